"""DCAN: equations, the critic's optimum, limits, collapse of the literal reading, the read-out."""

import math
import warnings
from functools import partial

import common
import numpy as np
import pytest
import torch
from common import quietly
from scipy import stats
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.nn.functional import softplus

from deepmix import DCAN, pretrain_autoencoder
from deepmix._torch import Rows
from deepmix.gaussian_mixture import Mixture
from deepmix.mixture.dcan.adversarial import AdversarialObjective, Settings
from deepmix.mixture.dcan.dcan import PAPER_SETTINGS
from deepmix.mixture.dcan.losses import critic_loss, encoder_loss, euclidean_loss, kl_loss
from deepmix.mixture.dcan.network import Critic, DCANNetwork, component, hard_mixture, sweep
from deepmix.networks import init_weights
from deepmix.training import Objective, Phase, minimize

RTOL = 1e-10
DIVERGENCES = ("js", "kl", "euclidean")


@pytest.fixture
def small():
    """The estimator trains for longer than in the common tests: to where the method arrives."""
    return partial(
        common.small,
        hidden_layer_sizes=(16,),
        batch_size=40,
        pretrain_max_iter=20,
        max_iter=15,
        learning_rate_init=5e-3,
    )


def example(n=11, d=3, seed=0):
    draw = np.random.default_rng(seed)
    weight = torch.tensor(draw.integers(1, 4, n).astype(float))
    return torch.tensor(draw.normal(size=(n, d))), weight


def mixture(k=4, d=3, seed=1):
    draw = np.random.default_rng(seed)
    weights = torch.tensor(draw.dirichlet(np.full(k, 5.0)))
    variance = torch.tensor(0.7, dtype=torch.double)
    return Mixture(weights, torch.tensor(draw.normal(size=(k, d))), variance, "tied_spherical")


def settings(**changed):
    values = {
        "clustering_weight": 2.0,
        "warm_up": 0,
        "reconstruction_weight": 0.5,
        "update_every": 0,
        "pool_size": 100,
        "memory": 0.5,
        "literal": False,
        "equal_weights": False,
        "saturating": False,
        "label_smoothing": 0.0,
        "batch_size": 11,
    }
    return Settings(**{**values, **changed})


def small_network(seed=0, **parameters):
    """A network in float64 with parameters of no structure."""
    network = DCANNetwork(3, 4, 3, (5,), **parameters)
    for name in ("critic", "deviation"):
        if getattr(network, name) is not None:
            setattr(network, name, getattr(network, name).to_empty(device="cpu"))
    network.autoencoder = network.autoencoder.to_empty(device="cpu")
    network = network.double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    network.track(mixture())
    return network


# --- Equations ---


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_critics_loss_equals_a_naive_loop(smoothing):
    positive, negative = example(7)[0][:, 0], example(5, seed=2)[0][:, 0]
    weight = example(5)[1]
    expected = 0.0
    for w, v in zip(weight.tolist(), negative.tolist()):
        expected -= w * math.log(1 - sigmoid(v))
    for v in positive.tolist():
        target = (1 - smoothing) * math.log(sigmoid(v)) + smoothing * math.log(1 - sigmoid(v))
        expected -= float(weight.sum()) * target / 7
    got = critic_loss(positive, negative, weight, smoothing)
    assert float(got) == pytest.approx(expected, rel=RTOL)


def test_a_critic_that_knows_nothing_has_a_loss_of_two_log_two():
    weight = example()[1]
    zeros = torch.zeros(11).double()
    got = critic_loss(zeros, zeros, weight) / weight.sum()
    assert float(got) == pytest.approx(2 * math.log(2), rel=RTOL)


def test_the_encoders_losses_equal_naive_loops():
    logits, weight = example()[0][:, 0], example()[1]
    pairs = list(zip(weight.tolist(), logits.tolist()))
    saturating = sum(w * math.log(1 - sigmoid(v)) for w, v in pairs)
    other = -sum(w * math.log(sigmoid(v)) for w, v in pairs)
    got = encoder_loss(logits, weight, saturating=True), encoder_loss(logits, weight)
    assert [float(v) for v in got] == pytest.approx([saturating, other], rel=RTOL)


def test_the_saturating_loss_is_flat_where_the_critic_is_sure():
    logits = torch.tensor([-20.0], requires_grad=True)
    weight = torch.ones(1)
    slopes = [
        float(torch.autograd.grad(encoder_loss(logits, weight, saturating), logits)[0])
        for saturating in (True, False)
    ]
    assert slopes[0] == pytest.approx(0, abs=1e-8)
    assert slopes[1] == pytest.approx(-1, rel=1e-6)


def test_the_euclidean_loss_equals_a_naive_loop():
    z, weight = example()
    centers = example(seed=5)[0]
    expected = sum(
        w * 0.5 * sum((a - b) ** 2 for a, b in zip(row, center))
        for w, row, center in zip(weight.tolist(), z.tolist(), centers.tolist())
    )
    assert float(euclidean_loss(z, centers, weight)) == pytest.approx(expected, rel=RTOL)


def test_the_kl_loss_is_the_divergence_of_two_gaussians():
    z, weight = example()
    centers, log_deviation = example(seed=5)[0], 0.3 * example(seed=6)[0]
    variance = torch.tensor(0.6).double()
    own = torch.distributions.Normal(centers, variance.sqrt())
    given = torch.distributions.Normal(z, log_deviation.exp())
    expected = weight @ torch.distributions.kl_divergence(own, given).sum(dim=1)
    got = kl_loss(z, log_deviation, centers, variance, weight)
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=0)


def test_with_unit_variances_kl_is_euclidean():
    """Lemma 1, Eq. 9."""
    z, weight = example()
    centers = example(seed=5)[0]
    got = kl_loss(z, torch.zeros_like(z), centers, torch.ones(()).double(), weight)
    torch.testing.assert_close(got, euclidean_loss(z, centers, weight), rtol=RTOL, atol=0)


@pytest.mark.parametrize("literal", [False, True])
def test_a_component_is_the_arg_max_of_eq_22(literal):
    z, (weights, means, variance) = example()[0], mixture().tensors
    for row, got in zip(z, component(z, mixture(), literal)):
        tau = 1.0 if literal else 1 / float(variance)
        values = [
            math.log(w) - 0.5 * tau * float((row - mean).square().sum())
            for w, mean in zip(weights.tolist(), means)
        ]
        assert int(got) == int(np.argmax(values))


def test_the_component_is_the_posterior_mode_of_scikit_learns_mixture():
    z, (weights, means, variance) = example(200)[0], mixture().tensors
    model = GaussianMixture(4, covariance_type="spherical")
    model.weights_, model.means_ = weights.numpy(), means.numpy()
    model.covariances_ = np.full(4, float(variance))
    model.precisions_cholesky_ = 1 / np.sqrt(model.covariances_)
    got = component(z, mixture())
    np.testing.assert_array_equal(got, model.predict(z.numpy()))


def test_the_sweep_of_em_equals_a_naive_loop():
    z, weight = example(40)
    before = mixture()
    labels = component(z, before)
    weights, means, variance = hard_mixture(z, labels, weight, before).tensors
    within = 0.0
    for k in range(4):
        rows, w = z[labels == k], weight[labels == k]
        assert float(weights[k]) == pytest.approx(float(w.sum() / weight.sum()), rel=1e-9)
        mean = (w[:, None] * rows).sum(dim=0) / w.sum()
        torch.testing.assert_close(means[k], mean, rtol=1e-9, atol=1e-12)
        within += float(w @ (rows - mean).square().sum(dim=1))
    share = weight / weight.sum()
    overall = float((share @ (z - share @ z).square()).mean())
    expected = within / float(weight.sum()) / 3 + 1e-3 * overall
    assert float(variance) == pytest.approx(expected, rel=1e-9)


def test_equal_weights_leave_means_and_variance_as_they_are():
    z, weight = example(40)
    before = mixture()
    labels = component(z, before)
    free = hard_mixture(z, labels, weight, before)
    equal = hard_mixture(z, labels, weight, before, equal_weights=True)
    assert equal.weights.tolist() == [0.25] * 4
    assert torch.equal(equal.means, free.means)
    assert torch.equal(equal.covariances, free.covariances)


def test_an_empty_component_keeps_its_mean_and_can_come_back():
    z, weight = example(40)
    before = mixture()
    labels = component(z, before).clamp_max(2)  # none for the last
    weights, means, _ = hard_mixture(z, labels, weight, before).tensors
    torch.testing.assert_close(means[3], before.means[3])
    assert float(weights[3]) == pytest.approx(0.025 / 1.025, rel=1e-6)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)


def test_the_memory_is_a_share_of_the_old_values():
    z, weight = example(40)
    old = mixture()
    new = hard_mixture(z, component(z, old), weight, old)
    swept = sweep(z, weight, old, memory=0.25)
    for got, a, b in zip(swept.tensors, old.tensors, new.tensors):
        torch.testing.assert_close(got, 0.25 * a + 0.75 * b, rtol=RTOL, atol=0)


@pytest.mark.parametrize("conditional", [True, False])
def test_the_steps_of_the_game_are_the_equations(conditional):
    x, weight = example()
    network = small_network(conditional=conditional)
    objective = AdversarialObjective(
        network, Rows(x.numpy(), torch.device("cpu"), x.dtype), settings(), make_generator()
    )
    terms = {**objective.critic_step(x, None, weight), **objective.encoder_step(x, None, weight)}
    z = network.autoencoder.encoder(x)
    _, means, variance = mixture().tensors
    labels = component(z, mixture())
    seen = (z - means[labels]) / variance.sqrt() if conditional else z
    negative = network.critic(seen)[:, 0]
    noise = torch.randn(11, 3, generator=make_generator(), dtype=torch.float64)
    if conditional:
        positive = network.critic(noise)[:, 0]
        torch.testing.assert_close(terms["critic"], critic_loss(positive, negative, weight))
    expected = {
        "clustering": 2.0 * weight @ softplus(-negative),
        "reconstruction": 0.5 * weight @ (network.autoencoder(x) - x).square().sum(dim=1),
        "latent_variance": weight @ z.square().mean(dim=1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=RTOL, atol=0, msg=name)
    assert set(terms) == {*expected, "critic", "critic_accuracy"}
    assert 0 <= float(terms["critic_accuracy"] / weight.sum()) <= 1


def test_a_warm_up_lets_the_weight_grow_by_the_step():
    x, weight = example()
    rows = Rows(x.numpy(), torch.device("cpu"), x.dtype)
    objectives = [
        AdversarialObjective(small_network(), rows, settings(warm_up=steps), make_generator())
        for steps in (0, 4)
    ]
    for step in range(1, 7):
        full, growing = (
            {**o.critic_step(x, None, weight), **o.encoder_step(x, None, weight)}
            for o in objectives
        )
        expected = min(1.0, step / 4) * full["clustering"]
        torch.testing.assert_close(growing["clustering"], expected, rtol=RTOL, atol=0)
        torch.testing.assert_close(growing["reconstruction"], full["reconstruction"])


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_draws_for_a_critic_of_codes_as_they_are_follow_the_mixture_of_the_batch():
    network = small_network(conditional=False)
    rows = Rows(np.zeros((2, 3)), torch.device("cpu"), torch.float64)
    objective = AdversarialObjective(network, rows, settings(batch_size=20_000), make_generator())
    labels, weight = torch.tensor([0, 0, 2, 3]), torch.tensor([1.0, 2.0, 3.0, 2.0]).double()
    drawn = objective._draw(labels, weight, torch.zeros(4, 3).double())
    _, means, variance = mixture().tensors
    share = torch.tensor([3, 0, 3, 2]).double() / 8
    center = share @ means
    torch.testing.assert_close(drawn.mean(dim=0), center, atol=0.03, rtol=0)
    spread = share @ (means - center).square() + variance
    torch.testing.assert_close(drawn.var(dim=0), spread, rtol=0.05, atol=0)


# --- The game's phases ---


def test_each_phase_trains_its_own_parameters_only(blobs):
    """Gradients that the encoder's step leaves in the critic must never be stepped with."""
    X = torch.tensor(blobs[0])
    network = small_network()
    rows = Rows(blobs[0], torch.device("cpu"), torch.float64)
    objective = AdversarialObjective(network, rows, settings(batch_size=40), make_generator())
    critic_phase, encoder_phase = objective.phases()
    assert set(critic_phase.parameters) == set(network.critic.parameters())
    assert set(encoder_phase.parameters) == set(network.autoencoder.parameters())

    class OneStep(Objective):
        def phases(self):
            return (Phase(critic_phase.parameters, critic_phase.step),)

    weight = torch.ones(len(X)).double()
    critic_phase.step(X, None, weight)
    for parameter in network.critic.parameters():
        parameter.grad = None
    terms = encoder_phase.step(X, None, weight)
    loss = terms["clustering"] + terms["reconstruction"]
    loss.backward(inputs=list(encoder_phase.parameters))
    assert all(p.grad is None for p in network.critic.parameters())
    before = [p.detach().clone() for p in network.autoencoder.parameters()]
    minimize(OneStep(), rows, max_iter=1, batch_size=40, generator=make_generator())
    for parameter, old in zip(network.autoencoder.parameters(), before):
        assert torch.equal(parameter.detach(), old)


def test_without_reconstruction_the_decoder_stays_as_it_was():
    network = small_network()
    objective = AdversarialObjective(network, None, settings(reconstruction_weight=0.0), None)
    assert objective.watch == ("clustering",)
    assert set(objective.phases()[1].parameters) == set(network.autoencoder.encoder.parameters())


# --- The critic's optimum ---


class CriticAlone(Objective):
    """The critic against two Gaussians of the line that do not move."""

    def __init__(self, critic, shift, generator):
        self.critic, self.shift, self.generator = critic, shift, generator

    def phases(self):
        return (Phase(tuple(self.critic.parameters()), self.step),)

    def step(self, batch, index, weight):
        noise = torch.randn(2, len(batch), 1, generator=self.generator)
        positive, negative = self.critic(torch.cat([noise[0], noise[1] + self.shift])).view(2, -1)
        return {"critic": critic_loss(positive, negative, weight)}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_trained_critics_value_is_the_jensen_shannon_divergence(shift):
    """Lemma 2 with its factors: max V = 2 JS - 2 ln 2."""
    critic = init_weights(Critic((1, 64, 1)), make_generator())
    rows = Rows(np.zeros((20_000, 1), np.float32), torch.device("cpu"), torch.float32)
    options = {"batch_size": 500, "generator": make_generator()}
    minimize(CriticAlone(critic, shift, make_generator(1)), rows, max_iter=12, **options)
    grid = torch.linspace(-12, 15, 20_001)[:, None].double()
    step = float(grid[1] - grid[0])
    p, q = (np.exp(stats.norm(mu).logpdf(grid[:, 0])) for mu in (0.0, shift))
    m = (p + q) / 2
    divergence = 0.5 * step * float(np.sum(p * np.log(p / m) + q * np.log(q / m)))
    with torch.no_grad():
        logits = critic.double()(grid)[:, 0].numpy()
    value = -step * float(np.sum(p * np.logaddexp(0, -logits) + q * np.logaddexp(0, logits)))
    assert value == pytest.approx(2 * divergence - 2 * math.log(2), abs=1e-2)
    assert value <= 2 * divergence - 2 * math.log(2) + 1e-9  # of all critics the best


def test_spectral_norms_bound_the_critics_slope():
    critic = init_weights(Critic((3, 16, 16, 1), spectral_norm=True), make_generator())
    for parameter in critic.parameters():
        parameter.data.mul_(10)
    a, b = torch.randn(2, 500, 3, generator=make_generator())
    slopes = (critic(a) - critic(b)).abs().squeeze(1) / (a - b).norm(dim=1)
    assert float(slopes.detach().max()) <= 1 + 1e-5


# --- Limits ---


IDENTITY = {"encoder": nn.Identity(), "decoder": nn.Identity(), "latent_dim": 3}


def test_without_a_divergence_the_labels_are_those_of_the_start(blobs, small):
    X, _ = blobs
    start = small(DCAN, max_iter=0, covariance_type="tracked").fit(X)
    model = small(DCAN, clustering_weight=0.0, covariance_type="tracked").fit(X)
    assert adjusted_rand_score(start.labels_, model.labels_) > 0.99


def test_with_networks_that_do_nothing_the_start_is_k_means(overlapping, small):
    X, _ = overlapping
    options = {"covariance_type": "tracked", "dtype": "auto", **IDENTITY, "latent_dim": 4}
    model = small(DCAN, **options).fit(X)
    assert model.n_iter_ == 0  # nothing to train
    expected = KMeans(4, n_init=10, random_state=0).fit(X).cluster_centers_
    scale = math.sqrt(X.var(axis=0).mean())
    expected = (expected - X.mean(axis=0)) / scale
    distances = np.linalg.norm(model.tracked_means_[:, None] - expected, axis=2)
    assert distances.min(axis=1).max() < 0.05
    np.testing.assert_allclose(model.transform(X), (X - X.mean(axis=0)) / scale, rtol=1e-8)


def test_with_networks_that_do_nothing_the_read_out_is_scikit_learns_mixture(overlapping, small):
    X, _ = overlapping
    options = {**IDENTITY, "latent_dim": 4, "readout_n_init": 10, "dtype": "auto"}
    model = small(DCAN, covariance_type="full", **options).fit(X)
    z = model.transform(X)
    expected = GaussianMixture(4, n_init=20, reg_covar=1e-3, random_state=0).fit(z)
    assert model.score(X) > expected.score(z) - 0.02
    given = GaussianMixture(4, reg_covar=1e-3)
    given.weights_, given.means_ = model.weights_, model.means_
    given.covariances_ = model.covariances_
    given.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(model.covariances_))
    np.testing.assert_allclose(model.predict_proba(X), given.predict_proba(z), atol=1e-5)
    np.testing.assert_allclose(model.score_samples(X), given.score_samples(z), rtol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_keeps_separated_blobs(divergence, blobs, small):
    X, y = blobs
    model = small(DCAN, divergence=divergence, max_iter=60).fit(X)
    assert adjusted_rand_score(model.labels_, y) > 0.95
    terms = {"clustering", "reconstruction", "latent_variance"}
    terms |= {"critic", "critic_accuracy"} if divergence == "js" else set()
    assert set(model.history_) == {"loss", "pretrain_reconstruction", *terms}
    total = model.history_["clustering"] + model.history_["reconstruction"]
    np.testing.assert_allclose(model.history_["loss"], total)


def test_pulls_in_closed_form_tighten_the_components(overlapping, small):
    X, _ = overlapping
    options = {"covariance_type": "tracked", "max_iter": 40, "clustering_weight": 100.0}
    before = small(DCAN, max_iter=0, covariance_type="tracked").fit(X)
    after = small(DCAN, divergence="euclidean", **options).fit(X)
    assert after.tracked_variance_ < 0.8 * before.tracked_variance_


def test_the_game_makes_residuals_that_the_critic_takes_for_noise(overlapping, small):
    model = small(DCAN, max_iter=150).fit(overlapping[0])
    assert model.history_["critic"][-1] == pytest.approx(2 * math.log(2), abs=0.15)
    assert 0.35 < model.history_["critic_accuracy"][-1] < 0.65


@pytest.mark.parametrize(
    "options",
    [
        {"conditional": False},
        {"spectral_norm": True},
        {"label_smoothing": 0.1},
        {"activation": "tanh"},
        {"generator_loss": "saturating"},
        {"update_every": 0},
        {"memory": 0.0, "pool_size": 50, "update_every": 1},
        {"solver": "sgd", "learning_rate_init": 1e-4, "momentum": 0.9},
        {"init": "k-means++"},
        {"reconstruction_weight": 0.0},
        {"critic_hidden_layer_sizes": ()},
        {"n_init": 2},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_options_train_and_stay_finite(options, blobs, small):
    X, y = blobs
    model = quietly(small(DCAN, **options).fit, X)
    assert all(np.all(np.isfinite(values)) for values in model.history_.values())
    assert adjusted_rand_score(model.labels_, y) > 0.5


def test_a_frozen_mixture_stays_where_it_started(blobs, small):
    options = {"covariance_type": "tracked", "update_every": 0, "dtype": "auto"}
    model = small(DCAN, max_iter=0, **options).fit(blobs[0])
    start = model.module_.tracked
    trained = small(DCAN, **options).fit(blobs[0])
    # But for the unit of the codes, which is fixed at the end.
    ratio = float(trained.module_.tracked_variance / start.covariances)
    moved = trained.tracked_means_ - trained.tracked_means_.mean(axis=0)
    expected = (start.means - start.means.mean(dim=0)).numpy() * math.sqrt(ratio)
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)


def test_a_restart_is_kept_by_the_share_of_variance_within_components(overlapping, small):
    X, _ = overlapping

    def ratio(model):
        z, means = model.transform(X), model.tracked_means_
        distances = np.square(z[:, None] - means).sum(axis=2)
        posterior = np.log(model.tracked_weights_) - distances / 2 / model.tracked_variance_
        near = distances[np.arange(len(z)), posterior.argmax(axis=1)].sum()
        return near / np.square(z - z.mean(axis=0)).sum()

    several = small(DCAN, n_init=4, max_iter=3).fit(X)
    seeds = [small(DCAN, max_iter=3).fit(X)]
    assert ratio(several) <= ratio(seeds[0]) + 1e-6


# --- The literal reading ---


def test_eq_22_ends_in_one_component():
    """Where codes lie closer than one, weights outweigh distances: the rich get richer."""
    z = torch.tensor(np.random.default_rng(0).normal(size=(600, 10)) * math.sqrt(0.5))
    centers = KMeans(10, n_init=1, random_state=0).fit(z).cluster_centers_
    weights, variance = torch.full((10,), 0.1).double(), torch.tensor(0.4).double()
    literal = healthy = Mixture(weights, torch.tensor(centers), variance, "tied_spherical")
    one = torch.ones(600).double()
    for _ in range(200):
        literal = sweep(z, one, literal, 0.0, literal=True)
        healthy = sweep(z, one, healthy, 0.0)
    assert torch.bincount(component(z, literal, literal=True)).max() > 0.98 * 600
    assert torch.bincount(component(z, healthy)).max() < 0.3 * 600


def test_the_papers_recipe_collapses_and_says_so():
    X = load_digits().data[:600] / 16
    model = DCAN.from_paper("mnist", max_iter=8, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X)
    assert any("found smaller than n_clusters" in str(w.message) for w in caught)
    assert len(np.unique(model.labels_)) <= 3


def test_a_data_set_that_the_paper_does_not_name_is_refused():
    with pytest.raises(ValueError, match=r"no networks for 'iris'. Choose one of \['cifar10'"):
        DCAN.from_paper("iris")


@pytest.mark.parametrize("name", PAPER_SETTINGS)
def test_paper_settings_are_parameters_that_can_be_overridden(name):
    model = DCAN.from_paper(name, 7, max_iter=3)
    got = (model.hidden_layer_sizes, model.latent_dim, model.critic_hidden_layer_sizes)
    assert got == PAPER_SETTINGS[name]
    assert (model.n_clusters, model.max_iter, model.batch_size) == (7, 3, 16)
    assert (model.activation, model.solver, model.assignment) == ("tanh", "sgd", "literal")


# --- The read-out ---

SHAPES = {
    "full": (4, 3, 3),
    "tied": (3, 3),
    "diag": (4, 3),
    "spherical": (4,),
    "tied_spherical": (),
}


@pytest.mark.parametrize("covariance_type", SHAPES)
def test_covariances_have_the_shape_of_their_type(covariance_type, blobs, small):
    X, y = blobs
    model = small(DCAN, covariance_type=covariance_type).fit(X)
    assert model.covariance_type_ == covariance_type
    assert model.covariances_.shape == SHAPES[covariance_type]
    assert adjusted_rand_score(model.labels_, y) > 0.95
    drawn, labels = model.sample(500)
    assert drawn.shape == (500, 3)
    assert np.mean(model.predict(drawn) == labels) > 0.8


def test_the_mixture_of_the_codes_can_be_fitted_anew(overlapping, small):
    X, _ = overlapping
    direct = small(DCAN, covariance_type="full", dtype="auto").fit(X)
    model = small(DCAN, covariance_type="tracked", dtype="auto").fit(X)
    codes, tracked = model.transform(X), model.tracked_means_
    assert model.set_params(covariance_type="full").read_out(X) is model
    for name in ("means_", "weights_", "covariances_", "cluster_centers_"):
        np.testing.assert_allclose(getattr(model, name), getattr(direct, name), rtol=1e-6)
    np.testing.assert_array_equal(model.labels_, direct.labels_)
    np.testing.assert_array_equal(model.transform(X), codes)
    np.testing.assert_array_equal(model.tracked_means_, tracked)
    with pytest.raises(ValueError, match="The 'covariance_type' parameter of DCAN must be"):
        model.set_params(covariance_type="round").read_out(X)


def test_what_is_read_out_is_the_network_that_was_trained(overlapping, small):
    X, _ = overlapping
    model = small(DCAN).fit(X)
    means = model.means_
    model.set_params(n_clusters=3, latent_dim=2, hidden_layer_sizes=(5,)).read_out(X)
    assert model.n_clusters_ == 4
    np.testing.assert_allclose(model.means_, means, rtol=1e-6)
    np.testing.assert_array_equal(model.predict(X), model.labels_)
    assert model.cluster_centers_.shape == (4, X.shape[1])


def test_one_bad_row_is_left_out_of_a_mixture_fitted_anew(overlapping, small):
    X, _ = overlapping
    model = small(DCAN).fit(X)
    means = model.means_
    with pytest.warns(UserWarning, match="1 of .* rows .* left out") as caught:
        model.read_out(np.vstack([X, np.full((1, X.shape[1]), -9999.0)]))
    assert caught[0].filename == __file__
    np.testing.assert_allclose(model.means_, means, rtol=1e-6)
    assert len(model.labels_) == len(X) + 1


def test_a_mixture_that_cannot_be_fitted_anew_leaves_the_one_there_is(
    overlapping, small, monkeypatch
):
    X, _ = overlapping
    model = small(DCAN).fit(X)
    before = dict(vars(model))
    whole = DCAN._fitted_attributes
    monkeypatch.setattr(
        DCAN, "_fitted_attributes", lambda *args: {**whole(*args), "tracked_means_": np.nan}
    )
    with pytest.raises(FloatingPointError, match="tracked_means_"):
        model.read_out(X)
    assert vars(model) == before


def test_auto_is_full_where_there_are_rows_enough(blobs, small):
    X, _ = blobs
    assert small(DCAN).fit(X).covariance_type_ == "full"
    assert quietly(small(DCAN, 8).fit, X).covariance_type_ == "tied"


def test_probabilities_are_the_posterior_of_the_mixture_of_codes(overlapping, small):
    X, _ = overlapping
    model = small(DCAN, covariance_type="full").fit(X)
    z = model.transform(X)
    log_joint = np.transpose(
        [
            np.log(w) + stats.multivariate_normal(mean, covariance).logpdf(z)
            for w, mean, covariance in zip(model.weights_, model.means_, model.covariances_)
        ]
    )
    log_density = logsumexp(log_joint, axis=1)
    np.testing.assert_allclose(model.score_samples(X), log_density, rtol=1e-4, atol=1e-4)
    resp = np.exp(log_joint - log_density[:, None])
    np.testing.assert_allclose(model.predict_proba(X), resp, atol=1e-4)


def test_codes_have_mean_zero_and_variance_one(overlapping, small):
    z = small(DCAN).fit(overlapping[0]).transform(overlapping[0])
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    assert z.var(axis=0).mean() == pytest.approx(1, rel=1e-4)


def test_decoded_means_are_the_centres(blobs, small):
    model = small(DCAN, max_iter=30).fit(blobs[0])
    decoded = model.inverse_transform(model.means_)
    np.testing.assert_allclose(decoded, model.cluster_centers_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.interpolate(0, 2)[[0, -1]], decoded[[0, 2]], rtol=1e-5)
    assert model.latent_centers_ is model.means_


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_in_full_batches_weights_are_repetitions_and_order_is_nothing(
    divergence, overlapping, small
):
    X, _ = overlapping
    draw = np.random.default_rng(0)
    weight = draw.integers(0, 4, len(X)).astype(float)
    order = draw.permutation(len(X))
    options = {"batch_size": 5000, "dtype": "auto", "max_iter": 5, "pretrain_max_iter": 5}
    options |= {"divergence": divergence}
    weighted = small(DCAN, **options).fit(X, sample_weight=weight)
    repeated = small(DCAN, **options).fit(np.repeat(X, weight.astype(int), axis=0))
    permuted = small(DCAN, **options).fit(X[order], sample_weight=weight[order])
    for other in (repeated, permuted):
        np.testing.assert_allclose(other.tracked_means_, weighted.tracked_means_, rtol=1e-6)
        np.testing.assert_allclose(other.weights_, weighted.weights_, rtol=1e-5)
        np.testing.assert_allclose(other.cluster_centers_, weighted.cluster_centers_, rtol=1e-5)


# --- Networks from outside ---


class Squares(nn.Module):
    """Polynomial features and a linear layer."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(2 * n_in, n_out)

    def forward(self, x):
        return self.linear(torch.cat([x, x.square()], dim=1))


def test_encoders_and_decoders_may_come_from_outside(blobs, small):
    X, _ = blobs
    model = quietly(small(DCAN, encoder=Squares, decoder=nn.Linear).fit, X)
    assert type(model.module_.autoencoder.encoder) is Squares
    assert type(model.module_.autoencoder.decoder) is nn.Linear
    np.testing.assert_array_equal(model.labels_, model.predict(X))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({"encoder": nn.Linear(3, 4)}, r"encoder must map a batch of shape \(2, 3\) to \(2, 3\)"),
        ({"decoder": nn.Linear(3, 4)}, r"decoder must map a batch of shape \(2, 3\) to \(2, 3\)"),
    ],
)
def test_networks_of_wrong_shape_are_refused_before_training(
    networks, message, blobs, small, monkeypatch
):
    monkeypatch.setattr("deepmix.base.minimize", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=message):
        small(DCAN, **networks).fit(blobs[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_pretrained_autoencoder_serves_every_divergence(divergence, blobs, small):
    X = ((blobs[0] - blobs[0].mean()) / blobs[0].std()).astype(np.float32)
    pretrained = pretrain_autoencoder(
        X, hidden_layer_sizes=(16,), latent_dim=3, max_iter=20, random_state=0
    )
    before = [p.clone() for p in pretrained.parameters()]
    parts = {"encoder": pretrained.encoder, "decoder": pretrained.decoder}
    options = {**parts, "pretrain_max_iter": 0, "scale": False, "divergence": divergence}
    start = small(DCAN, max_iter=0, **options).fit(X)
    with torch.inference_mode():
        codes = pretrained.encoder(torch.tensor(X)).numpy()
    expected = (codes - codes.mean(axis=0)) / math.sqrt(codes.var(axis=0).mean())
    np.testing.assert_allclose(start.transform(X), expected, atol=1e-4)
    small(DCAN, **options).fit(X)
    for parameter, old in zip(pretrained.parameters(), before):
        assert torch.equal(parameter, old)


def test_networks_with_normalisation_and_dropout_predict_row_by_row(blobs, small):
    def build(n_in, n_out):
        return nn.Sequential(
            nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, n_out)
        )

    X, _ = blobs
    model = quietly(small(DCAN, encoder=build).fit, X)
    whole = model.predict_proba(X)
    rows = np.concatenate([model.predict_proba(X[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(rows, whole[:20], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("equal_weights", "least", "most"), [(True, 0.1, 0.25), (False, 0.8, 1.0)])
def test_where_there_are_no_clusters_free_weights_end_in_one(equal_weights, least, most):
    X = np.random.default_rng(0).random((1500, 30))
    tracked = {"covariance_type": "tracked", "equal_weights": equal_weights}
    sizes = {"hidden_layer_sizes": (64,), "latent_dim": 5, "pretrain_max_iter": 20}
    model = quietly(DCAN(10, divergence="euclidean", random_state=0, **tracked, **sizes).fit, X)
    assert least <= np.bincount(model.labels_).max() / len(X) <= most


# --- Scaling ---


@pytest.mark.parametrize(
    ("share", "offset", "centered"), [(0.2, 0, True), (0.3, 0, False), (0.3, 100, True)]
)
def test_rows_of_many_zeros_are_scaled_but_not_centred(share, offset, centered, small):
    rng = np.random.RandomState(0)
    X = 1 + rng.rand(200, 10)
    X[rng.permutation(200)[: int(200 * share)]] = 0
    X = np.c_[X, offset + rng.rand(200, 1)]  # a zero beside a column far from it is one value
    module = quietly(small(DCAN, max_iter=0, dtype="float64").fit, X).module_
    scaled = module.scaler(torch.tensor(X))
    assert float(scaled.square().sum(dim=1).mean()) == pytest.approx(10)
    assert np.allclose(module.scaler.mean, X.mean(axis=0) if centered else 0)


# --- Lengths ---


def test_auto_counts_steps(blobs, small):
    X, _ = blobs  # 240 rows: two batches of 128
    model = small(DCAN, batch_size="auto", max_iter="auto", pretrain_max_iter="auto")
    rows = Rows(X, torch.device("cpu"), torch.float32)
    assert model._n_epochs(rows) == 500
    assert model._batch_size(rows) == 128
    assert small(DCAN, batch_size=40, max_iter="auto")._n_epochs(rows) == 167
    model.set_params(max_iter=1)
    assert len(quietly(model.fit, X).history_["pretrain_reconstruction"]) == 150


def test_a_critic_is_judged_by_the_module(blobs, small):
    X, _ = blobs
    model = small(DCAN, dtype="auto").fit(X)
    module = model.module_.double()
    z = torch.tensor(model.transform(X))
    with torch.no_grad():
        got = module.judge(z)
        labels = component(z, module.tracked)
        residual = (z - module.tracked.means[labels]) / module.tracked.covariances.sqrt()
        expected = module.critic(residual)[:, 0]
    torch.testing.assert_close(got, expected)


# --- Real data ---


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_digits_the_tracked_mixture_is_never_far_below_its_start(divergence):
    X, y = load_digits(return_X_y=True)
    from deepmix.metrics import clustering_accuracy

    for seed in (0, 1):
        # That of the final codes varies by more, with the local maximum that it ends in.
        options = {"divergence": divergence, "random_state": seed, "covariance_type": "tracked"}
        start = DCAN(10, max_iter=0, **options).fit(X)
        model = DCAN(10, **options).fit(X)
        scores = [clustering_accuracy(y, m.labels_) for m in (start, model)]
        assert scores[1] > scores[0] - 0.02
