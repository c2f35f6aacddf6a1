"""Where training starts: centres by k-means and its kin."""

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils import check_array

from deepmix._torch import (
    inference_batch_size,
)
from deepmix.gaussian_mixture import fit_gaussian_mixture

# Numbers in the sample of rows from which centres are started: 16 MiB in float32, all the
# rows of most tables, 5,000 rows of MNIST.
SAMPLE_BUDGET = 2**22

# --- Choice among restarts ---------------------------------------------------------------


def first_best(values):
    """Index of the first value that is the smallest but for rounding.

    Restarts that end in one partition under several names differ by rounding only: which of them
    is kept should not depend on the processor.

    Parameters
    ----------
    values : array-like of shape (n_restarts,)
        Of which some may be infinite.

    Returns
    -------
    int
    """
    values = np.asarray(values, dtype=np.float64)
    best = values.min()
    slack = 1e-6 * abs(best) if np.isfinite(best) else 0.0
    return int(np.argmax(values <= best + slack))


# --- Centres ---------------------------------------------------------------------------


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
    with np.errstate(over="ignore", invalid="ignore"):  # of squares; what comes of it is looked at
        if init == "k-means++":
            return _plus_plus(X, n_clusters, random_state, sample_weight)
        runs = [_lloyd(X, n_clusters, random_state, sample_weight) for _ in range(n_init)]
    return runs[first_best([run.inertia_ for run in runs])].cluster_centers_


def _plus_plus(X, n_clusters, random_state, sample_weight):
    centers, _ = kmeans_plusplus(
        X, n_clusters, sample_weight=sample_weight, random_state=random_state
    )
    return centers


def _lloyd(X, n_clusters, random_state, sample_weight):
    start = _plus_plus(X, n_clusters, random_state, sample_weight)
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: the estimator says so after its own fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(n_clusters, init=start, n_init=1).fit(X, sample_weight=sample_weight)


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


def best_mixture(X, n_clusters, random_state, sample_weight=None, n_init=5):
    """Full-covariance mixture of highest likelihood out of runs of EM from k-means.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
    n_clusters : int
    random_state : RandomState
    sample_weight : ndarray of shape (n_samples,) or None
    n_init : int, default=5

    Returns
    -------
    means : Tensor of shape (n_clusters, n_features)
    within : Tensor of shape (n_features, n_features)
        Mean covariance of the clusters.
    """
    origin = np.average(X, axis=0, weights=sample_weight)
    x = torch.from_numpy(X - origin).double()
    weight = None if sample_weight is None else torch.from_numpy(sample_weight)
    # Codes may have dead dimensions: relative to their spread, not to one.
    reg_covar = 1e-3 * float(np.average(x.square().mean(dim=1), weights=sample_weight)) or 1.0
    runs = []
    for _ in range(n_init):
        centers = initial_centers("k-means", X, n_clusters, random_state, sample_weight)
        nearest = pairwise_distances_argmin(X, centers)
        resp = torch.nn.functional.one_hot(torch.from_numpy(nearest), n_clusters).double()
        runs.append(fit_gaussian_mixture(x, resp, weight, reg_covar=reg_covar))
    best = runs[first_best([-float(run.lower_bound) for run in runs])].parameters
    within = torch.einsum("k,kij->ij", best.weights, best.covariances)
    return best.means + torch.from_numpy(origin), within
