"""Log-densities against scipy.stats, and the prior against its formula."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import logsumexp

from deepmix.distributions import (
    GaussianStatistics,
    NormalInverseWishart,
    gaussian_log_density,
    hard_statistics,
    mixture_log_density,
    niw_log_marginal,
    niw_mode,
    niw_posterior,
    soft_statistics,
    spherical_log_density,
)
from deepmix.mixture.clustering_module.losses import DirichletPrior, log_mean_resp

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


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_densities_of_simpler_covariances_are_those_of_full_ones(covariance_type):
    X, means, _ = example()
    covariances = np.random.default_rng(6).random((3, 4)) + 0.1
    if covariance_type == "spherical":
        covariances = covariances[:, 0]
    full = np.array([np.eye(4) * c for c in covariances])
    x, means = torch.tensor(X), torch.tensor(means)
    got = gaussian_log_density(x, means, torch.tensor(covariances))
    torch.testing.assert_close(got, gaussian_log_density(x, means, torch.tensor(full)))


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_some_clusters_at_a_time_have_the_densities_of_all_at_once(covariance_type, monkeypatch):
    draw = np.random.default_rng(0)
    x, means = torch.tensor(draw.normal(size=(20, 4))), torch.tensor(draw.normal(size=(7, 4)))
    covariances = torch.tensor(draw.random((7, 4)) if covariance_type == "diag" else draw.random(7))
    whole = gaussian_log_density(x, means, covariances)
    monkeypatch.setattr("deepmix.distributions.IN_CACHE", 3 * x.numel())
    assert torch.equal(gaussian_log_density(x, means, covariances), whole)
