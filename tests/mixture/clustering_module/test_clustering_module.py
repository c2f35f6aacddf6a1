"""ClusteringModule: equations, gradient, limits, properties, recorded results."""

import warnings
from functools import partial

import common
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from deepmix import ClusteringModule
from deepmix._torch import Rows
from deepmix.mixture.clustering_module.clustering_module import (
    PAPER_SETTINGS,
    ClusteringObjective,
    restart_criterion,
)
from deepmix.mixture.clustering_module.losses import (
    DirichletPrior,
    ambiguity,
    balance,
    cluster_shares,
    inertia,
    inertia_and_gradients,
    merging,
    reconstruction,
    sparsity,
)
from deepmix.mixture.clustering_module.network import ClusteringNetwork
from deepmix.training import minimize

RTOL = 1e-10


@pytest.fixture
def small():
    """The estimator trains for longer than in the common tests: to where the method arrives."""
    return partial(common.small, max_iter=20, batch_size="auto", learning_rate_init=0.01)


def example(n=11, k=4, d=3, restarts=2, seed=0):
    """Rows, log-responsibilities, centres and weights of no structure at all."""
    draw = np.random.default_rng(seed)
    x = torch.tensor(draw.normal(size=(n, d)) + 1.0)
    log_resp = torch.tensor(2 * draw.normal(size=(n, restarts, k))).log_softmax(dim=2)
    centers = torch.tensor(draw.normal(size=(restarts, k, d)))
    weight = torch.tensor(draw.integers(1, 4, n).astype(float))
    return x, log_resp, centers, weight


def one_restart():
    x, log_resp, centers, weight = example()
    return x, log_resp[:, 0].exp(), centers[0], weight


def by_loops(term):
    """A sum over rows i and a term of that row, written as in the paper."""
    x, resp, centers, weight = (t.numpy() for t in one_restart())
    total = 0.0
    for i in range(len(x)):
        total += weight[i] * term(x[i], resp[i], centers)
    return total


def pairs(g, mu, keep):
    return sum(
        g[k] * g[m] * np.dot(mu[k], mu[m])
        for k in range(len(mu))
        for m in range(len(mu))
        if keep(k, m)
    )


NAIVE = {
    reconstruction: lambda x, g, mu: np.sum((x - sum(g[k] * mu[k] for k in range(len(mu)))) ** 2),
    sparsity: lambda x, g, mu: sum(g[k] * (1 - g[k]) * np.sum(mu[k] ** 2) for k in range(len(mu))),
    merging: lambda x, g, mu: -pairs(g, mu, lambda k, m: k != m),
    inertia: lambda x, g, mu: sum(g[k] * np.sum((x - mu[k]) ** 2) for k in range(len(mu))),
}


# --- Equations ---


@pytest.mark.parametrize("term", [reconstruction, inertia], ids=lambda f: f.__name__)
def test_terms_that_look_at_the_rows_equal_naive_loops(term):
    x, resp, centers, weight = one_restart()
    assert float(term(x, resp, centers, weight)) == pytest.approx(by_loops(NAIVE[term]), rel=RTOL)


@pytest.mark.parametrize("term", [sparsity, merging], ids=lambda f: f.__name__)
def test_terms_of_responsibilities_and_centres_equal_naive_loops(term):
    _, resp, centers, weight = one_restart()
    assert float(term(resp, centers, weight)) == pytest.approx(by_loops(NAIVE[term]), rel=RTOL)


@pytest.mark.parametrize("alpha", [3.0, [1.5, 2.0, 4.0, 8.0]])
def test_balance_equals_a_naive_loop(alpha):
    _, log_resp, _, weight = example()
    strength = torch.as_tensor(alpha, dtype=torch.float64) - 1
    got = balance(log_resp, weight, strength.expand(2, 4))
    alpha = np.broadcast_to(alpha, 4)
    for restart in range(2):
        resp = log_resp[:, restart].exp().numpy()
        mean = sum(w * row for w, row in zip(weight.numpy(), resp)) / weight.sum().item()
        expected = sum((1 - alpha[k]) * np.log(mean[k]) for k in range(4))
        assert float(got[restart]) == pytest.approx(expected, rel=RTOL)


def test_inertia_is_the_sum_of_the_first_three_terms():
    x, resp, centers, weight = one_restart()
    parts = sparsity(resp, centers, weight) + merging(resp, centers, weight)
    parts = parts + reconstruction(x, resp, centers, weight)
    torch.testing.assert_close(inertia(x, resp, centers, weight), parts, rtol=RTOL, atol=0)


def test_ambiguity_is_the_second_and_third_term_and_never_negative():
    x, resp, centers, weight = one_restart()
    parts = sparsity(resp, centers, weight) + merging(resp, centers, weight)
    torch.testing.assert_close(ambiguity(x, resp, centers, weight), parts, rtol=RTOL, atol=0)
    assert parts > 0


def test_eq_7_is_minus_eq_2_but_for_the_entropy_of_the_cluster_sizes():
    x, log_resp, centers, weight = example()
    log_resp, centers, alpha = log_resp[:, 0], centers[0], 2.5
    resp, n = log_resp.exp().numpy(), weight.sum().item()
    mean = np.average(resp, axis=0, weights=weight)
    # Eq. 1 with phi the mean responsibilities: log-densities of covariance I/2, by scipy.
    density = [stats.multivariate_normal(mu, np.eye(3) / 2).logpdf(x) for mu in centers.numpy()]
    density = np.transpose(density) + 1.5 * np.log(np.pi)
    q = weight.numpy() @ (resp * (np.log(mean) + density)).sum(axis=1)
    q += (alpha - 1) * np.log(mean).sum()
    loss = inertia(x, log_resp.exp(), centers, weight)
    loss = loss + balance(log_resp, weight, torch.full((4,), alpha - 1).double())
    assert float(loss) == pytest.approx(-q + n * (mean @ np.log(mean)), rel=RTOL)


def test_eq_7_as_printed_is_unbounded_below_and_ours_is_not():
    x, _, _, weight = one_restart()
    resp = torch.nn.functional.one_hot(torch.arange(11) % 4, 4).double()
    values, ours = [], []
    for scale in (1.0, 10.0, 100.0, 1000.0):
        means = (resp * weight[:, None]).T @ x
        centers = scale * means / (resp * weight[:, None]).sum(dim=0)[:, None]
        diagonal = weight @ (resp.square() @ centers.square().sum(dim=1))
        ours.append(float(inertia(x, resp, centers, weight)))
        values.append(ours[-1] - float(diagonal))  # E3 with its diagonal k = l
    assert np.all(np.diff(values) < 0)
    assert values[-1] < -1000
    assert min(ours) > 0
    assert ours[-1] > ours[0]


# --- Gradient in closed form ---


def differentiated(x, logits, centers, weight, prior):
    logits, centers = logits.clone().requires_grad_(), centers.clone().requires_grad_()
    log_resp = logits.log_softmax(dim=2)
    strength = prior(log_resp, weight)
    terms = [inertia(x, log_resp[:, r].exp(), centers[r], weight) for r in range(centers.shape[0])]
    loss = torch.stack(terms) + balance(log_resp, weight, strength)
    return loss, torch.autograd.grad(loss.sum(), (logits, centers))


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("concentration", ["auto", 4.0, 0.5, [1.5, 6.0, 3.0, 2.0]])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_form_gradient_is_that_of_autograd(restarts, concentration, weighted):
    x, logits, centers, weight = example(restarts=restarts)
    weight = weight if weighted else torch.ones_like(weight)
    prior = DirichletPrior(concentration, 3.0, weight)
    loss, expected = differentiated(x, logits, centers, weight, prior)
    log_resp = logits.log_softmax(dim=2)
    terms, *gradients = inertia_and_gradients(x, log_resp, centers, weight, prior)
    torch.testing.assert_close(
        terms["inertia"] + terms["balance"], loss.detach(), rtol=RTOL, atol=0
    )
    for got, wanted in zip(gradients, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_the_objectives_gradients_are_those_of_its_parameters():
    x, _, _, weight = example()
    network = ClusteringNetwork(3, 4, 2).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    prior = DirichletPrior(3.0, 1.0, weight)
    (phase,) = ClusteringObjective(lambda batch: batch, network, prior).phases()
    with torch.no_grad():
        _, gradients = phase.step(x, None, weight)
    log_resp, centers = network.log_resp(x), network.centers()
    loss = sum(inertia(x, log_resp[:, r].exp(), centers[r], weight) for r in range(2))
    loss = loss + balance(log_resp, weight, prior(log_resp, weight)).sum()
    for got, wanted in zip(gradients, torch.autograd.grad(loss, phase.parameters), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_a_cluster_that_has_lost_every_row_keeps_a_finite_gradient_that_brings_it_back():
    x, _, centers, weight = example(restarts=1)
    logits = torch.zeros(11, 1, 4).double()
    logits[..., 0] = -2000.0  # its responsibilities underflow
    log_resp = logits.log_softmax(dim=2)
    prior = DirichletPrior(3.0, None, weight)
    terms, logit_gradient, _ = inertia_and_gradients(x, log_resp, centers, weight, prior)
    assert torch.isfinite(logit_gradient).all()
    assert torch.isfinite(terms["balance"]).all()
    # The prior raises every logit of the lost cluster, by (alpha - 1) in all.
    assert torch.all(logit_gradient[..., 0] < 0)
    assert float(logit_gradient[..., 0].sum()) == pytest.approx(-2.0, rel=RTOL)
    _, share = cluster_shares(log_resp, weight / weight.sum())
    torch.testing.assert_close(share.sum(dim=0), torch.ones(1, 4).double())


def test_restarts_trained_together_are_those_trained_alone(overlapping):
    rows = Rows(overlapping[0], torch.device("cpu"), torch.float64)

    def train(network):
        objective = ClusteringObjective(lambda b: b / 5, network, DirichletPrior(3.0, 1.0, like))
        generator = torch.Generator().manual_seed(7)
        options = {"learning_rate": 1e-2, "batch_size": 50, "max_iter": 5, "generator": generator}
        return minimize(objective, rows, **options)

    like = torch.zeros((), dtype=torch.float64)
    network = ClusteringNetwork(4, 4, 3).init_random(torch.Generator().manual_seed(0)).double()
    alone = [network.select(r) for r in range(3)]
    for one in alone:  # copies, not views of the weights that train together
        one.load_state_dict({k: v.clone() for k, v in one.state_dict().items()}, assign=True)
    together = train(network)
    for restart, one in enumerate(alone):
        history = train(one)
        chosen = network.select(restart)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(chosen.state_dict()[name], value, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(
            together.arrays(restart)["loss"], history.arrays()["loss"], rtol=1e-8
        )


def test_the_criterion_of_each_restart_is_its_sum_over_all_rows():
    x, _, _, weight = example()
    network = ClusteringNetwork(3, 4, 2).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    rows = Rows(x.numpy(), torch.device("cpu"), torch.float64, weight.numpy())
    got = restart_criterion(inertia, lambda b: b, network, rows)
    for restart in range(2):
        resp = network.log_resp(x)[:, restart].exp()
        expected = inertia(x, resp, network.centers()[restart], weight).item()
        assert got[restart] == pytest.approx(expected, rel=RTOL)


# --- Limits ---


@pytest.mark.parametrize("init", ["k-means++", "k-means"])
def test_before_training_labels_are_those_of_the_nearest_initial_centre(init, overlapping, small):
    X, _ = overlapping
    model = small(ClusteringModule, init=init, max_iter=0, dtype="auto").fit(X)
    distances = np.linalg.norm(X[:, None] - model.cluster_centers_, axis=2)
    np.testing.assert_array_equal(model.labels_, distances.argmin(axis=1))


def test_posterior_start_from_given_centres_keeps_the_k_means_labels_exactly(overlapping, small):
    X, _ = overlapping
    kmeans = KMeans(4, n_init=1, random_state=0).fit(X)
    start = small(ClusteringModule, init=kmeans.cluster_centers_, max_iter=0, dtype="auto").fit(X)
    np.testing.assert_array_equal(start.labels_, kmeans.labels_)
    np.testing.assert_allclose(start.cluster_centers_, kmeans.cluster_centers_, rtol=RTOL)


def test_the_pseudo_inverse_start_loses_k_means_labels(overlapping, small):
    X, _ = overlapping
    kmeans = KMeans(4, n_init=1, random_state=0).fit(X)
    options = {"init": kmeans.cluster_centers_, "max_iter": 0, "dtype": "auto"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it may lose a cluster, too
        start = small(ClusteringModule, encoder_init="pinv", **options).fit(X)
    np.testing.assert_allclose(start.cluster_centers_, kmeans.cluster_centers_, rtol=1e-8)
    assert np.mean(start.labels_ != kmeans.labels_) > 0.01


def test_on_separated_blobs_it_is_a_spherical_gaussian_mixture(blobs):
    X, y = blobs
    model = ClusteringModule(4, random_state=0, dtype="auto", max_iter=200, tol=0).fit(X)
    mixture = GaussianMixture(4, covariance_type="spherical", n_init=3, random_state=0).fit(X)
    assert adjusted_rand_score(model.labels_, mixture.predict(X)) == 1.0
    assert adjusted_rand_score(model.labels_, y) == 1.0
    nearest = np.linalg.norm(model.cluster_centers_[:, None] - mixture.means_, axis=2)
    assert sorted(nearest.argmin(axis=1)) == [0, 1, 2, 3]
    assert nearest.min(axis=1).max() < 0.15  # of a standard deviation of 0.6
    order = nearest.argmin(axis=1)
    np.testing.assert_allclose(model.weights_, mixture.weights_[order], atol=0.02)
    assert model.variance_ == pytest.approx(mixture.covariances_.mean(), rel=0.1)
    assert model.score(X) == pytest.approx(mixture.score(X), abs=0.1)


def test_one_cluster_is_the_mean_and_the_variance(overlapping, small):
    X, _ = overlapping
    options = {"batch_size": 1000, "max_iter": 300, "n_init": 1}
    model = small(ClusteringModule, 1, dtype="auto", **options).fit(X)
    np.testing.assert_array_equal(model.labels_, 0)
    np.testing.assert_allclose(model.cluster_centers_[0], X.mean(axis=0), atol=1e-3)
    assert model.variance_ == pytest.approx(X.var(axis=0).mean(), rel=1e-3)


# --- Properties ---


def test_labels_change_neither_with_scale_nor_with_origin(overlapping, small):
    X, _ = overlapping
    plain = small(ClusteringModule, dtype="auto").fit(X)
    moved = small(ClusteringModule, dtype="auto").fit(1000 * X + 5)
    np.testing.assert_array_equal(plain.labels_, moved.labels_)
    np.testing.assert_allclose(moved.cluster_centers_, 1000 * plain.cluster_centers_ + 5, rtol=1e-5)
    np.testing.assert_allclose(moved.variance_, 1e6 * plain.variance_, rtol=1e-5)


def test_without_scaling_the_papers_concentration_hangs_on_the_units(overlapping, small):
    X, _ = overlapping
    fits = [
        small(ClusteringModule, scale=False, concentration=5.0, dtype="auto").fit(c * X)
        for c in (1, 0.01)
    ]
    assert np.any(fits[0].labels_ != fits[1].labels_)


@pytest.mark.parametrize("init", ["k-means++", "k-means"])
@pytest.mark.parametrize("concentration", ["auto", [2.0, 3.0, 4.0, 5.0]])
def test_in_full_batches_weights_are_repetitions_and_order_is_nothing(
    init, concentration, overlapping, small
):
    X, _ = overlapping
    draw = np.random.default_rng(0)
    weight = draw.integers(0, 4, len(X)).astype(float)
    order = draw.permutation(len(X))
    options = {
        "init": init,
        "concentration": concentration,
        "batch_size": 5000,
        "dtype": "auto",
        "random_state": 3,
    }
    weighted = small(ClusteringModule, **options).fit(X, sample_weight=weight)
    repeated = small(ClusteringModule, **options).fit(np.repeat(X, weight.astype(int), axis=0))
    permuted = small(ClusteringModule, **options).fit(X[order], sample_weight=weight[order])
    for other in (repeated, permuted):
        np.testing.assert_allclose(other.cluster_centers_, weighted.cluster_centers_, rtol=1e-8)
        np.testing.assert_allclose(other.weights_, weighted.weights_, rtol=1e-8)
        np.testing.assert_allclose(other.variance_, weighted.variance_, rtol=1e-8)
        np.testing.assert_array_equal(other.predict(X), weighted.predict(X))


def test_permuted_initial_centres_permute_the_clusters(overlapping, small):
    X, _ = overlapping
    centers, order = X[:4], np.array([2, 0, 3, 1])
    plain = small(ClusteringModule, init=centers, dtype="auto").fit(X)
    permuted = small(ClusteringModule, init=centers[order], dtype="auto").fit(X)
    np.testing.assert_allclose(
        permuted.cluster_centers_, plain.cluster_centers_[order], rtol=1e-7, atol=1e-8
    )
    np.testing.assert_array_equal(order[permuted.labels_], plain.labels_)


def test_responsibilities_sum_to_one_and_their_maximum_is_the_label(overlapping, small):
    X, _ = overlapping
    model = small(ClusteringModule).fit(X)
    resp = model.predict_proba(X)
    np.testing.assert_allclose(resp.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(resp.argmax(axis=1), model.predict(X))
    np.testing.assert_array_equal(model.transform(X), resp)
    np.testing.assert_allclose(model.weights_, resp.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("concentration", ["auto", 3.0, [2.0, 2.0, 3.0, 3.0]])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_history_is_finite_and_decreases(concentration, init, overlapping, small):
    options = {"init": init, "concentration": concentration, "batch_size": 1000, "max_iter": 40}
    model = small(ClusteringModule, **options).fit(overlapping[0])
    loss = model.history_["loss"]
    assert loss.shape == (model.n_iter_,) == (40,)
    assert all(np.all(np.isfinite(values)) for values in model.history_.values())
    np.testing.assert_allclose(loss, model.history_["inertia"] + model.history_["balance"])
    assert loss[-1] < loss[0]
    # Adam may rise a little; over ten epochs of full batches it does not.
    assert np.all(loss[10:] < loss[:-10])


def test_the_kept_restart_is_the_best_of_them(overlapping):
    X, _ = overlapping
    options = {"max_iter": 3, "tol": 0, "dtype": "auto", "init": "random", "averaging": False}

    def soft_inertia(model):
        resp = model.predict_proba(X)
        squared = np.square(X[:, None] - model.cluster_centers_).sum(axis=2)
        return (resp * squared).sum()

    models = [ClusteringModule(4, n_init=n, random_state=0, **options).fit(X) for n in (1, 20)]
    assert soft_inertia(models[1]) < soft_inertia(models[0])


def test_selection_by_sparsity_keeps_another_restart(overlapping):
    X, _ = overlapping
    options = {"n_init": 20, "max_iter": 1, "tol": 0, "init": "random", "random_state": 0}

    def l_sp(model):
        resp, mu = model.predict_proba(X), model.cluster_centers_ - X.mean(axis=0)
        return (resp @ np.square(mu).sum(axis=1)).sum() - np.square(resp @ mu).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # one epoch leaves clusters empty
        by_sparsity, by_inertia = (
            ClusteringModule(4, selection=s, **options).fit(X) for s in ("sparsity", "inertia")
        )
    assert l_sp(by_sparsity) < l_sp(by_inertia)


def test_given_centres_start_one_run(overlapping, small):
    X, _ = overlapping
    fits = [small(ClusteringModule, init=X[:4], n_init=n).fit(X) for n in (1, 7)]
    np.testing.assert_array_equal(fits[0].cluster_centers_, fits[1].cluster_centers_)


def test_a_callable_chooses_the_centres_on_standardised_rows(blobs, small):
    X, _ = blobs
    seen = []

    def last_rows(X, n_clusters, random_state):
        seen.append(X)
        return X[-n_clusters:]

    model = small(ClusteringModule, init=last_rows, max_iter=0, n_init=3, dtype="auto").fit(X)
    assert len(seen) == 3
    assert seen[0].var(axis=0).mean() == pytest.approx(1.0)
    np.testing.assert_allclose(model.cluster_centers_, X[-4:], rtol=1e-8)


def test_asymmetric_concentration_makes_clusters_unequal(overlapping, small):
    X, _ = overlapping
    strong = {"batch_size": 1000, "max_iter": 60}
    equal = small(ClusteringModule, concentration=200.0, **strong).fit(X)
    unequal = small(ClusteringModule, concentration=[2.0, 2.0, 2.0, 600.0], **strong).fit(X)
    assert np.ptp(equal.weights_) < 0.05
    assert np.ptp(unequal.weights_) > 0.2


def test_clipping_prevents_the_divergence_of_gradient_descent(overlapping, small):
    options = {"solver": "sgd", "learning_rate_init": 10.0, "init": "random"}
    with pytest.raises(FloatingPointError, match=r"epoch .* set max_grad_norm"):
        small(ClusteringModule, **options).fit(overlapping[0])
    clipped = small(ClusteringModule, max_grad_norm=0.1, **options).fit(overlapping[0])
    assert np.all(np.isfinite(clipped.cluster_centers_))


def test_a_fit_that_diverges_leaves_no_fitted_estimator(overlapping, small):
    model = small(ClusteringModule, solver="sgd", learning_rate_init=1e3)
    with pytest.raises(FloatingPointError):
        model.fit(overlapping[0])
    assert not hasattr(model, "labels_")


# --- Density ---


def test_score_samples_is_the_log_density_of_the_mixture(overlapping, small):
    X, _ = overlapping
    model = small(ClusteringModule).fit(X)
    densities = [
        stats.norm(mu, np.sqrt(model.variance_)).logpdf(X).sum(axis=1)
        for mu in model.cluster_centers_
    ]
    expected = logsumexp(np.transpose(densities), b=model.weights_, axis=1)
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-8)
    assert model.score(X) == pytest.approx(expected.mean(), rel=1e-8)
    weight = np.arange(len(X)) % 3
    weighted = np.average(expected, weights=weight)
    assert model.score(X, sample_weight=weight) == pytest.approx(weighted, rel=1e-8)


def test_the_variance_is_the_mean_squared_distance_under_the_responsibilities(overlapping, small):
    X, _ = overlapping
    weight = 1.0 + np.arange(len(X)) % 3
    model = small(ClusteringModule, dtype="auto").fit(X, sample_weight=weight)
    squared = np.square(X[:, None] - model.cluster_centers_).sum(axis=2)
    inertia_ = weight @ (model.predict_proba(X) * squared).sum(axis=1)
    assert model.variance_ == pytest.approx(inertia_ / weight.sum() / X.shape[1], rel=1e-8)


def test_samples_have_the_moments_of_the_mixture(blobs, small):
    model = small(ClusteringModule, max_iter=60).fit(blobs[0])
    X, labels = model.sample(20_000)
    assert X.shape == (20_000, 3)
    np.testing.assert_allclose(np.bincount(labels) / 20_000, model.weights_, atol=0.02)
    for k, centre in enumerate(model.cluster_centers_):
        drawn = X[labels == k]
        np.testing.assert_allclose(drawn.mean(axis=0), centre, atol=0.05 * np.sqrt(model.variance_))
        assert drawn.var(axis=0).mean() == pytest.approx(model.variance_, rel=0.05)
    assert np.mean(model.predict(X) == labels) > 0.99


# --- The paper's settings ---


@pytest.mark.parametrize("name", PAPER_SETTINGS)
def test_paper_settings_are_parameters_that_can_be_overridden(name):
    model = ClusteringModule.from_paper(name, 7, max_iter=3)
    assert (model.concentration, model.batch_size) == PAPER_SETTINGS[name]
    assert (model.n_clusters, model.max_iter, model.scale, model.tol) == (7, 3, False, 0)
    assert (model.learning_rate_init, model.epsilon, model.init) == (1e-3, 1e-3, "random")


def test_paper_settings_train(overlapping):
    X, _ = overlapping
    model = ClusteringModule.from_paper("pendigits", 4, batch_size=20, random_state=0)
    model.fit(X / 10)
    assert model.n_iter_ == 150
    assert model.history_["loss"][-1] < model.history_["loss"][0]


# --- Online ---


def test_partial_fit_over_batches_learns_what_fit_learns(blobs, small):
    X, y = blobs
    model = small(ClusteringModule)
    for _ in range(30):
        for start in range(0, len(X), 80):
            model.partial_fit(X[start : start + 80])
    assert adjusted_rand_score(model.predict(X), y) == 1.0


def test_partial_fit_goes_on_with_the_optimisers_state(blobs, small):
    X, _ = blobs
    model = small(ClusteringModule, batch_size=1000, dtype="auto", averaging=False, n_init=1)
    for _ in range(5):
        model.partial_fit(X)
    whole = small(
        ClusteringModule, batch_size=1000, dtype="auto", averaging=False, n_init=1, max_iter=5
    ).fit(X)
    np.testing.assert_allclose(model.cluster_centers_, whole.cluster_centers_, rtol=1e-10)


def test_partial_fit_goes_on_from_fit(blobs, small):
    X, _ = blobs
    model = small(ClusteringModule, learning_rate_init=1e-4).fit(X)
    before = model.cluster_centers_.copy()
    model.partial_fit(X)
    assert 0 < np.abs(model.cluster_centers_ - before).max() < 0.1


def test_partial_fit_takes_small_batches_once_it_has_begun(blobs, small):
    X, _ = blobs
    model = small(ClusteringModule).partial_fit(X[:100])
    model.partial_fit(X[100:102])
    np.testing.assert_array_equal(model.labels_, model.predict(X[100:102]))


def test_partial_fit_refuses_another_number_of_features(blobs, small):
    X, _ = blobs
    model = small(ClusteringModule).partial_fit(X)
    with pytest.raises(ValueError, match="X has 2 features, but ClusteringModule is expecting 3"):
        model.partial_fit(X[:, :2])


def test_partial_fit_takes_sparse_rows_and_weights(overlapping, small):
    X, _ = overlapping
    weight = np.arange(len(X)) % 3.0
    dense, sparse = small(ClusteringModule), small(ClusteringModule)
    for _ in range(3):
        dense.partial_fit(X, sample_weight=weight)
        sparse.partial_fit(sp.csr_array(X), sample_weight=weight)
    np.testing.assert_allclose(sparse.cluster_centers_, dense.cluster_centers_, rtol=1e-6)
