"""Where clusters start: k-means++, k-means, samples of rows, and the choice among restarts.

References
----------
.. [1] D. Arthur, S. Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
"""

import math
import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array

from deepmix._torch import inference_batch_size
from deepmix.gaussian_mixture import Mixture, fit_gaussian_mixture
from deepmix.gaussians import squared_distances

# k-means++ holds the distances of as many restarts at once as have this many numbers: 32 MiB in
# float64.
CANDIDATES = 2**22
# Centres are started from a sample of rows of this many numbers (16 MiB in float32), which are all
# rows of most tables and 5,000 rows of MNIST; or from 100 rows for each cluster if that is more.
SAMPLE_BUDGET = 2**22

# --- k-means++ and k-means on tensors --------------------------------------------------


def plus_plus(x, n_clusters, generator, weight=None, n_init=1):
    r"""Rows as centres by k-means++, for several restarts side by side.

    The first is drawn by weight, each further one with probability

    .. math:: p_i \propto w_i \min_k \lVert x_i - \mu_k \rVert^2

    a few times, of which the draw that lowers the inertia most is kept, as in scikit-learn.
    Draws go through the sums of these in the order of the rows: a row of weight two is the same
    as a row that is there twice.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    n_clusters : int
    generator : torch.Generator or RandomState
        A generator on the CPU, so that every device sees the same draws. From a `RandomState` the
        draws are those of `sklearn.cluster.kmeans_plusplus`.
    weight : Tensor of shape (n,) or None
    n_init : int, default=1

    Returns
    -------
    Tensor of shape (n_init, n_clusters, d)
    """
    weight = torch.ones_like(x[:, 0]) if weight is None else weight.to(x)
    n_trials = 2 + int(math.log(n_clusters))
    shape = (n_init, n_clusters, n_trials)
    if isinstance(generator, torch.Generator):
        draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    else:  # one number for the first centre, `n_trials` for each further one
        numbers = generator.random_sample((n_init, 1 + (n_clusters - 1) * n_trials))
        first = np.repeat(numbers[:, :1], n_trials - 1, axis=1)
        draws = torch.from_numpy(np.c_[first, numbers].reshape(shape))
    at_once = max(1, CANDIDATES // (len(x) * n_trials))
    return torch.cat([_plus_plus(x, weight, part) for part in draws.to(x).split(at_once)])


def _plus_plus(x, weight, draws):
    """k-means++ from uniform draws of shape (R, K, n_trials) -> (R, K, d)."""
    restarts = torch.arange(len(draws), device=x.device)
    first = _rows_by_mass(weight.expand(len(draws), -1), draws[:, 0, :1])
    centers = [x[first[:, 0]]]
    nearest = squared_distances(centers[0], x)  # (R, n)
    # One centre follows from those before it: this loop cannot be an axis.
    for trial in draws.unbind(dim=1)[1:]:
        candidates = _rows_by_mass(weight * nearest, trial)
        distances = squared_distances(x[candidates.flatten()], x).view(*candidates.shape, -1)
        distances = torch.minimum(distances, nearest[:, None])
        best = (distances @ weight).argmin(dim=1)
        nearest = distances[restarts, best]
        centers.append(x[candidates[restarts, best]])
    return torch.stack(centers, dim=1)


def _rows_by_mass(mass, uniform):
    """Rows by their mass: (R, n), (R, T) -> (R, T)."""
    cumulative = mass.cumsum(dim=1)
    wanted = uniform * cumulative[:, -1:]
    # From the right: a row without mass is never drawn, but where no row has any.
    return torch.searchsorted(cumulative, wanted, right=True).clamp_max(mass.shape[1] - 1)


def k_means(x, centers, weight=None, max_iter=100, tol=1e-6):
    """Lloyd's algorithm, as hard EM of a mixture with one variance and equal weights.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Centred; an empty cluster goes to the origin.
    centers : Tensor of shape (K, d) or (n_restarts, K, d)
    weight : Tensor of shape (n,) or None
    max_iter : int, default=100
    tol : float, default=1e-6
        EM has converged when ``-(d / 2) * log(inertia)``, the mean log-likelihood up to a constant,
        changes by less than this, in nats.

    Returns
    -------
    MixtureFit
        Mixture of type 'tied_spherical', whose variance is the inertia for each row and feature.
    """
    unit = x.var(dim=0, correction=0).mean().clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    weights = torch.full_like(centers[..., 0], 1 / centers.shape[-2])
    start = Mixture(weights, centers, unit.expand(weights.shape[:-1]), "tied_spherical")
    # Relative to the spread: the variance of rows that lie on their centres must not be zero.
    options = {"hard": True, "equal_weights": True, "reg_covar": 1e-9 * unit}
    return fit_gaussian_mixture(x, start, weight, max_iter=max_iter, tol=tol, **options)


# --- Centres of an estimator ------------------------------------------------------------


def initial_centers(init, X, n_clusters, random_state, sample_weight=None, n_init=1):
    """Choose cluster centres.

    Parameters
    ----------
    init : {'k-means++', 'k-means'}, callable or array-like of shape (n_clusters, n_features)
        ``'k-means'`` runs Lloyd's algorithm from ``'k-means++'``. A callable is called as
        ``init(X, n_clusters, random_state=random_state)``.
    X : ndarray of shape (n_samples, n_features)
    n_clusters : int
    random_state : RandomState
    sample_weight : ndarray of shape (n_samples,) or None
    n_init : int, default=1
        Runs of ``'k-means'``, of which the one of lowest inertia is kept.

    Returns
    -------
    centers : ndarray of shape (n_clusters, n_features)
    """
    if callable(init):
        return check_centers(init(X, n_clusters, random_state=random_state), n_clusters, X.shape[1])
    if not isinstance(init, str):
        return check_centers(init, n_clusters, X.shape[1])
    X, sample_weight = canonical_order(X, sample_weight)
    if not np.all(np.isfinite(X)):
        raise FloatingPointError(
            "The rows that clusters are started from are not finite: training before has diverged. "
            "Lower learning_rate_init, set max_grad_norm, or standardise the data."
        )
    weight = None if sample_weight is None else torch.from_numpy(sample_weight)
    n_init = n_init if init == "k-means" else 1
    starts = plus_plus(torch.from_numpy(X).double(), n_clusters, random_state, weight, n_init)
    starts = starts.numpy().astype(X.dtype)
    if init == "k-means++":
        return starts[0]
    # Squared distances may overflow: the inertia of a run is then infinite.
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        # Fewer distinct rows than clusters: the estimator says so after its own fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        runs = [
            KMeans(n_clusters, init=start, n_init=1).fit(X, sample_weight=sample_weight)
            for start in starts
        ]
    return runs[first_best([run.inertia_ for run in runs])].cluster_centers_


def check_centers(centers, n_clusters, n_features):
    """Validate centres from a user: ndarray of shape (n_clusters, n_features)."""
    centers = check_array(centers, dtype=np.float64, input_name="init")
    if centers.shape != (n_clusters, n_features):
        raise ValueError(
            f"init has shape {centers.shape}; expected (n_clusters, n_features) = "
            f"({n_clusters}, {n_features}). Give one centre for each cluster."
        )
    return centers


def canonical_order(X, sample_weight):
    """Sort rows and drop those of weight zero.

    k-means++ draws by inverse distribution function, so in a fixed order its draws depend
    neither on how the rows were permuted nor on whether a row is repeated or weighted. By value,
    not by bytes: a shift of all rows in the last digit must not change the order.
    """
    if sample_weight is not None:
        X, sample_weight = X[sample_weight > 0], sample_weight[sample_weight > 0]
    order = np.lexsort(X.T)
    return X[order], None if sample_weight is None else sample_weight[order]


# --- Samples and restarts --------------------------------------------------------------


def sample_rows(rows, function, n_clusters, random_state, max_rows=None):
    """Apply ``function`` to a random sample of rows, for `initial_centers`.

    Parameters
    ----------
    rows : Rows
    function : callable
        A batch (B, n_features) -> a batch, for example a standardiser.
    n_clusters : int
        At least 100 rows for each are taken, where there are so many.
    random_state : RandomState
    max_rows : int or None
        None takes as many as make `SAMPLE_BUDGET` numbers.

    Returns
    -------
    X : ndarray of shape (n_sampled, n_features_out)
    sample_weight : ndarray of shape (n_sampled,) or None
    """
    visited = rows.visited
    size = max(max_rows or SAMPLE_BUDGET // rows.n_features, 100 * n_clusters)
    if len(visited) > size:
        chosen = random_state.choice(len(visited), size, replace=False)
        visited = visited[torch.from_numpy(np.sort(chosen))]
    step = inference_batch_size(rows.n_features)
    with torch.inference_mode():
        X = torch.cat([function(rows.take(index)).cpu() for index in visited.split(step)])
    weight = None if rows.uniform else rows.weight[visited.to(rows.weight.device)].cpu().double()
    return X.numpy(), None if weight is None else weight.numpy()


def first_best(values):
    """Index of the first value that is the smallest but for rounding.

    Restarts that end in one partition under several names differ by rounding only: which of them
    is kept should not depend on the processor.

    Parameters
    ----------
    values : array-like of shape (n_restarts,)
        Criterion of each restart, the lower the better; it may be infinite.

    Returns
    -------
    int
    """
    values = np.asarray(values, dtype=np.float64)
    best = values.min()
    slack = 1e-6 * abs(best) if np.isfinite(best) else 0.0
    return int(np.argmax(values <= best + slack))
