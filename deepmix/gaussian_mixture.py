r"""The mixture of Gaussians on tensors: its value, the module that predicts from it, and EM.

A mixture may have a leading axis of restarts, which EM runs side by side: to a density, the
clusters of all restarts are but more clusters. EM passes over the rows in pieces, so that no more
is held of them than what is asked for.

References
----------
.. [1] A. P. Dempster, N. M. Laird, D. B. Rubin, "Maximum likelihood from incomplete data via the
   EM algorithm", JRSS B 39, 1977.
.. [2] G. Celeux, G. Govaert, "A classification EM algorithm for clustering and two stochastic
   versions", Computational Statistics & Data Analysis 14, 1992.
"""

import math
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import nn

from deepmix.gaussians import (
    GaussianStatistics,
    pad_axes,
    self_products,
    soft_statistics,
    squared_distances,
    squared_mahalanobis,
)
from deepmix.linalg import cholesky, inverse_triangle

# PIECE is the number of rows x clusters x features in a piece of rows: 2 MiB in float64, so
# that what is made of a piece stays in the cache. IN_CACHE is the number of differences of rows and
# means, feature by feature, that are held at once: 512 KiB, since they take twenty times as long
# once they leave the cache.
PIECE, IN_CACHE = 2**18, 2**16

# The statistics that each type of covariance needs, and whether the clusters share it.
COVARIANCE_TYPES = {
    "full": ("full", False),
    "tied": ("full", True),
    "diag": ("diag", False),
    "spherical": ("spherical", False),
    "tied_spherical": ("spherical", True),
}

# --- The mixture -----------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    r"""A mixture of Gaussians, or several side by side.

    .. math:: p(x) = \sum_k \pi_k \, \mathcal N(x \mid \mu_k, \Sigma_k)

    Attributes
    ----------
    weights : Tensor of shape (..., K)
    means : Tensor of shape (..., K, d)
    covariances : Tensor
        Covariances of shape (..., K, d, d) if 'full', (..., d, d) if 'tied', (..., K, d) if 'diag',
        (..., K) if 'spherical', (...) if 'tied_spherical': one variance for all.
    covariance_type : {'full', 'tied', 'diag', 'spherical', 'tied_spherical'}
    """

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor
    covariance_type: str = "full"

    @property
    def tensors(self):
        """Weights, means and covariances."""
        return self.weights, self.means, self.covariances

    def map(self, function, *others):
        """Apply a function to each of the three tensors, beside those of other mixtures."""
        columns = zip(self.tensors, *(other.tensors for other in others), strict=True)
        return Mixture(*(function(*column) for column in columns), self.covariance_type)

    def take(self, index):
        """Select mixtures by number along the first axis, or clusters of one mixture."""
        return self.map(lambda value: value[index])

    def put(self, index, other):
        """A copy in which the mixtures ``index`` are those of ``other``."""
        return self.map(lambda value, new: value.index_copy(0, index, new), other)

    def shift(self, by):
        """The mixture of rows moved ``by`` a vector."""
        return Mixture(self.weights, self.means + by, self.covariances, self.covariance_type)

    def in_order(self):
        """The same mixture, its clusters in the order of the first coordinate of their means."""
        order = self.means[:, 0].argsort()
        tied = COVARIANCE_TYPES[self.covariance_type][1]
        covariances = self.covariances if tied else self.covariances[order]
        return Mixture(self.weights[order], self.means[order], covariances, self.covariance_type)

    def to_module(self):
        """The `MixtureModule` of this one mixture, on its device and in its dtype."""
        n_clusters, n_features = self.means.shape
        full = COVARIANCE_TYPES[self.covariance_type][0] == "full"
        return MixtureModule(n_features, n_clusters, full).to(self.means).set(self)

    def attributes(self):
        """Fitted attributes of an estimator: dict of float64 arrays that own their memory."""
        weights, means, covariances = (
            value.double().cpu().numpy().copy() for value in self.tensors
        )
        return {
            "weights_": weights / weights.sum(),
            "means_": means,
            "covariances_": covariances,
        }


def full_covariances(mixture):
    """Covariances of whatever type as matrices: Tensor of shape (..., K, d, d)."""
    return _full(mixture.covariances, mixture)


def draw_rows(mixture, labels, noise):
    """Rows of given clusters of one mixture, made of standard normal noise.

    Parameters
    ----------
    mixture : Mixture
        On the CPU, in float64.
    labels : ndarray of shape (n,)
        Cluster of each row.
    noise : ndarray of shape (n, d)

    Returns
    -------
    rows : ndarray of shape (n, d)
    """
    kind, tied = COVARIANCE_TYPES[mixture.covariance_type]
    factors = cholesky(mixture.covariances) if kind == "full" else mixture.covariances.sqrt()
    noise, rows = torch.from_numpy(noise), mixture.means[torch.from_numpy(labels)]
    for k in range(len(mixture.means)):
        own, factor = torch.from_numpy(labels == k), factors if tied else factors[k]
        rows[own] += noise[own] @ factor.mT if kind == "full" else noise[own] * factor
    return rows.numpy()


def _full(values, mixture):
    """Covariances, or factors of the same shape, as matrices of each cluster."""
    *lead, n_clusters, n_features = mixture.means.shape
    kind, tied = COVARIANCE_TYPES[mixture.covariance_type]
    values = values.unsqueeze(len(lead)) if tied else values
    if kind == "spherical":
        values = values[..., None].expand(*values.shape, n_features)
    values = values if kind == "full" else torch.diag_embed(values)
    return values.expand(*lead, n_clusters, n_features, n_features)


# --- Densities -------------------------------------------------------------------------


def precisions_cholesky(mixture):
    r"""Factors of the precisions, which whiten; and the densities at the means.

    .. math:: U_k U_k^\top = \Sigma_k^{-1}, \qquad
        \log \pi_k + \log |U_k| - \tfrac d2 \log 2 \pi

    Parameters
    ----------
    mixture : Mixture

    Returns
    -------
    factors : Tensor
        Upper triangular matrices, or inverse standard deviations, in the shape of the covariances.
    log_constant : Tensor of shape (..., K)
        Log of the joint density of each cluster and its mean.
    """
    means, covariances = mixture.means, mixture.covariances
    n_features = means.shape[-1]
    kind, tied = COVARIANCE_TYPES[mixture.covariance_type]
    if kind == "full":
        factors = inverse_triangle(cholesky(covariances)).mT
        log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    else:
        factors = covariances.rsqrt()
        log_det = factors.log()
        log_det = log_det.sum(dim=-1) if kind == "diag" else n_features * log_det
    log_det = (log_det[..., None] if tied else log_det) - 0.5 * n_features * math.log(2 * math.pi)
    # A variance may be in float64 for the sake of its range.
    return factors.to(means), mixture.weights.log() + log_det.to(means)


def log_joint(x, mixture):
    r"""Log of the joint density of row and cluster.

    .. math:: \log \pi_k + \log \mathcal N(x_i \mid \mu_k, \Sigma_k)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    mixture : Mixture

    Returns
    -------
    Tensor of shape (n, ..., K)
    """
    prepared = precisions_cholesky(mixture)
    parts = _pieces(len(x), mixture.means.numel(), x.device)
    return torch.cat([_log_joint(x[part], mixture, *prepared) for part in parts])


def _log_joint(x, mixture, factors, log_constant):
    """`log_joint` of a piece of rows, from the `precisions_cholesky` of the mixture."""
    *lead, n_clusters, n_features = mixture.means.shape
    kind, tied = COVARIANCE_TYPES[mixture.covariance_type]
    if tied:
        # (n, d), (R, K, d) -> (R, n, K): rows are whitened once for all clusters that share it.
        means = mixture.means.reshape(-1, n_clusters, n_features)
        if kind == "full":
            factors = factors.reshape(-1, n_features, n_features)
            squared = squared_distances(x @ factors, means @ factors)
        else:
            factors = factors.reshape(-1, 1, 1)
            squared = squared_distances(x * factors, means * factors)
        squared = squared.movedim(0, 1)
    else:
        means = mixture.means.reshape(-1, n_features)
        factors = factors.reshape(len(means), *factors.shape[len(lead) + 1 :] or (1,))
        # Full covariances take one product; the others make differences, some clusters at a time.
        size = IN_CACHE * (1 if x.device.type == "cpu" else 64) // max(1, x.numel())
        size = len(means) if kind == "full" else max(1, size)
        parts = zip(means.split(size), factors.split(size), strict=True)
        squared = torch.cat([squared_mahalanobis(x, *part) for part in parts], dim=1)
    return log_constant - 0.5 * squared.reshape(-1, *lead, n_clusters)


def log_density(x, mixture):
    r"""Log-density of the mixture.

    .. math:: \log \sum_k \pi_k \, \mathcal N(x_i \mid \mu_k, \Sigma_k)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    mixture : Mixture

    Returns
    -------
    Tensor of shape (n, ...)
    """
    return torch.logsumexp(log_joint(x, mixture), dim=-1)


def log_resp(x, mixture):
    r"""E-step: log of the responsibilities.

    .. math:: \log \gamma_{ik} = \log \pi_k \mathcal N(x_i \mid \mu_k, \Sigma_k) - \log p(x_i)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    mixture : Mixture

    Returns
    -------
    Tensor of shape (n, ..., K)
    """
    return log_joint(x, mixture).log_softmax(dim=-1)


class MixtureModule(nn.Module):
    """A mixture in the form that its densities need: nothing is factored when it is applied.

    Rows go through all at once: who walks over many of them makes batches of them. So the module
    can be exported, with any number of rows. A new module has K times the standard normal.

    Parameters
    ----------
    n_features, n_clusters : int
    full : bool, default=True
        Whether covariances are full, or else diagonal.

    Attributes
    ----------
    log_constant : Tensor of shape (K,)
        Log weight plus log of the density at the mean.
    means : Tensor of shape (K, d)
    precisions_cholesky : Tensor of shape (K, d, d) or (K, d)
        Upper triangular factors of the precisions; or inverse deviations.
    """

    def __init__(self, n_features, n_clusters, full=True):
        super().__init__()
        constant = -math.log(n_clusters) - 0.5 * n_features * math.log(2 * math.pi)
        one = torch.eye(n_features) if full else torch.ones(n_features)
        self.register_buffer("log_constant", torch.full((n_clusters,), constant))
        self.register_buffer("means", torch.zeros(n_clusters, n_features))
        self.register_buffer("precisions_cholesky", one.repeat(n_clusters, *[1] * one.dim()))

    def set(self, mixture):
        """Become the module of a mixture, in float64, of any number of clusters.

        Its covariances may be of any type if those of the module are full; else of any type but
        'full' and 'tied'. Returns the module.
        """
        factors, log_constant = precisions_cholesky(mixture)
        if self.precisions_cholesky.dim() == 3:
            factors = _full(factors, mixture)
        else:
            factors = factors if factors.dim() == 2 else factors.reshape(-1, 1)
            factors = factors.expand_as(mixture.means)
        new = {
            "log_constant": log_constant,
            "means": mixture.means,
            "precisions_cholesky": factors.contiguous(),
        }
        for name, value in new.items():
            buffer, value = getattr(self, name), value.to(self.means)
            if buffer.shape == value.shape:  # in place: others may hold it
                buffer.copy_(value)
            else:
                setattr(self, name, value)
        return self

    def log_joint(self, x):
        """Log of weight times density: (B, d) -> (B, K)."""
        return self.log_constant - 0.5 * squared_mahalanobis(
            x, self.means, self.precisions_cholesky
        )


# --- M-step ----------------------------------------------------------------------------


def mixture_statistics(x, resp, covariance_type="full"):
    """Weighted sums over rows that determine the parameters of a mixture.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred, for the sake of its second moments.
    resp : Tensor of shape (n, ..., K)
        Times the sample weights, if rows have any.
    covariance_type : str

    Returns
    -------
    GaussianStatistics
        With the leading axes of ``resp``; ``second`` of the shape of the covariances.
    """
    shape, n_features = resp.shape[1:], x.shape[1]
    kind, tied = COVARIANCE_TYPES[covariance_type]
    # What clusters share needs no products of features for each of them.
    sums = soft_statistics(x, resp.flatten(1), "spherical" if tied else kind)
    second, lead = sums.second, shape
    if tied:
        lead = shape[:-1]
        second = soft_statistics(x, resp.sum(dim=-1).view(len(x), -1), kind).second
    second = second.view((*lead, *second.shape[1:]))
    return GaussianStatistics(sums.nk.view(shape), sums.first.view(*shape, n_features), second)


def maximize(
    statistics, covariance_type="full", reg_covar=1e-6, equal_weights=False, shrinkage=0.0
):
    r"""M-step: the parameters of highest likelihood, from sums over rows.

    .. math:: \pi_k = \tfrac{n_k}{\sum_l n_l}, \quad
        \mu_k = \tfrac{1}{n_k} \sum_i \gamma_{ik} x_i, \quad
        \Sigma_k = \tfrac{1}{n_k} \sum_i \gamma_{ik} x_i x_i^\top - \mu_k \mu_k^\top
        + \epsilon I

    'tied' takes the mean of these matrices by weight, 'diag' their diagonal, the spherical types
    the mean of that. An empty cluster goes to the origin, and has nothing but :math:`\epsilon`.
    Shrinkage leads from covariances of their own to 'tied', whatever the units of the features:

    .. math:: (1 - \alpha) \, \Sigma_k + \alpha \sum_l \pi_l \Sigma_l

    Parameters
    ----------
    statistics : GaussianStatistics
        Sums over rows, as `mixture_statistics` makes them.
    covariance_type : str
    reg_covar : float or Tensor
        :math:`\epsilon`.
    equal_weights : bool, default=False
        All clusters have weight 1/K.
    shrinkage : float, default=0
        :math:`\alpha`, from 0 to 1.

    Returns
    -------
    Mixture
    """
    kind, tied = COVARIANCE_TYPES[covariance_type]
    eps = torch.finfo(statistics.nk.dtype).eps
    nk = statistics.nk + 10 * eps  # an empty cluster divides by it
    total = nk.sum(dim=-1, keepdim=True)
    weights = torch.full_like(nk, 1 / nk.shape[-1]) if equal_weights else nk / total
    means = statistics.first / nk[..., None]
    square = self_products(means, kind)
    square = square * pad_axes(nk, square)
    square, divisor = (square.sum(dim=nk.dim() - 1), total[..., 0]) if tied else (square, nk)
    divisor = pad_axes(divisor, square) * (means.shape[-1] if kind == "spherical" else 1)
    second = statistics.second / divisor
    # Epsilon is raised by what the difference of moments may lose by rounding.
    if kind == "full":
        diagonal = second.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(reg_covar + 100 * eps * diagonal.sum(dim=-1, keepdim=True))
    else:
        second = second * (1 + 100 * eps) + reg_covar
    covariances = second - square / divisor
    if shrinkage and not tied:
        axis = nk.dim() - 1
        pooled = (pad_axes(nk / total, covariances) * covariances).sum(dim=axis, keepdim=True)
        covariances = covariances + shrinkage * (pooled - covariances)
    return Mixture(weights, means, covariances, covariance_type)


# --- EM --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureFit:
    """What EM ends with; all but the mixture have the shape of the restarts.

    Attributes
    ----------
    mixture : Mixture
    lower_bound : Tensor of shape (...)
        Mean log-likelihood of the rows, or mean log of the joint density of row and cluster if
        rows were given to one cluster each: of this mixture.
    n_iter : Tensor of shape (...)
        E-steps.
    converged : Tensor of shape (...)
    """

    mixture: Mixture
    lower_bound: torch.Tensor
    n_iter: torch.Tensor
    converged: torch.Tensor

    def take(self, index):
        """Fits by number, along the axis of restarts."""
        rest = (self.lower_bound, self.n_iter, self.converged)
        return MixtureFit(self.mixture.take(index), *(value[index] for value in rest))


def fit_gaussian_mixture(
    x,
    start,
    weight=None,
    *,
    covariance_type="full",
    hard=False,
    equal_weights=False,
    shrinkage=0.0,
    reg_covar=1e-6,
    max_iter=100,
    tol=1e-3,
):
    r"""EM for a mixture of Gaussians, from one start or from several side by side.

    scikit-learn's `GaussianMixture` takes no sample weights; from the same start this is the
    same, but for its last M-step, which follows the E-step that it tests for convergence. Hard
    EM of 'tied_spherical' with equal weights is Lloyd's algorithm of k-means.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred, for the sake of its second moments.
    start : Mixture or Tensor of shape (n, K) or (n, n_restarts, K)
        A mixture, whose type of covariance then counts, or responsibilities.
    weight : Tensor of shape (n,) or None
    covariance_type : {'full', 'tied', 'diag', 'spherical', 'tied_spherical'}, default='full'
    hard : bool, default=False
        Give each row to its likeliest cluster: classification EM.
    equal_weights, shrinkage
        As in `maximize`. Shrunk covariances are not those of highest likelihood, which then may
        fall by a little from one iteration to the next.
    reg_covar, max_iter, tol
        As in `sklearn.mixture.GaussianMixture`.

    Returns
    -------
    MixtureFit
        With an axis of restarts if the start has one.
    """
    weight = torch.ones_like(x[:, 0]) if weight is None else weight.to(x)
    weight = weight / weight.sum()
    given = isinstance(start, Mixture)
    covariance_type = start.covariance_type if given else covariance_type
    options = (covariance_type, reg_covar, equal_weights, shrinkage)
    if not given:
        parts = _pieces(len(x), start[0].numel() * x.shape[1], x.device)
        parts = (
            mixture_statistics(x[i], start[i] * pad_axes(weight[i], start), covariance_type)
            for i in parts
        )
        start = maximize(reduce(add, parts), *options)
    single = start.weights.dim() == 1
    start = start.take(None) if single else start
    fit = _iterate(x, weight, start, hard, options, max_iter, tol)
    return fit.take(0) if single else fit


def _iterate(x, weight, mixture, hard, options, max_iter, tol):
    """EM on a leading axis of restarts, each until it has settled."""
    n_restarts = len(mixture.weights)
    bound = torch.full_like(mixture.weights[:, 0], -math.inf)
    n_iter = torch.zeros(n_restarts, dtype=torch.int64, device=x.device)
    converged = torch.zeros(n_restarts, dtype=torch.bool, device=x.device)
    active = torch.arange(n_restarts, device=x.device)
    for _ in range(max_iter):
        statistics, now = e_step(x, weight, mixture.take(active), hard)
        settled = (now - bound[active]).abs() < tol
        bound[active], converged[active] = now, settled
        n_iter[active] += 1
        active = active[~settled]
        if not len(active):
            break
        new = maximize(statistics.take(~settled), *options)
        mixture = mixture.put(active, new)
    if len(active):  # the bound is that of the mixture, the last one too
        bound[active] = e_step(x, weight, mixture.take(active), hard)[1]
    return MixtureFit(mixture, bound, n_iter, converged)


def e_step(x, weight, mixture, hard=False):
    """Sums over rows for the next M-step, and the log-likelihood, piece by piece.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    weight : Tensor of shape (n,)
        Weights of the rows, which sum to one.
    mixture : Mixture
    hard : bool, default=False

    Returns
    -------
    statistics : GaussianStatistics
    lower_bound : Tensor of shape (...)
    """
    bound, prepared = 0.0, precisions_cholesky(mixture)

    def sums(part):
        nonlocal bound
        joint, w = _log_joint(x[part], mixture, *prepared), weight[part]
        if hard:
            height, labels = joint.max(dim=-1)
            resp = torch.zeros_like(joint).scatter_(-1, labels[..., None], 1.0)
        else:
            height = torch.logsumexp(joint, dim=-1)
            resp = (joint - height[..., None]).exp()
        bound = bound + (w @ height.flatten(1)).view(height.shape[1:])
        return mixture_statistics(x[part], resp * pad_axes(w, resp), mixture.covariance_type)

    parts = _pieces(len(x), mixture.means.numel(), x.device)
    return reduce(add, map(sums, parts)), bound


def _pieces(n, width, device):
    """Slices of rows: of a width that fits a cache, on the CPU; of a width that fits a memory."""
    size = max(64, PIECE * (1 if device.type == "cpu" else 64) // width)
    return (slice(start, start + size) for start in range(0, n, size))
