"""Partitions compared, matched and merged."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from deepmix.partitions import align, stability


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


def test_a_partition_by_itself_and_one_of_one_cluster_are_stable():
    assert stability(table_of([np.array([0, 1, 1])], np.ones(3))).tolist() == [1.0]
    assert stability(table_of([np.zeros(3, int)] * 2, np.ones(3))).tolist() == [1.0, 1.0]


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
