"""Log-densities against scipy.stats, and the prior against its formula."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

from deepmix.distributions import (
    DirichletPrior,
    estimate_gaussians,
    fit_gaussian_mixture,
    gaussian_log_density,
    log_mean_resp,
    mixture_log_density,
    spherical_log_density,
)

RTOL = 1e-10
LIKE = torch.zeros((), dtype=torch.float64)


def example(n=20, k=3, d=4):
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.ones(k))
    return generator.normal(size=(n, d)), generator.normal(size=(k, d)), weights


def random_log_resp(n=12, restarts=2, k=4, seed=0):
    logits = np.random.default_rng(seed).normal(size=(n, restarts, k))
    return torch.tensor(logits).log_softmax(dim=-1)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("variance", [0.1, 7.0])
def test_spherical_density_is_that_of_scipy(variance, offset):
    X, means, _ = example()
    got = spherical_log_density(torch.tensor(X + offset), torch.tensor(means + offset), variance)
    covariance = variance * np.eye(4)
    expected = [stats.multivariate_normal(m, covariance).logpdf(X) for m in means]
    rtol = 1e-10 if offset == 0 else 1e-7  # digits that X itself has lost
    np.testing.assert_allclose(got, np.transpose(expected), rtol=rtol)


def test_mixture_density_is_the_log_of_the_sum():
    X, means, weights = example()
    components = spherical_log_density(torch.tensor(X), torch.tensor(means), 0.5)
    got = mixture_log_density(components, torch.tensor(weights))
    expected = np.log(np.exp(components.numpy()) @ weights)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_mixture_density_is_finite_far_away_and_for_an_empty_component():
    X, means, _ = example()
    components = spherical_log_density(torch.tensor(X + 1e4), torch.tensor(means), 1e-3)
    got = mixture_log_density(components, torch.tensor([0.5, 0.5, 0.0]))
    assert torch.isfinite(got).all()


def test_log_mean_resp_is_the_log_of_the_weighted_mean():
    log_resp = random_log_resp()
    weight = torch.arange(1.0, 13.0, dtype=torch.float64)
    expected = np.log(np.average(log_resp.exp().numpy(), axis=0, weights=weight.numpy()))
    np.testing.assert_allclose(log_mean_resp(log_resp, weight), expected, rtol=1e-10)


def test_log_mean_resp_outlives_an_underflow():
    log_resp = torch.tensor([[0.0, -2000.0], [0.0, -2001.0]], dtype=torch.float64)
    got = log_mean_resp(log_resp, torch.ones(2, dtype=torch.float64))
    assert got[1] == pytest.approx(logsumexp([-2000.0, -2001.0]) - np.log(2), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-20, 1e25])
def test_spherical_density_outlives_squares_that_float32_cannot_hold(scale):
    X, means, _ = example()
    single = [torch.tensor(scale * a, dtype=torch.float32) for a in (X, means)]
    got = spherical_log_density(*single, (0.5 * scale) ** 2).double()
    expected = spherical_log_density(torch.tensor(X), torch.tensor(means), 0.25)
    torch.testing.assert_close(got, expected - 4 * np.log(scale), rtol=1e-5, atol=1e-4)


# --- Full covariances ---


def covariances_of(k=3, d=4):
    roots = np.random.default_rng(1).normal(size=(k, d, d))
    return roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(d)


def test_full_density_is_that_of_scipy():
    (X, means, _), covariances = example(), covariances_of()
    got = gaussian_log_density(*(torch.tensor(a) for a in (X, means, covariances)))
    expected = [stats.multivariate_normal(m, c).logpdf(X) for m, c in zip(means, covariances)]
    np.testing.assert_allclose(got, np.transpose(expected), rtol=RTOL)


def test_full_density_of_spheres_is_the_spherical_one():
    X, means, _ = (torch.tensor(a) for a in example())
    spheres = (0.7 * torch.eye(4).double()).expand(3, 4, 4)
    torch.testing.assert_close(
        gaussian_log_density(X, means, spheres),
        spherical_log_density(X, means, 0.7),
        rtol=RTOL,
        atol=0,
    )


def test_the_m_step_is_weighted_means_and_covariances():
    X, _, _ = example()
    resp = random_log_resp(20, 1, 3)[:, 0].exp().numpy() * np.arange(1, 21)[:, None]
    weights, means, covariances = estimate_gaussians(torch.tensor(X), torch.tensor(resp), 0.01)
    np.testing.assert_allclose(weights, resp.sum(axis=0) / resp.sum(), rtol=RTOL)
    for k in range(3):
        np.testing.assert_allclose(means[k], np.average(X, axis=0, weights=resp[:, k]), rtol=RTOL)
        expected = np.cov(X.T, aweights=resp[:, k], ddof=0) + 0.01 * np.eye(4)
        np.testing.assert_allclose(covariances[k], expected, rtol=1e-9, atol=1e-12)


def em(X, resp, weight=None, **options):
    weight = None if weight is None else torch.tensor(weight)
    return fit_gaussian_mixture(torch.tensor(X), torch.tensor(resp), weight, **options)


def test_em_is_that_of_scikit_learn_from_the_same_start(overlapping):
    X = overlapping[0] - overlapping[0].mean(axis=0)
    start = np.random.default_rng(0).dirichlet(np.full(4, 0.1), len(X))
    means = (start.T @ X) / start.sum(axis=0)[:, None]
    options = {"max_iter": 500, "tol": 1e-10, "reg_covar": 1e-6}
    first = [np.cov(X.T, aweights=r, ddof=0) + 1e-6 * np.eye(4) for r in start.T]
    mixture = GaussianMixture(
        4,
        means_init=means,
        weights_init=start.mean(axis=0),
        precisions_init=np.linalg.inv(first),
        **options,
    ).fit(X)
    (weights, means, covariances), log_resp, log_likelihood = em(X, start, **options)
    np.testing.assert_allclose(weights, mixture.weights_, rtol=1e-3)
    np.testing.assert_allclose(means, mixture.means_, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(covariances, mixture.covariances_, rtol=2e-2, atol=2e-2)
    assert float(log_likelihood) == pytest.approx(mixture.score(X), abs=1e-5)
    np.testing.assert_allclose(log_resp.exp(), mixture.predict_proba(X), atol=1e-2)


def test_the_likelihood_of_em_never_falls(overlapping):
    X = overlapping[0]
    start = np.random.default_rng(0).dirichlet(np.ones(4), len(X))
    options = {"tol": 0.0, "reg_covar": 0.0}
    curve = [float(em(X, start, max_iter=i, **options)[2]) for i in range(1, 20)]
    assert np.all(np.diff(curve) > -1e-10)


def test_weights_in_em_are_repetitions(overlapping):
    X = overlapping[0]
    weight = (np.arange(len(X)) % 3).astype(float)
    start = np.random.default_rng(0).dirichlet(np.ones(4), len(X))
    times = weight.astype(int)
    weighted, _, first = em(X, start, weight)
    repeated, _, second = em(np.repeat(X, times, axis=0), np.repeat(start, times, axis=0))
    assert float(first) == pytest.approx(float(second), rel=1e-9)
    for a, b in zip(weighted, repeated):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# --- Dirichlet prior ---


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
