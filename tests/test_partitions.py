"""Partitions compared, matched and merged."""

from itertools import permutations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import normalized_mutual_info_score

from deepmix.partitions import (
    align,
    merge,
    neighbour_graph,
    normalized_cut,
    pair_weights,
    stability,
)


def partitions(n=60, k=4, r=5, seed=0):
    """Partitions that mostly agree, under names of their own, and weights."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, k, n)
    found = [np.where(draw.random(n) < 0.3, draw.integers(0, k, n), truth) for _ in range(r)]
    names = [draw.permutation(k) for _ in range(r)]
    return [name[labels] for name, labels in zip(names, found)], draw.integers(1, 4, n)


def table_of(labels, weight, k=4):
    """By a loop over rows."""
    table = np.zeros((len(labels), k, len(labels), k))
    for i, w in enumerate(weight):
        for r, first in enumerate(labels):
            for t, second in enumerate(labels):
                table[r, first[i], t, second[i]] += w
    return table


def test_stability_is_the_mean_nmi_with_the_others():
    labels, weight = partitions()
    repeated = [np.repeat(row, weight) for row in labels]
    expected = [
        np.mean([normalized_mutual_info_score(a, b) for j, b in enumerate(repeated) if j != i])
        for i, a in enumerate(repeated)
    ]
    np.testing.assert_allclose(stability(table_of(labels, weight)), expected, rtol=1e-12)


def test_a_partition_by_itself_is_stable_and_those_of_one_cluster_do_not_agree():
    assert stability(table_of([np.array([0, 1, 1])], np.ones(3))).tolist() == [1.0]
    assert stability(table_of([np.zeros(3, int)] * 2, np.ones(3))).tolist() == [0.0, 0.0]


def test_the_most_stable_partition_is_the_one_in_the_middle():
    truth = np.arange(40) % 4
    noisy = [np.where(np.arange(40) % 7 == i, 0, truth) for i in range(4)]
    assert np.argmax(stability(table_of([*noisy, truth], np.ones(40)))) == 4


def test_alignment_is_the_best_of_all_permutations():
    labels, weight = partitions()
    table = table_of(labels, weight)
    found = align(table, reference=2)
    for r, matrix in enumerate(found):
        assert sorted(map(tuple, matrix)) == sorted(map(tuple, np.eye(4)))
        kept = weight @ (matrix[labels[r]].argmax(axis=1) == labels[2])
        best = max(weight @ (np.array(p)[labels[r]] == labels[2]) for p in permutations(range(4)))
        assert kept == pytest.approx(best)
    np.testing.assert_array_equal(found[2], np.eye(4))


# --- Clusters and gaps ---


def naive_graph(X, n_neighbors):
    """Zelnik-Manor and Perona by loops, on the nearest neighbours."""
    n = len(X)
    weights = np.zeros((n, n))
    order = [sorted((np.linalg.norm(X[i] - X[j]), j) for j in range(n) if j != i) for i in range(n)]
    scale = [order[i][n_neighbors // 2 - 1][0] for i in range(n)]
    for i in range(n):
        for distance, j in order[i][:n_neighbors]:
            weights[i, j] = np.exp(-(distance**2) / (scale[i] * scale[j]))
    weights = (weights + weights.T) / 2
    return weights / weights.sum()


@pytest.mark.parametrize(("n", "n_neighbors"), [(60, 10), (150, 15), (230, 20)])
def test_the_graph_equals_a_naive_one(n, n_neighbors):
    X = np.random.default_rng(0).normal(size=(n, 3)) * [1.0, 10.0, 0.1]
    expected = naive_graph(X, n_neighbors)
    np.testing.assert_allclose(neighbour_graph(X).toarray(), expected, rtol=1e-9, atol=1e-15)


def test_the_graph_does_not_see_units_and_takes_repeated_and_single_rows():
    X = np.random.default_rng(0).normal(size=(80, 2))
    graph = neighbour_graph(X)
    np.testing.assert_allclose(neighbour_graph(1e6 * X).toarray(), graph.toarray(), rtol=1e-9)
    assert graph.sum() == pytest.approx(1.0)
    assert np.isfinite(neighbour_graph(np.zeros((30, 2))).toarray()).all()
    assert neighbour_graph(X[:1]).shape == (1, 1)
    assert neighbour_graph(X[:2]).sum() == pytest.approx(1.0)


def test_weights_of_pairs_are_sums_over_edges():
    draw = np.random.default_rng(0)
    dense = draw.random((30, 30))
    labels = draw.integers(0, 4, 30)
    expected = np.zeros((5, 5))
    for i in range(30):
        for j in range(30):
            expected[labels[i], labels[j]] += dense[i, j]
    np.testing.assert_allclose(pair_weights(sp.csr_array(dense), labels, 5), expected)


@pytest.mark.parametrize("n_clusters", [1, 3, 7])
def test_merging_is_average_linkage(n_clusters):
    """SciPy's, on the mean edge of two rows as a similarity; pieces of equal size."""
    draw = np.random.default_rng(1)
    weights = draw.random((12, 12))
    weights = weights + weights.T
    clusters = merge(weights, np.full(12, 1 / 12), n_clusters)
    distance = 10 - weights
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance), method="average")
    theirs = fcluster(tree, n_clusters, criterion="maxclust")
    assert sorted(np.unique(clusters)) == list(range(n_clusters))
    assert len(np.unique(theirs)) == n_clusters
    assert len({*zip(clusters.tolist(), theirs.tolist())}) == n_clusters


def test_merging_weighs_edges_by_the_sizes_of_the_pieces():
    # 0 and 1 share more edges than 2 and 3, but of many more rows.
    weights = np.array([[0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=float)
    assert merge(weights, np.array([0.45, 0.45, 0.05, 0.05]), 3).tolist() == [0, 1, 2, 2]
    assert merge(weights, np.full(4, 0.25), 3).tolist() == [0, 0, 1, 2]


def test_the_cut_is_the_share_of_edges_that_leave_a_cluster():
    assert normalized_cut(np.diag([1.0, 2.0, 3.0])) == 0.0
    assert normalized_cut(np.array([[3.0, 1.0], [1.0, 1.0]])) == pytest.approx((0.25 + 0.5) / 2)
    assert normalized_cut(np.array([[1.0, 0.0], [0.0, 0.0]])) == 0.5  # an empty cluster
