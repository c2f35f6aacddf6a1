"""Scaled rows in chunks, and the variance that rounding took from them, against loops."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from deepmix._torch import Rows
from deepmix.gaussians import hard_statistics
from deepmix.mixture.deep_dpm.scaled_rows import ScaledRows, rounding_variance, unrounded


def data(X, weight=None, function=lambda batch: batch):
    return ScaledRows(Rows(X, torch.device("cpu"), torch.float64, weight), function)


# --- Rows ---


@pytest.mark.parametrize("kept", [True, False])
def test_chunks_hold_all_niw_positive_weight_once(monkeypatch, kept):
    monkeypatch.setattr("deepmix.mixture.deep_dpm.scaled_rows.CHUNK", 1)
    monkeypatch.setattr("deepmix.mixture.deep_dpm.scaled_rows.KEPT", 2**25 if kept else 0)
    X = np.random.default_rng(0).normal(size=(1000, 3))
    weight = np.arange(1000) % 3.0
    rows = data(X, weight, lambda batch: 2 * batch)
    assert len(rows.slices) == 3
    np.testing.assert_array_equal(rows.map(lambda x, part: x), 2 * X[weight > 0])
    labels = torch.tensor(np.arange(len(rows)) % 4)
    got = rows.statistics(labels, 4, "full")
    kept_rows = torch.tensor(2 * X[weight > 0])
    expected = hard_statistics(kept_rows, labels, torch.tensor(weight[weight > 0]), 4)
    torch.testing.assert_close(got.second, expected.second)


# --- Rounded values ---


def on_grids(n_samples=300):
    """Hundredths, integers, an indicator, one value, and values on no grid."""
    draw = np.random.default_rng(7)
    hundredths = np.round(draw.normal(size=n_samples), 2)
    return np.c_[
        hundredths,
        draw.poisson(3.0, n_samples),
        5.0 + (draw.random(n_samples) < 0.03),
        np.ones(n_samples),
        draw.normal(size=n_samples),
    ]


def test_the_step_of_a_grid_is_the_one_that_a_loop_over_values_finds():
    X = on_grids()
    for column, variance in zip(X.T, data(X).rounding.tolist()):
        values = np.unique(column)
        gaps = [b - a for a, b in itertools.pairwise(values) if b - a > 1e-6]
        step = min(gaps, default=0.0)
        off = max((abs(gap / step - round(gap / step)) for gap in gaps), default=0.0)
        assert variance == pytest.approx(step**2 / 12 if off < 1e-2 else 0.0, rel=1e-6)


def test_iris_is_in_tenths_of_a_centimetre_in_float32_too():
    X = load_iris().data
    np.testing.assert_allclose(data(X).rounding, np.full(4, 0.01 / 12), rtol=1e-9)
    single = (X.astype(np.float32) - X.mean(axis=0, dtype=np.float32)).astype(float)
    np.testing.assert_allclose(data(single).rounding, np.full(4, 0.01 / 12), rtol=1e-4)


def test_the_step_follows_the_units_and_neither_order_nor_copies(monkeypatch):
    X = on_grids()
    expected = data(X).rounding.numpy()
    assert np.count_nonzero(expected) == 3
    np.testing.assert_allclose(data(X * 3 + 1).rounding, 9 * expected, rtol=1e-6)
    np.testing.assert_allclose(data(np.repeat(X, 3, axis=0)).rounding, expected, rtol=1e-12)
    monkeypatch.setattr("deepmix.mixture.deep_dpm.scaled_rows.CHUNK", 1)
    shuffled = data(np.random.default_rng(0).permutation(X))
    assert len(shuffled.slices) == 2
    np.testing.assert_allclose(rounding_variance(shuffled), expected, rtol=1e-6)


def test_a_grid_is_seen_where_each_chunk_holds_one_of_its_values(monkeypatch):
    monkeypatch.setattr("deepmix.mixture.deep_dpm.scaled_rows.CHUNK", 1)
    rows = data(np.repeat([0.0, 1.0], 256)[:, None])
    assert len(rows.slices) == 2
    assert rows.rounding.tolist() == [pytest.approx(1 / 12)]


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_unrounded_statistics_are_those_of_values_about_the_rounded_ones(covariance_type):
    X, variance = np.random.default_rng(1).normal(size=(20, 3)), np.array([0.3, 0.0, 2.0])
    labels, one = torch.arange(20) % 2, torch.ones(20).double()
    rounded = hard_statistics(torch.tensor(X), labels, one, 2, covariance_type)
    # Eight values for each, of that variance and independent of each other.
    signs = np.array(list(itertools.product([-1, 1], repeat=3)))
    spread = torch.tensor((X[:, None] + signs * np.sqrt(variance)).reshape(-1, 3))
    eight = labels.repeat_interleave(8), one.repeat_interleave(8) / 8
    expected = hard_statistics(spread, *eight, 2, covariance_type)
    got = unrounded(rounded, torch.tensor(variance))
    torch.testing.assert_close(got.first, expected.first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.second, expected.second, rtol=1e-9, atol=1e-9)


def test_values_on_no_grid_have_the_statistics_of_the_rows_as_they_are():
    rows, labels = data(np.random.default_rng(2).normal(size=(90, 3))), torch.arange(90) % 4
    assert not rows.rounding.any()
    assert torch.equal(
        rows.statistics(labels, 4, "full").second, rows.sums(labels, 4, "full").second
    )
