"""Centres by k-means and its kin, and autoencoders by reconstruction."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state

from deepmix._torch import Rows
from deepmix.initialization import (
    best_mixture,
    canonical_order,
    check_centers,
    first_best,
    initial_centers,
    sample_rows,
)


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


def test_plus_plus_takes_rows_of_the_data(overlapping):
    X, _ = overlapping
    centers = centers_of("k-means++", X)
    assert all(np.any(np.all(c == X, axis=1)) for c in centers)
    assert len(np.unique(centers, axis=0)) == 4


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


# --- Mixtures ---


def test_the_best_mixture_of_blobs_has_their_means_and_mean_covariance(blobs):
    X, y = blobs
    means, within = best_mixture(X, 4, check_random_state(0))
    expected = np.array([X[y == k].mean(axis=0) for k in range(4)])
    nearest = np.linalg.norm(means.numpy()[:, None] - expected, axis=2)
    assert sorted(nearest.argmin(axis=1)) == [0, 1, 2, 3]
    assert nearest.min(axis=1).max() < 0.01
    pooled = sum(np.mean(y == k) * np.cov(X[y == k].T, ddof=0) for k in range(4))
    reg_covar = 1e-3 * X.var(axis=0).mean()
    np.testing.assert_allclose(within, pooled + reg_covar * np.eye(3), atol=0.01)


def test_the_best_mixture_takes_weights_and_repeats(overlapping):
    X, _ = overlapping
    weight = (np.arange(len(X)) % 3).astype(float)
    weighted = best_mixture(X, 4, check_random_state(0), weight)
    repeated = best_mixture(np.repeat(X, weight.astype(int), axis=0), 4, check_random_state(0))
    for a, b in zip(weighted, repeated):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_best_mixture_outlives_dead_dimensions_and_equal_rows():
    X = np.c_[np.random.default_rng(0).normal(size=(50, 2)), np.zeros(50)].astype(np.float32)
    for data in (X, np.ones((50, 3), np.float32)):
        means, within = best_mixture(data, 3, check_random_state(0))
        assert torch.isfinite(means).all()
        assert torch.linalg.eigvalsh(within).min() > 0


def test_the_first_of_the_best_is_chosen_whatever_rounding_says():
    assert first_best([3.0, 1.0 + 1e-9, 1.0, 2.0]) == 1
    assert first_best([3.0, -1.0 + 1e-9, -1.0]) == 1
    assert first_best([3.0, 1.1, 1.0]) == 2
    assert first_best([np.inf, 5.0]) == 1
    assert first_best([np.inf, np.inf]) == 0
    assert first_best([0.0, -1e-30]) == 1
