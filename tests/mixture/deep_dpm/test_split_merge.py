"""Proposals and the partition that they change, against loops, exhaustive search and limits."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from sklearn.cluster import KMeans

from deepmix._torch import Rows
from deepmix.gaussians import (
    GaussianStatistics,
    NormalInverseWishart,
    hard_statistics,
    log_evidence,
    niw_log_marginal,
)
from deepmix.mixture.deep_dpm.proposals import (
    MIN_HALF,
    Cuts,
    Splitter,
    discriminant,
    disjoint_pairs,
    log_merge_ratio,
    log_split_ratio,
    principal_directions,
    two_means_1d,
)
from deepmix.mixture.deep_dpm.scaled_rows import ScaledRows
from deepmix.mixture.deep_dpm.split_merge import Partition

RTOL = 1e-10


def prior(d=2, scale=0.05, covariance_type="full"):
    shaped = {"full": scale * np.eye(d), "diag": np.full(d, scale), "spherical": d * scale}
    values = (np.zeros(d), 0.01, d + 2.0, shaped[covariance_type])
    return NormalInverseWishart(*(torch.tensor(v, dtype=torch.float64) for v in values))


def data(X, weight=None, function=lambda batch: batch):
    return ScaledRows(Rows(X, torch.device("cpu"), torch.float64, weight), function)


def blobs(sizes, centers, seed=0, spread=0.1):
    draw = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    return np.asarray(centers, float)[y] + spread * draw.normal(size=(len(y), 2)), y


# --- Hastings ratios ---


def log_h_by_hand(first, second, niw, alpha=10.0):
    """Equation of H_s, one cluster at a time."""

    def log_f(x):
        one = torch.ones(len(x), dtype=torch.float64)
        zeros = torch.zeros(len(x), dtype=torch.long)
        return float(
            niw_log_marginal(
                niw, hard_statistics(torch.tensor(x), zeros, one, 1, niw.covariance_type)
            )[0]
        )

    both = np.r_[first, second]
    parts = sum(gammaln(len(x)) + log_f(x) for x in (first, second))
    return np.log(alpha) + parts - gammaln(len(both)) - log_f(both)


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_split_and_merge_ratios_are_those_of_each_cluster_and_each_other(covariance_type):
    X, y = blobs([20, 30, 25, 10], [[0, 0], [1, 0], [0, 1], [2, 2]])
    niw, x, one = prior(covariance_type=covariance_type), torch.tensor(X), torch.ones(85).double()
    halves = hard_statistics(x, torch.tensor(y), one, 4, covariance_type)
    split = log_split_ratio(niw, halves, np.log(10.0))
    for k, (a, b) in enumerate([(0, 1), (2, 3)]):
        assert float(split[k]) == pytest.approx(log_h_by_hand(X[y == a], X[y == b], niw), rel=1e-9)
    pairs, merge = log_merge_ratio(niw, halves, np.log(10.0))
    assert pairs.tolist() == [list(p) for p in itertools.combinations(range(4), 2)]
    for (a, b), value in zip(pairs.tolist(), merge.tolist()):
        assert value == pytest.approx(-log_h_by_hand(X[y == a], X[y == b], niw), rel=1e-9)
    torch.testing.assert_close(merge[[0, 5]], -split, rtol=1e-9, atol=1e-9)


def test_halves_of_few_rows_are_no_split_and_empty_clusters_no_evidence():
    X, _ = blobs([5, 50], [[0, 0], [9, 9]])
    labels = torch.tensor([0] * 5 + [1] * 50)
    statistics = hard_statistics(torch.tensor(X), labels, torch.ones(55).double(), 2)
    assert MIN_HALF == 5
    assert log_split_ratio(prior(), statistics, 0.0).tolist() == [-np.inf]
    three = hard_statistics(torch.tensor(X), labels, torch.ones(55).double(), 3)
    assert float(log_evidence(prior(), three)[2]) == 0.0


# --- Cuts ---


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_in_one_dimension_is_the_best_of_all(seed):
    draw = np.random.default_rng(seed)
    t, labels = np.round(draw.normal(size=60), 1), draw.integers(0, 4, 60)  # with ties
    weight = draw.integers(1, 4, 60).astype(float)
    side = two_means_1d(*(torch.tensor(v) for v in (t, labels, weight)), 5).numpy()
    for k in range(4):
        values, w, s = t[labels == k], weight[labels == k], side[labels == k]

        def within(above, values=values, w=w):
            return sum(
                w[half] @ (values[half] - np.average(values[half], weights=w[half])) ** 2
                for half in (above, ~above)
            )

        best = min(within(values > cut) for cut in np.unique(values)[:-1])
        assert within(s == 1) == pytest.approx(best, rel=1e-9)
        assert values[s == 0].max() < values[s == 1].min()


def test_a_cluster_without_two_values_is_not_cut():
    t = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])
    side = two_means_1d(t, labels, torch.ones(5).double(), 3)
    assert side.tolist() == [0, 0, 0, 0, 1]


def test_principal_directions_are_those_of_each_cluster_with_a_fixed_sign():
    draw = np.random.default_rng(1)
    X, labels = draw.normal(size=(90, 3)) * [1, 3, 2], np.arange(90) % 2
    one = torch.ones(90).double()
    statistics = hard_statistics(torch.tensor(X), torch.tensor(labels), one, 2)
    directions, variance = principal_directions(statistics, 2)
    for k in range(2):
        values = np.linalg.eigvalsh(np.cov(X[labels == k].T, bias=True))[::-1]
        np.testing.assert_allclose(variance[k], values[:2], rtol=1e-9)
        projected = (X[labels == k] @ directions[k].numpy()).var(axis=0)
        np.testing.assert_allclose(projected, values[:2], rtol=1e-9)
    assert torch.all(directions.abs().amax(dim=1) == directions.amax(dim=1))


def test_the_discriminant_of_two_halves_is_fishers():
    X, y = blobs([40, 60], [[0, 0], [1, 2]], spread=0.4)
    one, labels = torch.ones(100).double(), torch.tensor(y)
    niw = prior(scale=1e-9)
    direction, middle = discriminant(hard_statistics(torch.tensor(X), labels, one, 2), niw)
    means = [X[y == k].mean(axis=0) for k in (0, 1)]
    scatter = sum((X[y == k] - means[k]).T @ (X[y == k] - means[k]) for k in (0, 1))
    expected = np.linalg.solve(scatter, means[1] - means[0])
    np.testing.assert_allclose(direction[0], expected, rtol=1e-6)
    assert float(middle[0]) == pytest.approx(expected @ (means[0] + means[1]) / 2, rel=1e-6)


def test_the_better_of_two_cuts_is_taken_cluster_by_cluster():
    labels = torch.tensor([0, 0, 1, 1])

    def cuts(ratio, side, base):
        halves = GaussianStatistics(
            base + torch.arange(4.0), torch.zeros(4, 1), torch.zeros(4, 1, 1)
        )
        return Cuts(torch.tensor(ratio), torch.tensor(side), halves)

    best = cuts([1.0, 5.0], [0, 1, 0, 1], 0).better(cuts([2.0, 4.0], [1, 0, 1, 0], 10), labels)
    assert best.log_ratio.tolist() == [2.0, 5.0]
    assert best.side.tolist() == [1, 0, 0, 1]
    assert best.halves.nk.tolist() == [10.0, 11.0, 2.0, 3.0]


def test_the_splitter_parts_two_long_clusters_side_by_side():
    draw = np.random.default_rng(2)
    X = draw.normal(size=(600, 2)) * [5.0, 0.1] + np.c_[np.zeros(600), np.repeat([0.0, 2.0], 300)]
    labels = torch.zeros(600, dtype=torch.long)
    splitter = Splitter(data(X), prior(), 0.0)
    cuts = splitter(labels, 1)
    assert float(cuts.log_ratio[0]) > 0
    assert len(np.unique(np.c_[cuts.side, np.repeat([0, 1], 300)], axis=0)) == 2
    along = Splitter(data(X), prior(), 0.0, n_directions=1, n_refinements=0)(labels, 1)
    assert float(along.log_ratio[0]) < 0
    k_means = KMeans(2, n_init=1, random_state=0).fit_predict(X)  # cuts across, too
    assert len(np.unique(np.c_[k_means, np.repeat([0, 1], 300)], axis=0)) == 4


def grid_of_sixteen(n_samples=800):
    """Sixteen Gaussians on the points of a square, which no diagonal parts."""
    draw = np.random.default_rng(4)
    y = np.arange(n_samples) % 16
    return np.c_[y // 4, y % 4] + 0.1 * draw.normal(size=(n_samples, 2)), y


def test_the_search_parts_a_square_of_clusters_along_its_sides():
    X, y = grid_of_sixteen()
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    for rows in (X, X @ turn):
        splitter = Splitter(data(rows), prior(), np.log(10.0))
        found = splitter.search(torch.zeros(800, dtype=torch.long), 1)
        assert float(found.log_ratio[0]) > 0
        # No Gaussian of the sixteen is cut through.
        assert len(np.unique(np.c_[found.side, y], axis=0)) == 16


def row_of_clusters(n_clusters, n_samples=200):
    y = np.arange(n_samples) % n_clusters
    noise = 0.05 * np.random.default_rng(9).normal(size=(n_samples, 2))
    return np.c_[y, np.zeros(n_samples)] + noise, y


def test_looking_ahead_finds_what_no_single_cut_does():
    X, y = row_of_clusters(8)
    splitter, labels = Splitter(data(X), prior(), np.log(10.0)), torch.zeros(200, dtype=torch.long)
    cuts = splitter(labels, 1)
    assert float(cuts.log_ratio[0]) < 0
    gain, codes = splitter.look_ahead(labels, cuts)
    assert len(np.unique(np.c_[codes, y], axis=0)) == len(codes.unique()) == 8
    # The gain is that of the posterior.
    assert float(gain[0]) == pytest.approx(
        partition(X, y).score() - partition(X, labels).score(), rel=1e-9
    )


def test_looking_ahead_prunes_as_a_recursion_over_the_cuts_does():
    X, y = blobs([60, 40, 50, 30, 200], [[0, 0], [1, 0], [2, 0], [9, 9], [5, 5]])
    splitter = Splitter(data(X), prior(), np.log(10.0))
    labels = torch.tensor((y > 2).astype(int) + (y > 3))

    def best(members, depth):
        """Gain, and the pieces that it takes."""
        one = torch.zeros(len(X), dtype=torch.long)
        one[members] = 1
        cuts = splitter(one, 2)
        side, ratio = cuts.side.numpy().astype(bool), float(cuts.log_ratio[1])
        parts = [members[~side[members]], members[side[members]]]
        below = [best(p, depth - 1) if depth > 1 else (0.0, [p]) for p in parts if ratio > -np.inf]
        gain = ratio + sum(b[0] for b in below)
        return (gain, below[0][1] + below[1][1]) if gain > 0 else (0.0, [members])

    gain, codes = splitter.look_ahead(labels, splitter(labels, 3))
    for k in range(3):
        members = np.flatnonzero(labels.numpy() == k)
        expected, pieces = best(members, 3)
        assert float(gain[k]) == pytest.approx(expected, rel=1e-9)
        found = {tuple(np.flatnonzero(codes.numpy() == c)) for c in np.unique(codes[members])}
        assert found == {tuple(piece) for piece in pieces}


@pytest.mark.parametrize(
    "draw",
    [lambda d: d.random((5000, 2)), lambda d: d.normal(size=(900, 6))],
    ids=["uniform", "normal"],
)
def test_the_search_does_not_cut_one_cloud(draw):
    X = draw(np.random.default_rng(1))
    found = Splitter(data(X), prior(X.shape[1], 0.5), np.log(10.0)).search(
        torch.zeros(len(X), dtype=torch.long), 1
    )
    assert found.log_ratio.tolist() == [-np.inf]


def test_a_square_of_clusters_is_found_from_one_cluster_and_from_many():
    X, y = grid_of_sixteen()
    for start in (np.zeros(800, int), y, y // 3, y * 2 + np.arange(800) // 16 % 2):
        part = partition(X, start)
        for epoch in range(60):
            part.change(epoch)
        assert part.settled
        assert part.n_clusters == len(np.unique(np.c_[part.labels, y], axis=0)) == 16


def test_splitting_one_gaussian_does_not_pay():
    X = np.random.default_rng(3).normal(size=(5000, 4))
    cuts = Splitter(data(X), prior(4, 5.0), np.log(10.0))(torch.zeros(5000, dtype=torch.long), 1)
    assert float(cuts.log_ratio[0]) < 0


# --- Merges ---


def test_pairs_to_try_are_disjoint_and_the_likeliest_first():
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 3], [0, 3], [1, 3]])
    ratio = torch.tensor([3.0, 5.0, 4.0, -1.0, -3.0, -2.0])
    assert disjoint_pairs(pairs, ratio, 0, set()) == [1]
    assert disjoint_pairs(pairs, ratio, 3, set()) == [1, 5]
    assert disjoint_pairs(pairs, ratio, 3, {(1, 3)}) == [1]
    # A pair that pays is tried again, whatever was refused.
    assert disjoint_pairs(pairs, ratio, 0, {(0, 2)}) == [1]


def partition(X, labels, **options):
    niw, rows = prior(), data(X)
    options = {"max_clusters": None, **options}
    part = Partition(rows, niw, Splitter(rows, niw, np.log(10.0)), **options)
    part.start(torch.as_tensor(labels))
    return part


def test_from_one_cluster_and_from_fragments_the_same_partition_is_reached():
    X, y = blobs([100, 60, 80], [[0, 0], [2, 0], [0, 2]])
    for start in (np.zeros(240, int), y * 2 + np.arange(240) % 2, np.arange(240) % 7):
        part = partition(X, start)
        for epoch in range(30):
            part.change(epoch)
        assert part.settled
        assert part.n_clusters == 3
        assert len(np.unique(np.c_[part.labels, y], axis=0)) == 3


def test_origins_name_the_parents_of_splits_and_the_larger_member_of_merges():
    X, y = blobs([100, 60], [[0, 0], [2, 0]])
    part = partition(X, np.zeros(160, int))
    assert part.change(0).tolist() == [0, 0]
    assert part.n_clusters == 2
    # Two halves of the first blob, the second of them larger, beside the second blob.
    fragments = np.where(y == 1, 0, 1 + (np.arange(160) > 30))
    part = partition(X, fragments)
    origin = part.change(0)
    assert part.n_clusters == 2
    assert sorted(origin.tolist()) == [0, 2]
    kinds = {row[1] for row in part.proposals}
    assert kinds == {"split", "merge", "exchange"}


def test_two_clusters_that_share_a_class_are_parted_along_the_classes():
    X, y = blobs([100, 100], [[0, 0], [2, 0]])
    # All of the one and a piece of the other, against the rest.
    wrong = np.where((y == 1) & (np.arange(200) > 120), 1, 0)
    part = partition(X, wrong)
    before = part.score()
    part._done.add("split")
    origin = part.change(0)
    assert origin.tolist() == [0, 1]
    assert [row[1] for row in part.proposals if row[-1]] == ["exchange"]
    # Each half keeps the number of the cluster that it holds more of.
    np.testing.assert_array_equal(part.labels, y)
    assert part.score() > before


@pytest.mark.parametrize("move", ["split", "merge"])
def test_a_partition_makes_the_moves_that_it_may(move):
    X, y = blobs([100, 60], [[0, 0], [2, 0]])
    part = partition(X, y * 2 + np.arange(160) % 2)
    part.moves = (move,)
    for epoch in range(10):
        part.change(epoch)
    assert part.settled
    assert {row[1] for row in part.proposals} <= {move, "exchange"}
    assert part.n_clusters == {"split": 4, "merge": 2}[move]


def test_what_merges_undo_is_not_done_again(monkeypatch):
    # Merges that always pay undo each look ahead: the next must reach a higher posterior.
    X, _ = row_of_clusters(8)
    part = partition(X, np.zeros(200, int))

    def union(epoch):
        if part.n_clusters == 1:
            part._done.add("merge")
            return None
        return torch.zeros(200, dtype=torch.long), torch.zeros(1, dtype=torch.long)

    monkeypatch.setattr(part, "_merge", union)
    numbers = []
    for epoch in range(10):
        part.change(epoch)
        numbers.append(part.n_clusters)
    assert part.settled
    assert max(numbers) == 8
    assert numbers[-1] == 1


def test_no_split_goes_beyond_max_clusters():
    X, _ = blobs([50] * 4, [[0, 0], [4, 0], [0, 4], [4, 4]])
    part = partition(X, np.zeros(200, int), max_clusters=3)
    for epoch in range(10):
        part.change(epoch)
    assert part.n_clusters <= 3


def test_a_proposal_of_a_low_ratio_is_accepted_at_its_rate():
    X, _ = blobs([50], [[0, 0]])
    generator = torch.Generator().manual_seed(0)
    part = partition(X, np.zeros(50, int), generator=generator)
    log_ratio = torch.full((20_000,), np.log(0.3), dtype=torch.float64)
    assert float(part._accepts(log_ratio).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert not partition(X, np.zeros(50, int))._accepts(log_ratio).any()


def test_empty_clusters_are_dropped():
    X, y = blobs([50, 50, 50], [[0, 0], [2, 0], [0, 2]])
    part = partition(X, y)
    part.labels = torch.tensor(np.where(y == 1, 2, y))
    assert part.drop_empty().tolist() == [0, 2]
    assert part.n_clusters == len(part.mixture.means) == 2
    assert float(part.mixture.weights.sum()) == pytest.approx(1.0, rel=RTOL)
    assert part.labels.unique().tolist() == [0, 1]
