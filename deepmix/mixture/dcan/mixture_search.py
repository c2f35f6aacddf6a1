r"""The mixture of given codes, chosen without labels: many cheap starts, a race, cuts and merges.

EM ends where its start leads it, and on the codes of a network the ends differ by tenths of
accuracy. Here many starts run side by side on a sample of rows for a few iterations, the best go
on, and the best of those tries to merge two of its clusters and to cut another, as long as the
likelihood rises. EM on all rows ends the search.

The likelihood chooses well where it cannot buy itself small or flat clusters: hence weights that
are equal and covariances that are shrunk, by default.

References
----------
.. [1] C. Biernacki, G. Celeux, G. Govaert, "Choosing starting values for the EM algorithm for
   getting the highest likelihood in multivariate Gaussian mixture models", Computational
   Statistics & Data Analysis 41, 2003.
.. [2] J. H. Friedman, "Regularized discriminant analysis", JASA 84, 1989.
.. [3] N. Ueda, R. Nakano, Z. Ghahramani, G. E. Hinton, "SMEM algorithm for mixture models", Neural
   Computation 12, 2000.
"""

from dataclasses import replace

import torch

from deepmix.gaussian_mixture import (
    fit_gaussian_mixture,
    full_covariances,
    log_joint,
    log_resp,
)
from deepmix.kmeans import k_means, plus_plus
from deepmix.linalg import eigh

# The search sees SEARCH_ROWS rows, or SEARCH_ROWS_PER_CLUSTER for each cluster if that is more.
SEARCH_ROWS, SEARCH_ROWS_PER_CLUSTER = 10_000, 100
# 'auto' gives each cluster its own covariance if there are this many rows for each feature of each
# cluster, and no more than MAX_FULL_FEATURES features.
ROWS_PER_FEATURE, MAX_FULL_FEATURES = 15, 16
# In a race every start has RACE_ITER iterations of EM; one in RACE_KEPT, the best, goes on for at
# most RACE_MAX_ITER more.
RACE_ITER, RACE_KEPT, RACE_MAX_ITER = 10, 4, 200
# The N_MOVES best cuts are combined with the N_MOVES closest pairs. A cluster is cut across its
# N_DIRECTIONS directions of largest variance, and CUT_ITER iterations of EM judge a cut. The
# responsibilities of all cuts have at most CUT_NUMBERS numbers (64 MiB): rows are left out beyond
# that. A move must gain MIN_GAIN nats for each row.
N_MOVES, N_DIRECTIONS, CUT_ITER, CUT_NUMBERS, MIN_GAIN = 4, 2, 4, 2**23, 1e-2
# Number of cuts that are tried, as many as 16 clusters have: each is a mixture of all clusters, so
# that the cost of all cuts would grow with the square of the number of clusters.
MAX_CUTS = 32


def covariance_type_for(n_samples, n_clusters, n_features):
    """What 'auto' stands for: 'full' where there are rows enough for it, else 'tied'.

    Parameters
    ----------
    n_samples : int or float
        Total weight of the rows.
    n_clusters, n_features : int

    Returns
    -------
    {'full', 'tied'}
    """
    enough = n_samples >= ROWS_PER_FEATURE * n_clusters * n_features
    return "full" if enough and n_features <= MAX_FULL_FEATURES else "tied"


def search_mixture(
    x,
    n_clusters,
    generator,
    weight=None,
    *,
    starts=(),
    covariance_type="auto",
    equal_weights=True,
    shrinkage=0.1,
    reg_covar=1e-6,
    n_init=20,
    n_moves=5,
    max_iter=200,
    tol=1e-4,
):
    """Fit a mixture to given codes from many starts, of which the likeliest is kept.

    Half the starts are ends of k-means, half are rows by k-means++ as they are.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        In float64, if digits are not to depend on the order of sums.
    n_clusters : int
    generator : torch.Generator
        On the CPU, so that every device sees the same draws.
    weight : Tensor of shape (n,) or None
    starts : sequence of Mixture
        Further starts, such as a mixture that training has tracked. They say which rows belong
        together, so that they may be of another type of covariance.
    covariance_type : {'auto', 'full', 'tied', 'diag', 'spherical', 'tied_spherical'}
        ``'auto'``, the default, is what `covariance_type_for` says.
    equal_weights, shrinkage
        As in `deepmix.gaussian_mixture.maximize`.
    reg_covar : float, default=1e-6
        In units of the mean variance of the features: codes have no units.
    n_init : int, default=20
    n_moves : int, default=5
        Largest number of moves, each of which merges two clusters and cuts another.
    max_iter, tol
        Iteration limit and tolerance, in nats for each row, of the EM on all rows that follows the
        search; by default 200 and 1e-4.

    Returns
    -------
    MixtureFit
    """
    weight = torch.ones_like(x[:, 0]) if weight is None else weight.to(x)
    total = float(weight.sum())  # a row of weight two is two rows
    x, weight = x[weight > 0], weight[weight > 0] / total
    origin = weight @ x
    x = x - origin
    if covariance_type == "auto":
        covariance_type = covariance_type_for(total, n_clusters, x.shape[1])
    options = {
        "covariance_type": covariance_type,
        "equal_weights": equal_weights,
        "shrinkage": shrinkage,
        "reg_covar": reg_covar * (float(weight @ x.square().mean(dim=1)) or 1.0),
    }
    part = _sample(len(x), n_clusters, generator)
    few, w = x[part], weight[part]
    starts = [start.shift(-origin) for start in starts]
    best = race(few, start_resp(few, n_clusters, generator, w, starts, n_init), w, **options)
    for _ in range(n_moves if n_clusters > 2 else 0):
        moved = cut_and_merge(few, best.mixture, w, **options)
        if float(moved.lower_bound) < float(best.lower_bound) + MIN_GAIN:
            break
        best = moved
    fit = fit_gaussian_mixture(x, best.mixture, weight, max_iter=max_iter, tol=tol, **options)
    return replace(fit, mixture=fit.mixture.shift(origin))


def _sample(n_samples, n_clusters, generator):
    """Rows that the search sees: all, in order, where they are few."""
    size = max(SEARCH_ROWS, SEARCH_ROWS_PER_CLUSTER * n_clusters)
    if n_samples <= size:
        return slice(None)
    return torch.randperm(n_samples, generator=generator)[:size].sort().values


# --- Starts ----------------------------------------------------------------------------


def start_resp(x, n_clusters, generator, weight, starts=(), n_init=20):
    """Responsibilities of all starts: those given, then k-means, then k-means++.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred.
    n_clusters : int
    generator : torch.Generator
    weight : Tensor of shape (n,)
    starts : sequence of Mixture
    n_init : int, default=20

    Returns
    -------
    Tensor of shape (n, len(starts) + n_init, K)
    """
    mixtures = [start.map(lambda value: value[None]) for start in starts]
    if n_init:
        centers = plus_plus(x, n_clusters, generator, weight, n_init)
        ends, raw = centers.tensor_split(2)  # the first is longer where they are odd
        mixtures.append(k_means(x, ends, weight, max_iter=30, tol=1e-4).mixture)
        if len(raw):
            mixtures.append(k_means(x, raw, weight, max_iter=0).mixture)
    return torch.cat([_one_hot(log_joint(x, mixture)) for mixture in mixtures], dim=1)


def _one_hot(joint):
    labels = joint.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(joint).scatter_(-1, labels, 1.0)


# --- Race ------------------------------------------------------------------------------


def race(x, start, weight, *, tol=1e-4, **options):
    """A few iterations for all starts, the rest for the best, the best of which is kept.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred.
    start : Mixture or Tensor of shape (n, n_restarts, K)
    weight : Tensor of shape (n,)
    tol : float, default=1e-4
    **options
        Further parameters of `deepmix.gaussian_mixture.fit_gaussian_mixture`.

    Returns
    -------
    MixtureFit
        Fit of the start that ended with the highest likelihood.
    """
    fit = fit_gaussian_mixture(x, start, weight, max_iter=RACE_ITER, tol=0.0, **options)
    kept = -(-len(fit.lower_bound) // RACE_KEPT)
    best = fit.lower_bound.topk(kept).indices
    start = fit.mixture.take(best)
    fit = fit_gaussian_mixture(x, start, weight, max_iter=RACE_MAX_ITER, tol=tol, **options)
    return fit.take(int(fit.lower_bound.argmax()))


# --- Cuts and merges -------------------------------------------------------------------


def cut_and_merge(x, mixture, weight, **options):
    """The best mixture that has one cluster cut and two others merged, or nearly the best.

    Each cluster is cut through its mean, across the directions of largest variance, and each of
    these mixtures has a few iterations; of many clusters those that `largest_cuts` says. Those
    that gain most meet the pairs of clusters that share most rows, and these successors race.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred.
    mixture : Mixture
        One mixture, of three clusters or more.
    weight : Tensor of shape (n,)
    **options
        Further parameters of `deepmix.gaussian_mixture.fit_gaussian_mixture`.

    Returns
    -------
    MixtureFit
        Its likelihood may be lower than that of ``mixture``.
    """
    resp = log_resp(x, mixture).exp()
    n_clusters = resp.shape[1]
    n_cuts = min(MAX_CUTS, n_clusters * min(N_DIRECTIONS, x.shape[1]))
    some = slice(None, None, 1 + len(x) * n_cuts * n_clusters // CUT_NUMBERS)
    start, owner = cuts(x[some], resp[some], mixture, weight[some])
    fit = fit_gaussian_mixture(x[some], start, weight[some], max_iter=CUT_ITER, tol=0.0, **options)
    kept = fit.lower_bound.topk(min(N_MOVES, n_cuts)).indices
    cut = log_resp(x, fit.mixture.take(kept)).exp()
    start = merged(cut, owner[kept], closest_pairs(resp, weight))
    return race(x, start if start.shape[1] else resp[:, None], weight, **options)


def cuts(x, resp, mixture, weight):
    """Responsibilities with one cluster in two, for each cluster and each direction.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    resp : Tensor of shape (n, K)
    mixture : Mixture
    weight : Tensor of shape (n,)

    Returns
    -------
    start : Tensor of shape (n, n_cuts, K + 1)
        The far half is the last cluster.
    owner : Tensor of shape (n_cuts,)
        The cluster that is cut.
    """
    axes = eigh(full_covariances(mixture)).eigenvectors[:, :, -N_DIRECTIONS:].mT
    owner = torch.arange(len(axes), device=x.device).repeat_interleave(axes.shape[1])
    axes = axes.flatten(0, 1)
    score, middle = x @ axes.T, (mixture.means[owner] * axes).sum(dim=1)
    if len(owner) > MAX_CUTS:
        tried = largest_cuts(score - middle, resp[:, owner], weight)
        owner, score, middle = owner[tried], score[:, tried], middle[tried]
    half = resp[:, owner] * (score > middle)
    start = resp[:, None].repeat(1, len(owner), 1)
    start[:, torch.arange(len(owner), device=x.device), owner] -= half
    return torch.cat([start, half[:, :, None]], dim=2), owner


def largest_cuts(score, resp, weight):
    r"""The `MAX_CUTS` cuts across most scatter: weight of the cluster times variance of its scores.

    .. math:: \sum_i w_i \gamma_{ik} s_i^2

    Parameters
    ----------
    score : Tensor of shape (n, n_cuts)
        Coordinate of each row along the direction of a cut, from the mean of the cluster.
    resp : Tensor of shape (n, n_cuts)
        Responsibility for each row of the cluster that is cut.
    weight : Tensor of shape (n,)

    Returns
    -------
    Tensor of shape (MAX_CUTS,)
        In rising order.
    """
    scatter = weight @ (resp * score.square())
    return scatter.topk(MAX_CUTS).indices.sort().values


def closest_pairs(resp, weight):
    r"""Pairs of clusters that share most rows, `N_MOVES` of them, the closest first.

    .. math:: \frac{\sum_i \gamma_{ik} \gamma_{il}}
        {\sqrt{\sum_i \gamma_{ik}^2 \sum_i \gamma_{il}^2}}

    Parameters
    ----------
    resp : Tensor of shape (n, K)
    weight : Tensor of shape (n,)

    Returns
    -------
    Tensor of shape (n_pairs, 2)
    """
    shared = resp.T @ (resp * weight[:, None])
    norm = shared.diagonal().clamp_min(torch.finfo(resp.dtype).tiny).sqrt()
    pairs = torch.triu_indices(len(norm), len(norm), offset=1, device=resp.device)
    cosines = (shared / norm / norm[:, None])[pairs[0], pairs[1]]
    return pairs.T[cosines.topk(min(N_MOVES, len(cosines))).indices]


def merged(resp, owner, pairs):
    """Each pair put together in each mixture, unless one of the two was cut there.

    Parameters
    ----------
    resp : Tensor of shape (n, n_mixtures, K + 1)
    owner : Tensor of shape (n_mixtures,)
        The cluster that was cut.
    pairs : Tensor of shape (n_pairs, 2)

    Returns
    -------
    Tensor of shape (n, n_merged, K)
    """
    number, pair = (pairs != owner[:, None, None]).all(dim=2).nonzero().T
    first, second = pairs[pair].T
    resp = resp[:, number]
    here = torch.arange(len(number), device=resp.device)
    resp[:, here, first] += resp[:, here, second]
    kept = torch.arange(resp.shape[2] - 1, device=resp.device)
    kept = kept + (kept >= second[:, None])
    return resp.gather(2, kept.expand(len(resp), -1, -1))
