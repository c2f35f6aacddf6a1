"""What every estimator of the package is: parameters, the template of ``fit``, predictions.

A method supplies its network (`_init_network`), its stages (`_train`) and a label-free criterion
(`_criterion`); the rest is here. This is the only file that uses private names of scikit-learn,
but for the entry to `sklearn.callback` that scikit-learn documents for others (callbacks.py).
"""

import math
import warnings
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import ClassifierTags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from deepmix._torch import (
    NATIVE_DTYPES,
    TORCH_DTYPES,
    Rows,
    apply_batchwise,
    load_state,
    make_generator,
    refuse_bad_weights,
    resolve_device,
    state_to_numpy,
    to_host,
)
from deepmix.callbacks import CallbackSupportMixin, EarlyStopping, Progress, Reports
from deepmix.initialization import first_best
from deepmix.networks import build_on_meta
from deepmix.training import minimize, optimizer_to_numpy


class BaseDeepMixture(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    ClusterMixin,
    BaseEstimator,
):
    """Base class of deep mixture models.

    Subclasses set ``_network_class`` and ``_transform_output`` (the network's method behind
    `transform`) and write ``_network_arguments``, ``_init_network``, ``_train``, ``_criterion``,
    ``_n_features_out`` and, for `score`, ``score_samples``. ``_batched_restarts`` says that one
    network holds all restarts side by side; ``_n_clusters_parameter`` names the parameter that
    needs as many rows.
    """

    _parameter_constraints: dict = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "device": [str, torch.device],
        "dtype": [StrOptions({"float32", "float64", "auto"})],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }
    _network_class = None
    _n_clusters_parameter = "n_clusters"
    _batched_restarts = False
    _auto_batch_size = (20, 256)

    # --- Fit -------------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None, sample_weight=None):
        """Train the model.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)
            Training data. Dense arrays are used in place, memory maps too; CSR stays CSR.
        y : Ignored
            Present for the conventions of scikit-learn.
        sample_weight : array-like of shape (n_samples,), default=None
            How often each row counts.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If the data, the weights, a parameter or the device cannot be used; before any
            training.
        FloatingPointError
            If a term of the loss is no longer finite.
        """
        given = X
        X, weight = self._check_training_data(X, sample_weight)
        random_state = check_random_state(self.random_state)
        rows = Rows(X, resolve_device(self.device), self._training_dtype(X), weight)
        self._check_scale(rows)
        with Reports(self, given, _some_y(y, X)) as reports:
            network, history, restart = self._fit_restarts(rows, random_state, reports)
        self._set_fitted(network, history, restart, rows, X)
        for message in self._concerns(history):
            warnings.warn(message, ConvergenceWarning, stacklevel=3)  # fit's caller
        return self

    def _fit_restarts(self, rows, random_state, reports):
        """Train every restart and keep the best one by the method's label-free criterion."""
        n_restarts = self._n_restarts(rows)
        together = n_restarts if self._batched_restarts else 1
        best = None
        for _ in range(n_restarts // together):
            generator = make_generator(random_state)
            network = self._new_network(rows, together, random_state, generator, self._continues())
            history = self._train(network, rows, generator, random_state, reports)
            network.eval()
            criteria = np.atleast_1d(self._criterion(network, rows))
            criteria = np.where(np.isnan(criteria), np.inf, criteria)
            restart = first_best(criteria)
            if best is None or criteria[restart] < best[0]:
                best = criteria[restart], network, history, restart
            if history.interrupted:
                break
        criterion, network, history, restart = best
        if not np.isfinite(criterion):
            raise FloatingPointError(
                "The trained model is not finite: training has diverged in its last steps. Lower "
                "learning_rate_init, set max_grad_norm, or standardise the data."
            )
        return network, history, restart

    def _n_restarts(self, rows):
        return 1 if self._continues() else self.n_init

    def _continues(self):
        """Whether this fit starts from the state of the last one."""
        return self.warm_start and hasattr(self, "_state")

    def _new_network(self, rows, n_restarts, random_state, generator, continues):
        if continues:
            self._check_continuation(rows)
            network = self._rebuild(rows.dtype, rows.device)
        else:
            network = self._init_network(rows, n_restarts, random_state, generator)
        return network.to(rows.device, rows.dtype).train()

    def _check_continuation(self, rows):
        """Refuse to go on with data or parameters that need another network."""
        changed = {
            name: (value, self._arguments[name])
            for name, value in self._network_arguments(rows.n_features).items()
            if value != self._arguments[name]
        }
        if changed:
            name, (now, before) = next(iter(changed.items()))
            raise ValueError(
                f"Training goes on with a model of {name}={before!r}; got {name}={now!r}. "
                "Call fit with warm_start=False to start anew."
            )

    def _minimize(
        self,
        objective,
        network,
        rows,
        reports,
        *,
        max_iter,
        task="fit",
        may_stop=True,
        callbacks=(),
        **options,
    ):
        """One stage: `minimize` with this estimator's parameters and its watchers."""
        callbacks = list(callbacks)
        if may_stop and self.tol > 0:
            callbacks.append(EarlyStopping(self.tol, self.n_iter_no_change))
        if self.verbose:
            callbacks.append(Progress(type(self).__name__, max(1, 10 // int(self.verbose))))
        options = {"learning_rate": self.learning_rate_init, **options}
        options.setdefault("batch_size", self._batch_size(rows))
        reconstruct = partial(self._attributes_midway, network, rows)
        with reports.task(task, max_iter, reconstruct) as report:
            callbacks += report
            return minimize(
                objective, rows, max_iter=max_iter, callbacks=callbacks, task=task, **options
            )

    def _batch_size(self, rows):
        """Rows in a step: as asked, or 40 steps an epoch within ``_auto_batch_size``."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        return int(np.clip(len(rows.visited) // 40, *self._auto_batch_size))

    # --- Fitted state ----------------------------------------------------------------

    def _set_fitted(self, network, history, restart, rows, X):
        self.history_ = history.arrays(restart)
        self.n_iter_, self.converged_ = history.n_iter, history.converged
        self.device_ = str(rows.device)
        self._optimizer_state = None  # partial_fit keeps one
        for name, value in self._fitted_attributes(network, rows, restart).items():
            setattr(self, name, value)
        self.labels_ = self._predict(X)

    def _fitted_attributes(self, network, rows, restart=0):
        """What a fitted estimator needs to predict, as arrays: dict of name to value."""
        arguments = self._fitted_arguments(network, rows)
        return {
            "_state": state_to_numpy(self._kept(network, restart)),
            "_arguments": arguments,
            "n_clusters_": arguments["n_clusters"],
        }

    def _kept(self, network, restart):
        """What stays of a network that holds several restarts."""
        return network.select(restart)

    def _fitted_arguments(self, network, rows):
        """Arguments that rebuild a trained network; other than asked for if its K has changed."""
        return self._network_arguments(rows.n_features)

    def _attributes_midway(self, network, rows):
        """Fitted attributes of a network that goes on training: its mode comes back."""
        mode = network.training
        network.eval()
        try:
            return self._fitted_attributes(network, rows)
        finally:
            network.train(mode)

    def _rebuild(self, dtype, device):
        """The trained network, from the arrays that are the fitted state."""
        network = build_on_meta(lambda: self._network_class(**self._arguments))
        return load_state(network, self._state).to(device, dtype).eval()

    @property
    def module_(self):
        """The trained `torch.nn.Module`, built anew from the fitted arrays at each access."""
        check_is_fitted(self)
        return self._rebuild(torch.float32, torch.device("cpu"))

    def to_module(self):
        """Return an eval-mode module that maps data to responsibilities.

        Returns
        -------
        torch.nn.Module
            (n_samples, n_features) -> (n_samples, n_clusters), on the CPU in float32.
        """
        return self.module_

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_state")

    # --- Predictions -----------------------------------------------------------------

    def predict(self, X):
        """Assign each row to its most responsible cluster.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        labels : ndarray of shape (n_samples,)
            Integers from 0 to ``n_clusters - 1``.
        """
        return self._predict(self._check_data(X))

    def predict_proba(self, X):
        """Responsibility of each cluster for each row.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        resp : ndarray of shape (n_samples, n_clusters)
            Rows sum to one.
        """
        return self._apply("resp", self._check_data(X))

    def transform(self, X):
        """Embed the data.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        X_new : ndarray of shape (n_samples, n_features_out)
        """
        return self._apply(self._transform_output, self._check_data(X))

    def score(self, X, y=None, sample_weight=None):
        """Mean of `score_samples`: higher is better, no labels needed.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)
        y : Ignored
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        score : float
        """
        values = self.score_samples(X)
        weight = _check_sample_weight(to_host(sample_weight), values, dtype=np.float64)
        return float(np.average(values.astype(np.float64), weights=weight))

    def _predict(self, X):
        return self._apply("resp", X).argmax(axis=1).astype(np.int64)

    def _apply(self, method, X):
        """Apply a method of the network to validated data, batch by batch."""
        device = self._prediction_device()
        # In the dtype of X: a float32 net would make a row's result depend on its batch.
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        network = self._rebuild(dtype, device)
        rows = Rows(X, device, dtype)
        rows.width = self._row_width(rows.n_features)
        return apply_batchwise(getattr(network, method), rows)

    def _row_width(self, n_features):
        """Numbers that the network makes of a row at most, for the size of batches."""
        return n_features

    def _draw(self, n_samples, n_dimensions):
        """Labels by ``weights_`` and standard normal noise, for `sample`."""
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer >= 1; got {n_samples!r}.")
        random_state = check_random_state(self.random_state)
        labels = random_state.choice(self.n_clusters_, size=n_samples, p=self.weights_)
        return labels, random_state.standard_normal((n_samples, n_dimensions))

    def _prediction_device(self):
        try:
            return resolve_device(self.device)
        except ValueError:  # fitted on a machine that had it, used on one that has not
            return torch.device("cpu")

    # --- Validation ------------------------------------------------------------------

    def _check_training_data(self, X, sample_weight, reset=True):
        """Validate data, weights and what depends on both; nothing is trained before."""
        self._check_parameters()
        X = self._check_data(X, reset=reset)
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(to_host(sample_weight), X, dtype=np.float64)
            refuse_bad_weights(weight)
        n_rows = X.shape[0] if weight is None else np.count_nonzero(weight)
        n_clusters = getattr(self, self._n_clusters_parameter)
        if reset and n_rows < n_clusters:
            raise ValueError(
                f"n_samples={n_rows} should be >= {self._n_clusters_parameter}={n_clusters}"
                f"{'' if weight is None else ' (rows of positive weight)'}. "
                "Give more rows or ask for fewer clusters."
            )
        return X, weight

    def _check_data(self, X, reset=False):
        if not reset:
            check_is_fitted(self)
        X = to_host(X)
        _refuse_what_is_no_table(X)
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse="csr",
            dtype=list(NATIVE_DTYPES),
            order="C",
        )

    def _check_parameters(self):
        """Refuse parameters that do not go together; subclasses add theirs."""
        # Of estimators with large networks.
        if getattr(self, "precision", None) == "bfloat16" and self.dtype != "float32":
            raise ValueError(
                f"precision='bfloat16' goes with dtype='float32'; got dtype={self.dtype!r}. Change "
                "one of the two."
            )

    def _check_scale(self, rows):
        """Refuse data that overflow, and warn of data that lose their digits."""
        mean, variances = rows.moments()
        variance = float(variances.sum())
        if not (torch.isfinite(mean).all() and math.isfinite(variance)):
            raise ValueError(
                f"X has values too large to compute with in {rows.dtype}: their mean or "
                "variance overflows. Rescale X (StandardScaler), or set dtype='float64'."
            )
        offset = float(mean.abs().max())
        if offset * torch.finfo(rows.dtype).eps > 1e-2 * math.sqrt(variance / len(mean)) > 0:
            warnings.warn(
                f"X varies by {math.sqrt(variance / len(mean)):.2g} around values as large as "
                f"{offset:.2g}, which {rows.dtype} cannot tell apart well. Subtract the mean "
                "(StandardScaler), or set dtype='float64'.",
                UserWarning,
                stacklevel=3,
            )

    def _training_dtype(self, X):
        if self.dtype == "auto":
            return torch.float64 if X.dtype == np.float64 else torch.float32
        return TORCH_DTYPES[self.dtype]

    def _concerns(self, history):
        """What a user should know about this fit: an iterator of messages."""
        name = type(self).__name__
        ended = self.converged_ or history.interrupted or history.stopped
        if not ended and self.tol > 0:
            yield (
                f"{name} did not converge in max_iter={self.n_iter_} epochs (tol={self.tol}, "
                f"n_iter_no_change={self.n_iter_no_change}). Increase max_iter, raise tol, or "
                "set tol=0 to train for max_iter epochs and nothing else."
            )
        n_found = len(np.unique(self.labels_))
        if n_found < self.n_clusters_:
            yield (
                f"Number of distinct clusters ({n_found}) found smaller than n_clusters "
                f"({self.n_clusters_}). Possibly due to duplicate rows in X, a concentration "
                "that is too small, or too few epochs."
            )

    # --- Conventions -----------------------------------------------------------------

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        # scikit-learn's check of sparse input reads these of everything with predict_proba.
        tags.classifier_tags = ClassifierTags()
        return tags


def _some_y(y, X):
    """A callback of scikit-learn that scores does so only if y is not None."""
    return np.zeros(X.shape[0]) if y is None else y


def _refuse_what_is_no_table(X):
    """Clear errors for inputs that scikit-learn would turn into numbers or objects."""
    dtype = getattr(X, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "US":
        raise ValueError(
            f"X must hold numbers; got strings (dtype {dtype}). Encode them first, for "
            "example with sklearn.preprocessing.OneHotEncoder."
        )


# --- Online training -------------------------------------------------------------------


class OnlineMixin:
    """``partial_fit`` for estimators whose ``_objective(network, rows)`` is one stage."""

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y=None, sample_weight=None):
        """Go on training with one pass over a batch of data.

        The first call starts the model, one restart of it, from its batch, and fixes the
        scaling; that batch needs at least ``n_clusters`` rows. ``labels_``, ``weights_`` and
        ``variance_`` describe the last batch.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)
        y : Ignored
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        self : object
        """
        given, first = X, not hasattr(self, "_state")
        X, weight = self._check_training_data(X, sample_weight, reset=first)
        rows = Rows(X, resolve_device(self.device), self._training_dtype(X), weight)
        self._check_scale(rows)
        random_state = check_random_state(self.random_state)
        generator = make_generator(random_state)
        network = self._new_network(rows, 1, random_state, generator, not first)
        objective = self._objective(network, rows)
        # The moments of Adam are part of the state: without them each call would begin with
        # steps of full length.
        resumed = None if first else self._optimizer_state
        with Reports(self, given, _some_y(y, X)) as reports:
            history = self._minimize(
                objective,
                network,
                rows,
                reports,
                max_iter=1,
                generator=generator,
                task="partial_fit",
                may_stop=False,
                optimizers=resumed,
            )
        self._set_fitted(network, history, 0, rows, X)
        self._optimizer_state = [optimizer_to_numpy(o) for o in history.optimizers]
        return self
