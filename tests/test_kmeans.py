"""k-means++, k-means and the centres of estimators; samples of rows; the first of the best."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.utils import check_random_state

from deepmix import kmeans
from deepmix._torch import Rows
from deepmix.gaussian_mixture import log_joint
from deepmix.kmeans import (
    canonical_order,
    check_centers,
    first_best,
    initial_centers,
    k_means,
    plus_plus,
    sample_rows,
)

# --- On tensors ---


def test_hard_em_with_one_variance_and_equal_weights_is_k_means(overlapping):
    X = overlapping[0] - overlapping[0].mean(axis=0)
    centers = X[[0, 50, 100, 150]]
    expected = KMeans(4, init=centers, n_init=1, tol=0).fit(X)
    fit = k_means(torch.tensor(X), torch.tensor(centers), tol=1e-12)
    np.testing.assert_allclose(fit.mixture.means, expected.cluster_centers_, rtol=1e-9)
    assert float(fit.mixture.covariances) == pytest.approx(expected.inertia_ / X.size, rel=1e-6)
    labels = log_joint(torch.tensor(X), fit.mixture).argmax(dim=1)
    np.testing.assert_array_equal(labels, expected.labels_)


def seeds_of(X, k=4, weight=None, n_init=3):
    weight = None if weight is None else torch.tensor(weight)
    generator = torch.Generator().manual_seed(0)
    return plus_plus(torch.tensor(X), k, generator, weight, n_init)


def test_plus_plus_takes_different_rows_of_the_data(overlapping):
    X = overlapping[0]
    centers = seeds_of(X)
    assert centers.shape == (3, 4, X.shape[1])
    for c in centers.numpy():
        assert all(np.any(np.all(row == X, axis=1)) for row in c)
        assert len(np.unique(c, axis=0)) == 4
    assert len(np.unique(centers.reshape(3, -1), axis=0)) == 3


def test_plus_plus_takes_a_row_of_each_blob(blobs):
    X, y = blobs
    for centers in seeds_of(X, n_init=20).numpy():
        nearest = np.linalg.norm(centers[:, None] - X, axis=2).argmin(axis=1)
        assert sorted(y[nearest]) == [0, 1, 2, 3]


def test_plus_plus_takes_weights_as_repetitions_and_never_a_weight_of_zero(overlapping):
    X = overlapping[0]
    weight = (np.arange(len(X)) % 3).astype(float)
    got = seeds_of(X, weight=weight)
    np.testing.assert_array_equal(got, seeds_of(np.repeat(X, weight.astype(int), axis=0)))
    unseen = {tuple(row) for row in X[weight == 0]}
    assert not unseen & {tuple(row) for row in got.flatten(0, 1).tolist()}


def test_plus_plus_in_parts_is_plus_plus(overlapping, monkeypatch):
    X = overlapping[0]
    whole = seeds_of(X)
    monkeypatch.setattr(kmeans, "CANDIDATES", 1)
    np.testing.assert_array_equal(seeds_of(X), whole)


def test_plus_plus_outlives_fewer_distinct_rows_than_clusters():
    X = np.repeat([[0.0, 1.0], [2.0, 3.0]], 5, axis=0)
    centers = seeds_of(X)
    assert torch.isfinite(centers).all()
    assert torch.isfinite(k_means(torch.tensor(X), centers).mixture.means).all()


def centers_of(init, X, k=4, seed=0, weight=None, **options):
    return initial_centers(init, X, k, check_random_state(seed), weight, **options)


# --- Centres ---


@pytest.mark.parametrize("init", ["k-means++", "k-means"])
def test_centres_depend_neither_on_order_nor_on_repetition(init, overlapping):
    X, _ = overlapping
    generator = np.random.default_rng(0)
    weight = generator.integers(0, 4, len(X)).astype(float)
    order = generator.permutation(len(X))
    expected = centers_of(init, X, weight=weight)
    permuted = centers_of(init, X[order], weight=weight[order])
    repeated = centers_of(init, np.repeat(X, weight.astype(int), axis=0))
    np.testing.assert_allclose(permuted, expected, rtol=1e-10)
    np.testing.assert_allclose(repeated, expected, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_plus_plus_of_a_random_state_is_that_of_scikit_learn(k, overlapping):
    X, weight = overlapping[0], np.arange(300) % 3.0
    mine, theirs = (check_random_state(3) for _ in range(2))
    got = plus_plus(torch.tensor(X), k, mine, torch.tensor(weight), n_init=2)
    for centers in got:
        expected, _ = kmeans_plusplus(X, k, sample_weight=weight, random_state=theirs)
        np.testing.assert_array_equal(centers, expected)
    assert mine.random_sample() == theirs.random_sample()  # and it goes on from the same place


def test_k_means_ends_where_lloyds_algorithm_stays(blobs):
    X, _ = blobs
    centers = centers_of("k-means", X)
    labels = np.linalg.norm(X[:, None] - centers, axis=2).argmin(axis=1)
    means = [X[labels == k].mean(axis=0) for k in range(4)]
    np.testing.assert_allclose(centers, means, rtol=1e-10)


def test_more_runs_of_k_means_do_not_raise_the_inertia(overlapping):
    X, _ = overlapping

    def inertia(n_init):
        centers = centers_of("k-means", X, k=8, n_init=n_init)
        return KMeans(8, init=centers, n_init=1, max_iter=1).fit(X).inertia_

    # The first of ten runs is the one run: the draws of a random state go on.
    assert inertia(10) <= inertia(1) * (1 + 1e-12)


def test_a_callable_is_called_as_scikit_learns(blobs):
    X, _ = blobs
    seen = {}

    def first_rows(X, n_clusters, random_state):
        seen.update(random_state=random_state)
        return X[:n_clusters]

    np.testing.assert_array_equal(centers_of(first_rows, X), X[:4])
    assert isinstance(seen["random_state"], np.random.RandomState)


@pytest.mark.parametrize(
    ("centers", "message"),
    [
        (np.zeros((3, 3)), r"init has shape \(3, 3\); expected .* = \(4, 3\)"),
        (np.zeros((4, 2)), r"init has shape \(4, 2\); expected .* = \(4, 3\)"),
        (np.zeros(3), "Expected 2D array"),
        (np.full((4, 3), np.nan), "init contains NaN"),
    ],
)
def test_centres_that_cannot_be_are_refused(centers, message):
    with pytest.raises(ValueError, match=message):
        check_centers(centers, 4, 3)


def test_the_canonical_order_is_by_value_and_drops_weight_zero():
    X = np.array([[2.0, 0.0], [1.0, 5.0], [1.0, -5.0], [9.0, 9.0]])
    ordered, weight = canonical_order(X, np.array([1.0, 2.0, 3.0, 0.0]))
    np.testing.assert_array_equal(sorted(map(tuple, ordered)), sorted(map(tuple, X[:3])))
    np.testing.assert_array_equal(sorted(weight), [1.0, 2.0, 3.0])
    again, _ = canonical_order(X[[1, 0, 2]], None)
    np.testing.assert_array_equal(again, ordered)


# --- Samples of rows ---


def test_all_rows_are_taken_where_they_are_few(blobs):
    X, _ = blobs
    weight = np.arange(len(X)) % 3.0
    rows = Rows(X, torch.device("cpu"), torch.float64, weight)
    got, got_weight = sample_rows(rows, lambda x: 2 * x, 4, check_random_state(0))
    np.testing.assert_array_equal(got, 2 * X[weight > 0])
    np.testing.assert_array_equal(got_weight, weight[weight > 0])


def test_a_sample_is_drawn_where_rows_are_many():
    X = np.arange(1000.0)[:, None]
    rows = Rows(X, torch.device("cpu"), torch.float64)
    got, weight = sample_rows(rows, lambda x: x, 4, check_random_state(0), max_rows=10)
    assert weight is None
    assert len(np.unique(got)) == len(got) == 400
    again, _ = sample_rows(rows, lambda x: x, 4, check_random_state(0), max_rows=10)
    np.testing.assert_array_equal(got, again)


def test_the_first_of_the_best_is_chosen_whatever_rounding_says():
    assert first_best([3.0, 1.0 + 1e-9, 1.0, 2.0]) == 1
    assert first_best([3.0, -1.0 + 1e-9, -1.0]) == 1
    assert first_best([3.0, 1.1, 1.0]) == 2
    assert first_best([np.inf, 5.0]) == 1
    assert first_best([np.inf, np.inf]) == 0
    assert first_best([0.0, -1e-30]) == 1
