"""Base class of the estimators: parameters, the template of ``fit``, predictions.

A method supplies its network (`_init_network`) and its stages (`_train`), which return a network, a
history and a label-free criterion (`Trained`); the rest is here. This file and parameters.py are
the only ones that use private names of scikit-learn, but for the entry to `sklearn.callback` that
scikit-learn documents for others (callbacks.py).
"""

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import ClassifierTags, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import nn

from deepmix._torch import (
    NATIVE_DTYPES,
    TORCH_DTYPES,
    Rows,
    apply_batchwise,
    load_state,
    own_modes,
    refuse_bad_weights,
    relative_weights,
    resolve_device,
    state_size,
    state_to_numpy,
    threads_for,
    to_host,
)
from deepmix.callbacks import CallbackSupportMixin, EarlyStopping, Progress, Reports
from deepmix.fitting import Fit, RandomStreams
from deepmix.kmeans import first_best
from deepmix.networks import build_on_meta, needs_several_rows, seed_dropout
from deepmix.parameters import (
    ArrayLike,
    Auto,
    Count,
    Device,
    Dtype,
    Matrix,
    NonNegative,
    Positive,
    RandomState,
    Verbosity,
    validated,
)
from deepmix.training import minimize

if TYPE_CHECKING:
    from typing_extensions import Self

Method = TypeVar("Method", bound=Callable)


def trains(method: Method) -> Method:
    """Decorate a method that trains: parameters are validated, and torch's modes set aside."""
    return validated(own_modes()(method))


# Attributes and methods that each estimator must define, with what they are.
REQUIRED = {
    "_network_class": "the torch.nn.Module that is trained and predicts",
    "_transform_output": "the name of its method behind transform",
    "_n_features_out": "the number of columns that transform makes",
    "_network_arguments": "(n_features) -> dict of arguments that build the network",
    "_init_network": "(fit, n_restarts) -> the network to begin with",
    "_train": "(fit, network) -> Trained",
}


# Parts of a network that may be the user's: their buffers may hold infinities, as masks of
# attention do, where every other value of a fit is finite.
USERS_PARTS = ("autoencoder.", "members.")


class BaseDeepMixture(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    ClusterMixin,
    BaseEstimator,
):
    """Base class of deep mixture models.

    An estimator writes what `REQUIRED` lists and, for `score`, ``score_samples``; a base class of
    several is made with ``abstract=True``. ``_batched_restarts`` says that one network holds all
    restarts side by side; ``_relative_weights`` says that only the ratios of sample weights count.
    """

    def __init_subclass__(cls, abstract=False, **options):
        super().__init_subclass__(**options)
        missing = [name for name in REQUIRED if not hasattr(cls, name)]
        if missing and not abstract:
            wanted = "; ".join(f"{name}: {REQUIRED[name]}" for name in missing)
            raise TypeError(
                f"{cls.__name__} is an estimator without {wanted}. Write it, or make a base class "
                f"of others with class {cls.__name__}(..., abstract=True)."
            )

    # Parameters that this class reads; each estimator lists its own with `parameters`.
    n_init: Count | Auto
    batch_size: Count | Auto
    learning_rate_init: Positive | Auto
    tol: NonNegative
    n_iter_no_change: Count
    warm_start: bool
    device: Device
    dtype: Dtype
    random_state: RandomState
    verbose: Verbosity

    # Attributes that every fit sets.
    labels_: np.ndarray
    n_clusters_: int
    history_: dict[str, np.ndarray]
    n_iter_: int
    converged_: bool
    device_: str

    _network_class: type[nn.Module]
    _batched_restarts = False
    _relative_weights = True
    _auto_batch_size = (20, 256)

    # --- Fit -------------------------------------------------------------------------

    @trains
    def fit(self, X: Matrix, y: object = None, sample_weight: ArrayLike | None = None) -> "Self":
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
            If a term of the loss, or an attribute that the fit would set, is not finite.

        Notes
        -----
        The first Ctrl-C ends training at the next batch (during initialisation or the search for
        a mixture, when that is done). The estimator is then fitted with the last whole epoch of the
        best restart, with a ConvergenceWarning. A second Ctrl-C, or one inside a search such as
        GridSearchCV, raises KeyboardInterrupt and leaves the estimator as it was.
        """
        given = X
        with self._whole_or_not_at_all():
            X, weight = self._check_training_data(X, sample_weight)
            rows = self._training_rows(X, weight)
            reports = self._reports(given, X, y)
            with threads_for(self._step_work(rows)), reports:
                streams = RandomStreams(self.random_state)
                fit = Fit(rows, X, streams, reports, continues=self._continues())
                trained = self._fit_restarts(fit)
                fit = fit.through(trained.network)
                self._finish(fit, trained)
                fitted = self._attributes(fit, trained)
            self._set_fitted(fitted)
        self._warn_of_interruption(reports.interruption)
        for message in self._concerns(fit, trained):
            warnings.warn(message, ConvergenceWarning, stacklevel=4)  # fit's caller
        return self

    def _reports(self, given, X, y):
        """Reports to callbacks, on the data as given; scoring ones do not score without y."""
        return Reports(self, given, np.zeros(X.shape[0]) if y is None else y)

    @contextmanager
    def _whole_or_not_at_all(self):
        """Restore the estimator, names of features included, if anything is raised inside."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _fit_restarts(self, fit):
        """Train every restart and keep the best one by the label-free criterion: `Trained`."""
        n_restarts = self._n_restarts(fit)
        together = n_restarts if self._batched_restarts else 1
        best = None
        for _ in range(n_restarts // together):
            trained = self._train(*self._begin(fit, together))
            criteria = np.atleast_1d(trained.criterion)
            criteria = np.where(np.isnan(criteria), np.inf, criteria)
            trained.restart = first_best(criteria)
            trained.criterion = criteria[trained.restart]
            if best is None or trained.criterion < best.criterion:
                best = trained
            if fit.interruption.requested:
                break
            fit = fit.another()
        if not np.isfinite(best.criterion):
            raise FloatingPointError(
                "The trained model is not finite: training has diverged in its last steps. Lower "
                "learning_rate_init, set max_grad_norm, or standardise the data."
            )
        return best

    def _finish(self, fit, trained):
        """A last stage, of the restart that is kept only; it may add to ``trained.attributes``."""

    def _n_restarts(self, fit):
        return 1 if fit.continues else self.n_init

    def _continues(self):
        """Whether `fit` starts from the state of the last one."""
        return self.warm_start and hasattr(self, "_state")

    def _begin(self, fit, n_restarts, **options):
        """The fit, with rows batched for the network, and the network to train, new or fitted."""
        if fit.continues:
            self._check_continuation(fit.rows)
            network = self._rebuild(fit.dtype, fit.device)
        else:
            network = self._init_network(fit, n_restarts, **options)
        network = seed_dropout(network.to(fit.device, fit.dtype).train(), fit.rng.torch)
        return fit.through(network), network

    def _step_work(self, rows):
        """Multiply-adds of one training step, which decide the number of threads: int."""
        arguments = self._network_arguments(rows.n_features)
        network = build_on_meta(lambda: self._network_class(**arguments))  # takes no memory
        return min(self._batch_size(rows), len(rows.visited)) * state_size(network)

    def _check_continuation(self, rows):
        """Raise ValueError if data or parameters need another network than the fitted one."""
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
        fit,
        network,
        objective,
        *,
        max_iter,
        task="fit",
        may_stop=True,
        callbacks=(),
        **options,
    ):
        """Run one training stage: `minimize` with this estimator's parameters and callbacks."""
        if may_stop and self.tol > 0:
            callbacks = [*callbacks, EarlyStopping(self.tol, self.n_iter_no_change)]
        options = {
            "learning_rate": self.learning_rate_init,
            "batch_size": self._batch_size(fit.rows),
            "generator": fit.rng.torch,
            **options,
        }
        sizes = fit.rows.batch_sizes(options["batch_size"], objective.even_batches)
        if 1 in sizes and needs_several_rows(network):
            raise ValueError(
                f"Batch normalisation has no variance of one row; got batches of {max(sizes)} out "
                f"of {len(fit.rows.visited)} rows. Give batch_size >= 2 and more rows, or a "
                "network without it."
            )
        options |= {"max_iter": max_iter, "buffers": network.buffers}
        stage = {"max_iter": max_iter, "task": task, "callbacks": callbacks}
        with self._watched(fit, network, **stage) as watchers:
            return minimize(objective, fit.rows, **watchers, **options)

    @contextmanager
    def _watched(self, fit, network, *, max_iter, task="fit", callbacks=()):
        """Watch a stage: yields callbacks, task name and interruption, as `minimize` takes them.

        Callbacks are those given, the progress that ``verbose`` asks for, and scikit-learn's, which
        see the estimator as if the fit had ended with ``network``.
        """
        callbacks = list(callbacks)
        if self.verbose:
            callbacks.append(Progress(type(self).__name__, max(1, 10 // int(self.verbose))))
        reconstruct = partial(self._attributes_midway, fit, network)
        with fit.reports.task(task, max_iter, reconstruct) as report:
            callbacks += report
            yield {"callbacks": callbacks, "task": task, "interruption": fit.interruption}

    def _batch_size(self, rows):
        """Rows in a step: ``batch_size``; for 'auto' n_rows / 40 within ``_auto_batch_size``."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        return int(np.clip(len(rows.visited) // 40, *self._auto_batch_size))

    # --- Fitted state ----------------------------------------------------------------

    def _attributes(self, fit, trained):
        """All attributes that a fit sets: dict of name to value."""
        history = trained.history
        fitted = {
            **self._fitted_attributes(fit, trained.network, trained.restart),
            "history_": history.arrays(trained.restart),
            "n_iter_": history.n_iter,
            "converged_": history.converged,
            "device_": str(fit.device),
            "_optimizer_state": None,  # only partial_fit sets it
            "_batches_seen": 2,  # so that partial_fit does not take its batch for the second one
            **trained.attributes,
        }
        return {**fitted, "labels_": self._labels(fit.X, fitted["_state"], fitted["_arguments"])}

    def _set_fitted(self, fitted):
        """Set all attributes at once: an estimator is never half of one fit, half of another."""
        arguments = fitted["_arguments"]
        network = build_on_meta(lambda: self._network_class(**arguments))
        theirs = {n for n, _ in network.named_buffers() if n.startswith(USERS_PARTS)}
        state = {name: value for name, value in fitted["_state"].items() if name not in theirs}
        for name, value in {**fitted, **state}.items():
            if not _is_finite(value):
                raise FloatingPointError(
                    f"The fit ended with values in {name} that are not finite. X spans more than "
                    "its dtype can hold, or training has diverged: rescale X (StandardScaler), set "
                    "dtype='float64', or lower learning_rate_init."
                )
        vars(self).update(fitted)

    def _warn_of_interruption(self, interruption):
        """Warn that Ctrl-C ended training, once attributes are set: a warning may be an error."""
        if interruption.requested:
            place = interruption.place or "after the last epoch"
            warnings.warn(
                f"Training was interrupted {place}; the estimator is fitted with what its whole "
                "epochs have made.",
                ConvergenceWarning,
                stacklevel=5,
            )

    def _fitted_attributes(self, fit, network, restart=0):
        """What a fitted estimator needs to predict, as arrays: dict of name to value."""
        arguments = self._fitted_arguments(fit, network)
        return {
            "_state": state_to_numpy(self._best_of(network, restart)),
            "_arguments": arguments,
            "n_clusters_": arguments["n_clusters"],
        }

    def _best_of(self, network, restart):
        """The best restart of a network that holds several: nn.Module."""
        return network.select(restart)

    def _fitted_arguments(self, fit, network):
        """Arguments that build the trained network anew; training may have changed n_clusters."""
        return self._network_arguments(fit.rows.n_features)

    def _attributes_midway(self, fit, network):
        """Fitted attributes of a network in training, whose training mode is restored: dict."""
        mode = network.training
        network.eval()
        try:
            return self._fitted_attributes(fit, network)
        finally:
            network.train(mode)

    def _rebuild(self, dtype, device, state=None, arguments=None):
        """Build the trained network from arrays: ``state``, by default the fitted ones."""
        arguments = self._arguments if arguments is None else arguments
        network = build_on_meta(lambda: self._network_class(**arguments))
        state = self._state if state is None else state
        return load_state(network, state).to(device, dtype).eval()

    @property
    @own_modes()
    def module_(self) -> nn.Module:
        """The trained `torch.nn.Module`, built anew from the fitted arrays at each access."""
        check_is_fitted(self)
        return self._rebuild(torch.float32, torch.device("cpu"))

    def to_module(self) -> nn.Module:
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

    def predict(self, X: Matrix) -> np.ndarray:
        """Assign each row to its most responsible cluster.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        labels : ndarray of shape (n_samples,)
            Integers from 0 to ``n_clusters - 1``.
        """
        return self._labels(self._check_data(X))

    def predict_proba(self, X: Matrix) -> np.ndarray:
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

    def transform(self, X: Matrix) -> np.ndarray:
        """Embed the data.

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        X_new : ndarray of shape (n_samples, n_features_out)
        """
        return self._apply(self._transform_output, self._check_data(X))

    def score(self, X: Matrix, y: object = None, sample_weight: ArrayLike | None = None) -> float:
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

    def _labels(self, X, state=None, arguments=None):
        """Most responsible clusters of validated data, batch by batch to save memory: ndarray."""
        return self._apply("resp", X, state, arguments, then=lambda resp: resp.argmax(dim=1))

    @own_modes()
    def _apply(self, method, X, state=None, arguments=None, then=lambda result: result):
        """Apply a method of the network, and ``then`` a function, to validated data by batches."""
        rows = self._prediction_rows(X)
        network = self._rebuild(rows.dtype, rows.device, state, arguments)
        rows = rows.through(network)
        function = getattr(network, method)
        work = min(rows.inference_batch_size, len(rows)) * state_size(network)
        with threads_for(work):
            return apply_batchwise(lambda batch: then(function(batch)), rows)

    def _draw(self, n_samples, n_dimensions):
        """Draw labels with probabilities ``weights_``, and standard normal noise, for `sample`."""
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples must be an integer >= 1; got {n_samples!r}.")
        random_state = check_random_state(self.random_state)
        labels = random_state.choice(self.n_clusters_, size=n_samples, p=self.weights_)
        return labels, random_state.standard_normal((n_samples, n_dimensions))

    def _prediction_rows(self, X):
        """Validated data on the device to predict on, in the dtype of X: Rows."""
        # In float32 the result of a row of float64 would depend on its batch.
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        return Rows(X, self._prediction_device(), dtype)

    def _prediction_device(self):
        try:
            return resolve_device(self.device)
        except ValueError:  # the device of the fit is not on this machine
            return torch.device("cpu")

    # --- Validation ------------------------------------------------------------------

    def _check_training_data(self, X, sample_weight, reset=True):
        """Validate parameters, data, weights and the number of rows, before any training."""
        self._check_parameters()
        X = self._check_data(X, reset=reset)
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(to_host(sample_weight), X, dtype=np.float64)
            refuse_bad_weights(weight)
            weight = relative_weights(weight) if self._relative_weights else weight
        n_rows = X.shape[0] if weight is None else np.count_nonzero(weight)
        name, n_clusters = self._least_rows()
        if reset and n_rows < n_clusters:
            raise ValueError(
                f"n_samples={n_rows} should be >= {name}={n_clusters}"
                f"{'' if weight is None else ' (rows of positive weight)'}. "
                "Give more rows or ask for fewer clusters."
            )
        return X, weight

    def _least_rows(self):
        """Name and value of the parameter that is the least number of rows: str, int."""
        return "n_clusters", self.n_clusters

    def _check_data(self, X, reset=False):
        if not reset:
            check_is_fitted(self)
        X = to_host(X)
        _refuse_what_is_no_table(X)
        with np.errstate(invalid="ignore"):  # scikit-learn sums X, where inf - inf may occur
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
        # Only estimators with large networks have the parameter ``precision``.
        if getattr(self, "precision", None) == "bfloat16" and self.dtype != "float32":
            raise ValueError(
                f"precision='bfloat16' goes with dtype='float32'; got dtype={self.dtype!r}. Change "
                "one of the two."
            )

    def _training_rows(self, X, weight, device=None):
        """The rows to train on, checked, without those that are far from all others."""
        device = resolve_device(self.device) if device is None else device
        rows = Rows(X, device, self._training_dtype(X), weight)
        self._check_scale(rows)
        far, share = rows.far_rows()
        enough = len(rows.visited) - len(far) >= self._least_rows()[1]
        if len(far) and enough:
            warnings.warn(
                f"{len(far)} of {len(rows.visited)} rows (the first is row {int(far[0])}) have "
                f"{share:.0%} of the scatter of X: they are left out of scaling and training, and "
                "get a label afterwards. If they are missing values written as numbers, remove or "
                "impute them.",
                UserWarning,
                stacklevel=5,  # fit's caller
            )
            rows.leave_out(far)
        if rows.look_like_counts():
            warnings.warn(
                "X looks like raw counts: whole numbers, many of them zero, a few very large. "
                "Clusters would be those of the row totals. Divide each row by its total and take "
                "np.log1p, or use tf-idf for words (sklearn TfidfTransformer).",
                UserWarning,
                stacklevel=5,
            )
        self._check_total_weight(rows)
        return rows

    def _check_total_weight(self, rows):
        """Warn if the weights sum to too little; overridden where weights are counts of rows."""

    def _check_scale(self, rows):
        """Raise ValueError if the data overflow; warn if rounding blurs their differences."""
        if not len(rows.visited) or not math.isfinite(rows.total_weight):
            raise ValueError(
                f"sample_weight has no value that {rows.dtype} holds: all are too close to zero, "
                "or their sum is too large. Multiply them by a constant, or set dtype='float64'."
            )
        mean, variances = rows.moments()
        variance = float(variances.sum())
        overflows = not (torch.isfinite(mean).all() and math.isfinite(variance))
        if overflows and not rows.are_finite():
            raise ValueError(
                "X contains NaN or infinity, which scikit-learn's assume_finite=True does not look "
                "for. Impute or remove those rows."
            )
        if overflows:
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
                stacklevel=6,
            )

    def _training_dtype(self, X):
        if self.dtype == "auto":
            return torch.float64 if X.dtype == np.float64 else torch.float32
        return TORCH_DTYPES[self.dtype]

    def _concerns(self, fit, trained):
        """What a user should know about this fit: an iterator of messages."""
        name, history = type(self).__name__, trained.history
        ended = self.converged_ or history.interrupted or history.stopped
        if not ended and self.tol > 0:
            yield (
                f"{name} did not converge in max_iter={self.n_iter_} epochs (tol={self.tol}). "
                "Increase max_iter, raise tol, or set tol=0 to train for max_iter epochs and "
                "nothing else."
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
        # scikit-learn's checks of sparse input read these tags of all with predict_proba.
        tags.classifier_tags = ClassifierTags()
        return tags


def _is_finite(value):
    """Whether a float or an array of floats is finite; True for everything else."""
    is_number = isinstance(value, (np.ndarray, np.floating, float))
    return not is_number or np.result_type(value).kind != "f" or bool(np.all(np.isfinite(value)))


def _refuse_what_is_no_table(X):
    """Raise clear errors for inputs that scikit-learn would turn into numbers or objects."""
    if hasattr(X, "obsm") and hasattr(X, "X"):
        raise TypeError(
            f"X is a {type(X).__name__} object; expected one table of numbers. Give one of its "
            "matrices, such as adata.obsm['X_pca'], or adata.X after normalising and log1p."
        )
    shape = getattr(X, "shape", ())
    if len(shape) > 2:
        raise ValueError(
            f"X has {len(shape)} dimensions, {tuple(shape)}; expected two: rows of features. "
            "Unfold images with X.reshape(len(X), -1); NeuralMixtureEM folds them by image_shape="
            "(channels, height, width)."
        )
    dtype = getattr(X, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "US":
        raise ValueError(
            f"X must hold numbers; got strings (dtype {dtype}). Encode them first, for "
            "example with sklearn.preprocessing.OneHotEncoder."
        )
