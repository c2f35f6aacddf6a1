"""The Dirichlet prior on mean responsibilities, and their logarithm."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from deepmix.mixture.clustering_module.losses import DirichletPrior, log_mean_resp

LIKE = torch.zeros((), dtype=torch.float64)


def random_log_resp(n=12, restarts=2, k=4, seed=0):
    logits = np.random.default_rng(seed).normal(size=(n, restarts, k))
    return torch.tensor(logits).log_softmax(dim=-1)


def test_log_mean_resp_is_the_log_of_the_weighted_mean():
    log_resp = random_log_resp()
    weight = torch.arange(1.0, 13.0, dtype=torch.float64)
    expected = np.log(np.average(log_resp.exp().numpy(), axis=0, weights=weight.numpy()))
    np.testing.assert_allclose(log_mean_resp(log_resp, weight), expected, rtol=1e-10)


def test_log_mean_resp_outlives_an_underflow():
    log_resp = torch.tensor([[0.0, -2000.0], [0.0, -2001.0]], dtype=torch.float64)
    got = log_mean_resp(log_resp, torch.ones(2, dtype=torch.float64))
    assert got[1] == pytest.approx(logsumexp([-2000.0, -2001.0]) - np.log(2), rel=1e-10)


def test_auto_concentration_grows_with_the_weight_of_the_batch():
    prior = DirichletPrior("auto", 3.0, LIKE)
    log_resp = random_log_resp()
    one = prior(log_resp, torch.ones(12, dtype=torch.float64))
    two = prior(log_resp, torch.full((12,), 2.0, dtype=torch.float64))
    assert one.shape == (2, 4)
    torch.testing.assert_close(one, torch.full((2, 4), 0.05 * 3.0 * 12, dtype=torch.float64))
    torch.testing.assert_close(two, 2 * one)


def test_a_number_is_the_papers_alpha_whatever_the_batch():
    prior = DirichletPrior(5, 3.0, LIKE)
    for n in (3, 12):
        strength = prior(random_log_resp(n), torch.ones(n, dtype=torch.float64))
        torch.testing.assert_close(strength, torch.full((2, 4), 4.0, dtype=torch.float64))


def test_an_array_gives_the_largest_concentration_to_the_largest_cluster():
    log_resp = random_log_resp()
    weight = torch.ones(12, dtype=torch.float64)
    strength = DirichletPrior([9.0, 2.0, 5.0, 3.0], 1.0, LIKE)(log_resp, weight)
    sizes = log_resp.exp().mean(dim=0)
    for row, size in zip(strength, sizes):
        torch.testing.assert_close(row[size.argsort()], torch.tensor([1.0, 2.0, 4.0, 8.0]).double())


def test_an_array_of_equal_concentrations_is_the_number():
    log_resp, weight = random_log_resp(), torch.ones(12, dtype=torch.float64)
    array = DirichletPrior([3.0] * 4, 1.0, LIKE)(log_resp, weight)
    torch.testing.assert_close(array, DirichletPrior(3.0, 1.0, LIKE)(log_resp, weight))
