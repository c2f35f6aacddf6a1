"""Distances and statistics against loops, the prior against its formula."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from deepmix.gaussians import (
    GaussianStatistics,
    NormalInverseWishart,
    hard_statistics,
    niw_log_marginal,
    niw_mode,
    niw_posterior,
    soft_statistics,
    squared_mahalanobis,
)

RTOL = 1e-10


def example(n=20, k=3, d=4):
    generator = np.random.default_rng(0)
    return generator.normal(size=(n, d)), generator.normal(size=(k, d))


# --- Squared distances ---


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_squared_mahalanobis_distances_are_those_of_a_loop(covariance_type):
    (X, means), root = example(), np.random.default_rng(1).normal(size=(3, 4, 4))
    factors = {"full": np.triu(root), "diag": root[:, 0], "spherical": root[:, 0, :1]}
    factors = factors[covariance_type]
    got = squared_mahalanobis(*(torch.tensor(a) for a in (X, means, factors)))
    for k, (mean, factor) in enumerate(zip(means, factors)):
        matrix = factor if covariance_type == "full" else np.diag(np.full(4, 1.0) * factor)
        precision = matrix @ matrix.T
        expected = [(x - mean) @ precision @ (x - mean) for x in X]
        np.testing.assert_allclose(got[:, k], expected, rtol=RTOL)


# --- Sufficient statistics ---

COVARIANCES = ("full", "diag", "spherical")


def naive_second(x, resp, covariance_type):
    """Sums over rows, one at a time."""
    product = {
        "full": lambda row: np.outer(row, row),
        "diag": lambda row: row**2,
        "spherical": lambda row: row @ row,
    }[covariance_type]
    return np.array(
        [sum(r * product(row) for r, row in zip(column, x)) for column in np.transpose(resp)]
    )


@pytest.mark.parametrize("d", [1, 3, 40])
@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_soft_statistics_are_sums_over_rows(covariance_type, d):
    draw = np.random.default_rng(0)
    x, resp = draw.normal(size=(15, d)), draw.random((15, 3))
    got = soft_statistics(torch.tensor(x), torch.tensor(resp), covariance_type)
    np.testing.assert_allclose(got.nk, resp.sum(axis=0), rtol=RTOL)
    np.testing.assert_allclose(got.first, resp.T @ x, rtol=RTOL)
    expected = naive_second(x, resp, covariance_type)
    np.testing.assert_allclose(got.second, expected, rtol=RTOL, atol=1e-12)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
@pytest.mark.parametrize(("n", "d"), [(1, 2), (200, 3), (150, 40)])
def test_hard_statistics_are_soft_ones_of_labels(n, d, covariance_type):
    draw = np.random.default_rng(1)
    x, labels = draw.normal(size=(n, d)), draw.integers(0, 4, n)
    labels[labels == 2] = 4  # cluster 2 stays empty
    weight = draw.random(n)
    got = hard_statistics(
        torch.tensor(x), torch.tensor(labels), torch.tensor(weight), 5, covariance_type
    )
    resp = np.eye(5)[labels] * weight[:, None]
    expected = soft_statistics(torch.tensor(x), torch.tensor(resp), covariance_type)
    for name in ("nk", "first", "second"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_statistics_of_a_union_are_sums(covariance_type):
    draw = np.random.default_rng(2)
    x, one = torch.tensor(draw.normal(size=(30, 3))), torch.ones(30, dtype=torch.float64)
    labels = torch.tensor(draw.integers(0, 6, 30))
    parts = hard_statistics(x, labels, one, 6, covariance_type)
    whole = hard_statistics(x, labels // 2, one, 3, covariance_type)
    added = parts.take(torch.tensor([0, 2, 4])) + parts.take(torch.tensor([1, 3, 5]))
    for name in ("nk", "first", "second"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))
        torch.testing.assert_close(getattr(parts.pairs(), name), getattr(whole, name))
    both = GaussianStatistics.cat([parts, whole])
    torch.testing.assert_close(both.first, torch.cat([parts.first, whole.first]))


# --- Normal-inverse-Wishart ---


def niw(d, covariance_type, seed=0):
    """A prior of no special values."""
    draw = np.random.default_rng(seed)
    root = draw.normal(size=(d, d))
    scale = {
        "full": root @ root.T + np.eye(d),
        "diag": draw.random(d) + 0.5,
        "spherical": draw.random() + 0.5,
    }[covariance_type]
    values = (draw.normal(size=d), 0.7, d + 2.5, scale)
    return NormalInverseWishart(*(torch.tensor(v, dtype=torch.float64) for v in values))


def rows(n, d, seed=3):
    return np.random.default_rng(seed).normal(size=(n, d)) * 1.3 + 0.4


def statistics_of(x, covariance_type):
    return soft_statistics(torch.tensor(x), torch.ones(len(x), 1).double(), covariance_type)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_in_one_dimension_the_marginal_likelihood_is_the_integral(covariance_type):
    prior, x = niw(1, covariance_type), rows(4, 1)
    mean, kappa, dof, scale = (
        float(v) for v in (prior.mean, prior.kappa, prior.dof, prior.scale.reshape(()))
    )

    mu, log_variance = np.linspace(-15, 15, 1501)[:, None], np.linspace(-6, 12, 1501)
    variance = np.exp(log_variance)
    density = stats.invgamma(dof / 2, scale=scale / 2).pdf(variance) * variance
    density = density * stats.norm(mean, np.sqrt(variance / kappa)).pdf(mu)
    for value in x[:, 0]:
        density = density * stats.norm(mu, np.sqrt(variance)).pdf(value)
    expected = integrate.simpson(integrate.simpson(density, x=log_variance), x=mu[:, 0])
    got = niw_log_marginal(prior, statistics_of(x, covariance_type))
    assert float(got[0]) == pytest.approx(np.log(expected), rel=1e-6)


def predictive(posterior, covariance_type):
    """Distribution of the next row: Student t, by scipy."""
    d = posterior.mean.shape[1]
    mean, kappa, dof, scale = (
        v[0].numpy() for v in (posterior.mean, posterior.kappa, posterior.dof, posterior.scale)
    )
    factor = (kappa + 1) / kappa
    if covariance_type == "full":
        df = dof - d + 1
        return stats.multivariate_t(mean, scale * factor / df, df)
    if covariance_type == "spherical":
        return stats.multivariate_t(mean, scale * factor / dof * np.eye(d), dof)
    return stats.t(dof, mean, np.sqrt(scale * factor / dof))


@pytest.mark.parametrize("covariance_type", COVARIANCES)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_marginal_likelihood_is_a_chain_of_predictions(d, covariance_type):
    prior, x = niw(d, covariance_type), rows(12, d)
    expected = 0.0
    for i, row in enumerate(x):
        posterior = niw_posterior(prior, statistics_of(x[:i], covariance_type))
        expected += np.sum(predictive(posterior, covariance_type).logpdf(row))
    got = niw_log_marginal(prior, statistics_of(x, covariance_type))
    assert float(got[0]) == pytest.approx(expected, rel=RTOL)


def niw_log_density(prior, mean, covariance, covariance_type):
    """Up to a constant, written out for one cluster: `covariance` in the shape of the scale."""
    d, deviation = len(prior.mean), mean - prior.mean
    if covariance_type == "full":
        inverse, log_det = torch.linalg.inv(covariance), torch.logdet(covariance)
        value = -(prior.dof + d + 1) / 2 * log_det - torch.trace(prior.scale @ inverse) / 2
        return value - log_det / 2 - prior.kappa / 2 * deviation @ inverse @ deviation
    value = -(prior.dof / 2 + 1) * covariance.log() - prior.scale / covariance / 2
    width = d if covariance_type == "spherical" else 1
    value = value - width / 2 * covariance.log()
    return value.sum() - (prior.kappa / 2 * deviation.square() / covariance).sum()


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_the_mode_is_where_the_density_is_level_and_highest(covariance_type):
    prior = niw(3, covariance_type)
    mean, covariance = (v.clone().requires_grad_() for v in niw_mode(prior))
    highest = niw_log_density(prior, mean, covariance, covariance_type)
    for gradient in torch.autograd.grad(highest, (mean, covariance)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-10, rtol=0)
    for factor in (0.9, 1.1):
        other = niw_log_density(prior, mean, factor * covariance, covariance_type)
        assert other < highest


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_the_posterior_is_that_of_naive_sums_and_one_cluster_at_a_time(covariance_type):
    d, draw = 3, np.random.default_rng(5)
    prior, x, resp = niw(d, covariance_type), rows(20, d), draw.random((20, 2))
    statistics = soft_statistics(torch.tensor(x), torch.tensor(resp), covariance_type)
    posterior = niw_posterior(prior, statistics)
    marginal = niw_log_marginal(prior, statistics)
    for k in range(2):
        r, m0 = resp[:, k], prior.mean.numpy()
        n, mean = r.sum(), np.average(x, axis=0, weights=r)
        # In centred form, as textbooks have it.
        scatter = (r[:, None] * (x - mean)).T @ (x - mean)
        shift = mean - m0
        scatter = scatter + 0.7 * n / (0.7 + n) * np.outer(shift, shift)
        shaped = {"full": scatter, "diag": np.diag(scatter), "spherical": np.trace(scatter)}
        expected = prior.scale.numpy() + shaped[covariance_type]
        np.testing.assert_allclose(posterior.scale[k], expected, rtol=RTOL)
        np.testing.assert_allclose(posterior.mean[k], (0.7 * m0 + n * mean) / (0.7 + n), rtol=RTOL)
        one = niw_log_marginal(prior, statistics.take(torch.tensor([k])))
        torch.testing.assert_close(one[0], marginal[k], rtol=RTOL, atol=0)


def test_an_empty_cluster_has_the_prior_for_posterior_and_likelihood_one():
    for covariance_type in COVARIANCES:
        prior = niw(3, covariance_type)
        nothing = statistics_of(np.empty((0, 3)), covariance_type)
        torch.testing.assert_close(niw_posterior(prior, nothing).scale[0], prior.scale)
        assert float(niw_log_marginal(prior, nothing)[0]) == pytest.approx(0.0, abs=1e-10)
