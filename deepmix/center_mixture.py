"""Models whose clusters have a centre in data space, and the density that this defines."""

import math
from numbers import Real

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted

from deepmix._torch import Rows, apply_batchwise, own_modes, sum_batchwise, to_host
from deepmix.base import BaseDeepMixture
from deepmix.distributions import (
    mixture_log_density,
    spherical_log_density,
    squared_distances,
)
from deepmix.parameters import ArrayLike, Auto, Count, CountOrZero, Matrix, Positive, Solver
from deepmix.training import Averaged


class CenterMixture(BaseDeepMixture):
    """Base class of models whose clusters have a centre in data space.

    The network gives ``cluster_centers()`` beside ``resp(x)``.
    """

    # Parameters that are read here.
    n_clusters: Count
    concentration: Positive | Auto | ArrayLike
    max_iter: CountOrZero
    solver: Solver
    epsilon: Positive
    max_grad_norm: Positive | None
    averaging: bool

    @own_modes()
    def score_samples(self, X: Matrix) -> np.ndarray:
        r"""Log-density of each row under the mixture that the centres define.

        .. math:: \log p(x) = \log \sum_k \phi_k \, \mathcal N(x \mid \mu_k, \sigma^2 I)

        with the centres in data space (``cluster_centers_``), the mean responsibilities
        (``weights_``) and the one variance that fits the training data (``variance_``).

        Parameters
        ----------
        X : {array-like, sparse matrix, torch.Tensor} of shape (n_samples, n_features)

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, for data in the units of X.
        """
        X = self._check_data(X)
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        rows = Rows(X, self._prediction_device(), dtype)
        like = {"dtype": dtype, "device": rows.device}
        means = torch.tensor(self.cluster_centers_, **like)
        weights = torch.tensor(self.weights_, **like)

        def log_density(x):
            return mixture_log_density(spherical_log_density(x, means, self.variance_), weights)

        return apply_batchwise(log_density, rows)

    def _check_parameters(self):
        super()._check_parameters()
        if not isinstance(self.concentration, (str, Real)):
            value = np.asarray(self.concentration, dtype=np.float64)
            if value.shape != (self.n_clusters,) or not np.all((value > 0) & np.isfinite(value)):
                raise ValueError(
                    f"concentration must hold n_clusters={self.n_clusters} positive numbers, "
                    f"one for each cluster; got {self.concentration!r}. Give one number to treat "
                    "all clusters alike, or 'auto'."
                )

    def _minimize_and_average(self, objective, network, rows, reports, **options):
        """The main stage, and the averaging epoch after it if ``averaging`` asks for one."""
        history = self._minimize(
            objective, network, rows, reports, max_iter=self.max_iter, **options
        )
        if self.averaging and history.n_iter and not history.interrupted:
            once = {"max_iter": 1, "task": "average", "may_stop": False}
            options["optimizers"] = history.optimizers
            self._minimize(Averaged(objective), network, rows, reports, **once, **options)
        return history

    def _minimize(self, objective, network, rows, reports, **options):
        optimizer = {
            "solver": self.solver,
            "epsilon": self.epsilon,
            "max_grad_norm": self.max_grad_norm,
        }
        return super()._minimize(objective, network, rows, reports, **{**optimizer, **options})

    def _fitted_attributes(self, network, rows, restart=0):
        attributes = super()._fitted_attributes(network, rows, restart)
        return {**attributes, **center_mixture(network.select(restart).eval(), rows)}


class DecoderMixin(BaseDeepMixture):
    """For models that decode codes: the network gives ``decode(z)``.

    ``_centers_attribute`` names the fitted centres among the codes.
    """

    _centers_attribute = "latent_centers_"

    def inverse_transform(self, X: ArrayLike) -> np.ndarray:
        """Decode codes.

        Parameters
        ----------
        X : array-like of shape (n_samples, latent_dim)

        Returns
        -------
        X_original : ndarray of shape (n_samples, n_features)
        """
        check_is_fitted(self)
        codes = check_array(to_host(X), dtype=[np.float64, np.float32], order="C")
        if codes.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {codes.shape[1]} columns; expected codes of latent_dim="
                f"{self._n_features_out} dimensions, as transform gives them."
            )
        return self._apply("decode", codes)

    def interpolate(self, start: int, stop: int, n_steps: int = 9) -> np.ndarray:
        """Decode the straight line between two centres.

        Parameters
        ----------
        start, stop : int
            Clusters.
        n_steps : int, default=9
            Points on the line, both ends included.

        Returns
        -------
        X : ndarray of shape (n_steps, n_features)
        """
        check_is_fitted(self)
        steps = np.linspace(0, 1, n_steps)[:, None]
        ends = getattr(self, self._centers_attribute)[[start, stop]]
        return self.inverse_transform((1 - steps) * ends[0] + steps * ends[1])


class LatentMixture(DecoderMixin, CenterMixture):
    """Base class of models whose clusters have a centre among codes, which a decoder maps to data.

    Fitted are ``latent_centers_`` and ``latent_variance_``.
    """

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw codes from the spherical mixture around the centres, and decode them.

        Parameters
        ----------
        n_samples : int, default=1

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
        labels : ndarray of shape (n_samples,)
            Cluster that each row was drawn from.
        """
        check_is_fitted(self)
        labels, noise = self._draw(n_samples, self._n_features_out)
        codes = self.latent_centers_[labels] + np.sqrt(self.latent_variance_) * noise
        return self.inverse_transform(codes), labels


def center_mixture(network, rows):
    """Centres, weights and variance of the mixture of `CenterMixture.score_samples`."""
    _, variances = rows.moments()
    # In units of the data's own spread, squares of huge values do not overflow.
    unit = math.sqrt(variances.mean()) or 1.0
    with torch.inference_mode():
        centers = network.cluster_centers()

        def sums(x, weight):
            resp = network.resp(x) * weight[:, None]
            squared = squared_distances(x / unit, centers / unit)
            return torch.cat([resp.sum(dim=0), (resp * squared).sum()[None]]).double().cpu()

        *nk, spread = sum_batchwise(sums, rows).tolist()
    return {
        "cluster_centers_": centers.double().cpu().numpy(),
        "weights_": np.array(nk) / np.sum(nk),
        # Where every row lies on its centre a density still needs a width.
        "variance_": unit**2 * max(spread / (np.sum(nk) * rows.n_features), 1e-6),
    }
