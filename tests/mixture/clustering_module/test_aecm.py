"""AECM: equations, limits, starts, networks from outside, decoding, recorded results."""

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
from sklearn.datasets import load_digits, make_blobs, make_circles
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.utils import check_random_state
from torch import nn

from deepmix import AECM, pretrain_autoencoder
from deepmix._torch import Rows
from deepmix.fitting import Fit, RandomStreams
from deepmix.mixture.clustering_module.aecm import PAPER_SETTINGS, JointObjective, best_mixture
from deepmix.mixture.clustering_module.losses import (
    DirichletPrior,
    balance,
    gini,
    inertia,
    merging,
    orthonormality,
    reconstruction,
    sparsity,
)
from deepmix.mixture.clustering_module.network import AECMNetwork
from deepmix.networks import MLP

RTOL = 1e-10


@pytest.fixture
def small():
    """The estimator trains for longer than in the common tests: to where the method arrives."""
    return partial(common.small, hidden_layer_sizes=(16,), batch_size=40, learning_rate_init=5e-3)


def identity_network(d=3, k=3, seed=0):
    """A clustering module whose autoencoder does nothing, with parameters of no structure."""
    network = AECMNetwork(d, k, d, (), encoder=nn.Identity(), decoder=nn.Identity()).double()
    for parameter in network.clustering.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    return network


def example(n=11, d=3, seed=0):
    draw = np.random.default_rng(seed)
    x = torch.tensor(draw.normal(size=(n, d)))
    return x, torch.tensor(draw.integers(1, 4, n).astype(float))


# --- Equations ---


def test_gini_equals_a_naive_loop():
    x, weight = example()
    resp = x.softmax(dim=1)
    expected = sum(
        w * sum(g * (1 - g) for g in row) for w, row in zip(weight.tolist(), resp.tolist())
    )
    assert float(gini(resp, weight)) == pytest.approx(expected, rel=RTOL)


def test_gini_lies_between_hard_and_uniform_responsibilities():
    weight = torch.tensor([1.0, 2.0])
    assert gini(torch.eye(2), weight) == 0
    uniform = gini(torch.full((2, 5), 0.2), weight)
    assert float(uniform) == pytest.approx((1 - 1 / 5) * 3, rel=1e-6)


def test_orthonormality_equals_a_naive_loop():
    centers = example()[0][:4]
    expected = 0.0
    for k in range(4):
        for m in range(4):
            expected += abs(float(centers[k] @ centers[m]) - (k == m))
    assert float(orthonormality(centers)) == pytest.approx(expected, rel=RTOL)


def test_orthonormality_vanishes_for_orthonormal_rows_only():
    centers = nn.init.orthogonal_(torch.empty(3, 5).double())
    assert float(orthonormality(centers)) == pytest.approx(0, abs=1e-12)
    assert orthonormality(2 * centers) > 1
    # Columns that are orthonormal do not count: it is U U', not U' U.
    assert orthonormality(nn.init.orthogonal_(torch.empty(5, 3).double())) > 1


def test_the_loss_is_the_sum_of_eq_10():
    x, weight = example()
    coders = {"encoder": MLP((3, 5, 2)), "decoder": MLP((2, 5, 3))}
    network = AECMNetwork(3, 4, 2, (), **coders).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    objective = JointObjective(network, DirichletPrior(3.0, 1.0, weight), 0.7, 1.3)
    with torch.no_grad():
        terms = objective.step(x, None, weight)
        z = network.encode(x)
        resp = network.resp(x)
        mu = network.clustering.centers()[0]
        x_hat = network.decode(z)
    mean = np.average(resp, axis=0, weights=weight)
    expected = {
        "reconstruction": 0.7 * weight @ (x - x_hat).square().sum(dim=1),
        "clustering": weight @ (z - resp @ mu).square().sum(dim=1),
        "sparsity": weight @ (resp * (1 - resp)).sum(dim=1),
        "balance": (1 - 3.0) * np.log(mean).sum(),
        "orthonormality": 1.3 * (mu @ mu.T - torch.eye(4)).abs().sum(),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=RTOL), name


def test_the_joint_objective_trains_autoencoder_and_clustering_and_no_buffer():
    network = AECMNetwork(3, 4, 2, (5,))
    (phase,) = JointObjective(network, None, 1.0, 1.0).phases()
    assert set(phase.parameters) == set(network.parameters())


# --- Limits ---


def test_with_an_identity_autoencoder_its_terms_are_those_of_the_clustering_module():
    x, weight = example()
    network = identity_network()
    prior = DirichletPrior([1.5, 3.0, 2.0], 1.0, weight)
    with torch.no_grad():
        terms = JointObjective(network, prior, 1.0, 1.0).step(x, None, weight)
        log_resp = network.clustering.log_resp(x)[:, 0]
        resp, mu = log_resp.exp(), network.clustering.centers()[0]
    assert terms["reconstruction"] == 0
    torch.testing.assert_close(
        terms["clustering"], reconstruction(x, resp, mu, weight), rtol=RTOL, atol=0
    )
    expected = balance(log_resp, weight, prior(log_resp, weight))
    torch.testing.assert_close(terms["balance"], expected, rtol=RTOL, atol=0)


def test_with_orthonormal_centres_eq_10_is_eq_7():
    x, weight = example()
    network = identity_network()
    network.clustering.init_orthonormal(torch.Generator().manual_seed(0), gain=2.0)
    prior = DirichletPrior(2.0, 1.0, weight)
    with torch.no_grad():
        terms = JointObjective(network, prior, 1.0, 1.0).step(x, None, weight)
        resp, mu = network.resp(x), network.clustering.centers()[0]
    assert float(terms["orthonormality"]) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(terms["sparsity"], sparsity(resp, mu, weight), rtol=RTOL, atol=0)
    assert float(merging(resp, mu, weight)) == pytest.approx(0, abs=1e-12)
    total = terms["clustering"] + terms["sparsity"]
    torch.testing.assert_close(total, inertia(x, resp, mu, weight), rtol=RTOL, atol=0)


def test_an_identity_autoencoder_clusters_separated_blobs(blobs, small):
    X, y = blobs
    identity = {"encoder": nn.Identity(), "decoder": nn.Identity(), "latent_dim": 3}
    model = small(AECM, orthogonality_weight=0.0, max_iter=20, **identity).fit(X)
    assert adjusted_rand_score(model.labels_, y) == 1.0


def test_the_pretrained_start_keeps_the_k_means_labels_exactly(overlapping, small):
    X, _ = overlapping
    model = small(AECM, init="pretrain", max_iter=0, dtype="auto").fit(X)
    codes = model.transform(X)
    distances = np.linalg.norm(codes[:, None] - model.latent_centers_, axis=2)
    np.testing.assert_array_equal(model.labels_, distances.argmin(axis=1))
    # Lloyd's algorithm has nothing left to move.
    again = KMeans(4, init=model.latent_centers_, n_init=1).fit(codes)
    np.testing.assert_array_equal(model.labels_, again.labels_)
    np.testing.assert_allclose(again.cluster_centers_, model.latent_centers_, rtol=1e-3, atol=1e-3)


def test_the_start_from_a_mixture_assigns_rows_to_the_nearest_mean_of_whitened_codes(blobs, small):
    X, y = blobs
    model = small(AECM, init="pretrain-gmm", max_iter=0, dtype="auto").fit(X)
    codes = model.transform(X)
    distances = np.linalg.norm(codes[:, None] - model.latent_centers_, axis=2)
    np.testing.assert_array_equal(model.labels_, distances.argmin(axis=1))
    assert adjusted_rand_score(model.labels_, y) == 1.0
    within = np.mean([np.cov(codes[y == k].T, ddof=0) for k in range(4)], axis=0)
    values = np.linalg.eigvalsh(within)
    # Three dimensions of data in five of codes: what varies varies alike.
    assert values[-1] < 1.6 * values[2]


@pytest.mark.parametrize("init", ["pretrain", "pretrain-gmm"])
def test_the_pretrained_centres_have_the_scale_of_orthonormal_ones(init, overlapping, small):
    model = small(AECM, init=init, max_iter=0, dtype="auto").fit(overlapping[0])
    assert np.square(model.latent_centers_).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(model.latent_centers_.mean(axis=0), 0, atol=1e-8)


def test_the_orthonormal_start_is_orthonormal(overlapping, small):
    options = {"init": "orthonormal", "max_iter": 0, "dtype": "auto"}
    model = quietly(small(AECM, **options).fit, overlapping[0])
    centers = model.latent_centers_
    np.testing.assert_allclose(centers @ centers.T, np.eye(4), atol=1e-10)


# --- Starts ---


@pytest.mark.parametrize("init", ["pretrain", "pretrain-gmm", "pretrain-pinv", "orthonormal"])
def test_every_start_ends_at_the_blobs(init, blobs, small):
    X, y = blobs
    model = quietly(small(AECM, init=init, max_iter=60, clustering_max_iter=20).fit, X)
    assert adjusted_rand_score(model.labels_, y) > 0.9


def test_training_brings_the_centres_near_orthonormality(blobs, small):
    model = small(AECM, max_iter=60, orthogonality_weight=3.0).fit(blobs[0])
    centers = model.latent_centers_
    assert np.abs(centers @ centers.T - np.eye(4)).max() < 0.2


def test_pretraining_is_in_the_history_with_its_own_length(blobs, small):
    model = small(AECM, pretrain_max_iter=7, max_iter=9).fit(blobs[0])
    assert model.history_["pretrain_reconstruction"].shape == (7,)
    terms = {"reconstruction", "clustering", "sparsity", "balance", "orthonormality"}
    assert set(model.history_) == {"loss", "pretrain_reconstruction", *terms}
    total = sum(model.history_[name] for name in terms)
    np.testing.assert_allclose(model.history_["loss"], total)
    assert model.history_["loss"].shape == (model.n_iter_,) == (9,)


@pytest.mark.parametrize("init", ["pretrain", "orthonormal"])
def test_the_history_is_finite_and_decreases(init, overlapping, small):
    model = small(AECM, init=init, max_iter=30).fit(overlapping[0])
    assert all(np.all(np.isfinite(values)) for values in model.history_.values())
    assert model.history_["loss"][-1] < model.history_["loss"][0]


def test_a_random_start_warns_when_it_stays_on_the_plateau(overlapping, small):
    model = small(AECM, init="random", max_iter=2, learning_rate_init=1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(overlapping[0])
    messages = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert any("still near uniform" in m and "Raise logit_gain" in m for m in messages)


def test_a_logit_gain_leaves_the_plateau(overlapping, small):
    def impurity(gain):
        model = small(AECM, init="orthonormal", logit_gain=gain, max_iter=3)
        return quietly(model.fit, overlapping[0]).history_["sparsity"][-1]

    assert impurity(0.5) > 0.7 * 0.75  # of at most 1 - 1/4
    assert impurity(8.0) < 0.4 * 0.75


def objective_of(model, network, rows):
    return model._objective(Fit(rows, None, RandomStreams(0)), network)


def test_the_kept_restart_has_the_lowest_loss(overlapping, small):
    X, _ = overlapping
    options = {"init": "orthonormal", "max_iter": 3, "averaging": False, "dtype": "auto"}
    options["batch_size"] = 1000

    def criterion(n_init, seed=0):
        model = small(AECM, n_init=n_init, random_state=seed, **options)
        quietly(model.fit, X)
        network = model._rebuild(torch.float64, torch.device("cpu"))
        rows = Rows(X, torch.device("cpu"), torch.float64)
        with torch.no_grad():
            objective = objective_of(model, network, rows)
            terms = objective.step(rows.take(rows.visited), None, rows.weight)
        return float(sum(terms.values()))

    assert criterion(6) < criterion(1)


def test_the_full_loss_is_that_of_a_step_where_one_batch_holds_all(overlapping, small):
    X, _ = overlapping
    model = quietly(small(AECM, dtype="auto", concentration=[2.0, 3.0, 4.0, 5.0]).fit, X)
    network = model._rebuild(torch.float64, torch.device("cpu"))
    rows = Rows(X, torch.device("cpu"), torch.float64)
    objective = objective_of(model, network, rows)
    with torch.no_grad():
        step = sum(objective.step(rows.take(rows.visited), None, rows.weight).values())
    assert objective.full_loss(rows, len(X)) == pytest.approx(float(step), rel=RTOL)


@pytest.mark.parametrize("concentration", [0.5, 2.0, "auto"])
def test_the_full_loss_of_a_dead_cluster_is_finite(concentration, blobs, small):
    X, _ = blobs
    model = quietly(small(AECM, concentration=concentration).fit, X)
    network = model._rebuild(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        network.clustering.encoder_bias[0] = -1e6
    rows = Rows(X, torch.device("cpu"), torch.float32)
    assert np.isfinite(objective_of(model, network, rows).full_loss(rows, 50))


def test_the_full_loss_does_not_depend_on_the_order_of_rows(small):
    X, y = make_blobs(9000, centers=4, n_features=3, random_state=0)
    model = quietly(small(AECM, max_iter=1, pretrain_max_iter=1, batch_size=500).fit, X)
    network = model._rebuild(torch.float64, torch.device("cpu"))
    rows, by_class = (Rows(Z, torch.device("cpu"), torch.float64) for Z in (X, X[np.argsort(y)]))
    objective = objective_of(model, network, rows)
    expected = pytest.approx(objective.full_loss(rows, 500), rel=RTOL)
    assert objective.full_loss(by_class, 500) == expected


def test_the_same_width_of_codes_as_clusters_is_not_asked_for(blobs, small):
    X, _ = blobs
    for latent_dim in (2, 4, 7, None):
        model = quietly(small(AECM, latent_dim=latent_dim, max_iter=2).fit, X)
        assert model.transform(X).shape == (240, latent_dim or 10)


def test_a_linear_autoencoder_is_one_without_hidden_layers(blobs, small):
    model = quietly(small(AECM, hidden_layer_sizes=(), max_iter=5).fit, blobs[0])
    kinds = [type(layer) for layer in model.module_.autoencoder.encoder]
    assert kinds == [nn.Linear]


# --- Precision ---


def test_bfloat16_trains_to_the_same_clusters(blobs, small):
    X, y = blobs
    full, short = (small(AECM, precision=p).fit(X) for p in ("float32", "bfloat16"))
    assert adjusted_rand_score(short.labels_, y) == adjusted_rand_score(full.labels_, y) == 1.0
    assert np.any(short.transform(X) != full.transform(X))
    assert all(value.dtype == np.float32 for value in short._state.values())
    # The loss and its running sum stay float32: sums of hundreds of rows lose nothing.
    first = {name: curve[0] for name, curve in full.history_.items()}
    assert {name: curve[0] for name, curve in short.history_.items()} == pytest.approx(
        first, rel=0.05, abs=5e-3
    )


# --- Weights ---


def test_in_full_batches_weights_are_repetitions_and_order_is_nothing(overlapping, small):
    X, _ = overlapping
    draw = np.random.default_rng(0)
    weight = draw.integers(0, 4, len(X)).astype(float)
    order = draw.permutation(len(X))
    options = {"batch_size": 5000, "dtype": "auto", "max_iter": 5, "pretrain_max_iter": 5}
    weighted = small(AECM, **options).fit(X, sample_weight=weight)
    repeated = small(AECM, **options).fit(np.repeat(X, weight.astype(int), axis=0))
    permuted = small(AECM, **options).fit(X[order], sample_weight=weight[order])
    for other in (repeated, permuted):
        np.testing.assert_allclose(other.cluster_centers_, weighted.cluster_centers_, rtol=1e-6)
        np.testing.assert_allclose(other.weights_, weighted.weights_, rtol=1e-6)
        np.testing.assert_allclose(other.latent_variance_, weighted.latent_variance_, rtol=1e-6)
        np.testing.assert_array_equal(other.predict(X), weighted.predict(X))


# --- Between codes and data ---


def test_responsibilities_sum_to_one_and_their_maximum_is_the_label(overlapping, small):
    X, _ = overlapping
    model = small(AECM).fit(X)
    resp = model.predict_proba(X)
    np.testing.assert_allclose(resp.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(resp.argmax(axis=1), model.predict(X))
    np.testing.assert_allclose(model.weights_, resp.mean(axis=0), rtol=1e-4)


def test_centres_in_data_space_are_the_decoded_centres(blobs, small):
    model = small(AECM).fit(blobs[0])
    decoded = model.inverse_transform(model.latent_centers_)
    np.testing.assert_allclose(model.cluster_centers_, decoded, rtol=1e-4, atol=1e-4)


def test_codes_decode_to_what_is_near_the_data(blobs, small):
    X, _ = blobs
    model = small(AECM, pretrain_max_iter=60, max_iter=30, reconstruction_weight=100.0).fit(X)
    error = np.square(model.inverse_transform(model.transform(X)) - X).mean()
    assert error < 0.1 * X.var(axis=0).mean()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decoding_keeps_the_dtype_of_the_codes(dtype, blobs, small):
    model = small(AECM, max_iter=1).fit(blobs[0])
    assert model.inverse_transform(np.zeros((2, 5), dtype)).dtype == dtype
    assert model.inverse_transform(torch.zeros(2, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 4)), "X has 4 columns; expected codes of latent_dim=5"),
        (np.zeros(5), "Expected 2D array"),
        (np.full((2, 5), np.nan), "contains NaN"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes, message, blobs, small):
    model = small(AECM, max_iter=1).fit(blobs[0])
    with pytest.raises(ValueError, match=message):
        model.inverse_transform(codes)


def test_interpolation_begins_and_ends_at_the_decoded_centres(blobs, small):
    model = small(AECM).fit(blobs[0])
    path = model.interpolate(1, 3, n_steps=5)
    assert path.shape == (5, 3)
    np.testing.assert_allclose(path[[0, -1]], model.cluster_centers_[[1, 3]], rtol=1e-4, atol=1e-4)
    middle = model.inverse_transform(model.latent_centers_[[1, 3]].mean(axis=0)[None])
    np.testing.assert_allclose(path[2], middle[0], rtol=1e-8)


def test_score_samples_is_the_density_around_the_decoded_centres(overlapping, small):
    X, _ = overlapping
    model = small(AECM).fit(X)
    densities = [
        stats.norm(mu, np.sqrt(model.variance_)).logpdf(X).sum(axis=1)
        for mu in model.cluster_centers_
    ]
    expected = logsumexp(np.transpose(densities), b=model.weights_, axis=1)
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-8)
    assert model.score(X) == pytest.approx(expected.mean(), rel=1e-8)


def test_samples_are_decoded_codes_of_their_clusters(blobs, small):
    X, _ = blobs
    model = small(AECM, max_iter=60, pretrain_max_iter=60).fit(X)
    drawn, labels = model.sample(2000)
    assert drawn.shape == (2000, 3)
    np.testing.assert_allclose(np.bincount(labels) / 2000, model.weights_, atol=0.05)
    assert np.mean(model.predict(drawn) == labels) > 0.9


# --- Networks from outside ---


class Squares(nn.Module):
    """Polynomial features and a linear layer: circles become separable."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(2 * n_in, n_out)

    def forward(self, x):
        return self.linear(torch.cat([x, x.square()], dim=1))


def networks_of(spec):
    if spec == "instance":
        return {"encoder": Squares(3, 5), "decoder": nn.Linear(5, 3)}
    encoder = Squares if spec == "class" else lambda n_in, n_out: Squares(n_in, n_out)
    return {"encoder": encoder, "decoder": nn.Linear}


@pytest.mark.parametrize("spec", ["class", "function", "instance"])
def test_encoders_and_decoders_may_come_from_outside(spec, blobs, small):
    X, _ = blobs
    model = quietly(small(AECM, **networks_of(spec)).fit, X)
    module = model.module_
    assert type(module.autoencoder.encoder) is Squares
    assert type(module.autoencoder.decoder) is nn.Linear
    np.testing.assert_array_equal(model.labels_, model.predict(X))
    assert model.transform(X).shape == (240, 5)


def test_a_module_instance_is_never_trained_in_place(blobs, small):
    networks = networks_of("instance")
    before = {
        name: [p.detach().clone() for p in module.parameters()] for name, module in networks.items()
    }
    model = quietly(small(AECM, **networks).fit, blobs[0])
    for name, module in networks.items():
        assert getattr(model, name) is module
        for parameter, old in zip(module.parameters(), before[name]):
            assert torch.equal(parameter, old)
            assert parameter.grad is None


@pytest.mark.parametrize("spec", ["class", "function"])
def test_networks_from_callables_repeat_and_draw_no_global_number(
    spec, blobs, small, global_random_states
):
    before = global_random_states()
    fits = [quietly(small(AECM, **networks_of(spec)).fit, blobs[0]) for _ in range(2)]
    fits[0].predict(blobs[0])
    fits[0].sample(3)
    assert global_random_states() == before
    np.testing.assert_array_equal(fits[0].transform(blobs[0]), fits[1].transform(blobs[0]))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({"encoder": nn.Linear(3, 4)}, r"encoder must map a batch of shape \(2, 3\) to \(2, 5\)"),
        ({"encoder": nn.Linear(2, 5)}, r"encoder cannot be applied to a batch of shape \(2, 3\)"),
        ({"decoder": nn.Linear(5, 4)}, r"decoder must map a batch of shape \(2, 5\) to \(2, 3\)"),
        ({"decoder": lambda a, b: nn.Linear(b, a)}, "decoder cannot be applied"),
        ({"encoder": nn.Flatten(0)}, "encoder must map"),
    ],
)
def test_networks_of_wrong_shape_are_refused_before_training(
    networks, message, blobs, small, monkeypatch
):
    monkeypatch.setattr("deepmix.base.minimize", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=message):
        small(AECM, **networks).fit(blobs[0])


class Gain(nn.Linear):
    """A layer with a parameter that no rule of initialisation knows."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.gain = nn.Parameter(torch.full((n_out,), 3.0))


@pytest.mark.parametrize("encoder", [Gain, lambda n_in, n_out: nn.LSTM(n_in, n_out)])
def test_parameters_that_cannot_be_drawn_are_refused(encoder, blobs, small):
    with pytest.raises(ValueError, match=r"Pass an nn\.Module instance instead"):
        small(AECM, encoder=encoder).fit(blobs[0])


def test_a_module_that_a_callable_hands_out_again_is_never_trained_in_place(blobs, small):
    X, _ = blobs
    given = MLP((X.shape[1], 8, 5))
    before = {name: value.clone() for name, value in given.state_dict().items()}
    model = small(AECM, encoder=lambda n_in, n_out: given).fit(X)
    model.predict(X)
    for name, value in given.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_callable_that_gives_no_module_is_refused(blobs, small):
    with pytest.raises(TypeError, match=r"encoder must return a torch.nn.Module"):
        small(AECM, encoder=lambda a, b: "network").fit(blobs[0])


def test_one_pretrained_autoencoder_serves_two_estimators(blobs, small):
    X = ((blobs[0] - blobs[0].mean()) / blobs[0].std()).astype(np.float32)
    pretrained = pretrain_autoencoder(
        X, hidden_layer_sizes=(16,), latent_dim=5, max_iter=20, random_state=0
    )
    before = [p.clone() for p in pretrained.parameters()]
    parts = {"encoder": pretrained.encoder, "decoder": pretrained.decoder}
    start = {"init": "pretrain", "pretrain_max_iter": 0, "max_iter": 0}
    options = {**parts, **start, "scale": False}
    first = small(AECM, n_clusters=4, **options).fit(X)
    second = small(AECM, n_clusters=3, **options).fit(X)
    for parameter, old in zip(pretrained.parameters(), before):
        assert torch.equal(parameter, old)
    # With no epoch of its own each one has the codes that it was given, but for their scale.
    with torch.inference_mode():
        codes = pretrained.encoder(torch.tensor(X)).numpy()
    for model in (first, second):
        got = model.transform(X)
        got, expected = got - got.mean(axis=0), codes - codes.mean(axis=0)
        np.testing.assert_allclose(got / got.std(), expected / expected.std(), atol=1e-4)


def test_frozen_networks_stay_as_they_are_given(blobs, small):
    X = ((blobs[0] - blobs[0].mean()) / blobs[0].std()).astype(np.float32)
    pretrained = pretrain_autoencoder(
        X, hidden_layer_sizes=(16,), latent_dim=5, max_iter=20, random_state=0
    ).requires_grad_(False)
    parts = {"encoder": pretrained.encoder, "decoder": pretrained.decoder}
    model = small(AECM, scale=False, **parts).fit(X)
    state = model.module_.autoencoder.state_dict()
    for name, value in pretrained.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    assert adjusted_rand_score(model.labels_, blobs[1]) > 0.9


def test_networks_with_normalisation_and_dropout_predict_row_by_row(blobs, small):
    def build(n_in, n_out):
        return nn.Sequential(
            nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, n_out)
        )

    X, _ = blobs
    model = quietly(small(AECM, encoder=build).fit, X)
    whole = model.predict_proba(X)
    rows = np.concatenate([model.predict_proba(X[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(rows, whole[:20], rtol=1e-7, atol=1e-9)


def test_with_normalisation_and_dropout_the_start_still_keeps_the_k_means_labels(blobs, small):
    def build(n_in, n_out):
        return nn.Sequential(
            nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, n_out)
        )

    model = small(AECM, init="pretrain", encoder=build, max_iter=0, dtype="auto")
    model.fit(blobs[0])
    codes = model.transform(blobs[0])
    distances = np.linalg.norm(codes[:, None] - model.latent_centers_, axis=2)
    np.testing.assert_array_equal(model.labels_, distances.argmin(axis=1))
    again = KMeans(4, init=model.latent_centers_, n_init=1).fit(codes)
    np.testing.assert_allclose(again.cluster_centers_, model.latent_centers_, rtol=1e-3, atol=1e-3)


def test_a_callback_that_looks_at_the_model_midway_does_not_change_it(blobs, small):
    base = pytest.importorskip("sklearn.callback", reason="scikit-learn has it from 1.9 on")
    assert base

    class Looking:
        def setup(self, estimator, context): ...
        def teardown(self, estimator, context): ...
        def on_fit_task_begin(self, estimator, context, **told): ...
        def on_fit_task_end(self, estimator, context, *, fitted_estimator=None, **told):
            return False

    def build(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n_out))

    def fit(*callbacks):
        model = small(AECM, encoder=build, max_iter=4, pretrain_max_iter=2)
        if callbacks:
            model.set_callbacks(*callbacks)
        return quietly(model.fit, blobs[0])

    np.testing.assert_array_equal(fit().transform(blobs[0]), fit(Looking()).transform(blobs[0]))


def test_squares_of_the_features_separate_circles():
    class Radius(nn.Linear):
        def forward(self, x):
            return super().forward(x.square())

    X, y = make_circles(400, factor=0.3, noise=0.05, random_state=0)
    model = AECM(
        2,
        latent_dim=2,
        hidden_layer_sizes=(20,),
        encoder=Radius,
        max_iter=30,
        learning_rate_init=1e-2,
        tol=0,
        random_state=0,
    ).fit(X)
    assert adjusted_rand_score(model.labels_, y) == 1.0
    assert adjusted_rand_score(KMeans(2, n_init=3, random_state=0).fit_predict(X), y) < 0.1


# --- The paper's settings ---


def test_a_data_set_that_the_paper_does_not_tune_is_refused():
    with pytest.raises(ValueError, match=r"no settings for 'iris'. Choose one of \['10x73k'"):
        AECM.from_paper("iris")


@pytest.mark.parametrize("name", PAPER_SETTINGS)
def test_paper_settings_are_parameters_that_can_be_overridden(name):
    model = AECM.from_paper(name, 7, max_iter=3)
    got = (
        model.concentration,
        model.reconstruction_weight,
        model.batch_size,
        model.latent_dim,
    )
    assert got == PAPER_SETTINGS[name]
    assert (model.n_clusters, model.max_iter, model.scale, model.tol) == (7, 3, False, 0)
    assert (model.learning_rate_init, model.epsilon, model.init) == (1e-3, 1e-3, "random")


# --- Real data ---


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_digits_it_beats_k_means(seed):
    X, y = load_digits(return_X_y=True)
    model = AECM(10, random_state=seed)
    quietly(model.fit, X)
    kmeans = KMeans(10, n_init=10, random_state=seed).fit(X)
    scores = [adjusted_rand_score(y, m.labels_) for m in (model, kmeans)]
    assert scores[0] > scores[1] + 0.02


# --- The mixture from k-means ---


def test_the_best_mixture_of_blobs_has_their_means_and_mean_covariance(blobs):
    X, y = blobs
    means, within = best_mixture(X, 4, check_random_state(0))
    expected = np.array([X[y == k].mean(axis=0) for k in range(4)])
    nearest = np.linalg.norm(means.numpy()[:, None] - expected, axis=2)
    assert sorted(nearest.argmin(axis=1)) == [0, 1, 2, 3]
    assert nearest.min(axis=1).max() < 0.01
    pooled = sum(np.mean(y == k) * np.cov(X[y == k].T, ddof=0) for k in range(4))
    reg_covar = 1e-3 * X.var(axis=0).mean()
    np.testing.assert_allclose(within, pooled + reg_covar * np.eye(3), atol=0.01)


def test_the_best_mixture_takes_weights_and_repeats(overlapping):
    X, _ = overlapping
    weight = (np.arange(len(X)) % 3).astype(float)
    weighted = best_mixture(X, 4, check_random_state(0), weight)
    repeated = best_mixture(np.repeat(X, weight.astype(int), axis=0), 4, check_random_state(0))
    for a, b in zip(weighted, repeated):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_best_mixture_outlives_dead_dimensions_and_equal_rows():
    X = np.c_[np.random.default_rng(0).normal(size=(50, 2)), np.zeros(50)].astype(np.float32)
    for data in (X, np.ones((50, 3), np.float32)):
        means, within = best_mixture(data, 3, check_random_state(0))
        assert torch.isfinite(means).all()
        assert torch.linalg.eigvalsh(within).min() > 0
