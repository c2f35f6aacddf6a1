"""Densities and priors of mixtures, batched on the device."""

import math

import numpy as np
import torch

# Strength of concentration='auto' per row, in units of the data's variance: the optimum of the
# clustering module on Pendigits lies between .03 and .1, and so do the values that its paper
# tuned (Table 12).
AUTO_STRENGTH = 0.05

# --- Gaussians -------------------------------------------------------------------------


def spherical_log_density(x, means, variance):
    r"""Log-density of Gaussians that share one spherical covariance.

    .. math:: \log \mathcal N(x_i \mid \mu_k, \sigma^2 I)
        = -\tfrac d2 \log(2 \pi \sigma^2) - \lVert x_i - \mu_k \rVert^2 / (2 \sigma^2)

    Parameters
    ----------
    x : Tensor of shape (B, d)
    means : Tensor of shape (K, d)
    variance : float

    Returns
    -------
    Tensor of shape (B, K)
    """
    deviation = math.sqrt(variance)  # divided by it first: squares of huge values overflow
    squared = squared_distances(x / deviation, means / deviation)
    return -0.5 * (x.shape[1] * math.log(2 * math.pi * variance) + squared)


def squared_distances(x, means):
    """Squared distances of rows to means: (B, d), (K, d) -> (B, K)."""
    # Differences, not the expanded square: this number is reported, and centres may lie far
    # from the origin.
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()


def mixture_log_density(log_density, weights):
    r"""Log-density of a mixture from those of its components.

    .. math:: \log \sum_k \phi_k \, p_k(x_i)

    Parameters
    ----------
    log_density : Tensor of shape (B, K)
    weights : Tensor of shape (K,)

    Returns
    -------
    Tensor of shape (B,)
    """
    return torch.logsumexp(log_density + weights.log(), dim=1)


def gaussian_log_density(x, means, covariances):
    r"""Log-density of Gaussians with full covariances.

    .. math:: \log \mathcal N(x_i \mid \mu_k, \Sigma_k)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    means : Tensor of shape (K, d)
    covariances : Tensor of shape (K, d, d)

    Returns
    -------
    Tensor of shape (n, K)
    """
    n_clusters, n_features = means.shape
    cholesky = torch.linalg.cholesky(covariances)
    identity = torch.eye(n_features, dtype=x.dtype, device=x.device).expand_as(cholesky)
    # Whitening of all clusters as one product: (n, d) @ (d, K * d)
    whiten = torch.linalg.solve_triangular(cholesky, identity, upper=False).mT
    z = (x @ whiten.permute(1, 0, 2).flatten(1)).view(-1, n_clusters, n_features)
    z = z - (means[:, None] @ whiten).squeeze(1)
    log_det = 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return -0.5 * (n_features * math.log(2 * math.pi) + log_det + z.square().sum(dim=2))


# --- Mixtures by EM --------------------------------------------------------------------


def estimate_gaussians(x, resp, reg_covar):
    r"""M-step: weights, means and full covariances from responsibilities.

    .. math:: n_k = \sum_i \gamma_{ik}, \quad \mu_k = \tfrac{1}{n_k} \sum_i \gamma_{ik} x_i,
        \quad \Sigma_k = \tfrac{1}{n_k} \sum_i \gamma_{ik} x_i x_i^\top - \mu_k \mu_k^\top

    Parameters
    ----------
    x : Tensor of shape (n, d)
    resp : Tensor of shape (n, K)
        Times the sample weights, if rows have any.
    reg_covar : float
        Added to the diagonals.

    Returns
    -------
    weights : Tensor of shape (K,)
    means : Tensor of shape (K, d)
    covariances : Tensor of shape (K, d, d)
    """
    nk = resp.sum(dim=0) + 10 * torch.finfo(x.dtype).eps  # an empty cluster divides by it
    means = (resp.T @ x) / nk[:, None]
    second = (resp.T[:, :, None] * x).mT @ x / nk[:, None, None]
    covariances = second - means[:, :, None] * means[:, None, :]
    covariances.diagonal(dim1=1, dim2=2).add_(reg_covar)
    return nk / nk.sum(), means, covariances


def fit_gaussian_mixture(x, resp, weight=None, reg_covar=1e-6, max_iter=100, tol=1e-3):
    """EM for a mixture with full covariances, from initial responsibilities.

    scikit-learn's `GaussianMixture` takes no sample weights; from the same start this is the
    same.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred, for the sake of its second moments.
    resp : Tensor of shape (n, K)
    weight : Tensor of shape (n,) or None
    reg_covar, max_iter, tol
        As in `sklearn.mixture.GaussianMixture`.

    Returns
    -------
    parameters : tuple
        Weights, means and covariances, as `estimate_gaussians` gives them.
    log_resp : Tensor of shape (n, K)
    log_likelihood : float
        Mean over the rows.
    """
    weight = torch.ones_like(x[:, 0]) if weight is None else weight
    weight = weight / weight.sum()
    previous = -math.inf
    parameters = estimate_gaussians(x, resp * weight[:, None], reg_covar)
    for _ in range(max_iter):
        weights, means, covariances = parameters
        log_joint = gaussian_log_density(x, means, covariances) + weights.log()
        log_density = torch.logsumexp(log_joint, dim=1)
        log_resp = log_joint - log_density[:, None]
        log_likelihood = float(weight @ log_density)
        if abs(log_likelihood - previous) < tol:
            break
        previous = log_likelihood
        parameters = estimate_gaussians(x, log_resp.exp() * weight[:, None], reg_covar)
    return parameters, log_resp, log_likelihood


# --- Dirichlet -------------------------------------------------------------------------


def log_mean_resp(log_resp, weight):
    r"""Log of the mean responsibilities of a batch.

    .. math:: \log \tilde\gamma_k = \log \sum_i w_i \gamma_{ik} - \log \sum_i w_i

    Parameters
    ----------
    log_resp : Tensor of shape (B, ..., K)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape (..., K)
    """
    log_weight = (weight / weight.sum()).log()
    return torch.logsumexp(log_resp + log_weight.view(-1, *[1] * (log_resp.dim() - 1)), dim=0)


class DirichletPrior:
    """The concentration of the Dirichlet prior on the mean responsibilities.

    Parameters
    ----------
    concentration : 'auto', float or array-like of shape (n_clusters,)
    variance : float
        Total variance of what is clustered: the unit of ``'auto'``.
    like : Tensor
        Its device and dtype are taken.
    """

    def __init__(self, concentration, variance, like):
        # E1 to E3 are sums over the batch and E4 is not: 'auto' grows with the batch instead.
        self.per_row = isinstance(concentration, str)
        strength = AUTO_STRENGTH * variance if self.per_row else np.asarray(concentration) - 1.0
        self.strength = torch.as_tensor(strength, dtype=like.dtype, device=like.device)
        self.asymmetric = self.strength.dim() > 0
        if self.asymmetric:
            self.strength = self.strength.sort().values

    def __call__(self, log_resp, weight):
        """Strength in a batch: (B, ..., K) and (B,) -> (..., K)."""
        # Only ranks need the mean; otherwise any row has its shape.
        log_mean = log_mean_resp(log_resp, weight) if self.asymmetric else log_resp[0]
        return self.strength_of(log_mean, weight.sum()).expand(log_mean.shape)

    def strength_of(self, log_mean, total_weight):
        """Strength alpha - 1 of each cluster in a batch.

        Parameters
        ----------
        log_mean : Tensor of shape (..., K)
            Log of the mean responsibilities.
        total_weight : Tensor of shape ()

        Returns
        -------
        Tensor that broadcasts to (..., K)
        """
        if self.per_row:
            return self.strength * total_weight
        if not self.asymmetric:
            return self.strength
        # Appendix 2: the largest concentration goes to the cluster that is largest now.
        return self.strength[log_mean.detach().argsort(dim=-1).argsort(dim=-1)]
