"""Partitions of the same rows: their agreement, and matching and merging of their clusters."""

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from scipy.stats import entropy
from sklearn.neighbors import NearestNeighbors

# --- Agreement -------------------------------------------------------------------------


def stability(table):
    r"""Mean normalised mutual information of each partition with the others.

    .. math:: s_r = \frac{1}{R - 1} \sum_{t \neq r} \frac{2 I(r, t)}{H(r) + H(t)}

    Parameters
    ----------
    table : ndarray of shape (R, K, R, K)
        Weight of the rows in cluster k of partition r and cluster l of partition t at
        ``[r, k, t, l]``.

    Returns
    -------
    ndarray of shape (R,)
        A single partition has stability one.
    """
    n_partitions = len(table)
    entropies = [entropy(np.diag(table[r, :, r])) for r in range(n_partitions)]
    agreement = np.ones((n_partitions, n_partitions))
    for r in range(n_partitions):
        for t in range(r):
            total = entropies[r] + entropies[t]
            shared = total - entropy(table[r, :, t].ravel())
            # Two partitions into one cluster do not count as agreeing: restarts collapse alike.
            agreement[r, t] = agreement[t, r] = 2 * shared / total if total > 0 else 0.0
    if n_partitions == 1:
        return agreement[0]
    return (agreement.sum(axis=1) - 1) / (n_partitions - 1)


def align(table, reference):
    """Permutations that number the clusters of all partitions as one of them does.

    Parameters
    ----------
    table : ndarray of shape (R, K, R, K)
        As in `stability`.
    reference : int
        The partition whose numbers stay.

    Returns
    -------
    ndarray of shape (R, K, K)
        1 where a cluster of a partition is matched to one of the reference, else 0; the matching
        has the largest weight (Kuhn's linear assignment).
    """
    identity = np.eye(table.shape[1])
    matched = (linear_sum_assignment(part[:, reference], maximize=True)[1] for part in table)
    return np.stack([identity[clusters] for clusters in matched])


# --- Clusters and gaps -----------------------------------------------------------------


def neighbour_graph(X):
    r"""Graph of nearest neighbours in which dense and thin regions weigh alike.

    .. math:: w_{ij} = \exp(-\lVert x_i - x_j \rVert^2 / (s_i s_j))

    for the 10 to 20 nearest neighbours of each row, made symmetric; the scale :math:`s_i` is the
    distance of row i to its neighbour of half that rank (Zelnik-Manor and Perona, 2004).

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)

    Returns
    -------
    csr_array of shape (n_samples, n_samples)
        Symmetric edge weights, which sum to one.
    """
    n_samples = len(X)
    if n_samples == 1:
        return sp.csr_array((1, 1))
    n_neighbors = min(int(np.clip(n_samples // 10, 10, 20)), n_samples - 1)
    distances, neighbors = NearestNeighbors(n_neighbors=n_neighbors).fit(X).kneighbors()
    scale = np.maximum(distances[:, max(0, n_neighbors // 2 - 1)], np.finfo(float).tiny ** 0.25)
    weights = np.exp(-(distances**2) / (scale[:, None] * scale[neighbors]))
    starts = np.arange(0, neighbors.size + 1, n_neighbors)
    graph = sp.csr_array((weights.ravel(), neighbors.ravel(), starts), (n_samples, n_samples))
    return (graph + graph.T) / (2 * max(weights.sum(), np.finfo(float).tiny))


def pair_weights(graph, labels, n_clusters):
    """Weight of the edges between two clusters, for all pairs of them.

    Parameters
    ----------
    graph : sparse array of shape (n_samples, n_samples)
    labels : ndarray of shape (n_samples,)
    n_clusters : int

    Returns
    -------
    ndarray of shape (n_clusters, n_clusters)
    """
    rows = np.arange(len(labels))
    member = sp.csr_array((np.ones(len(labels)), (rows, labels)), (len(labels), n_clusters))
    return (member.T @ graph @ member).toarray()


def merge(weights, sizes, n_clusters):
    """Merge clusters by average linkage: each time the pair of the largest mean edge.

    Parameters
    ----------
    weights : ndarray of shape (P, P)
        See `pair_weights`.
    sizes : ndarray of shape (P,)
        Share of the rows in each cluster.
    n_clusters : int
        Number of clusters to keep.

    Returns
    -------
    ndarray of shape (P,)
        Merged cluster of each original one, from 0 to ``n_clusters - 1``.
    """
    weights, sizes = weights.copy(), sizes.copy()
    groups = [[piece] for piece in range(len(sizes))]
    while len(groups) > n_clusters:
        linkage = weights / np.outer(sizes, sizes)
        linkage[np.tril_indices(len(sizes))] = -1
        first, second = np.unravel_index(linkage.argmax(), linkage.shape)
        weights[first] += weights[second]
        weights[:, first] += weights[:, second]
        weights = np.delete(np.delete(weights, second, axis=0), second, axis=1)
        sizes[first] += sizes[second]
        sizes = np.delete(sizes, second)
        groups[first] += groups.pop(second)
    clusters = np.empty(sum(map(len, groups)), dtype=int)
    for cluster, pieces in enumerate(groups):
        clusters[pieces] = cluster
    return clusters


def normalized_cut(weights):
    r"""Mean share of a cluster's edges that leave it: 0 if gaps part all clusters, near 1 if none.

    .. math:: \frac1K \sum_k \Big( 1 - A_{kk} \big/ \sum_l A_{kl} \Big)

    Parameters
    ----------
    weights : ndarray of shape (K, K)
        See `pair_weights`.

    Returns
    -------
    float
        The cut, to which an empty cluster counts as one without a gap.
    """
    volume = weights.sum(axis=1)
    kept = np.divide(np.diag(weights), volume, out=np.zeros(len(weights)), where=volume > 0)
    return float(np.mean(1 - kept))
