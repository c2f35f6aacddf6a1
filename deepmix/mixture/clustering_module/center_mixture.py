"""Models whose clusters have a centre in data space, and the density that this defines."""

import math
from numbers import Real

import numpy as np
import torch

from deepmix._torch import apply_batchwise, own_modes, sum_batchwise
from deepmix.base import BaseDeepMixture
from deepmix.gaussian_mixture import Mixture, log_density
from deepmix.gaussians import squared_distances
from deepmix.parameters import ArrayLike, Auto, Count, CountOrZero, Matrix, Positive, Solver
from deepmix.training import Averaged


class CenterMixture(BaseDeepMixture, abstract=True):
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
        rows = self._prediction_rows(self._check_data(X))
        weights, means = (
            torch.tensor(v, dtype=rows.dtype, device=rows.device)
            for v in (self.weights_, self.cluster_centers_)
        )
        # In float64: the square of what float32 can hold may be more than it can hold.
        variance = torch.tensor(self.variance_, dtype=torch.float64)
        mixture = Mixture(weights, means, variance, "tied_spherical")
        return apply_batchwise(lambda x: log_density(x, mixture), rows)

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

    def _minimize_and_average(self, fit, network, objective):
        """The main stage, and the averaging epoch after it if ``averaging`` asks for one."""
        history = self._minimize(fit, network, objective, max_iter=self.max_iter)
        if self.averaging and history.n_iter and not history.interrupted:
            once = {"max_iter": 1, "task": "average", "may_stop": False}
            averaged = Averaged(objective)
            self._minimize(fit, network, averaged, optimizers=history.optimizers, **once)
        return history

    def _minimize(self, fit, network, objective, **options):
        optimizer = {
            "solver": self.solver,
            "epsilon": self.epsilon,
            "max_grad_norm": self.max_grad_norm,
        }
        return super()._minimize(fit, network, objective, **{**optimizer, **options})

    def _fitted_attributes(self, fit, network, restart=0):
        attributes = super()._fitted_attributes(fit, network, restart)
        return {**attributes, **center_mixture(network.select(restart).eval(), fit.rows)}


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
