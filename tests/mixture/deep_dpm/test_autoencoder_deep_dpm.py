"""AutoencoderDeepDPM: losses, limits, what alternation does and leaves alone, decoding, errors."""

import warnings

import numpy as np
import pytest
import torch
from common import rows_of
from scipy import stats
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from torch import nn

from deepmix import AutoencoderDeepDPM, DeepDPM
from deepmix.callbacks import EpochState
from deepmix.gaussians import hard_statistics
from deepmix.mixture.deep_dpm.autoencoder_deep_dpm import (
    LEAST_ERROR,
    FeatureObjective,
    log_posterior_of_one,
)
from deepmix.mixture.deep_dpm.deep_dpm import mixture_to_scaled
from deepmix.mixture.deep_dpm.losses import center_distance, within_share
from deepmix.mixture.deep_dpm.network import AutoencoderDPMNetwork
from deepmix.mixture.deep_dpm.scaled_rows import ScaledRows
from deepmix.networks import MLP

RTOL = 1e-10


@pytest.fixture(scope="module")
def curved():
    """Four clusters in the plane, bent into ten dimensions: X of shape (400, 10), and labels."""
    draw = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 100)
    plane = np.array([[-4, -4], [4, -4], [-4, 4], [4, 4]])[y] + draw.normal(size=(400, 2))
    X = np.tanh(plane @ draw.normal(size=(2, 10)) / 4 + draw.normal(size=10))
    X.setflags(write=False)
    return X, y


def small_model(clusterer=None, **parameters):
    """A small estimator; ``clusterer`` holds parameters of its clusterer."""
    settings = {
        "hidden_layer_sizes": (16,),
        "latent_dim": 2,
        "learning_rate_init": 5e-3,
        "pretrain_max_iter": 15,
        "n_alternations": 2,
        "max_iter": 4,
        "dtype": "float64",
        "random_state": 0,
    }
    dpm = DeepDPM(**{"amortized": False, "prior_scale": "codes", **(clusterer or {})})
    return AutoencoderDeepDPM(dpm, **{**settings, **parameters})


# --- Losses ---


def test_the_distance_from_centres_equals_a_naive_loop():
    draw = np.random.default_rng(0)
    z, centers, weight = draw.normal(size=(9, 3)), draw.normal(size=(4, 3)), draw.random(9)
    labels = draw.integers(0, 4, 9)
    expected = sum(
        weight[i] * sum((z[i, j] - centers[labels[i], j]) ** 2 for j in range(3)) for i in range(9)
    )
    got = center_distance(*(torch.tensor(v) for v in (z, centers, labels, weight)))
    assert float(got) == pytest.approx(expected, rel=RTOL)


def test_the_share_within_clusters_equals_a_naive_loop():
    draw = np.random.default_rng(1)
    X, weight, labels = draw.normal(size=(30, 3)) + 5, draw.random(30), np.arange(30) % 3

    def scatter(chosen):
        mean = np.average(X[chosen], axis=0, weights=weight[chosen])
        return sum(weight[i] * np.sum((X[i] - mean) ** 2) for i in chosen)

    expected = sum(scatter(np.flatnonzero(labels == k)) for k in range(3)) / scatter(np.arange(30))
    tensors = (torch.tensor(v) for v in (X, labels, weight))
    assert within_share(hard_statistics(*tensors, 3, "diag")) == pytest.approx(expected, rel=1e-9)
    ones = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    assert within_share(hard_statistics(*ones, torch.ones(4).double(), 1, "diag")) == 1.0


@pytest.mark.parametrize("relative_loss", [True, False])
def test_the_loss_is_the_formula(relative_loss, curved):
    X, _ = curved
    options = {"reconstruction_weight": 0.7, "clustering_weight": 1.3}
    model = small_model(relative_loss=relative_loss, n_alternations=0, **options).fit(X)
    network = model._rebuild(torch.float64, torch.device("cpu"))
    codes = model.transform(X)
    objective = model._objective_of_features(
        network, mixture_to_scaled(model, network.clustering, "full")
    )
    x, weight = torch.tensor(X), torch.tensor(np.random.default_rng(2).random(len(X)))
    with torch.no_grad():
        terms = objective.step(x, None, weight)
        scaled, decoded = network.scaler(x), network.autoencoder(network.scaler(x))
    errors = (scaled - decoded).square().sum(dim=1)
    difference = codes - model.means_[model.labels_]
    if relative_loss:
        within = np.einsum("k,kij->ij", model.weights_, model.covariances_)
        distances = np.einsum("ni,ij,nj->n", difference, np.linalg.inv(within), difference)
        distances = distances / 2
        unit = max(float(errors.mean()), LEAST_ERROR * float(scaled.var(dim=0, correction=0).sum()))
        assert float(network.error) == pytest.approx(unit, rel=1e-6)
    else:
        distances, unit = 0.5 * np.square(difference).sum(axis=1), 1.0
    expected = {
        "reconstruction": 0.7 * float(weight @ errors) / unit,
        "clustering": 1.3 * float(weight.numpy() @ distances),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5), name


def test_the_autoencoder_is_trained_and_the_mixture_is_not():
    coders = {"encoder": MLP((3, 5, 2)), "decoder": MLP((2, 5, 3))}
    network = AutoencoderDPMNetwork(3, 4, 2, (5,), **coders)
    (phase,) = FeatureObjective(network, torch.eye(2), 1.0, 1.0).phases()
    assert set(phase.parameters) == set(network.autoencoder.parameters())


# --- Limits ---


@pytest.mark.parametrize("amortized", [False, True])
def test_without_alternation_it_is_deep_dpm_on_the_pretrained_codes(amortized, curved):
    X, _ = curved
    shared = {"amortized": amortized, "prior_scale": 1.0, "tol": 0, "n_clusters_init": 3}
    shared |= {"split_merge_every": 60, "freeze": 20}
    clusterer = {"max_iter": 25, **shared}
    model = small_model(clusterer, n_alternations=0, dtype="float32").fit(X)
    codes = model.transform(X)
    plain = DeepDPM(max_iter=25, random_state=0, **shared).fit(codes)
    assert model.n_clusters_ == plain.n_clusters_ > 1
    if amortized:  # nets of other draws
        assert adjusted_rand_score(model.labels_, plain.labels_) > 0.95
    else:
        np.testing.assert_array_equal(model.labels_, plain.labels_)
        np.testing.assert_allclose(model.means_, plain.means_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.covariances_, plain.covariances_, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(model.score_samples(X), plain.score_samples(codes), rtol=1e-3)


def test_a_linear_identity_leaves_deep_dpm_on_the_data(blobs):
    X, y = blobs
    identity = {"encoder": nn.Identity(), "decoder": nn.Identity(), "latent_dim": 3, "scale": False}
    model = small_model({"prior_scale": 1.0}, **identity).fit(X)
    plain = DeepDPM(amortized=False, prior_scale=1.0).fit(X)
    assert model.n_iter_ == 0  # there is nothing to train
    np.testing.assert_array_equal(model.labels_, plain.labels_)
    np.testing.assert_allclose(model.means_, plain.means_, rtol=1e-8)
    np.testing.assert_allclose(model.cluster_centers_, model.means_, rtol=1e-8)
    np.testing.assert_allclose(model.score_samples(X), plain.score_samples(X), rtol=1e-8)
    assert adjusted_rand_score(y, model.labels_) == 1.0


def test_without_weight_on_clusters_only_the_reconstruction_improves(curved):
    X, _ = curved
    model = small_model(clustering_weight=0.0, max_iter=20).fit(X)
    assert np.all(model.history_["clustering"] == 0)
    assert model.history_["reconstruction"][-1] < model.history_["reconstruction"][0]


# --- What alternation does, and what it leaves alone ---


def test_the_number_of_curved_clusters_is_found(curved):
    X, y = curved
    model = small_model(dtype="float32", pretrain_max_iter=40).fit(X)
    assert model.n_clusters_ == 4
    assert adjusted_rand_score(y, model.labels_) > 0.95
    assert model.converged_


def test_alternation_draws_codes_to_their_centres(curved):
    X, _ = curved

    def spread(model):
        codes = model.fit(X).transform(X)
        within = codes - model.means_[model.labels_]
        return np.square(within).sum() / np.square(codes - codes.mean(axis=0)).sum()

    assert spread(small_model(n_alternations=2)) < 0.8 * spread(small_model(n_alternations=0))


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_clusters_that_shrink_are_not_merged_for_it(weight, curved):
    X, _ = curved
    options = {"clustering_weight": weight, "n_alternations": 6, "pretrain_max_iter": 40}
    model = small_model(dtype="float32", **options).fit(X)
    assert list(model.history_["n_clusters"]) == [4] * 7
    assert model._state["shrinkage"] < 0.9


def test_the_prior_shrinks_with_the_clusters_or_stays(curved, monkeypatch):
    X, _ = curved
    scales, whole = [], DeepDPM._prior

    def prior(model, data, factor):
        scales.append(factor)
        return whole(model, data, factor)

    monkeypatch.setattr(DeepDPM, "_prior", prior)
    small_model().fit(X)
    assert scales[0] == 1.0
    assert scales[-1] < 1.0
    scales.clear()
    small_model(relative_loss=False, clustering_weight=0.1).fit(X)
    assert set(scales) == {1.0}


def test_a_clustering_begins_with_the_clusters_of_the_one_before(curved):
    X, _ = curved
    model = small_model({"max_iter": 30, "tol": 0}, n_alternations=3).fit(X)
    proposals = model.proposals_
    assert set(proposals["clustering"]) == {0, 1, 2, 3}
    accepted = proposals[(proposals["clustering"] > 0) & proposals["accepted"]]
    assert len(accepted) == 0  # nothing is found a second time
    np.testing.assert_array_equal(model.history_["n_clusters"], [model.n_clusters_] * 4)


def test_history_has_what_was_trained(curved):
    X, _ = curved
    model = small_model(n_alternations=3, max_iter=5, pretrain_max_iter=7).fit(X)
    history = model.history_
    assert set(history) == {
        *("loss", "reconstruction", "clustering"),
        *("pretrain_reconstruction", "n_clusters"),
    }
    assert history["loss"].shape == (model.n_iter_,) == (15,)
    np.testing.assert_allclose(history["loss"], history["reconstruction"] + history["clustering"])
    assert history["pretrain_reconstruction"].shape == (7,)
    assert history["n_clusters"].shape == (4,)


def test_of_several_restarts_the_one_that_gains_most_is_kept(curved, monkeypatch):
    X, _ = curved
    found, whole = [], AutoencoderDeepDPM._train

    def train(*args):
        trained = whole(*args)
        found.append((trained.criterion, len(trained.network.mixture.means)))
        return trained

    monkeypatch.setattr(AutoencoderDeepDPM, "_train", train)
    model = small_model(n_init=3, n_alternations=1, max_iter=2).fit(X)
    assert len({score for score, _ in found}) == 3
    assert max(score for score, _ in found) < 0  # better than one cluster
    assert model.n_clusters_ == min(found)[1]


def test_the_gain_does_not_depend_on_the_units_of_the_codes(curved):
    X, _ = curved
    model = small_model(n_alternations=0).fit(X)
    clustering = model._rebuild(torch.float64, torch.device("cpu")).clustering
    found = []
    for matrix in (np.eye(2), np.diag([1e3, 1e-2])):
        codes = rows_of(model.transform(X) @ matrix)
        model.clusterer._fit_feature_scaler(clustering.scaler, codes)
        data = ScaledRows(codes, clustering.scaler)
        assert len(data) == len(X)
        prior = model.clusterer._prior(data)
        found.append(log_posterior_of_one(data, prior, model.clusterer))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_nets_learn_the_responsibilities_of_codes(curved):
    X, y = curved
    nets = {"amortized": True, "split_merge_every": 100, "freeze": 30, "n_clusters_init": 4}
    model = small_model(nets, dtype="float32", pretrain_max_iter=40, n_alternations=1).fit(X)
    assert adjusted_rand_score(y, model.labels_) > 0.9
    assert set(model._subnets_state) == {
        *("hidden_weight", "hidden_bias", "output_weight", "output_bias")
    }
    again = model.set_params(warm_start=True).fit(X)
    assert adjusted_rand_score(y, again.labels_) > 0.9


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_simpler_covariances_train(covariance_type, curved):
    X, y = curved
    model = small_model({"covariance_type": covariance_type}, pretrain_max_iter=40).fit(X)
    assert model.covariances_.shape == (model.n_clusters_, 2)
    assert adjusted_rand_score(y, model.labels_) > 0.5


# --- Between codes and data ---


def test_the_density_is_that_of_the_codes_under_the_mixture(curved):
    X, _ = curved
    model = small_model().fit(X)
    codes = model.transform(X)
    parts = [
        np.log(w) + stats.multivariate_normal(m, c).logpdf(codes)
        for w, m, c in zip(model.weights_, model.means_, model.covariances_)
    ]
    np.testing.assert_allclose(model.score_samples(X), logsumexp(parts, axis=0), rtol=1e-6)
    posterior = np.exp(parts - logsumexp(parts, axis=0)).T
    np.testing.assert_allclose(model.predict_proba(X), posterior, atol=1e-6)


def test_centres_are_decoded_means_and_a_path_joins_them(curved):
    X, _ = curved
    model = small_model(pretrain_max_iter=40).fit(X)
    decoded = model.inverse_transform(model.means_)
    np.testing.assert_allclose(model.cluster_centers_, decoded, rtol=1e-6)
    path = model.interpolate(0, 1, n_steps=3)
    np.testing.assert_allclose(path[[0, -1]], decoded[[0, 1]], rtol=1e-6)
    with pytest.raises(ValueError, match="X has 3 columns; expected codes of latent_dim=2"):
        model.inverse_transform(np.zeros((2, 3)))


def test_samples_belong_to_their_clusters(curved):
    X, _ = curved
    model = small_model(pretrain_max_iter=40).fit(X)
    drawn, labels = model.sample(500)
    assert drawn.shape == (500, 10)
    assert np.mean(model.predict(drawn) == labels) > 0.9


# --- Networks from outside ---


@pytest.mark.parametrize("spec", ["class", "instance"])
def test_encoders_and_decoders_may_come_from_outside(spec, curved):
    X, _ = curved
    networks = {"encoder": nn.Linear, "decoder": nn.Linear}
    if spec == "instance":
        networks = {"encoder": nn.Linear(10, 2), "decoder": nn.Linear(2, 10)}
        before = networks["encoder"].weight.detach().clone()
    model = small_model(**networks).fit(X)
    assert type(model.module_.autoencoder.encoder) is nn.Linear
    np.testing.assert_array_equal(model.labels_, model.predict(X))
    if spec == "instance":
        assert torch.equal(networks["encoder"].weight, before)
    with pytest.raises(ValueError, match=r"encoder must map a batch of shape .* to \(2, 2\)"):
        small_model(encoder=nn.Linear(10, 3)).fit(X)


@pytest.mark.filterwarnings("ignore:AutoencoderDeepDPM found one cluster")
def test_weight_decay_keeps_weights_small(curved):
    X, _ = curved

    def norm(weight_decay):
        model = small_model(weight_decay=weight_decay).fit(X)
        return sum(np.square(v).sum() for k, v in model._state.items() if k.endswith("0.weight"))

    assert norm(10.0) < 0.9 * norm(0.0)


def test_bfloat16_trains_to_the_same_clusters(curved):
    X, _ = curved
    models = [
        small_model(precision=p, dtype="float32", pretrain_max_iter=40).fit(X)
        for p in ("float32", "bfloat16")
    ]
    assert adjusted_rand_score(*(model.labels_ for model in models)) > 0.9
    assert np.any(models[0].transform(X) != models[1].transform(X))


# --- Going on, stopping short ---


def test_warm_start_goes_on_from_clusters_and_encoder(curved):
    X, _ = curved
    model = small_model(warm_start=True).fit(X)
    before, shrinkage = model.n_clusters_, model._state["shrinkage"]
    model.fit(X)
    assert "pretrain_reconstruction" not in model.history_
    assert model.history_["n_clusters"][0] == before
    assert model._state["shrinkage"] < shrinkage


@pytest.mark.parametrize("task", ["pretrain", "clustering", "fit"])
def test_an_interruption_in_any_stage_leaves_a_fitted_estimator(
    task, curved, monkeypatch, press_ctrl_c
):
    whole = EpochState.__init__

    def noticed(state, name, epoch, *args):
        if (name, epoch) == (task, 2):
            press_ctrl_c()
        whole(state, name, epoch, *args)

    monkeypatch.setattr(EpochState, "__init__", noticed)
    X, _ = curved
    with pytest.warns(ConvergenceWarning, match=rf"interrupted after 3 of \d+ epochs \({task}\)"):
        model = small_model({"tol": 0, "max_iter": 5}).fit(X)
    assert not model.converged_
    assert model.n_iter_ == (3 if task == "fit" else 0)
    assert len(model.history_["n_clusters"]) == (0 if task == "pretrain" else 1)
    np.testing.assert_array_equal(model.labels_, model.predict(X))
    monkeypatch.undo()
    model.set_params(warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    # Without a clustering there is nothing to go on from, and the fit begins anew.
    assert ("pretrain_reconstruction" in model.history_) == (task == "pretrain")
    np.testing.assert_array_equal(model.labels_, model.predict(X))


def test_a_mixture_too_thin_for_float32_is_refused(curved):
    thin = {"prior_scale": 1e-300, "prior_kappa": 1e300, "covariance_type": "spherical"}
    model = small_model({**thin, "max_iter": 1}, n_alternations=0, dtype="float32")
    with pytest.raises(FloatingPointError, match=r"values in .* that are not finite"):
        model.fit(np.zeros((3, 10)))


def test_a_clustering_that_does_not_settle_warns_with_the_remedy(curved):
    model = small_model({"n_clusters_init": 30, "max_iter": 1}, n_alternations=0)
    with pytest.warns(ConvergenceWarning, match="did not settle in clusterer__max_iter=1 epochs"):
        model.fit(curved[0])


# --- The paper's settings ---


def test_the_papers_settings_are_those_of_the_program():
    model = AutoencoderDeepDPM.from_paper(n_samples=12_800, max_iter=3)
    assert model.hidden_layer_sizes == (500, 500, 2000)
    assert (model.reconstruction_weight, model.clustering_weight) == (0.005, 1.0)
    assert (model.learning_rate_init, model.weight_decay) == (2e-3, 5e-4)
    clusterer = model.clusterer
    assert (clusterer.n_clusters_init, clusterer.amortized, model.relative_loss) == (3, True, False)
    assert (clusterer.batch_size, clusterer.split_merge_every) == (128, 3000)
    assert (model.batch_size, model.max_iter, clusterer.max_iter) == (128, 3, 300)
    assert (clusterer.scaling, clusterer.tol, clusterer.freeze) == (None, 1.0, 200)


def test_the_papers_settings_train(curved):
    X, _ = curved
    quick = {"hidden_layer_sizes": (16,), "latent_dim": 2, "pretrain_max_iter": 5, "max_iter": 3}
    schedule = {"max_iter": 12, "split_merge_every": 20, "freeze": 5}
    quick |= {f"clusterer__{name}": value for name, value in schedule.items()}
    model = AutoencoderDeepDPM.from_paper(n_samples=len(X), random_state=0, **quick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    assert model.history_["n_clusters"].shape == (3,)
    assert model.n_iter_ == 6
    np.testing.assert_array_equal(model.labels_, model.predict(X))
