"""DeepDPM: losses, network surgery, limits, properties, robustness."""

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold

from deepmix import AutoencoderDeepDPM, DeepDPM
from deepmix._torch import Rows
from deepmix.callbacks import EpochState
from deepmix.fitting import Fit, RandomStreams
from deepmix.gaussian_mixture import Mixture
from deepmix.mixture.deep_dpm.deep_dpm import matrices_bytes
from deepmix.mixture.deep_dpm.losses import clustering_loss, subclustering_loss
from deepmix.mixture.deep_dpm.network import DPMNetwork, SubclusteringNets, in_pieces
from deepmix.mixture.deep_dpm.training import Search
from deepmix.networks import FeatureScaler, materialize

RTOL = 1e-10
BOTH = pytest.mark.parametrize("amortized", [True, False])


@pytest.fixture(scope="module")
def five():
    """Five Gaussians of different shapes: X of shape (900, 3), and their labels."""
    draw = np.random.default_rng(0)
    y = np.repeat(np.arange(5), [300, 250, 200, 100, 50])
    shapes = draw.normal(size=(5, 3, 3))
    centers = 8 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    X = centers[y] + np.einsum("nij,nj->ni", shapes[y], draw.normal(size=(900, 3)))
    X.setflags(write=False)
    return X, y


def generator():
    return torch.Generator().manual_seed(0)


# --- Losses ---


def test_the_clustering_loss_is_the_divergence_of_scipy():
    draw = np.random.default_rng(0)
    target, resp = draw.dirichlet(np.ones(4), 9), draw.dirichlet(np.ones(4), 9)
    target[0] = [1, 0, 0, 0]
    weight = draw.random(9)
    got = clustering_loss(*(torch.tensor(v) for v in (np.log(resp), target, weight)))
    expected = weight @ [stats.entropy(t, r) for t, r in zip(target, resp)]
    assert float(got) == pytest.approx(expected, rel=RTOL)
    same = clustering_loss(*(torch.tensor(v) for v in (np.log(resp), resp, weight)))
    assert float(same) == pytest.approx(0.0, abs=1e-12)


def test_the_subclustering_loss_equals_a_naive_loop():
    draw = np.random.default_rng(1)
    x, resp, weight = draw.normal(size=(7, 3)), draw.dirichlet([1, 1], 7), draw.random(7)
    means = draw.normal(size=(7, 2, 3))
    got = subclustering_loss(*(torch.tensor(v) for v in (x, resp, means, weight)))
    expected = sum(
        weight[i] * resp[i, j] * np.sum((x[i] - means[i, j]) ** 2)
        for i in range(7)
        for j in range(2)
    )
    assert float(got) == pytest.approx(expected, rel=RTOL)


# --- Network ---


def test_pieces_of_a_batch_give_what_the_batch_gives(five, monkeypatch):
    n_features, draw = 3, np.random.default_rng(2)
    means = torch.tensor(draw.normal(size=(4, n_features)))
    covariances = torch.eye(n_features, dtype=torch.float64).expand(4, -1, -1)
    mixture = Mixture(torch.full((4,), 0.25, dtype=torch.float64), means, covariances)
    module = mixture.to_module()
    x = torch.tensor(draw.normal(size=(100, n_features)))
    whole = module.log_joint(x)
    models = [DeepDPM(3, amortized=a, max_iter=20, tol=0, random_state=0) for a in (True, False)]
    fits = [clone(model).fit(five[0]) for model in models]
    monkeypatch.setattr("deepmix.mixture.deep_dpm.network.PRODUCTS", 1)
    torch.testing.assert_close(in_pieces(module.log_joint, module.means, x), whole)
    for model, fit in zip(models, fits):
        np.testing.assert_allclose(model.fit(five[0]).means_, fit.means_, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(model.labels_, fit.labels_)


@pytest.mark.parametrize("scale", [1e30, 1e-20])
def test_rows_of_any_size_are_normalised_in_float32(scale):
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.6, -0.8], [0.0, 0.0]])
    torch.testing.assert_close(FeatureScaler(2, normalize=True)(scale * x), expected)


def test_each_row_goes_through_the_subclustering_net_of_its_cluster():
    nets = SubclusteringNets(3, 4, 6).draw(generator()).double()
    torch.nn.init.normal_(nets.hidden_bias, generator=generator())
    x = torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    labels = torch.arange(20) % 4
    got = nets.log_resp(x, labels)
    for row, k, log_resp in zip(x, labels, got):
        hidden = torch.relu(row @ nets.hidden_weight[k] + nets.hidden_bias[k])
        logits = hidden @ nets.output_weight[k] + nets.output_bias[k]
        torch.testing.assert_close(log_resp, logits.log_softmax(dim=0))


def test_children_of_a_split_share_the_responsibility_of_their_parent():
    network = DPMNetwork(3, 3, (8,))
    network.net = materialize(network.net, generator())
    x = torch.randn(10, 3, generator=generator())
    before = network.net(x)
    network.inherit(torch.tensor([0, 2, 2, 1]))
    assert network.net[-1].out_features == 4
    torch.testing.assert_close(network.net(x), before[:, [0, 2, 2, 1]])


def test_the_scaler_has_the_moments_of_the_features_and_its_density():
    X = np.random.default_rng(3).normal(size=(50, 3)) * [1, 100, 0] + [0, 1e4, 7]
    weight = np.arange(50) % 3.0
    rows = Rows(X, torch.device("cpu"), torch.float64, weight)
    mean, variance = rows.moments()
    np.testing.assert_allclose(mean, np.average(X, axis=0, weights=weight), rtol=RTOL)
    expected = np.average((X - mean.numpy()) ** 2, axis=0, weights=weight)
    np.testing.assert_allclose(variance, expected, rtol=1e-9, atol=1e-20)
    scaler = FeatureScaler(3).double().fit(mean, variance)
    scaled = scaler(torch.tensor(X))
    assert torch.all(scaled[:, 2] == 0)
    torch.testing.assert_close(scaler.inverse(scaled), torch.tensor(X))
    expected = np.log(np.sqrt(expected[:2])).sum()
    assert float(scaler.log_volume()) == pytest.approx(expected, rel=1e-9)


# --- What is found ---


@BOTH
@pytest.mark.parametrize("n_clusters_init", [1, 2, 12])
def test_the_number_of_gaussians_is_found_from_any_start(amortized, n_clusters_init, five):
    X, y = five
    model = DeepDPM(n_clusters_init, amortized=amortized, random_state=0).fit(X)
    assert model.n_clusters_ == 5
    assert model.converged_
    assert adjusted_rand_score(y, model.labels_) > 0.98


@BOTH
def test_one_gaussian_is_one_cluster_and_it_is_said_what_to_try_for_more(amortized):
    X = np.random.default_rng(4).normal(size=(1000, 3)) @ np.diag([1.0, 5.0, 0.2])
    model = DeepDPM(4, amortized=amortized, random_state=0)
    with pytest.warns(ConvergenceWarning, match=r"found one cluster.*scaling=None.*prior_scale"):
        model.fit(X)
    assert model.n_clusters_ == 1
    model.set_params(max_clusters=1, n_clusters_init=1).fit(X)  # what was asked for: no warning
    assert model.n_clusters_ == 1


@pytest.mark.parametrize("covariance_type", ["diag", "spherical"])
def test_simpler_covariances_find_blobs(covariance_type, blobs):
    X, y = blobs
    # Without scaling, which would make balls ellipsoids.
    model = DeepDPM(covariance_type=covariance_type, amortized=False, scaling=None).fit(X)
    assert adjusted_rand_score(y, model.labels_) == 1.0
    assert model.covariances_.shape == (4, 3)


@BOTH
def test_units_and_offsets_change_nothing(amortized, five):
    X, _ = five
    options = {"amortized": amortized, "dtype": "auto", "random_state": 0}
    plain = DeepDPM(**options).fit(X)
    moved = DeepDPM(**options).fit(X * [1e3, 1.0, 1e-3] + [5.0, 1e3, 0.0])
    np.testing.assert_array_equal(plain.labels_, moved.labels_)
    scale = np.array([1e3, 1.0, 1e-3])
    np.testing.assert_allclose(moved.means_, plain.means_ * scale + [5.0, 1e3, 0.0], rtol=1e-6)
    expected = plain.covariances_ * scale[:, None] * scale
    np.testing.assert_allclose(moved.covariances_, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [32, 900])
def test_the_batch_size_does_not_change_the_number_of_clusters(batch_size, five):
    X, y = five
    model = DeepDPM(batch_size=batch_size, random_state=0).fit(X)
    assert model.n_clusters_ == 5
    assert adjusted_rand_score(y, model.labels_) > 0.98


def test_with_a_vanishing_prior_its_em_is_that_of_a_gaussian_mixture(overlapping):
    X, _ = overlapping
    # Rows that count for so many leave nothing of the prior.
    weight = np.full(len(X), 1e8)
    model = DeepDPM(3, amortized=False, random_state=0, tol=0, prior_scale=1e-6, max_iter=0)
    start = model.fit(X, sample_weight=weight)
    mixture = GaussianMixture(
        3,
        weights_init=start.weights_,
        means_init=start.means_,
        precisions_init=np.linalg.inv(start.covariances_),
        reg_covar=0,
        tol=0,
        max_iter=3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(X)
    model.set_params(max_iter=3).fit(X, sample_weight=weight)
    np.testing.assert_allclose(model.means_, mixture.means_, rtol=1e-5)
    np.testing.assert_allclose(model.covariances_, mixture.covariances_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.weights_, mixture.weights_, rtol=1e-5)


def test_no_more_than_max_clusters(five):
    X, _ = five
    model = DeepDPM(2, max_clusters=3, amortized=False, random_state=0).fit(X)
    assert model.n_clusters_ <= 3


@pytest.mark.filterwarnings("ignore:DeepDPM found one cluster")
def test_the_prior_scale_decides_how_fine_clusters_are(five):
    X, _ = five
    coarse = DeepDPM(amortized=False, prior_scale=1e5).fit(X)
    matrix = DeepDPM(amortized=False, prior_scale=1e-2 * np.eye(3)).fit(X)
    vector = DeepDPM(amortized=False, prior_scale=np.full(3, 1e-2)).fit(X)
    assert coarse.n_clusters_ == 1
    assert matrix.n_clusters_ == 5
    np.testing.assert_array_equal(matrix.labels_, vector.labels_)


@BOTH
def test_a_rare_indicator_makes_no_clusters(amortized, five, monkeypatch):
    X, y = five
    rare = np.c_[X, np.random.default_rng(8).random(len(X)) < 0.03]
    model = DeepDPM(amortized=amortized, random_state=0)
    assert adjusted_rand_score(y, model.fit(rare).labels_) > 0.98
    assert model.n_clusters_ == 5
    # A density has no bound where a cluster has one value of it.
    zeros = torch.zeros(4, dtype=torch.float64)
    monkeypatch.setattr(
        "deepmix.mixture.deep_dpm.scaled_rows.rounding_variance", lambda data: zeros
    )
    assert model.fit(rare).n_clusters_ > 5


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (6, 6), (8, 1), (3, 3, 3)])
@pytest.mark.parametrize("spread", [0.03, 0.15])
def test_clusters_that_fill_a_square_are_found_from_one(spread, shape):
    draw = np.random.default_rng(4)
    y = draw.integers(0, np.prod(shape), 60 * np.prod(shape))
    X = np.stack(np.unravel_index(y, shape), axis=1) + spread * draw.normal(
        size=(len(y), len(shape))
    )
    for rows in (X, X @ np.linalg.qr(draw.normal(size=(len(shape), len(shape))))[0]):
        model = DeepDPM(amortized=False).fit(rows)
        assert model.n_clusters_ == np.prod(shape)
        assert adjusted_rand_score(y, model.labels_) > 0.98


@pytest.mark.parametrize("decimals", [3, 2])
def test_rounding_finds_the_same_clusters(decimals, five):
    X, _ = five
    options = {"amortized": False, "dtype": "auto"}
    exact = DeepDPM(**options).fit(X)
    rounded = DeepDPM(**options).fit(np.round(X, decimals))
    assert adjusted_rand_score(exact.labels_, rounded.labels_) > 0.99
    atol = 10.0 ** -(2 * decimals - 1)
    scale = np.abs(exact.covariances_).max()
    np.testing.assert_allclose(rounded.covariances_, exact.covariances_, atol=atol * 10 * scale)


def test_weights_are_repetitions_without_nets(five):
    X, _ = five
    weight = np.random.default_rng(5).integers(0, 3, len(X))
    options = {"amortized": False, "dtype": "auto", "n_clusters_init": 3, "random_state": 0}
    weighted = DeepDPM(**options).fit(X, sample_weight=weight)
    repeated = DeepDPM(**options).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.means_, repeated.means_, rtol=1e-8)
    np.testing.assert_allclose(weighted.covariances_, repeated.covariances_, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(weighted.predict(X), repeated.predict(X))


# --- Fitted state ---


@BOTH
def test_the_density_is_that_of_the_fitted_mixture(amortized, five):
    X, _ = five
    model = DeepDPM(amortized=amortized, dtype="float64", random_state=0).fit(X)
    parts = [
        np.log(w) + stats.multivariate_normal(m, c).logpdf(X)
        for w, m, c in zip(model.weights_, model.means_, model.covariances_)
    ]
    expected = logsumexp(parts, axis=0)
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-6)
    assert model.score(X) == pytest.approx(expected.mean(), rel=1e-6)


def test_without_nets_responsibilities_are_the_posterior_of_the_mixture(five):
    X, _ = five
    model = DeepDPM(amortized=False, dtype="float64").fit(X)
    mixture = GaussianMixture(5).fit(X)
    mixture.weights_, mixture.means_ = model.weights_, model.means_
    mixture.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(model.covariances_))
    np.testing.assert_allclose(model.predict_proba(X), mixture.predict_proba(X), atol=1e-6)


@BOTH
def test_labels_probabilities_and_history_fit_together(amortized, five):
    X, _ = five
    model = DeepDPM(3, amortized=amortized, random_state=0).fit(X)
    resp = model.predict_proba(X)
    assert resp.shape == (900, model.n_clusters_)
    np.testing.assert_allclose(resp.sum(axis=1), 1, rtol=1e-9)
    np.testing.assert_array_equal(resp.argmax(axis=1), model.labels_)
    np.testing.assert_array_equal(model.transform(X), resp)
    assert list(model.get_feature_names_out())[-1] == f"deepdpm{model.n_clusters_ - 1}"
    np.testing.assert_array_equal(model.cluster_centers_, model.means_)
    assert model.history_["n_clusters"].shape == (model.n_iter_,)
    assert model.history_["n_clusters"][-1] == model.n_clusters_
    proposals = model.proposals_
    assert {"split", "merge", "exchange"} >= set(proposals["kind"])
    assert proposals["accepted"].any()
    split = proposals[(proposals["kind"] == "split") & proposals["accepted"]]
    assert np.all(split["log_ratio"] > 0)


def test_samples_have_the_moments_of_the_mixture(five):
    model = DeepDPM(amortized=False, random_state=0).fit(five[0])
    X, labels = model.sample(20_000)
    for k in range(model.n_clusters_):
        drawn = X[labels == k]
        np.testing.assert_allclose(drawn.mean(axis=0), model.means_[k], atol=0.2)
        np.testing.assert_allclose(np.cov(drawn.T), model.covariances_[k], rtol=0.2, atol=0.3)
    with pytest.raises(ValueError, match="n_samples must be an integer >= 1"):
        model.sample(0)


@BOTH
def test_the_same_seed_gives_the_same_bits(amortized, five, global_random_states):
    X, _ = five
    before = global_random_states()
    first, second = (
        DeepDPM(8, amortized=amortized, stochastic=True, random_state=1).fit(X) for _ in range(2)
    )
    assert global_random_states() == before
    np.testing.assert_array_equal(first.means_, second.means_)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))


@BOTH
def test_sparse_rows_are_dense_rows(amortized, five):
    X, _ = five
    X = np.where(np.abs(X) < 1, 0, X)
    options = {"amortized": amortized, "max_iter": 20, "tol": 0, "n_init": 1, "random_state": 0}
    options |= {"split_merge_every": 30, "freeze": 5}
    dense, sparse = DeepDPM(**options).fit(X), DeepDPM(**options).fit(sp.csr_array(X))
    assert dense.n_clusters_ == sparse.n_clusters_
    np.testing.assert_allclose(sparse.means_, dense.means_, rtol=1e-5, atol=1e-5)


# --- Going on, starting again ---


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical"])
@pytest.mark.parametrize("scaling", ["standard", "normalize", None])
def test_em_in_two_fits_is_em_in_one(covariance_type, scaling, overlapping, monkeypatch):
    X, _ = overlapping
    monkeypatch.setattr(Search, "propose", lambda *args: False)
    options = {"covariance_type": covariance_type, "scaling": scaling, "random_state": 0}
    model = DeepDPM(5, amortized=False, max_iter=3, tol=0, warm_start=True, **options).fit(X)
    twice = pickle.loads(pickle.dumps(model)).fit(X)
    once = clone(model).set_params(max_iter=6).fit(X)
    assert np.any(model.means_ != once.means_)
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_allclose(getattr(twice, name), getattr(once, name), rtol=1e-6, atol=1e-8)


@BOTH
def test_warm_start_finds_the_clusters_of_new_rows(amortized, five):
    X, y = five
    model = DeepDPM(amortized=amortized, warm_start=True, random_state=0).fit(X[y < 3])
    assert model.n_clusters_ == 3
    model.fit(X)
    assert model.n_clusters_ == 5
    assert adjusted_rand_score(y, model.labels_) > 0.98
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X[(y == 1) | (y == 4)])  # most clusters are left without a row
    assert model.n_clusters_ == 2


def test_warm_start_goes_on_with_the_subclustering_nets(five):
    X, _ = five
    model = DeepDPM(4, warm_start=True, max_iter=20, tol=0, random_state=0).fit(X)
    before = model._subnets_state
    assert len(before["output_bias"]) == model.n_clusters_
    model.set_params(max_iter=0).fit(X)
    for name, value in model._subnets_state.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("name", "value"), [("covariance_type", "diag"), ("scaling", None), ("amortized", False)]
)
def test_warm_start_refuses_another_kind_of_mixture(name, value, five):
    model = DeepDPM(4, warm_start=True, max_iter=1, tol=0, random_state=0).fit(five[0])
    with pytest.raises(ValueError, match=r"Training goes on with a model of .*warm_start=False"):
        model.set_params(**{name: value}).fit(five[0])


def test_of_several_restarts_the_partition_of_highest_posterior_is_kept(overlapping, monkeypatch):
    X, _ = overlapping
    found, whole = [], DeepDPM._train

    def train(*args):
        trained = whole(*args)
        found.append((trained.criterion, len(trained.network.mixture.means)))
        return trained

    monkeypatch.setattr(DeepDPM, "_train", train)
    options = {"amortized": False, "check_unions": False, "random_state": 0}
    model = DeepDPM(8, n_init=6, **options).fit(X)
    assert len(found) == 6
    assert len({score for score, _ in found}) > 1
    assert model.n_clusters_ == min(found)[1]
    found.clear()
    DeepDPM(n_init=6, **options).fit(X)
    assert len(found) == 1  # nothing is random


@pytest.mark.parametrize(
    ("options", "n_rows", "n_restarts"),
    [({}, 499, 5), ({}, 500, 1), ({"amortized": False}, 499, 1), ({"n_init": 2}, 499, 2)],
)
def test_nets_on_few_rows_begin_several_times(options, n_rows, n_restarts):
    X, weight = np.zeros((n_rows, 2)), np.r_[2.0, 0.0, np.ones(n_rows - 2)]
    for sample_weight in (None, weight):
        rows = Rows(X, torch.device("cpu"), torch.float32, sample_weight)
        fit = Fit(rows, X, RandomStreams(0))
        assert DeepDPM(**options)._n_restarts(fit) == n_restarts


@pytest.mark.filterwarnings("ignore:DeepDPM found one cluster")
def test_a_continued_fit_is_one_whatever_the_restarts(five, monkeypatch):
    X, _ = five
    fits, whole = [], DeepDPM._train
    monkeypatch.setattr(DeepDPM, "_train", lambda *args: fits.append(1) or whole(*args))
    options = {"max_iter": 5, "tol": 0, "random_state": 0}
    model = DeepDPM(**options, warm_start=True).fit(X[::3])
    assert len(fits) == 5
    model.fit(X[::3])
    assert len(fits) == 6


@BOTH
def test_after_the_last_round_the_best_partition_is_taken(amortized, five, monkeypatch):
    X, _ = five
    monkeypatch.setattr("deepmix.mixture.deep_dpm.training.MAX_ROUNDS", 1)
    for tol in (1e-3, 0):
        model = DeepDPM(12, amortized=amortized, tol=tol, max_iter=100, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X)
        assert not model.converged_
        assert (model.n_iter_ == 100) == (tol == 0)
        assert len(model.weights_) == model.n_clusters_
        np.testing.assert_array_equal(model.labels_, model.predict(X))


# --- As other estimators ---


@BOTH
def test_clones_pickles_and_threads_give_the_same_model(amortized, five):
    X, _ = five
    options = {"split_merge_every": 30, "freeze": 5, "n_init": 1, "random_state": 0}
    model = DeepDPM(3, amortized=amortized, max_iter=15, tol=0, **options)
    fitted = clone(model).fit(X)
    text = pickle.dumps(fitted)
    assert b"torch" not in text
    with ThreadPoolExecutor(3) as pool:
        others = list(pool.map(lambda _: clone(model).fit(X), range(3)))
    for other in (pickle.loads(text), *others):
        np.testing.assert_array_equal(other.means_, fitted.means_)
        np.testing.assert_array_equal(other.predict_proba(X), fitted.predict_proba(X))
        np.testing.assert_array_equal(other.score_samples(X), fitted.score_samples(X))


@pytest.mark.filterwarnings("ignore:DeepDPM found one cluster")
def test_a_grid_search_compares_priors_by_the_density(five):
    X, _ = five
    options = {"cv": KFold(2, shuffle=True, random_state=0), "error_score": "raise"}
    grid = {"prior_scale": [1.0, 1e5]}
    search = GridSearchCV(DeepDPM(amortized=False), grid, **options).fit(X)
    assert search.best_params_ == {"prior_scale": 1.0}


def pressed_after(epoch, monkeypatch, press_ctrl_c):
    """Press Ctrl-C at the end of an epoch."""
    whole = EpochState.__init__

    def noticed(state, task, number, *args):
        if number == epoch:
            press_ctrl_c()
        whole(state, task, number, *args)

    monkeypatch.setattr(EpochState, "__init__", noticed)


@BOTH
def test_an_interruption_leaves_a_fitted_estimator(amortized, five, monkeypatch, press_ctrl_c):
    X, _ = five
    pressed_after(2, monkeypatch, press_ctrl_c)
    model = DeepDPM(8, amortized=amortized, random_state=0)
    with pytest.warns(ConvergenceWarning, match="interrupted after 3 of"):
        model.fit(X)
    assert model.n_iter_ == 3
    assert model.history_["n_clusters"].shape == (3,)
    np.testing.assert_array_equal(model.labels_, model.predict(X))


@pytest.mark.parametrize("name", DeepDPM().get_params())
def test_a_bad_parameter_is_refused_by_name_before_training(name, five):
    model = DeepDPM(**{name: object()})
    with pytest.raises((ValueError, TypeError), match=f"The '{name}' parameter of DeepDPM must be"):
        model.fit(five[0])
    assert not hasattr(model, "labels_")


# --- The paper's settings ---


def test_the_papers_settings_normalise_rows_and_wait_thirty_epochs():
    model = DeepDPM.from_paper(n_samples=12_800, max_iter=3)
    assert (model.scaling, model.prior_scale, model.concentration) == ("normalize", 0.005, 10.0)
    assert (model.batch_size, model.split_merge_every, model.max_iter) == (128, 3000, 3)
    assert (model.stochastic, model.check_unions) == (True, False)


def test_the_papers_settings_train(five):
    X, _ = five
    quick = {"split_merge_every": 60, "freeze": 10, "max_iter": 60}
    model = DeepDPM.from_paper(n_samples=len(X), random_state=0, **quick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X + 20)
    norms = (X + 20) / np.linalg.norm(X + 20, axis=1, keepdims=True)
    for k in range(model.n_clusters_):
        members = norms[model.labels_ == k]
        np.testing.assert_allclose(model.means_[k], members.mean(axis=0), atol=0.2)


# --- Errors, before training ---


ERRORS = [
    ({"hidden_layer_sizes": ()}, r"hidden_layer_sizes must hold one or more integers >= 1; got"),
    ({"n_clusters_init": 3, "max_clusters": 2}, r"max_clusters=2 should be >= n_clusters_init=3"),
    ({"prior_dof": 1.5}, r"prior_dof=1.5 should be > n_features - 1 = 2"),
    (
        {"prior_scale": [1.0, 2.0]},
        r"prior_scale must be 'auto', 'codes', a positive number, or an array",
    ),
    ({"prior_scale": -np.eye(3)}, r"prior_scale must be 'auto'"),
    ({"n_clusters_init": 901}, r"n_samples=900 should be >= n_clusters_init=901"),
]


@pytest.mark.parametrize(("parameters", "message"), ERRORS)
def test_parameters_that_do_not_fit_are_refused_before_training(parameters, message, five):
    model = DeepDPM(**parameters)
    with pytest.raises(ValueError, match=message):
        model.fit(five[0])
    assert not hasattr(model, "labels_")


@BOTH
def test_too_few_epochs_warn_with_the_remedy(amortized, five):
    with pytest.warns(ConvergenceWarning, match=r"did not settle in 1 epochs \(max_iter=1\)"):
        DeepDPM(30, amortized=amortized, max_iter=1, random_state=0).fit(five[0])


# --- Robustness ---


AWKWARD = {
    "uniform noise": lambda draw: draw.random((400, 3)),
    "heavy tails": lambda draw: draw.standard_t(1, size=(400, 3)),
    "duplicates": lambda draw: np.repeat(draw.normal(size=(4, 3)), 50, axis=0),
    "equal rows": lambda draw: np.ones((40, 3)),
    "constant column": lambda draw: np.c_[draw.normal(size=(100, 2)), np.full(100, 1e3)],
    "collinear": lambda draw: draw.normal(size=(100, 1)) * [1.0, -2.0, 0.5],
    "two rows": lambda draw: draw.normal(size=(2, 3)),
    "fewer rows than features": lambda draw: draw.normal(size=(10, 30)),
}


@pytest.mark.filterwarnings("ignore:DeepDPM found one cluster")
@BOTH
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_data_are_clustered(amortized, name):
    X = AWKWARD[name](np.random.default_rng(6))
    start = min(3, len(np.unique(X, axis=0)))
    check_sound(DeepDPM(start, amortized=amortized, random_state=0, max_iter=200), X)


def check_sound(model, X):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    assert model.labels_.shape == (len(X),)
    assert model.labels_.max() < model.n_clusters_
    assert np.all(model.weights_ > 0)
    for value in (model.weights_, model.means_, model.covariances_, model.score_samples(X)):
        assert np.all(np.isfinite(value))
    scale = np.sqrt(np.einsum("kii->ki", model.covariances_))
    correlations = model.covariances_ / scale[:, :, None] / scale[:, None, :]
    assert np.linalg.eigvalsh(correlations).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_shapes_never_fail(seed):
    draw = np.random.default_rng(seed)
    n, d = int(2 * 1000 ** draw.random()), int(64 ** draw.random())
    k = int(draw.integers(1, 21))
    X, _ = make_blobs(n, d, centers=k, cluster_std=5 * draw.random(), random_state=seed)
    kind = draw.integers(4)
    if kind == 1:
        X[:, draw.integers(d)] = 3.0
    elif kind == 2 and d > 1:
        X[:, -1] = X[:, 0] - 2 * X[:, -2] if d > 2 else X[:, 0]
    elif kind == 3:
        X = X * 10.0 ** draw.integers(-6, 7, d)
    start = int(draw.integers(1, min(n, 20) + 1))
    options = {"amortized": seed % 4 == 0, "max_iter": 300, "random_state": seed}
    check_sound(DeepDPM(start, **options), X)


# --- Hostile use ---


@pytest.mark.filterwarnings("ignore:DeepDPM found one cluster")
def test_a_wide_thin_cloud_of_huge_values_is_clustered():
    X = np.random.RandomState(0).randn(20, 55) * 1e8  # fewer rows than features, a tiny prior
    model = DeepDPM(scaling=None, amortized=False).fit(X)
    assert np.isfinite(model.score_samples(X)).all()


@pytest.mark.filterwarnings("ignore:DeepDPM found one cluster")
@pytest.mark.parametrize("prior", [{"prior_kappa": 1e300}, {"prior_scale": 1e-300}])
@pytest.mark.parametrize("amortized", [True, False])
def test_an_extreme_prior_gives_a_fit_or_an_error_in_words(amortized, prior, five):
    model = DeepDPM(amortized=amortized, n_init=1, max_iter=3, tol=0, random_state=0, **prior)
    if "prior_kappa" in prior:
        with pytest.raises(
            FloatingPointError, match=r"not positive definite.*parameters of the prior"
        ):
            model.fit(five[0])
    else:
        assert np.isfinite(model.fit(five[0]).score_samples(five[0])).all()


@pytest.mark.parametrize("cls", [DeepDPM, AutoencoderDeepDPM])
def test_matrices_that_no_memory_holds_are_refused_before_any_work(cls):
    X = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    if cls is DeepDPM:
        model, X = cls(), np.tile(X, (1, 60_000))
    else:
        model = cls(latent_dim=600_000, hidden_layer_sizes=(2,))
    with pytest.raises(ValueError, match=r"600000 and 1 cluster.*2\.15e\+05 GiB.*'diag'.*PCA"):
        model.fit(X)


def test_the_estimate_of_memory_grows_with_clusters_and_the_square_of_features():
    assert matrices_bytes(1, 20_000) == 80 * 20_000**2 * 8
    assert matrices_bytes(3, 20) == 3 * matrices_bytes(1, 20)
