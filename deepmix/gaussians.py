"""Gaussians on tensors: squared distances, sufficient statistics, the normal-inverse-Wishart prior.

Every function works on K Gaussians side by side. Covariances are 'full' matrices, 'diag' variances
of each feature, or one 'spherical' variance for all features.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from deepmix.linalg import cholesky

# --- Squared distances -----------------------------------------------------------------


def squared_distances(x, means):
    """Squared Euclidean distances of rows to means: (..., n, d), (..., K, d) -> (..., n, K)."""
    # Differences, not the expanded square: this number is reported, and centres may lie far
    # from the origin.
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()


def squared_mahalanobis(x, means, precisions_cholesky):
    r"""Squared Mahalanobis distances of rows to means.

    .. math:: (x_i - \mu_k)^\top \Sigma_k^{-1} (x_i - \mu_k)
        = \lVert (x_i - \mu_k)^\top U_k \rVert^2, \qquad U_k U_k^\top = \Sigma_k^{-1}

    Parameters
    ----------
    x : Tensor of shape (n, d)
    means : Tensor of shape (K, d)
    precisions_cholesky : Tensor of shape (K, d, d), (K, d) or (K, 1)
        Factors :math:`U_k`, or the inverse deviation of each feature or of all features.

    Returns
    -------
    Tensor of shape (n, K)
    """
    if precisions_cholesky.dim() == 3:
        n_clusters, n_features = means.shape
        # The factors of all clusters side by side make one product: (n, d) @ (d, K * d).
        z = x @ precisions_cholesky.permute(1, 0, 2).flatten(1)
        z = z.view(-1, n_clusters, n_features) - (means[:, None] @ precisions_cholesky).squeeze(1)
    else:
        z = (x[:, None] - means) * precisions_cholesky
    return z.square().sum(dim=2)


def self_products(v, covariance_type):
    """Products of the features of vectors, in the shape that a covariance of the type has.

    Parameters
    ----------
    v : Tensor of shape (..., d)
    covariance_type : {'full', 'diag', 'spherical'}

    Returns
    -------
    Tensor of shape (..., d, d), (..., d) or (...)
        Products of two features ('full'), squares ('diag'), squared norms ('spherical').
    """
    if covariance_type == "full":
        return v[..., :, None] * v[..., None, :]
    squares = v.square()
    return squares.sum(dim=-1) if covariance_type == "spherical" else squares


def pad_axes(value, other):
    """View a tensor with as many axes as ``other`` has, by axes of length one at the end."""
    return value[(..., *[None] * (other.dim() - value.dim()))]


# --- Sufficient statistics -------------------------------------------------------------

# Up to this many features the products of pairs of features are one matrix product for all
# clusters; beyond it their columns would take more memory than they save time.
MAX_OUTER_FEATURES = 32


@dataclass(frozen=True)
class GaussianStatistics:
    """Weighted sums over rows that determine a Gaussian, of K sets of rows side by side.

    Those of a union of disjoint sets are the sums of theirs.

    Attributes
    ----------
    nk : Tensor of shape (K,)
        Total weight.
    first : Tensor of shape (K, d)
        Sums of the rows.
    second : Tensor of shape (K, d, d), (K, d) or (K,)
        Sums of the products of two features ('full'), of squares ('diag'), of squared norms
        ('spherical').
    """

    nk: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    def __add__(self, other):
        pairs = zip(self._sums(), other._sums(), strict=True)
        return GaussianStatistics(*(a + b for a, b in pairs))

    def take(self, index):
        """Sets by number: an index tensor of any shape selects along the first axis."""
        return GaussianStatistics(*(value[index] for value in self._sums()))

    def pairs(self):
        """Sets 2k and 2k + 1 put together: K sets out of 2K."""
        return GaussianStatistics(*(v.view(-1, 2, *v.shape[1:]).sum(dim=1) for v in self._sums()))

    @staticmethod
    def cat(parts):
        """Several collections of sets, one after another."""
        fields = zip(*(part._sums() for part in parts), strict=True)
        return GaussianStatistics(*(torch.cat(values) for values in fields))

    def _sums(self):
        return self.nk, self.first, self.second


def soft_statistics(x, resp, covariance_type="full"):
    r"""Statistics of K clusters from responsibilities.

    .. math:: n_k = \sum_i r_{ik}, \quad \sum_i r_{ik} x_i, \quad \sum_i r_{ik} x_i x_i^\top

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred, for the sake of its second moments.
    resp : Tensor of shape (n, K)
        Times the sample weights, if rows have any.
    covariance_type : {'full', 'diag', 'spherical'}, default='full'

    Returns
    -------
    GaussianStatistics
    """
    n_features = x.shape[1]
    if covariance_type != "full":
        second = resp.T @ self_products(x, covariance_type)
    elif n_features <= MAX_OUTER_FEATURES:
        second = (resp.T @ self_products(x, "full").flatten(1)).view(-1, n_features, n_features)
    else:
        second = (resp.T[:, :, None] * x).mT @ x
    return GaussianStatistics(resp.sum(dim=0), resp.T @ x, second)


def hard_statistics(x, labels, weight, n_clusters, covariance_type="full"):
    """Statistics of K clusters from labels, at a cost that does not grow with K.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred, for the sake of its second moments.
    labels : Tensor of shape (n,)
    weight : Tensor of shape (n,)
    n_clusters : int
    covariance_type : {'full', 'diag', 'spherical'}, default='full'

    Returns
    -------
    GaussianStatistics
    """
    zeros = partial(torch.zeros, dtype=x.dtype, device=x.device)
    n_features = x.shape[1]
    nk = zeros(n_clusters).index_add_(0, labels, weight)
    first = zeros(n_clusters, n_features).index_add_(0, labels, weight[:, None] * x)
    if covariance_type == "full":
        tiles, owner = _tiles(weight.sqrt()[:, None] * x, labels, n_clusters)
        second = zeros(n_clusters, n_features, n_features)
        return GaussianStatistics(nk, first, second.index_add_(0, owner, tiles.mT @ tiles))
    squares = self_products(x, covariance_type)
    squares = pad_axes(weight, squares) * squares
    second = zeros(n_clusters, *squares.shape[1:]).index_add_(0, labels, squares)
    return GaussianStatistics(nk, first, second)


def _tiles(x, labels, n_clusters):
    """Cut the rows of each cluster into tiles of equal height, the last filled with zeros.

    The products of all tiles are then one batched matrix product, whatever the sizes of the
    clusters: (n, d) -> (n_tiles, height, d), and the cluster of each tile.
    """
    height = max(32, x.shape[1])
    counts = torch.bincount(labels, minlength=n_clusters)
    in_cluster = (counts + height - 1) // height
    owner = torch.repeat_interleave(in_cluster)
    order = labels.argsort(stable=True)
    owner_of_row = labels[order]
    position = torch.arange(len(x), device=x.device)
    position = position - (counts.cumsum(0) - counts)[owner_of_row]
    slot = (in_cluster.cumsum(0) - in_cluster)[owner_of_row] * height + position
    padded = x.new_zeros(len(owner) * height, x.shape[1])
    padded[slot] = x[order]
    return padded.view(len(owner), height, x.shape[1]), owner


# --- Normal-inverse-Wishart ------------------------------------------------------------


@dataclass(frozen=True)
class NormalInverseWishart:
    r"""Conjugate distribution of the mean and covariance of a Gaussian, batched over clusters.

    .. math:: \Sigma \sim \mathcal W^{-1}(\nu, \Psi), \qquad
        \mu \mid \Sigma \sim \mathcal N(m, \Sigma / \kappa)

    The shape of ``scale`` says which covariances are meant: 'full'; 'diag', one such
    distribution in each feature; or 'spherical', :math:`\Sigma = \sigma^2 I` with one inverse
    Wishart variable :math:`\sigma^2` of dimension one.

    Attributes
    ----------
    mean : Tensor of shape (..., d)
        :math:`m`.
    kappa, dof : Tensor of shape (...)
        :math:`\kappa > 0` and :math:`\nu`, which counts more than d - 1 ('full') or 0.
    scale : Tensor of shape (..., d, d), (..., d) or (...)
        :math:`\Psi`, which is :math:`\nu \Psi` in Ronen et al. (2022).
    """

    mean: torch.Tensor
    kappa: torch.Tensor
    dof: torch.Tensor
    scale: torch.Tensor

    @property
    def covariance_type(self):
        return {1: "full", 0: "diag", -1: "spherical"}[self.scale.dim() - self.mean.dim()]


def niw_posterior(prior, statistics):
    r"""Posterior given sufficient statistics, which may be weighted.

    .. math:: \kappa^* = \kappa + n, \quad m^* = (\kappa m + \textstyle\sum_i x_i) / \kappa^*,
        \quad \nu^* = \nu + n, \quad
        \Psi^* = \Psi + \sum_i x_i x_i^\top + \kappa m m^\top - \kappa^* m^* m^{*\top}

    For 'spherical' every feature of a row informs about the one variance:
    :math:`\nu^* = \nu + n d`.

    Parameters
    ----------
    prior : NormalInverseWishart
        Prior of one cluster, the same for all K.
    statistics : GaussianStatistics

    Returns
    -------
    NormalInverseWishart
        With a leading axis of length K.
    """
    kappa = prior.kappa + statistics.nk
    mean = (prior.kappa * prior.mean + statistics.first) / kappa[:, None]
    before, after = (self_products(m, prior.covariance_type) for m in (prior.mean, mean))
    scale = prior.scale + statistics.second + prior.kappa * before
    scale = scale - pad_axes(kappa, after) * after
    per_row = mean.shape[1] if prior.covariance_type == "spherical" else 1
    return NormalInverseWishart(mean, kappa, prior.dof + per_row * statistics.nk, scale)


def niw_mode(distribution):
    r"""Mean and covariance of highest density (MAP estimate, if it is a posterior).

    .. math:: \mu = m, \qquad \Sigma = \Psi / (\nu + d + 2)

    with d = 1 in each feature of a 'diag' covariance.

    Parameters
    ----------
    distribution : NormalInverseWishart

    Returns
    -------
    means : Tensor of shape (..., d)
    covariances : Tensor
        Covariances in the shape of ``scale``.
    """
    n_features = 1 if distribution.covariance_type == "diag" else distribution.mean.shape[-1]
    divisor = pad_axes(distribution.dof + n_features + 2, distribution.scale)
    return distribution.mean, distribution.scale / divisor


def niw_log_partition(distribution):
    r"""Log of the integral of the density without its constant, by Cholesky, per cluster.

    .. math:: \log Z = \tfrac{\nu d}2 \log 2 + \log \Gamma_d(\tfrac\nu2) - \tfrac\nu2 \log |\Psi|
        + \tfrac d2 \log \tfrac{2 \pi}\kappa

    Parameters
    ----------
    distribution : NormalInverseWishart

    Returns
    -------
    Tensor of shape (...)
    """
    n_features, half = distribution.mean.shape[-1], distribution.dof / 2
    if distribution.covariance_type == "full":
        factors = cholesky(distribution.scale)
        log_det = 2 * factors.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        log_gamma, dimensions = torch.mvlgamma(half, n_features), n_features
    elif distribution.covariance_type == "diag":
        log_det = distribution.scale.log().sum(dim=-1)
        log_gamma, dimensions = n_features * torch.lgamma(half), n_features
    else:
        log_det, log_gamma, dimensions = distribution.scale.log(), torch.lgamma(half), 1
    log_two_pi = math.log(2 * math.pi)
    normal = 0.5 * n_features * (log_two_pi - distribution.kappa.log())
    return half * dimensions * math.log(2) + log_gamma - half * log_det + normal


def niw_log_marginal(prior, statistics):
    r"""Log marginal likelihood of each set of rows, its mean and covariance integrated out.

    .. math:: \log f(X_k) = \log Z(\kappa^*, m^*, \nu^*, \Psi^*) - \log Z(\kappa, m, \nu, \Psi)
        - \tfrac{n d}2 \log 2 \pi

    Parameters
    ----------
    prior : NormalInverseWishart
        Prior of one cluster, the same for all K. It must be in float64: the terms are millions of
        nats and differ by a few.
    statistics : GaussianStatistics

    Returns
    -------
    Tensor of shape (K,)
    """
    posterior = niw_log_partition(niw_posterior(prior, statistics))
    constant = 0.5 * prior.mean.shape[-1] * math.log(2 * math.pi)
    return posterior - niw_log_partition(prior) - constant * statistics.nk


def log_evidence(prior, statistics):
    r"""What a cluster contributes to the log posterior of a partition, without log alpha.

    .. math:: \log \Gamma(n_k) + \log f(X_k)

    Parameters
    ----------
    prior : NormalInverseWishart
    statistics : GaussianStatistics

    Returns
    -------
    Tensor of shape (K,)
        0 for an empty cluster.
    """
    nk = statistics.nk
    evidence = torch.lgamma(nk.clamp_min(1e-300)) + niw_log_marginal(prior, statistics)
    return torch.where(nk > 0, evidence, 0.0)
