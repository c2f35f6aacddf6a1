r"""Mixtures of Gaussians on tensors: densities and EM.

The mixture that is fitted by maximum likelihood. Parameters may have a leading axis of restarts,
which EM runs side by side: to a density, the clusters of all restarts are but more clusters. Rows
pass in pieces, so that no more is held of them than what is asked for.

References
----------
.. [1] A. P. Dempster, N. M. Laird, D. B. Rubin, "Maximum likelihood from incomplete data via the
   EM algorithm", JRSS B 39, 1977.
.. [2] G. Celeux, G. Govaert, "A classification EM algorithm for clustering and two stochastic
   versions", Computational Statistics & Data Analysis 14, 1992.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import nn

from deepmix.distributions import (
    GaussianStatistics,
    gaussian_log_density,
    soft_statistics,
    squared_distances,
)
from deepmix.linalg import cholesky, inverse_triangle

# Numbers in a piece of rows, times clusters, times features: 2 MiB in float64, so that what is
# made of a piece stays in the cache.
PIECE = 2**18

# The statistics that each type of covariance needs, and whether the clusters share it.
COVARIANCE_TYPES = {
    "full": ("full", False),
    "tied": ("full", True),
    "diag": ("diag", False),
    "spherical": ("spherical", False),
    "tied_spherical": ("spherical", True),
}

# --- Parameters ------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureParameters:
    r"""Parameters of a mixture of Gaussians, or of several side by side.

    .. math:: p(x) = \sum_k \pi_k \, \mathcal N(x \mid \mu_k, \Sigma_k)

    Attributes
    ----------
    weights : Tensor of shape (..., K)
    means : Tensor of shape (..., K, d)
    covariances : Tensor
        Of shape (..., K, d, d) if 'full', (..., d, d) if 'tied', (..., K, d) if 'diag',
        (..., K) if 'spherical', (...) if 'tied_spherical': one variance for all.
    covariance_type : {'full', 'tied', 'diag', 'spherical', 'tied_spherical'}
    """

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor
    covariance_type: str = "full"

    def map(self, function):
        """The same of other tensors: ``function`` of each of the three."""
        tensors = (self.weights, self.means, self.covariances)
        return MixtureParameters(*(function(value) for value in tensors), self.covariance_type)

    def shift(self, by):
        """The mixture of rows moved ``by`` a vector."""
        return replace(self, means=self.means + by)

    def take(self, index):
        """Mixtures by number, along the first axis."""
        return self.map(lambda value: value[index])

    def put(self, index, other):
        """A copy in which the mixtures ``index`` are those of ``other``."""
        pairs = zip(
            (self.weights, self.means, self.covariances),
            (other.weights, other.means, other.covariances),
            strict=True,
        )
        tensors = (value.index_copy(0, index, new) for value, new in pairs)
        return MixtureParameters(*tensors, self.covariance_type)


def full_covariances(parameters):
    """Covariances of whatever type as matrices: Tensor of shape (..., K, d, d)."""
    *lead, n_clusters, n_features = parameters.means.shape
    values = parameters.covariances
    kind, tied = COVARIANCE_TYPES[parameters.covariance_type]
    values = values.unsqueeze(len(lead)) if tied else values
    if kind == "spherical":
        values = values[..., None].expand(*values.shape, n_features)
    values = values if kind == "full" else torch.diag_embed(values)
    return values.expand(*lead, n_clusters, n_features, n_features)


# --- Densities -------------------------------------------------------------------------


def log_joint(x, parameters):
    r"""Log of the joint density of row and cluster.

    .. math:: \log \pi_k + \log \mathcal N(x_i \mid \mu_k, \Sigma_k)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    parameters : MixtureParameters

    Returns
    -------
    Tensor of shape (n, ..., K)
    """
    parts = _pieces(len(x), parameters.means.numel(), x.device)
    return torch.cat([_log_joint(x[part], parameters) for part in parts])


def _log_joint(x, parameters):
    means, covariances = parameters.means, parameters.covariances
    *lead, n_features = means.shape
    if COVARIANCE_TYPES[parameters.covariance_type][1]:
        log_density = _tied_log_density(x, means, covariances)
    else:
        covariances = covariances.reshape(-1, *covariances.shape[len(lead) :])
        log_density = gaussian_log_density(x, means.reshape(-1, n_features), covariances)
    return log_density.view(-1, *lead) + parameters.weights.log()


def _tied_log_density(x, means, covariances):
    """Of Gaussians that share a covariance: (n, d), (..., K, d) -> (n, ..., K)."""
    *lead, n_clusters, n_features = means.shape
    means = means.reshape(-1, n_clusters, n_features)
    if covariances.dim() == len(lead):
        deviation = covariances.reshape(-1).sqrt()
        log_det = 2 * n_features * deviation.log()
        squared = squared_distances(x, means.flatten(0, 1)).view(len(x), -1, n_clusters)
        squared = squared / deviation[:, None].square()
    else:
        factors = cholesky(covariances.reshape(-1, n_features, n_features))
        log_det = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        whiten = inverse_triangle(factors).mT
        squared = squared_distances(x @ whiten, means @ whiten).movedim(0, 1)
    log_density = -0.5 * (n_features * math.log(2 * math.pi) + log_det[:, None] + squared)
    return log_density.view(-1, *lead, n_clusters)


def log_density(x, parameters):
    r"""Log-density of the mixture.

    .. math:: \log \sum_k \pi_k \, \mathcal N(x_i \mid \mu_k, \Sigma_k)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    parameters : MixtureParameters

    Returns
    -------
    Tensor of shape (n, ...)
    """
    return torch.logsumexp(log_joint(x, parameters), dim=-1)


def log_resp(x, parameters):
    r"""E-step: log of the responsibilities.

    .. math:: \log \gamma_{ik} = \log \pi_k \mathcal N(x_i \mid \mu_k, \Sigma_k) - \log p(x_i)

    Parameters
    ----------
    x : Tensor of shape (n, d)
    parameters : MixtureParameters

    Returns
    -------
    Tensor of shape (n, ..., K)
    """
    return log_joint(x, parameters).log_softmax(dim=-1)


# --- Module ----------------------------------------------------------------------------


class GaussianMixtureHead(nn.Module):
    """A mixture in the form that its densities need: nothing is factored when it is applied.

    Rows go through all at once: who walks over many of them makes batches of them. So the module
    can be exported, with any number of rows.

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
    whiten : Tensor of shape (K, d, d) or (K, d)
        Inverse Cholesky factors, transposed; or inverse deviations.
    exact : tuple of Tensor
        Weights, means and covariances as they were set.
    """

    def __init__(self, n_features, n_clusters, full=True):
        super().__init__()
        shape = (n_features, n_features) if full else (n_features,)
        self.register_buffer("log_constant", torch.zeros(n_clusters))
        self.register_buffer("means", torch.zeros(n_clusters, n_features))
        self.register_buffer("whiten", torch.zeros(n_clusters, *shape))

    def set(self, weights, means, covariances):
        """Take parameters in float64, of a covariance of each cluster and of a new K."""
        n_features = means.shape[1]
        if covariances.dim() == 3:
            whiten = inverse_triangle(cholesky(covariances)).mT.contiguous()
            log_det = whiten.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        else:
            whiten = covariances.view(len(means), -1).expand(-1, n_features).rsqrt().contiguous()
            log_det = whiten.log().sum(dim=1)
        constant = weights.log() + log_det - 0.5 * n_features * math.log(2 * math.pi)
        for name, value in (("log_constant", constant), ("means", means), ("whiten", whiten)):
            buffer, value = getattr(self, name), value.to(self.means)
            if buffer.shape == value.shape:  # in place: others may hold it
                buffer.copy_(value)
            else:
                setattr(self, name, value)
        self.exact = weights, means, covariances

    def log_joint(self, x):
        """Log of weight times density: (B, d) -> (B, K)."""
        n_clusters, n_features = self.means.shape
        if self.whiten.dim() == 3:
            z = (x @ self.whiten.permute(1, 0, 2).flatten(1)).view(-1, n_clusters, n_features)
            z = z - (self.means[:, None] @ self.whiten).squeeze(1)
        else:
            z = (x[:, None] - self.means) * self.whiten
        return self.log_constant - 0.5 * z.square().sum(dim=2)


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
        Of `mixture_statistics`.
    covariance_type : str
    reg_covar : float or Tensor
        :math:`\epsilon`.
    equal_weights : bool, default=False
        All clusters have weight 1/K.
    shrinkage : float, default=0
        :math:`\alpha`, from 0 to 1.

    Returns
    -------
    MixtureParameters
    """
    kind, tied = COVARIANCE_TYPES[covariance_type]
    eps = torch.finfo(statistics.nk.dtype).eps
    nk = statistics.nk + 10 * eps  # an empty cluster divides by it
    total = nk.sum(dim=-1, keepdim=True)
    weights = torch.full_like(nk, 1 / nk.shape[-1]) if equal_weights else nk / total
    means = statistics.first / nk[..., None]
    square = {"full": _outer, "diag": torch.square, "spherical": _squared_norm}[kind](means)
    square = square * _like(nk, square)
    square, divisor = (square.sum(dim=nk.dim() - 1), total[..., 0]) if tied else (square, nk)
    divisor = _like(divisor, square) * (means.shape[-1] if kind == "spherical" else 1)
    second = statistics.second / divisor
    # Beside epsilon, what the difference may lose by rounding.
    if kind == "full":
        second.diagonal(dim1=-2, dim2=-1).add_(reg_covar + 100 * eps * _trace(second)[..., None])
    else:
        second = second * (1 + 100 * eps) + reg_covar
    covariances = second - square / divisor
    if shrinkage and not tied:
        axis = nk.dim() - 1
        pooled = (_like(nk / total, covariances) * covariances).sum(dim=axis, keepdim=True)
        covariances = covariances + shrinkage * (pooled - covariances)
    return MixtureParameters(weights, means, covariances, covariance_type)


def _like(value, other):
    """A view with as many axes as ``other``, ones at the end."""
    return value[(..., *[None] * (other.dim() - value.dim()))]


def _outer(v):
    return v[..., :, None] * v[..., None, :]


def _squared_norm(v):
    return v.square().sum(dim=-1)


def _trace(v):
    return v.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def estimate_gaussians(x, resp, reg_covar=1e-6, covariance_type="full", **options):
    """M-step from rows and responsibilities: `maximize` of `mixture_statistics`.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred, for the sake of its second moments.
    resp : Tensor of shape (n, ..., K)
        Times the sample weights, if rows have any.
    reg_covar, covariance_type, **options
        As in `maximize`.

    Returns
    -------
    MixtureParameters
    """
    statistics = mixture_statistics(x, resp, covariance_type)
    return maximize(statistics, covariance_type, reg_covar, **options)


# --- EM --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureFit:
    """What EM ends with; all but the parameters have the shape of the restarts.

    Attributes
    ----------
    parameters : MixtureParameters
    lower_bound : Tensor of shape (...)
        Mean log-likelihood of the rows, or mean log of the joint density of row and cluster if
        rows were given to one cluster each: of these parameters.
    n_iter : Tensor of shape (...)
        E-steps.
    converged : Tensor of shape (...)
    """

    parameters: MixtureParameters
    lower_bound: torch.Tensor
    n_iter: torch.Tensor
    converged: torch.Tensor

    def take(self, index):
        """Fits by number, along the axis of restarts."""
        rest = (self.lower_bound, self.n_iter, self.converged)
        return MixtureFit(self.parameters.take(index), *(value[index] for value in rest))


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
    start : MixtureParameters or Tensor of shape (n, K) or (n, n_restarts, K)
        Parameters, whose type of covariance then counts, or responsibilities.
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
    if isinstance(start, MixtureParameters):
        covariance_type = start.covariance_type
    options = (covariance_type, reg_covar, equal_weights, shrinkage)
    if isinstance(start, MixtureParameters):
        parameters = start
    else:
        parts = _pieces(len(x), start[0].numel() * x.shape[1], x.device)
        parts = (
            mixture_statistics(x[i], start[i] * _like(weight[i], start), covariance_type)
            for i in parts
        )
        parameters = maximize(reduce(add, parts), *options)
    single = parameters.weights.dim() == 1
    parameters = parameters.take(None) if single else parameters
    fit = _iterate(x, weight, parameters, hard, options, max_iter, tol)
    return fit.take(0) if single else fit


def _iterate(x, weight, parameters, hard, options, max_iter, tol):
    """EM on a leading axis of restarts, each until it has settled."""
    n_restarts = len(parameters.weights)
    bound = torch.full_like(parameters.weights[:, 0], -math.inf)
    n_iter = torch.zeros(n_restarts, dtype=torch.int64, device=x.device)
    converged = torch.zeros(n_restarts, dtype=torch.bool, device=x.device)
    active = torch.arange(n_restarts, device=x.device)
    for _ in range(max_iter):
        statistics, now = e_step(x, weight, parameters.take(active), hard)
        settled = (now - bound[active]).abs() < tol
        bound[active], converged[active] = now, settled
        n_iter[active] += 1
        active = active[~settled]
        if not len(active):
            break
        new = maximize(statistics.take(~settled), *options)
        parameters = parameters.put(active, new)
    if len(active):  # the bound is that of the parameters, the last ones too
        bound[active] = e_step(x, weight, parameters.take(active), hard)[1]
    return MixtureFit(parameters, bound, n_iter, converged)


def e_step(x, weight, parameters, hard=False):
    """Sums over rows for the next M-step, and the log-likelihood, piece by piece.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    weight : Tensor of shape (n,)
        Of sum one.
    parameters : MixtureParameters
    hard : bool, default=False

    Returns
    -------
    statistics : GaussianStatistics
    lower_bound : Tensor of shape (...)
    """
    bound = 0.0

    def sums(part):
        nonlocal bound
        joint, w = log_joint(x[part], parameters), weight[part]
        if hard:
            height, labels = joint.max(dim=-1)
            resp = torch.zeros_like(joint).scatter_(-1, labels[..., None], 1.0)
        else:
            height = torch.logsumexp(joint, dim=-1)
            resp = (joint - height[..., None]).exp()
        bound = bound + (w @ height.flatten(1)).view(height.shape[1:])
        return mixture_statistics(x[part], resp * _like(w, resp), parameters.covariance_type)

    parts = _pieces(len(x), parameters.means.numel(), x.device)
    return reduce(add, map(sums, parts)), bound


def _pieces(n, width, device):
    """Slices of rows: of a width that fits a cache, on the CPU; of a width that fits a memory."""
    size = max(64, PIECE * (1 if device.type == "cpu" else 64) // width)
    return (slice(start, start + size) for start in range(0, n, size))
