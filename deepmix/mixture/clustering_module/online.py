"""Training that goes on with one batch of data after another."""

import math
import warnings
from typing import TYPE_CHECKING

import torch

from deepmix._torch import threads_for
from deepmix.base import BaseDeepMixture, trains
from deepmix.fitting import Fit, RandomStreams, Trained
from deepmix.parameters import ArrayLike, Matrix
from deepmix.training import optimizer_to_numpy

if TYPE_CHECKING:
    from typing_extensions import Self

# Limits of `partial_fit` in units of the first batch's deviation: a batch farther than WIDE from
# its mean, or a second batch of less spread than NARROW, does not fit the scaling.
WIDE, NARROW = 10.0, 0.01


class OnlineMixin(BaseDeepMixture, abstract=True):
    """Add ``partial_fit`` to estimators that train one stage, ``_objective(fit, network)``."""

    @trains
    def partial_fit(
        self, X: Matrix, y: object = None, sample_weight: ArrayLike | None = None
    ) -> "Self":
        """Go on training with one pass over a batch of data.

        The first call starts the model, one restart of it, from its batch, and fixes the
        scaling; that batch needs at least ``n_clusters`` rows. A batch that lies ten times farther
        out, or a second one a hundred times closer together, cannot be clustered in that scaling:
        the model begins anew from it, with a warning. ``labels_``, ``weights_`` and ``variance_``
        describe the last batch.

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
        with self._whole_or_not_at_all():
            X, weight = self._check_training_data(X, sample_weight, reset=first)
            rows = self._training_rows(X, weight)
            first = first or self._begins_anew(rows)
            # The moments of Adam are part of the state: without them each call would begin with
            # steps of full length.
            resumed, n_seen = (None, 0) if first else (self._optimizer_state, self._batches_seen)
            reports = self._reports(given, X, y)
            with threads_for(self._step_work(rows)), reports:
                streams = RandomStreams(self.random_state)
                fit = Fit(rows, X, streams, reports, continues=not first)
                fit, network = self._begin(fit, 1)
                stage = {"max_iter": 1, "task": "partial_fit", "may_stop": False}
                objective = self._objective(fit, network)
                history = self._minimize(fit, network, objective, optimizers=resumed, **stage)
                seen = {"_optimizer_state": resumed, "_batches_seen": max(n_seen, 1)}
                if not history.interrupted:  # else the pass was undone
                    seen["_optimizer_state"] = [optimizer_to_numpy(o) for o in history.optimizers]
                    seen["_batches_seen"] = n_seen + 1
                fitted = self._attributes(fit, Trained(network.eval(), history, attributes=seen))
            self._set_fitted(fitted)
        self._warn_of_interruption(reports.interruption)
        return self

    def _begins_anew(self, rows):
        """Whether the model should start again from a batch that its scaling does not fit."""
        if not self.scale:
            return False
        scaler = self._rebuild(torch.float64, torch.device("cpu")).scaler
        mean, variance = rows.moments()
        unit = scaler.scale.square() * rows.n_features
        spread = math.sqrt(variance.sum() / unit)
        distance = math.sqrt((mean - scaler.mean).square().sum() / unit + spread**2)
        anew = len(rows.visited) >= self.n_clusters
        several = anew and len(rows.visited) > 1  # one row says nothing about spread
        closer = several and spread < NARROW and self._batches_seen == 1
        if distance <= WIDE and not closer:
            return False
        warnings.warn(
            f"This batch has {spread:.2g} times the spread of the first one, and lies "
            f"{distance:.2g} of its deviations from its mean. "
            + (
                "The model begins anew from it. "
                if anew
                else "Its rows are too few to begin anew. "
            )
            + "Scale all batches alike, and begin with one that is like the others.",
            UserWarning,
            stacklevel=5,  # partial_fit's caller
        )
        return anew
