"""The mixture of given codes: its starts, its moves, and that it finds what is there."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from deepmix.gaussian_mixture import (
    Mixture,
    fit_gaussian_mixture,
    log_joint,
    log_resp,
    maximize,
    mixture_statistics,
)
from deepmix.mixture.dcan import mixture_search
from deepmix.mixture.dcan.mixture_search import (
    closest_pairs,
    covariance_type_for,
    cut_and_merge,
    cuts,
    merged,
    race,
    search_mixture,
    start_resp,
)


def generator():
    return torch.Generator().manual_seed(0)


def search(X, k=4, weight=None, **options):
    weight = None if weight is None else torch.tensor(weight)
    return search_mixture(torch.tensor(X), k, generator(), weight, **{"n_init": 6, **options})


def m_step(x, resp, reg_covar, covariance_type="full"):
    statistics = mixture_statistics(x, resp, covariance_type)
    return maximize(statistics, covariance_type, reg_covar)


def labels_of(X, fit):
    return log_joint(torch.tensor(X), fit.mixture).argmax(dim=1).numpy()


def uniform(x):
    return torch.full_like(x[:, 0], 1 / len(x))


def one_hot(labels, k):
    return torch.nn.functional.one_hot(torch.as_tensor(labels), k).double()


# --- The search ---


def test_the_search_finds_blobs_far_from_the_origin(blobs):
    X, y = blobs
    fit = search(X + 100)
    assert adjusted_rand_score(y, labels_of(X + 100, fit)) == 1.0
    expected = [X[y == k].mean(axis=0) + 100 for k in range(4)]
    distances = np.linalg.norm(fit.mixture.means.numpy()[:, None] - expected, axis=2)
    assert distances.min(axis=1).max() < 0.01


def test_more_starts_and_moves_are_not_less_likely(overlapping):
    X = overlapping[0]
    options = {"n_moves": 0, "tol": 1e-8, "max_iter": 500}
    one, many = (search(X, n_init=n, **options).lower_bound for n in (1, 12))
    moves = search(X, **{**options, "n_init": 1, "n_moves": 5}).lower_bound
    assert float(many) >= float(one) - 1e-6
    assert float(moves) >= float(one) - 1e-6


def test_the_search_takes_no_notice_of_units(overlapping):
    X = overlapping[0]
    one, other = search(X), search(1000 * X)
    np.testing.assert_array_equal(labels_of(X, one), labels_of(1000 * X, other))
    shift = X.shape[1] * np.log(1000)
    assert float(one.lower_bound) == pytest.approx(float(other.lower_bound) + shift, rel=1e-6)


def test_weights_in_the_search_are_repetitions(overlapping):
    X = overlapping[0]
    weight = (np.arange(len(X)) % 3).astype(float)
    weighted = search(X, weight=weight)
    repeated = search(np.repeat(X, weight.astype(int), axis=0))
    torch.testing.assert_close(weighted.mixture.means, repeated.mixture.means)
    torch.testing.assert_close(weighted.lower_bound, repeated.lower_bound)


def test_the_search_of_a_sample_ends_with_all_rows(blobs):
    X, y = np.tile(blobs[0], (60, 1)), np.tile(blobs[1], 60)
    assert len(X) > 10_000
    fit = search(X)
    assert adjusted_rand_score(y, labels_of(X, fit)) == 1.0
    np.testing.assert_allclose(fit.mixture.weights, 0.25)


def test_a_given_start_counts(blobs):
    X, y = blobs
    x = torch.tensor(X)
    tracked = m_step(x, one_hot(y, 4), 0.01, "tied_spherical")
    fit = search(X, n_init=0, starts=[tracked], n_moves=0)
    np.testing.assert_array_equal(labels_of(X, fit), y)  # the names of its clusters too


@pytest.mark.parametrize("covariance_type", ["tied", "diag", "spherical", "tied_spherical"])
def test_the_search_goes_for_every_type_of_covariance(covariance_type, blobs):
    X, y = blobs
    fit = search(X, covariance_type=covariance_type)
    assert fit.mixture.covariance_type == covariance_type
    assert adjusted_rand_score(y, labels_of(X, fit)) == 1.0


def test_auto_is_full_where_rows_are_enough_and_features_few():
    assert covariance_type_for(1500, 10, 10) == "full"
    assert covariance_type_for(1499, 10, 10) == "tied"
    assert covariance_type_for(10**6, 10, 17) == "tied"


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 6])
def test_the_search_outlives_poor_data(n_clusters):
    X = np.random.default_rng(0).normal(size=(30, 3))
    for data in (X * [1, 1, 0], np.ones((30, 3)), X[:2], X[:1]):
        fit = search(data, n_clusters)
        assert torch.isfinite(fit.lower_bound)
        assert torch.isfinite(fit.mixture.means).all()


# --- Starts and race ---


def test_starts_are_partitions(overlapping):
    x = torch.tensor(overlapping[0])
    resp = start_resp(x, 4, generator(), uniform(x), n_init=5)
    assert resp.shape == (len(x), 5, 4)
    assert set(resp.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(resp.sum(dim=2), torch.ones(len(x), 5).double())
    assert (resp.sum(dim=0) > 0).all()


def test_the_race_keeps_the_likeliest(overlapping):
    x = torch.tensor(overlapping[0])
    x = x - x.mean(dim=0)
    start = start_resp(x, 4, generator(), uniform(x), n_init=4)
    # One in four goes on: the one that leads after ten iterations.
    early = fit_gaussian_mixture(x, start, max_iter=10, tol=0.0)
    leader = early.mixture.take(int(early.lower_bound.argmax()))
    expected = fit_gaussian_mixture(x, leader, max_iter=200, tol=1e-4)
    got = race(x, start, uniform(x))
    torch.testing.assert_close(got.lower_bound, expected.lower_bound)
    torch.testing.assert_close(got.mixture.means, expected.mixture.means)


# --- Cuts and merges ---


def test_cuts_part_each_cluster_and_leave_the_others(overlapping):
    x = torch.tensor(overlapping[0])
    mixture = m_step(x, one_hot(overlapping[1], 4), 0.01)
    resp = log_resp(x, mixture).exp()
    start, owner = cuts(x, resp, mixture, uniform(x))
    assert start.shape == (len(x), 8, 5)
    assert owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, k in enumerate(owner.tolist()):
        others = [j for j in range(4) if j != k]
        torch.testing.assert_close(start[:, i, others], resp[:, others])
        torch.testing.assert_close(start[:, i, k] + start[:, i, 4], resp[:, k])
        assert (start[:, i, k] * start[:, i, 4]).max() == 0
        assert start[:, i, 4].sum() > 0.3 * resp[:, k].sum()


def test_of_many_clusters_those_of_most_scatter_are_cut(overlapping, monkeypatch):
    x = torch.tensor(overlapping[0])
    mixture = m_step(x, one_hot(overlapping[1], 4), 0.01)
    resp, weight = log_resp(x, mixture).exp(), torch.arange(1.0, 301).double()
    all_starts, all_owners = cuts(x, resp, mixture, weight)
    axes = torch.linalg.eigh(mixture.covariances).eigenvectors
    scatter = []
    for k in range(4):
        for axis in axes[k].T[-2:]:
            score = (x - mixture.means[k]) @ axis
            scatter.append(float((weight * resp[:, k] * score**2).sum()))
    monkeypatch.setattr(mixture_search, "MAX_CUTS", 3)
    expected = np.sort(np.argsort(scatter)[-3:])
    starts, owners = cuts(x, resp, mixture, weight)
    torch.testing.assert_close(starts, all_starts[:, expected])
    assert owners.tolist() == all_owners[expected].tolist()


@pytest.mark.parametrize("n_clusters", [17, 40])
def test_the_number_of_cuts_does_not_grow_with_that_of_clusters(n_clusters, overlapping):
    x = torch.tensor(overlapping[0])
    labels = np.arange(len(x)) % n_clusters
    mixture = m_step(x, one_hot(labels, n_clusters), 0.01)
    start, owner = cuts(x, log_resp(x, mixture).exp(), mixture, uniform(x))
    assert start.shape == (len(x), mixture_search.MAX_CUTS, n_clusters + 1)
    assert len(owner) == mixture_search.MAX_CUTS
    moved = cut_and_merge(x, mixture, uniform(x), reg_covar=0.01)
    assert moved.mixture.means.shape == (n_clusters, x.shape[1])


def test_the_closest_pairs_are_those_that_share_rows():
    resp = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    weight = np.arange(50.0)
    pairs = closest_pairs(torch.tensor(resp), torch.tensor(weight))

    def cosine(i, j):
        a, b = (np.sqrt(weight) * resp[:, k] for k in (i, j))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    expected = sorted(((i, j) for j in range(4) for i in range(j)), key=lambda p: -cosine(*p))
    assert [tuple(pair) for pair in pairs.tolist()] == expected[:4]


def test_merged_are_the_sums_of_pairs_that_were_not_cut():
    resp = np.random.default_rng(0).dirichlet(np.ones(5), (20, 2))
    owner, pairs = np.array([0, 3]), np.array([[0, 1], [1, 2]])
    got = merged(torch.tensor(resp), torch.tensor(owner), torch.tensor(pairs)).numpy()
    assert got.shape == (20, 3, 4)  # the first mixture had cluster 0 cut
    for i, (mixture, (a, b)) in enumerate(((0, (1, 2)), (1, (0, 1)), (1, (1, 2)))):
        one = resp[:, mixture].copy()
        one[:, a] += one[:, b]
        np.testing.assert_allclose(got[:, i], np.delete(one, b, axis=1))


def test_a_cut_and_a_merge_lead_out_of_a_poor_optimum(blobs):
    X, y = blobs
    x = torch.tensor(X - X.mean(axis=0))
    # Two blobs in one cluster, and one blob in two.
    poor = np.select([y <= 1, (y == 2) & (np.arange(len(y)) % 2 == 0), y == 2], [0, 1, 2], 3)
    start = fit_gaussian_mixture(x, one_hot(poor, 4), reg_covar=1e-3)
    assert adjusted_rand_score(y, log_joint(x, start.mixture).argmax(dim=1)) < 0.9
    moved = cut_and_merge(x, start.mixture, uniform(x), reg_covar=1e-3)
    assert float(moved.lower_bound) > float(start.lower_bound) + 0.1
    assert adjusted_rand_score(y, log_joint(x, moved.mixture).argmax(dim=1)) == 1.0
    assert isinstance(moved.mixture, Mixture)
