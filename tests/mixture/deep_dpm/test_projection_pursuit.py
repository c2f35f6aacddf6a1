"""Directions of least kurtosis against an exhaustive search, a limit and their properties."""

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis

from deepmix._torch import Rows
from deepmix.mixture.deep_dpm.projection_pursuit import great_circle, least_kurtosis, whitening
from deepmix.mixture.deep_dpm.proposals import principal_directions
from deepmix.mixture.deep_dpm.scaled_rows import ScaledRows


def search(X, labels=None, n_directions=2, weight=None):
    """Scores, kurtosis, of rows in clusters."""
    rows = Rows(X, torch.device("cpu"), torch.float64, weight)
    data = ScaledRows(rows, lambda batch: batch)
    labels = torch.zeros(len(data), dtype=torch.long) if labels is None else torch.tensor(labels)
    sums = data.sums(labels, int(labels.max()) + 1, "full")
    whiten = whitening(*principal_directions(sums, X.shape[1]))
    return least_kurtosis(data, labels, sums.first / sums.nk[:, None], whiten, n_directions)


def squares(n_samples=800, seed=0):
    """Four clusters at the corners of a square that stands on one of them."""
    draw = np.random.default_rng(seed)
    corners = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]) + 5.0
    return corners[np.arange(n_samples) % 4] + 0.05 * draw.normal(size=(n_samples, 2))


def test_whitened_rows_have_the_unit_covariance_and_flat_directions_none():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(200, 3)) @ draw.normal(size=(3, 3))
    covariance = np.cov(X.T, bias=True)
    variance, vectors = np.linalg.eigh(covariance)
    variance, vectors = variance[::-1].copy(), vectors[:, ::-1].copy()
    whiten = whitening(torch.tensor(vectors)[None], torch.tensor(variance)[None])[0].numpy()
    np.testing.assert_allclose(whiten.T @ covariance @ whiten, np.eye(3), atol=1e-9)
    variance[2] = 0.0
    flat = whitening(torch.tensor(vectors)[None], torch.tensor(variance)[None])[0]
    assert not flat[:, 2].any()


def test_the_least_kurtosis_of_a_great_circle_is_that_of_a_loop_over_angles():
    draw = np.random.default_rng(1)
    y, u = draw.normal(size=(60, 3)) ** 3, draw.random((60, 3))
    cos, sin = great_circle(torch.tensor(y), torch.tensor(u), lambda v: v.mean(dim=0)[None])
    for q in range(3):
        found = []
        for angle in (np.arange(180) / 180 - 0.5) * np.pi:
            t = y[:, q] * np.cos(angle) + u[:, q] * np.sin(angle)
            found.append(np.mean(t**4) / np.mean(t**2) ** 2)
        t = y[:, q] * float(cos[0, q]) + u[:, q] * float(sin[0, q])
        assert np.mean(t**4) / np.mean(t**2) ** 2 == pytest.approx(min(found), rel=1e-9)


def test_two_dimensions_are_searched_to_the_least_of_all_angles():
    X = squares()
    scores, found = search(X)
    angles = np.linspace(0, np.pi, 2000)
    whole = [kurtosis(X @ [np.cos(a), np.sin(a)], fisher=False) for a in angles]
    assert float(found.min()) == pytest.approx(min(whole), abs=1e-3)
    # Two groups of one size: along a side of the square, not along a diagonal.
    assert float(found.min()) < 1.1
    assert torch.all((scores[:, int(found.argmin())].abs() - 1).abs() < 0.5)


def test_two_groups_in_many_dimensions_are_found_along_their_difference():
    draw = np.random.default_rng(2)
    half = np.repeat([-1.0, 1.0], 500)
    X = draw.normal(size=(1000, 6)) * [9, 8, 7, 1, 1, 1]
    X[:, 4] += 4 * half  # the fourth variance of six
    scores, found = search(X, n_directions=4)
    best = scores[:, int(found.argmin())].numpy()
    assert abs(np.corrcoef(best, half)[0, 1]) > 0.95


def test_neither_units_nor_turns_change_what_is_found():
    draw, X = np.random.default_rng(3), np.c_[squares(seed=3), np.random.default_rng(4).random(800)]
    _, found = search(X, n_directions=3)
    for change in (np.diag([0.1, 1.0, 10.0]), np.linalg.qr(draw.normal(size=(3, 3)))[0]):
        _, other = search(X @ change, n_directions=3)
        assert float(other.min()) == pytest.approx(float(found.min()), abs=0.02)


def test_clusters_are_searched_each_by_itself_and_weights_are_copies():
    X, other = squares(400), np.random.default_rng(5).normal(size=(300, 2))
    both = np.concatenate([X, other]) / 3.0
    _, found = search(both, np.repeat([0, 1], [400, 300]))
    for k, rows in enumerate((X, other)):
        np.testing.assert_allclose(search(rows / 3.0)[1][0], found[k], rtol=1e-6)
    weight = np.random.default_rng(6).integers(0, 3, 300)
    copies = search(np.repeat(other, weight, axis=0))[1]
    np.testing.assert_allclose(search(other, weight=weight.astype(float))[1], copies, rtol=1e-9)


def test_a_gaussian_has_no_direction_of_two_groups():
    _, found = search(np.random.default_rng(7).normal(size=(20_000, 5)), n_directions=4)
    assert float(found.min()) > 2.8


@pytest.mark.parametrize("n_features", [1, 3])
def test_rows_that_are_all_alike_are_searched_without_a_number_that_is_none(n_features):
    scores, found = search(np.ones((10, n_features)), n_directions=n_features)
    assert np.all(np.isfinite(scores.numpy()))
    assert np.all(np.isfinite(found.numpy()))
