"""EM for mixtures of Gaussians: against scikit-learn, loops, and itself."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from deepmix import gaussian_mixture
from deepmix.gaussian_mixture import (
    COVARIANCE_TYPES,
    Mixture,
    MixtureModule,
    draw_rows,
    fit_gaussian_mixture,
    full_covariances,
    log_density,
    log_joint,
    log_resp,
    maximize,
    mixture_statistics,
)

ALL = tuple(COVARIANCE_TYPES)
OF_SKLEARN = ("full", "tied", "diag", "spherical")


def start_of(X, k=4, seed=0, concentration=0.1):
    return np.random.default_rng(seed).dirichlet(np.full(k, concentration), len(X))


def em(X, resp, weight=None, **options):
    weight = None if weight is None else torch.tensor(weight)
    return fit_gaussian_mixture(torch.tensor(X), torch.tensor(resp), weight, **options)


def m_step(x, resp, reg_covar, covariance_type="full", **options):
    statistics = mixture_statistics(x, resp, covariance_type)
    return maximize(statistics, covariance_type, reg_covar, **options)


def assert_same(a, b, **tolerances):
    for name in ("weights", "means", "covariances"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerances)


@pytest.fixture(scope="module")
def X(overlapping):
    return overlapping[0] - overlapping[0].mean(axis=0)


# --- Densities ---


@pytest.mark.parametrize("covariance_type", ALL)
def test_the_joint_density_is_that_of_scipy(covariance_type, X):
    mixture = m_step(torch.tensor(X), torch.tensor(start_of(X)), 0.01, covariance_type)
    got = log_joint(torch.tensor(X), mixture)
    covariances = full_covariances(mixture)
    for k in range(4):
        density = stats.multivariate_normal(mixture.means[k], covariances[k]).logpdf(X)
        np.testing.assert_allclose(
            got[:, k], density + np.log(float(mixture.weights[k])), rtol=1e-9
        )
    total = np.log(np.exp(got.numpy()).sum(axis=1))
    np.testing.assert_allclose(log_density(torch.tensor(X), mixture), total, rtol=1e-9)
    resp = log_resp(torch.tensor(X), mixture).exp()
    np.testing.assert_allclose(resp, np.exp(got.numpy() - total[:, None]), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("covariance_type", ALL)
def test_rows_are_drawn_by_the_factor_of_their_cluster(covariance_type, X):
    mixture = m_step(torch.tensor(X), torch.tensor(start_of(X)), 0.01, covariance_type)
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(4, size=50), rng.standard_normal((50, X.shape[1]))
    means, covariances = mixture.means.clone().numpy(), full_covariances(mixture).numpy()
    rows = draw_rows(mixture, labels, noise)
    for row, k, z in zip(rows, labels, noise, strict=True):
        wanted = means[k] + np.linalg.cholesky(covariances[k]) @ z
        np.testing.assert_allclose(row, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(mixture.means, means)  # the mixture is only read


def test_rows_in_pieces_have_the_densities_of_all_at_once(X, monkeypatch):
    x = torch.tensor(np.repeat(X, 3, axis=0))
    mixture = m_step(x, torch.tensor(start_of(X)).repeat_interleave(3, dim=0), 0.01)
    whole = log_joint(x, mixture)
    monkeypatch.setattr("deepmix.gaussian_mixture.PIECE", 1)
    assert len(x) > 64  # the smallest piece
    np.testing.assert_allclose(log_joint(x, mixture), whole, rtol=1e-12)


def example(n=20, k=3, d=4):
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.ones(k))
    return weights, generator.normal(size=(k, d)), generator.normal(size=(n, d))


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("variance", [0.1, 7.0])
def test_one_spherical_covariance_far_from_the_origin(variance, offset):
    weights, means, X = example()
    variance = torch.tensor(variance, dtype=torch.float64)
    mixture = Mixture(*map(torch.tensor, (weights, means + offset)), variance, "tied_spherical")
    got = log_joint(torch.tensor(X + offset), mixture)
    covariance = float(variance) * np.eye(4)
    expected = [stats.multivariate_normal(m, covariance).logpdf(X) for m in means]
    rtol = 1e-10 if offset == 0 else 1e-7  # digits that X itself has lost
    np.testing.assert_allclose(got, np.transpose(expected) + np.log(weights), rtol=rtol)


def test_the_density_is_finite_far_away_and_for_an_empty_component():
    _, means, X = example()
    weights, variance = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor(1e-3).double()
    mixture = Mixture(weights, torch.tensor(means), variance, "tied_spherical")
    assert torch.isfinite(log_density(torch.tensor(X + 1e4), mixture)).all()


@pytest.mark.parametrize("scale", [1e-20, 1e25])
def test_the_density_outlives_squares_that_float32_cannot_hold(scale):
    weights, means, X = (torch.tensor(a) for a in example())
    variance = torch.tensor(0.25).double()
    double = Mixture(weights, means, variance, "tied_spherical")
    single = Mixture(
        weights.float(), (scale * means).float(), scale**2 * variance, "tied_spherical"
    )
    got = log_density((scale * X).float(), single)
    assert got.dtype == torch.float32
    expected = log_density(X, double) - 4 * np.log(scale)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_some_clusters_at_a_time_have_the_densities_of_all_at_once(covariance_type, monkeypatch):
    x = torch.tensor(example()[2])
    mixture = m_step(x, torch.tensor(start_of(x, k=7)), 0.01, covariance_type)
    whole = log_joint(x, mixture)
    monkeypatch.setattr(gaussian_mixture, "IN_CACHE", 3 * x.numel())
    assert torch.equal(log_joint(x, mixture), whole)


# --- Module ---


@pytest.mark.parametrize("full", [True, False])
def test_a_new_module_has_the_standard_normal_for_each_cluster(full):
    x = torch.tensor(example()[2], dtype=torch.float32)
    expected = stats.multivariate_normal(np.zeros(4)).logpdf(x) - np.log(3)
    got = MixtureModule(4, 3, full).log_joint(x)
    np.testing.assert_allclose(got, np.repeat(expected[:, None], 3, axis=1), rtol=1e-5)


@pytest.mark.parametrize("covariance_type", ALL)
@pytest.mark.parametrize("new", [True, False])
def test_the_module_has_the_densities_of_its_mixture(new, covariance_type, X):
    x = torch.tensor(X)
    mixture = m_step(x, torch.tensor(start_of(X)), 0.01, covariance_type)
    if new:
        module = mixture.to_module()
    else:  # of another number of clusters, that has full covariances whatever their type
        module = MixtureModule(X.shape[1], 2).double().set(mixture)
    np.testing.assert_allclose(module.log_joint(x), log_joint(x, mixture), rtol=1e-9)
    single = MixtureModule(X.shape[1], 4).set(mixture)
    assert {buffer.dtype for buffer in single.buffers()} == {torch.float32}
    np.testing.assert_allclose(single.log_joint(x.float()), log_joint(x, mixture), rtol=1e-4)


def test_a_module_keeps_the_buffers_that_others_may_hold(X):
    first, second = (
        m_step(torch.tensor(X), torch.tensor(start_of(X, seed=seed)), 0.01) for seed in (0, 1)
    )
    module = first.to_module()
    means = module.means
    assert module.set(second).means is means
    torch.testing.assert_close(means, second.means)


def test_attributes_are_copies_in_double_precision(X):
    mixture = m_step(torch.tensor(X), torch.tensor(start_of(X)), 0.01).map(torch.Tensor.float)
    fitted = mixture.attributes()
    assert {name: value.dtype for name, value in fitted.items()} == dict.fromkeys(
        ("weights_", "means_", "covariances_"), np.dtype(np.float64)
    )
    assert fitted["weights_"].sum() == pytest.approx(1.0, rel=1e-15)
    np.testing.assert_array_equal(fitted["means_"], mixture.means.double())


# --- M-step ---


def naive_m_step(X, resp, covariance_type, reg_covar):
    """One cluster at a time, in centred form."""
    nk = resp.sum(axis=0)
    means = [np.average(X, axis=0, weights=r) for r in resp.T]
    full = np.array([np.cov(X.T, aweights=r, ddof=0) for r in resp.T])
    if covariance_type.startswith("tied"):
        full = np.average(full, axis=0, weights=nk)
    full = full + reg_covar * np.eye(X.shape[1])
    reduce = {
        "full": lambda c: c,
        "diag": lambda c: np.diagonal(c, axis1=-2, axis2=-1),
        "spherical": lambda c: np.trace(c, axis1=-2, axis2=-1) / X.shape[1],
    }
    return nk / nk.sum(), means, reduce[COVARIANCE_TYPES[covariance_type][0]](full)


@pytest.mark.parametrize("covariance_type", ALL)
def test_the_m_step_is_weighted_means_and_covariances(covariance_type, X):
    resp = start_of(X) * np.arange(1, len(X) + 1)[:, None]
    got = m_step(torch.tensor(X), torch.tensor(resp), 0.01, covariance_type)
    weights, means, covariances = naive_m_step(X, resp, covariance_type, 0.01)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(got.means, means, rtol=1e-10)
    np.testing.assert_allclose(got.covariances, covariances, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
def test_shrinkage_leads_to_covariances_that_are_one(covariance_type, X):
    def estimate(shrinkage):
        return m_step(
            torch.tensor(X), torch.tensor(start_of(X)), 0.01, covariance_type, shrinkage=shrinkage
        )

    own, half, tied = (estimate(shrinkage).covariances for shrinkage in (0.0, 0.5, 1.0))
    pooled = torch.einsum("k,k...->...", estimate(0.0).weights, own)
    torch.testing.assert_close(tied, pooled.expand_as(own))
    torch.testing.assert_close(half, (own + tied) / 2)


def test_em_shrunk_all_the_way_is_tied(X):
    start, options = start_of(X), {"tol": 0.0, "max_iter": 6}
    shrunk = em(X, start, shrinkage=1.0, **options)
    tied = em(X, start, covariance_type="tied", **options)
    torch.testing.assert_close(shrunk.mixture.means, tied.mixture.means)
    torch.testing.assert_close(full_covariances(shrunk.mixture), full_covariances(tied.mixture))
    torch.testing.assert_close(shrunk.lower_bound, tied.lower_bound)


# --- EM ---


def sklearn_from(X, resp, covariance_type, **options):
    """scikit-learn's mixture after the M-step from ``resp`` and EM from there."""
    mixture = GaussianMixture(resp.shape[1], covariance_type=covariance_type, **options)
    mixture._initialize_parameters = lambda X, random_state, **_: mixture._initialize(X, resp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(X)


@pytest.mark.parametrize("covariance_type", OF_SKLEARN)
def test_em_is_that_of_scikit_learn_step_by_step(covariance_type, X):
    options = {"max_iter": 12, "tol": 0.0, "reg_covar": 1e-6}
    mixture = sklearn_from(X, start_of(X), covariance_type, **options)
    fit = em(X, start_of(X), covariance_type=covariance_type, **options)
    assert int(fit.n_iter) == mixture.n_iter_
    got, tolerance = fit.mixture, {"rtol": 1e-6, "atol": 1e-9}
    np.testing.assert_allclose(got.weights, mixture.weights_, **tolerance)
    np.testing.assert_allclose(got.means, mixture.means_, **tolerance)
    np.testing.assert_allclose(got.covariances, mixture.covariances_, **tolerance)
    resp = log_resp(torch.tensor(X), got).exp()
    np.testing.assert_allclose(resp, mixture.predict_proba(X), **tolerance)
    assert float(fit.lower_bound) == pytest.approx(mixture.score(X), rel=1e-9)


@pytest.mark.parametrize("covariance_type", OF_SKLEARN)
def test_em_stops_where_that_of_scikit_learn_does(covariance_type, X):
    options = {"max_iter": 500, "tol": 1e-4, "reg_covar": 1e-6}
    mixture = sklearn_from(X, start_of(X), covariance_type, **options)
    fit = em(X, start_of(X), covariance_type=covariance_type, **options)
    assert bool(fit.converged)
    assert mixture.converged_
    assert int(fit.n_iter) == mixture.n_iter_ > 5
    assert float(fit.lower_bound) == pytest.approx(mixture.lower_bound_, rel=1e-9)


def naive_spherical_em(X, resp, n_iter, *, hard, reg_covar):
    """Tied spherical EM, row by row and cluster by cluster."""
    for _ in range(n_iter + 1):
        nk = resp.sum(axis=0)
        means = [np.average(X, axis=0, weights=r) for r in resp.T]
        squared = np.array([[np.sum((x - m) ** 2) for m in means] for x in X])
        variance = np.sum(resp * squared) / X.size + reg_covar
        logits = np.log(nk / nk.sum()) - squared / (2 * variance)
        resp = np.exp(logits - logits.max(axis=1, keepdims=True))
        resp = resp / resp.sum(axis=1, keepdims=True)
        resp = np.eye(len(means))[logits.argmax(axis=1)] if hard else resp
    return nk / nk.sum(), means, variance


@pytest.mark.parametrize("hard", [False, True])
def test_em_with_one_variance_is_the_loop(hard, X):
    options = {"hard": hard, "reg_covar": 1e-3}
    start = start_of(X)
    fit = em(X, start, covariance_type="tied_spherical", max_iter=8, tol=0.0, **options)
    assert int(fit.n_iter) == 8
    weights, means, variance = naive_spherical_em(X, start, 8, **options)
    np.testing.assert_allclose(fit.mixture.weights, weights, rtol=1e-8)
    np.testing.assert_allclose(fit.mixture.means, means, rtol=1e-7, atol=1e-9)
    assert float(fit.mixture.covariances) == pytest.approx(variance, rel=1e-8)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("covariance_type", ALL)
def test_the_likelihood_of_em_never_falls(covariance_type, hard, X):
    options = {"tol": 0.0, "reg_covar": 0.0, "covariance_type": covariance_type, "hard": hard}
    start = start_of(X, concentration=1.0)
    curve = [float(em(X, start, max_iter=i, **options).lower_bound) for i in range(15)]
    assert np.all(np.diff(curve) > -1e-10)


@pytest.mark.parametrize("covariance_type", ALL)
def test_weights_in_em_are_repetitions(covariance_type, X):
    weight, start = (np.arange(len(X)) % 3).astype(float), start_of(X)
    times, options = weight.astype(int), {"covariance_type": covariance_type}
    weighted = em(X, start, weight, **options)
    repeated = em(np.repeat(X, times, axis=0), np.repeat(start, times, axis=0), **options)
    assert float(weighted.lower_bound) == pytest.approx(float(repeated.lower_bound), rel=1e-9)
    assert_same(weighted.mixture, repeated.mixture, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("covariance_type", ALL)
def test_restarts_side_by_side_are_those_one_by_one(covariance_type, hard, X, monkeypatch):
    monkeypatch.setattr(gaussian_mixture, "PIECE", 2000)  # several pieces of rows
    starts = [start_of(X, seed=seed, concentration=c) for seed, c in enumerate((0.1, 0.01, 1.0))]
    options = {"covariance_type": covariance_type, "hard": hard, "tol": 1e-4}
    together = em(X, np.stack(starts, axis=1), **options)
    assert len(set(together.n_iter.tolist())) > 1  # one settles before another
    for i, start in enumerate(starts):
        alone, one = em(X, start, **options), together.take(i)
        assert_same(one.mixture, alone.mixture, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(one.lower_bound, alone.lower_bound, rtol=1e-10, atol=0)
        assert int(one.n_iter) == int(alone.n_iter)


@pytest.mark.parametrize("covariance_type", ALL)
def test_em_goes_on_from_parameters(covariance_type, X):
    options = {"tol": 0.0}
    whole = em(X, start_of(X), covariance_type=covariance_type, max_iter=7, **options)
    half = em(X, start_of(X), covariance_type=covariance_type, max_iter=4, **options)
    rest = fit_gaussian_mixture(torch.tensor(X), half.mixture, max_iter=3, **options)
    assert rest.mixture.covariance_type == covariance_type
    assert_same(rest.mixture, whole.mixture, rtol=1e-9, atol=1e-12)


def test_names_of_clusters_do_not_matter(X):
    order = [2, 0, 3, 1]
    fit, other = em(X, start_of(X)), em(X, start_of(X)[:, order])
    assert_same(fit.mixture.map(lambda value: value[order]), other.mixture)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("covariance_type", ALL)
@pytest.mark.parametrize("kind", ["empty", "equal rows", "constant column", "few rows", "far"])
def test_em_outlives_poor_data(kind, covariance_type, hard):
    X = np.random.default_rng(0).normal(size=(40, 3))
    X = {
        "equal rows": np.ones((40, 3)),
        "constant column": X * [1, 1, 0],
        "few rows": X[:2],
        "far": X + 1e4,
    }.get(kind, X)
    start = start_of(X, concentration=1.0)
    if kind == "empty":
        start[:, 1] = 0
    fit = em(X, start, covariance_type=covariance_type, hard=hard)
    for value in (fit.mixture.weights, fit.mixture.means, fit.mixture.covariances):
        assert torch.isfinite(value).all()
    assert torch.linalg.eigvalsh(full_covariances(fit.mixture)).min() > 0
    assert torch.isfinite(fit.lower_bound)


def test_em_in_single_precision_is_near_that_in_double(X):
    single = em(X.astype(np.float32), start_of(X).astype(np.float32), max_iter=5)
    double = em(X, start_of(X), max_iter=5)
    assert single.lower_bound.dtype == torch.float32
    assert float(single.lower_bound) == pytest.approx(float(double.lower_bound), rel=1e-4)


@pytest.mark.parametrize("covariance_type", ALL)
def test_clusters_in_order_are_the_same_mixture(covariance_type, X):
    x = torch.tensor(X)
    mixture = m_step(x, torch.tensor(start_of(X)), 0.01, covariance_type)
    ordered = mixture.in_order()
    assert (ordered.means[:, 0].diff() > 0).all()
    order = mixture.means[:, 0].argsort()
    torch.testing.assert_close(log_joint(x, ordered), log_joint(x, mixture)[:, order])


def test_mixtures_are_taken_and_put_by_number(X):
    stacked = np.stack([start_of(X, seed=seed) for seed in range(3)], axis=1)
    mixture = em(X, stacked, max_iter=1).mixture
    moved = mixture.put(torch.tensor([0]), mixture.take(torch.tensor([2])))
    assert isinstance(moved, Mixture)
    assert_same(moved.take(0), mixture.take(2))
    assert_same(moved.take(1), mixture.take(1))
