"""What every estimator does with data, good and bad, with weights, dtypes and interruptions."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from estimators import number
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from torch import nn

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)
from deepmix.training import minimize

UNAVERAGED = {
    ClusteringModule: {"averaging": False},
    AECM: {"averaging": False},
    DCAN: {},
    NeuralMixtureEM: {},
    DeepDPM: {},
    AutoencoderDeepDPM: {},
}
# They begin with a number of clusters and find another.
FINDS_NUMBER = {DeepDPM, AutoencoderDeepDPM}


def named(message, cls):
    """A message with the class's own name of the number of clusters."""
    return message.replace("n_clusters=", f"{number(cls)}=")


def quietly(function, *args, **kwargs):
    """Call a fit that rightly warns of few epochs or few distinct rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return function(*args, **kwargs)


@pytest.fixture
def no_training(monkeypatch):
    """What must be refused must be refused before any training."""
    monkeypatch.setattr("deepmix.base.minimize", lambda *a, **k: pytest.fail("it trained"))


def X_with(value, dtype=np.float64):
    X = np.random.default_rng(0).normal(size=(40, 3)).astype(dtype)
    X[7, 1] = value
    return X


PLAIN = X_with(0.0)

# Those that can draw new rows.
with_centers = pytest.mark.parametrize(
    "estimator_class",
    [ClusteringModule, AECM, DCAN, DeepDPM, AutoencoderDeepDPM],
    ids=lambda cls: cls.__name__,
)

# --- Bad data ---

BAD_DATA = {
    "NaN": (X_with(np.nan), "contains NaN"),
    "infinity": (X_with(np.inf), "contains infinity"),
    "NaN in CSR": (sp.csr_array(X_with(np.nan)), "contains NaN"),
    "NaN in a tensor": (torch.tensor(X_with(np.nan)), "contains NaN"),
    "no rows": (np.empty((0, 3)), r"0 sample\(s\)"),
    "no columns": (np.empty((10, 0)), r"0 feature\(s\)"),
    "one dimension": (np.arange(10.0), "Reshape your data"),
    "a number": (3.0, "Expected 2D array|scalar"),
    "three dimensions": (np.zeros((10, 2, 2)), "3 dimensions, .*X.reshape"),
    "three dimensions in a tensor": (torch.zeros(10, 2, 2), "3 dimensions, .*X.reshape"),
    "strings": (np.full((10, 2), "a"), r"must hold numbers; got strings .*OneHotEncoder"),
    "numbers as strings": (np.full((10, 2), "1"), "must hold numbers; got strings"),
    "bytes": (np.full((10, 2), b"1"), "must hold numbers; got strings"),
    "a list of strings": ([["a", "b"]] * 10, "must hold numbers|could not convert string"),
    "strings in a frame": (pd.DataFrame({"a": ["x"] * 10}), "could not convert string|numbers"),
    "objects": (np.array([[{}, 1.0]] * 10, dtype=object), "float|number"),
    "complex": (PLAIN + 1j, "Complex data not supported"),
    "complex tensor": (torch.tensor(PLAIN + 1j), "Complex data not supported"),
    "ragged": ([[1, 2], [3]] * 5, "inhomogeneous|Expected 2D|setting an array element"),
    "fewer rows than clusters": (PLAIN[:3], "n_samples=3 should be >= n_clusters=4. Give more"),
    "overflow": (1e200 * PLAIN, r"too large to compute with.*Rescale X"),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_refused_before_training(name, estimator_class, small):
    X, message = BAD_DATA[name]
    with pytest.raises((ValueError, TypeError), match=named(message, estimator_class)):
        small(estimator_class).fit(X)


@pytest.mark.usefixtures("no_training")
def test_bad_data_are_refused_by_partial_fit(small):
    for X, message in BAD_DATA.values():
        with pytest.raises((ValueError, TypeError), match=message):
            small(ClusteringModule).partial_fit(X)


def test_huge_values_overflow_in_float64_too_and_are_refused(estimator_class, small):
    with pytest.raises(ValueError, match=r"too large to compute with in torch.float64"):
        small(estimator_class, dtype="float64").fit(1e200 * PLAIN)


METHODS = ["predict", "predict_proba", "transform", "score_samples", "score"]


@pytest.mark.parametrize("method", METHODS)
def test_predictions_refuse_another_number_of_features(method, estimator_class, small):
    model = quietly(small(estimator_class, max_iter=1).fit, PLAIN)
    message = f"X has 2 features, but {estimator_class.__name__} is expecting 3 features"
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(PLAIN[:, :2])


@pytest.mark.parametrize("method", METHODS)
def test_predictions_refuse_bad_values(method, estimator_class, small):
    model = quietly(small(estimator_class, max_iter=1).fit, PLAIN)
    for name in ("NaN", "infinity", "one dimension", "complex", "strings"):
        X, message = BAD_DATA[name]
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(X)


@pytest.mark.parametrize("method", [*METHODS, "module_", "to_module"])
def test_before_fit_there_is_nothing_to_ask(method, estimator_class):
    arguments = (PLAIN,) if method in METHODS else ()
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(estimator_class(), method)(*arguments)


@with_centers
def test_before_fit_there_is_nothing_to_draw_from(estimator_class):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        estimator_class().sample()


@pytest.mark.parametrize("cls", [AECM, DCAN, AutoencoderDeepDPM])
@pytest.mark.parametrize("method", ["inverse_transform", "interpolate"])
def test_before_fit_there_is_nothing_to_decode(method, cls):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(cls(), method)(*((PLAIN,) if method == "inverse_transform" else (0, 1)))


@with_centers
@pytest.mark.parametrize("n_samples", [0, -1, 1.5, "2"])
def test_a_number_of_samples_that_cannot_be_is_refused(n_samples, estimator_class, small):
    model = quietly(small(estimator_class, max_iter=1).fit, PLAIN)
    with pytest.raises(ValueError, match="n_samples must be an integer >= 1; got"):
        model.sample(n_samples)


# --- Bad weights ---

BAD_WEIGHTS = {
    "negative": (np.r_[-1.0, np.ones(39)], r"Negative values in .*weight"),
    "all zero": (np.zeros(40), "[Ss]ample weights must contain at least one non-zero number"),
    "too few": (np.ones(39), r"sample_weight.shape == \(39,\), expected \(40,\)"),
    "two columns": (np.ones((40, 2)), "Sample weights must be 1D"),
    "NaN": (np.r_[np.nan, np.ones(39)], "sample_weight contains NaN"),
    "infinity": (np.r_[np.inf, np.ones(39)], "sample_weight contains infinity"),
    "strings": (["a"] * 40, "could not convert string"),
    "too few positive": (np.r_[np.ones(3), np.zeros(37)], "n_samples=3 should be >= n_clusters=4"),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused_before_training(name, estimator_class, small):
    weight, message = BAD_WEIGHTS[name]
    with pytest.raises(ValueError, match=named(message, estimator_class)):
        small(estimator_class).fit(PLAIN, sample_weight=weight)


# --- Bad parameters ---

ALL = [
    ("n_clusters", 0),
    ("n_clusters", -1),
    ("n_clusters", 2.5),
    ("n_clusters", "4"),
    ("n_clusters", None),
    ("n_init", 0),
    ("n_init", "best"),
    ("max_iter", -1),
    ("max_iter", 1.5),
    ("batch_size", 0),
    ("batch_size", "all"),
    ("learning_rate_init", 0.0),
    ("learning_rate_init", -1.0),
    ("learning_rate_init", "small"),
    ("tol", -1e-3),
    ("tol", None),
    ("n_iter_no_change", 0),
    ("warm_start", "yes"),
    ("device", 0.5),
    ("device", None),
    ("dtype", "float16"),
    ("dtype", np.float32),
    ("random_state", "seed"),
    ("verbose", -1),
    ("verbose", "loud"),
    ("scale", None),
    ("selection", "bic"),
]
CENTERS = [
    ("n_init", "auto"),
    ("concentration", 0.0),
    ("concentration", -1.0),
    ("concentration", "paper"),
    ("concentration", None),
    ("solver", "lbfgs"),
    ("epsilon", 0.0),
    ("max_grad_norm", 0.0),
    ("averaging", "yes"),
    ("init", "kmeans"),
]
DPM = [
    ("n_clusters_init", 0),
    ("n_clusters_init", 2.5),
    ("n_clusters_init", None),
    ("max_clusters", 0),
    ("amortized", "yes"),
    ("covariance_type", "tied"),
    ("concentration", 0.0),
    ("concentration", None),
    ("prior_scale", 0.0),
    ("prior_scale", None),
    ("prior_dof", 0.0),
    ("prior_kappa", 0.0),
    ("scaling", "norm"),
    ("check_unions", None),
    ("stochastic", "yes"),
    ("hidden_layer_sizes", 100),
    ("split_merge_every", 0),
    ("freeze", -1),
    ("subcluster_learning_rate", 0.0),
]
ONE = {
    ClusteringModule: [*CENTERS, ("init", None), ("init", 3), ("encoder_init", "random")],
    NeuralMixtureEM: [
        ("hidden_layer_sizes", 100),
        ("image_shape", 28),
        ("network", 3),
        ("sobel", "yes"),
        ("augmentation", 0.1),
        ("two_fold", None),
        ("consistency_learning_rate", 0.0),
        ("consistency_warm_up", -1),
        ("weights", "balanced"),
        ("weights", None),
        ("gamma", 0.0),
        ("ensemble", 2),
        ("weight_decay", -1e-3),
        ("precision", "float16"),
    ],
    DCAN: [
        ("n_init", "auto"),
        ("divergence", "wasserstein"),
        ("divergence", None),
        ("covariance_type", "ellipse"),
        ("hidden_layer_sizes", 100),
        ("latent_dim", 0),
        ("latent_dim", 2.0),
        ("clustering_weight", -1.0),
        ("clustering_weight", None),
        ("warm_up", -1),
        ("reconstruction_weight", -1.0),
        ("conditional", "yes"),
        ("generator_loss", "hinge"),
        ("assignment", "nearest"),
        ("critic_hidden_layer_sizes", 64),
        ("activation", "leaky"),
        ("spectral_norm", "yes"),
        ("label_smoothing", 0.5),
        ("update_every", -1),
        ("pool_size", 0),
        ("memory", 1.0),
        ("init", "random"),
        ("readout_n_init", 0),
        ("equal_weights", None),
        ("encoder", "MLP"),
        ("decoder", 3),
        ("pretrain_max_iter", -1),
        ("pretrain_max_iter", None),
        ("max_iter", "all"),
        ("solver", "lbfgs"),
        ("momentum", 1.0),
        ("precision", "float16"),
    ],
    DeepDPM: DPM,
    AutoencoderDeepDPM: [
        ("clusterer", 4),
        ("clusterer", KMeans(4)),
        ("hidden_layer_sizes", 100),
        ("n_init", "auto"),
        ("latent_dim", 0),
        ("encoder", "MLP"),
        ("decoder", 3),
        ("pretrain_max_iter", -1),
        ("n_alternations", -1),
        ("reconstruction_weight", -1.0),
        ("clustering_weight", -1.0),
        ("relative_loss", None),
        ("weight_decay", -1e-3),
        ("precision", "float16"),
    ],
    AECM: [
        *CENTERS,
        ("init", "k-means++"),
        ("hidden_layer_sizes", 100),
        ("hidden_layer_sizes", "100"),
        ("hidden_layer_sizes", None),
        ("latent_dim", 0),
        ("latent_dim", 2.0),
        ("reconstruction_weight", -1.0),
        ("reconstruction_weight", "beta"),
        ("orthogonality_weight", -1.0),
        ("logit_gain", 0.0),
        ("logit_gain", "auto"),
        ("encoder", "MLP"),
        ("decoder", 3),
        ("pretrain_max_iter", -1),
        ("clustering_max_iter", 1.5),
        ("precision", "float16"),
    ],
}
# Of ``ALL``: what DeepDPM has no use for. It finds the number of clusters, ends when no proposal
# is left, always scales as ``scaling`` says, and selects by the posterior; DCAN has one criterion.
WITHOUT = {
    DCAN: {"selection"},
    DeepDPM: {"n_clusters", "n_iter_no_change", "scale", "selection"},
    AutoencoderDeepDPM: {"n_clusters", "n_iter_no_change", "selection", "tol"},
}
BAD_PARAMETERS = [
    (cls, *pair)
    for cls, own in ONE.items()
    for pair in ALL + own
    if pair[0] not in WITHOUT.get(cls, ())
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("cls", "name", "value"), BAD_PARAMETERS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_bad_parameter_is_refused_by_name_before_training(cls, name, value, small):
    with pytest.raises(ValueError, match=f"The '{name}' parameter of {cls.__name__} must be"):
        small(cls).set_params(**{name: value}).fit(PLAIN)


def test_no_parameter_escapes_the_table_of_bad_ones(estimator_class):
    tried = {name for cls, name, _ in BAD_PARAMETERS if cls is estimator_class}
    assert tried == set(estimator_class().get_params())


COMBINATIONS = [
    (AECM, {"concentration": [1.0, 2.0]}, "concentration must hold n_clusters=4 positive"),
    (AECM, {"concentration": [1.0, 2.0, 0.0, 1.0]}, "concentration must hold n_clusters=4"),
    (AECM, {"concentration": [[1.0] * 4]}, "concentration must hold n_clusters=4"),
    (AECM, {"concentration": [1.0, 2.0, np.nan, 1.0]}, "concentration must hold n_clusters=4"),
    (AECM, {"concentration": [1.0, 2.0, np.inf, 1.0]}, "concentration must hold n_clusters=4"),
    (AECM, {"concentration": ["a"] * 4}, "concentration|could not convert"),
    (ClusteringModule, {"concentration": [1.0, 2.0]}, "concentration must hold n_clusters=4"),
    (DeepDPM, {"hidden_layer_sizes": ()}, "hidden_layer_sizes must hold one or more integers"),
    (DeepDPM, {"max_clusters": 3}, "max_clusters=3 should be >= n_clusters_init=4"),
    (DCAN, {"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must hold integers >= 1; got"),
    (DCAN, {"critic_hidden_layer_sizes": (0.5,)}, "critic_hidden_layer_sizes must hold integers"),
    (DCAN, {"precision": "bfloat16", "dtype": "auto"}, "'bfloat16' goes with dtype='float32'"),
    (AutoencoderDeepDPM, {"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must hold integers"),
    (
        AutoencoderDeepDPM,
        {"clusterer__hidden_layer_sizes": ()},
        "hidden_layer_sizes must hold one or more integers",
    ),
    (AutoencoderDeepDPM, {"clusterer__n_init": 0}, "The 'n_init' parameter of DeepDPM must be"),
    (AutoencoderDeepDPM, {"clusterer__scaling": "normalize"}, "centres could not be decoded"),
    (AutoencoderDeepDPM, {"clusterer__max_clusters": 3}, "max_clusters=3 should be >="),
    (
        AutoencoderDeepDPM,
        {"clusterer__prior_dof": 1.5},
        r"prior_dof=1.5 should be > n_features - 1 = 2",
    ),
    (AutoencoderDeepDPM, {"clusterer__prior_scale": [1.0, 2.0]}, "prior_scale must be 'auto', 'co"),
    (
        AutoencoderDeepDPM,
        {"precision": "bfloat16", "dtype": "float64"},
        "'bfloat16' goes with dtype='float32'",
    ),
    (None, {"device": "gpu"}, "device='gpu' is not a device that torch knows"),
    (None, {"device": "cuda:99"}, "device='cuda:99' cannot be used on this machine"),
    (None, {"device": "meta"}, "device='meta' cannot be used on this machine"),
    (ClusteringModule, {"init": np.zeros((4, 2))}, r"init has shape \(4, 2\); expected"),
    (ClusteringModule, {"init": np.zeros((3, 3))}, r"init has shape \(3, 3\); expected"),
    (ClusteringModule, {"init": np.full((4, 3), np.nan)}, "init contains NaN"),
    (ClusteringModule, {"init": lambda X, k, random_state: X[:2]}, r"init has shape \(2, 3\)"),
    (AECM, {"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must hold integers >= 1; got"),
    (AECM, {"hidden_layer_sizes": (8, 2.5)}, "hidden_layer_sizes must hold integers >= 1"),
    (AECM, {"hidden_layer_sizes": ((8,), 8)}, "hidden_layer_sizes must hold integers >= 1"),
    (AECM, {"precision": "bfloat16", "dtype": "float64"}, "'bfloat16' goes with dtype='float32'"),
    (AECM, {"precision": "bfloat16", "dtype": "auto"}, "'bfloat16' goes with dtype='float32'"),
]
COMBINATIONS = [(cls, *rest) for only, *rest in COMBINATIONS for cls in ONE if only in (None, cls)]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("cls", "parameters", "message"), COMBINATIONS)
def test_parameters_that_do_not_fit_are_refused_before_training(cls, parameters, message, small):
    with pytest.raises(ValueError, match=message):
        small(cls, **parameters).fit(PLAIN)


# --- What works, and says so ---


def test_constant_features_are_no_obstacle(estimator_class, blobs, small):
    X, y = blobs
    model = small(estimator_class).fit(np.c_[X, np.full(len(X), 7.0)])
    assert adjusted_rand_score(model.labels_, y) > 0.9
    np.testing.assert_allclose(model.cluster_centers_[:, -1], 7.0, atol=1.0)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_rows_that_are_all_equal_give_one_cluster_and_a_warning(value, estimator_class, small):
    message = r"distinct clusters \(1\) found smaller than n_clusters \(4\).*duplicate rows"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = small(estimator_class).fit(np.full((30, 3), value))
    if estimator_class in FINDS_NUMBER:  # one cluster is what was to be found
        assert not caught
        assert model.n_clusters_ == 1
    else:
        assert {w.category for w in caught} == {ConvergenceWarning}
        assert any(re.search(message, str(w.message)) for w in caught)
    assert len(np.unique(model.labels_)) == 1
    assert np.isfinite(model.score(np.full((2, 3), value)))


def test_fewer_distinct_rows_than_clusters_warn(estimator_class, small):
    X = np.repeat([[0.0, 0.0], [5.0, 5.0]], 20, axis=0)
    if estimator_class in FINDS_NUMBER:  # two clusters are what was to be found
        model = small(estimator_class).fit(X)
        assert model.n_clusters_ == 2
    else:
        with pytest.warns(ConvergenceWarning, match="found smaller than n_clusters"):
            model = small(estimator_class).fit(X)
    assert len(np.unique(model.labels_)) <= 2


def test_a_large_offset_warns_with_the_remedy(estimator_class, blobs, small):
    with pytest.warns(UserWarning, match=r"cannot tell apart well.*Subtract the mean"):
        quietly(small(estimator_class, max_iter=1).fit, blobs[0] + 1e6)


def test_a_large_offset_is_no_matter_in_float64(estimator_class, blobs, small):
    X, _ = blobs
    near, far = (small(estimator_class, dtype="auto").fit(X + c) for c in (0.0, 1e6))
    # Up to names: of starts that are equal but for rounding, rounding chooses.
    assert adjusted_rand_score(near.labels_, far.labels_) == 1.0


@pytest.mark.parametrize("scale", [1e30, 1e-20])
def test_huge_and_tiny_values_work_in_float32(scale, estimator_class, blobs, small):
    X, y = blobs
    model = small(estimator_class).fit(scale * X)
    assert adjusted_rand_score(model.labels_, y) > 0.9
    assert np.all(np.isfinite(model.cluster_centers_))
    assert np.isfinite(getattr(model, "variance_", 1.0))
    assert getattr(model, "variance_", 1.0) > 0
    assert np.all(np.isfinite(model.score_samples(scale * X)))
    assert np.all(np.isfinite(model.score_samples((scale * X).astype(np.float32))))


def test_too_few_epochs_warn_with_the_remedy(estimator_class, blobs, small):
    message = r"did not converge in max_iter=2 epochs \(tol=0.0001.*Increase max_iter, raise tol"
    if estimator_class in FINDS_NUMBER:  # no n_iter_no_change: end when no proposal is left
        message = r"did not settle in 2 epochs \(max_iter=2\): .* Increase max_iter, or set tol=0"
    few = {"max_iter": 2}
    if estimator_class is AutoencoderDeepDPM:
        few = {"max_iter": 2, "clusterer__max_iter": 0}
        message = r"not settle in clusterer__max_iter=0 epochs: .* Increase clusterer__max_iter, or"
    with pytest.warns(ConvergenceWarning, match=message):
        model = small(estimator_class, tol=1e-4, **few).fit(blobs[0])
    assert not model.converged_


def test_without_tolerance_few_epochs_do_not_warn(estimator_class, blobs, small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small(estimator_class, tol=0).fit(blobs[0])
    assert not model.converged_


def test_early_stopping_ends_training_and_says_so(estimator_class, blobs, small):
    options = {"max_iter": 2000, "tol": 1e-2, "n_iter_no_change": 2}
    if estimator_class in FINDS_NUMBER:  # end when no proposal is left
        del options["n_iter_no_change"]
    if estimator_class is AutoencoderDeepDPM:  # which a clustering does; its own epochs are given
        options |= {"max_iter": 20, "clusterer__max_iter": 2000}
    model = small(estimator_class, **options).fit(blobs[0])
    assert model.converged_
    assert 2 < model.n_iter_ < 200
    assert len(model.history_["loss"]) == model.n_iter_


def test_as_many_rows_as_clusters_work(estimator_class, small):
    X = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    model = quietly(small(estimator_class).fit, X)
    assert model.labels_.shape == (4,)


def test_one_feature_and_one_cluster_work(estimator_class, blobs, small):
    X = blobs[0][:, :1]
    model = quietly(small(estimator_class).fit, X)
    n_clusters = model.n_clusters_ if estimator_class in FINDS_NUMBER else 4
    assert model.cluster_centers_.shape == (n_clusters, 1)
    most = {"max_clusters": 1} if estimator_class in FINDS_NUMBER else {}
    assert set(small(estimator_class, 1, **most).fit(X).labels_) == {0}


# --- Input of every kind ---

KINDS = {
    "float32": lambda X: X.astype(np.float32),
    "big-endian": lambda X: X.astype(">f8"),
    "longdouble": lambda X: X.astype(np.longdouble),
    "Fortran order": np.asfortranarray,
    "negative strides": lambda X: X[::-1].copy()[::-1],
    "every other column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "list": lambda X: X.tolist(),
    "tensor": torch.tensor,
    "tensor with gradient": lambda X: torch.tensor(X, requires_grad=True),
    "CSR array": sp.csr_array,
    "CSR matrix": sp.csr_matrix,
    "CSC": sp.csc_array,
    "COO": sp.coo_array,
    "sparse tensor": lambda X: torch.tensor(X).to_sparse(),
    "read-only": lambda X: X,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_in_any_container_give_the_same_model(
    kind, estimator_class, overlapping, small
):
    X, _ = overlapping
    X = X.astype(np.float32).astype(np.float64)  # numbers that float32 holds, too
    expected = small(estimator_class).fit(X)
    given = KINDS[kind](X)
    model = small(estimator_class).fit(given)
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    np.testing.assert_array_equal(model.predict(given), model.labels_)
    np.testing.assert_allclose(
        model.predict_proba(given), expected.predict_proba(X), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(model.score(given), expected.score(X), rtol=1e-5)


def test_bfloat16_tensors_are_their_values(estimator_class, blobs, small):
    X = torch.tensor(blobs[0]).to(torch.bfloat16)
    model = small(estimator_class).fit(X)
    np.testing.assert_array_equal(model.labels_, small(estimator_class).fit(X.float()).labels_)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_cuda_device_give_arrays(estimator_class, blobs, small):
    X, y = blobs
    model = small(estimator_class, device="cuda").fit(torch.tensor(X, device="cuda"))
    assert model.device_ == "cuda:0" or model.device_ == "cuda"
    assert isinstance(model.labels_, np.ndarray)
    assert adjusted_rand_score(model.labels_, y) > 0.9
    np.testing.assert_array_equal(model.set_params(device="cpu").predict(X), model.labels_)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_integers_are_computed_as_floats(dtype, estimator_class, overlapping, small):
    X = np.round(2 * overlapping[0] + 60).clip(0, 127)
    integers = small(estimator_class).fit(X.astype(dtype))
    floats = small(estimator_class).fit(X)
    np.testing.assert_array_equal(integers.labels_, floats.labels_)
    np.testing.assert_array_equal(integers.labels_, integers.predict(X.astype(dtype)))
    np.testing.assert_array_equal(integers.labels_, integers.predict(X))


def test_booleans_are_zeros_and_ones(estimator_class, blobs, small):
    X = blobs[0] > 0
    booleans = quietly(small(estimator_class).fit, X)
    floats = quietly(small(estimator_class).fit, X.astype(np.float32))
    np.testing.assert_array_equal(booleans.labels_, floats.labels_)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("training", ["float32", "auto"])
def test_labels_are_predictions_of_the_training_data(
    dtype, training, estimator_class, overlapping, small
):
    X = (2 * overlapping[0] + 60).clip(0, 127).astype(dtype)
    model = small(estimator_class, dtype=training)
    np.testing.assert_array_equal(model.fit_predict(X), model.labels_)
    np.testing.assert_array_equal(model.predict(X), model.labels_)
    assert model.labels_.dtype == np.int64
    again = small(estimator_class, dtype=training).fit_transform(X)
    np.testing.assert_array_equal(model.transform(X), again)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_are_in_the_dtype_of_the_data(dtype, estimator_class, blobs, small):
    X = blobs[0].astype(dtype)
    model = small(estimator_class).fit(X)
    for method in ("predict_proba", "transform", "score_samples"):
        assert getattr(model, method)(X).dtype == dtype
    assert type(model.score(X)) is float


def test_a_read_only_memory_map_is_used_in_place(estimator_class, blobs, small, tmp_path):
    np.save(tmp_path / "X.npy", blobs[0].astype(np.float32))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    model = small(estimator_class).fit(mapped)
    np.testing.assert_array_equal(model.predict(mapped), model.labels_)


def test_predictions_do_not_hang_on_how_rows_are_batched(
    estimator_class, overlapping, small, monkeypatch
):
    X, _ = overlapping
    model = small(estimator_class).fit(X)
    whole = model.predict_proba(X), model.transform(X), model.score_samples(X)
    monkeypatch.setattr("deepmix._torch.inference_batch_size", lambda *a: 7)
    parts = model.predict_proba(X), model.transform(X), model.score_samples(X)
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_weights_of_any_container_are_weights(estimator_class, blobs, small):
    X, _ = blobs
    weight = 1 + np.arange(len(X)) % 3
    expected = small(estimator_class).fit(X, sample_weight=weight.astype(float))
    for given in (weight, weight.tolist(), pd.Series(weight), torch.tensor(weight)):
        model = small(estimator_class).fit(X, sample_weight=given)
        np.testing.assert_array_equal(model.cluster_centers_, expected.cluster_centers_)


def test_equal_weights_are_no_weights(estimator_class, blobs, small):
    X, _ = blobs
    plain = small(estimator_class).fit(X)
    ones = small(estimator_class).fit(X, sample_weight=np.ones(len(X)))
    np.testing.assert_allclose(ones.cluster_centers_, plain.cluster_centers_, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(ones.labels_, plain.labels_)


# --- Nothing else is changed ---


def test_neither_the_users_arrays_nor_global_states_are_changed(
    estimator_class, blobs, small, global_random_states
):
    X, weight = np.array(blobs[0]), 1.0 + np.arange(240) % 3
    name, array = "concentration", np.array([4.0, 2.0, 3.0, 5.0])
    if estimator_class is NeuralMixtureEM:
        name, array = "weights", array / array.sum()
    elif estimator_class in FINDS_NUMBER:
        name, array = "prior_scale", array[:3]
    elif estimator_class is DCAN:
        name, array = "hidden_layer_sizes", np.array([16, 8])
    random_state = np.random.RandomState(0)
    copies = X.copy(), weight.copy(), array.copy()
    model = small(estimator_class, random_state=random_state, **{name: array})
    before = global_random_states()
    model.fit(X, sample_weight=weight)
    for method in METHODS:
        getattr(model, method)(X)
    if hasattr(model, "sample"):
        model.sample(5)
    model.module_(torch.tensor(X, dtype=torch.float32))
    assert global_random_states() == before
    for given, copy in zip((X, weight, array), copies):
        np.testing.assert_array_equal(given, copy)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    estimator_class, overlapping, small
):
    X, _ = overlapping
    first, again, other = (
        small(estimator_class, random_state=seed).fit(X).predict_proba(X) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_a_fit_without_a_seed_still_touches_no_torch_generator(estimator_class, blobs, small):
    before = torch.get_rng_state()
    small(estimator_class, random_state=None).fit(blobs[0])
    assert torch.equal(torch.get_rng_state(), before)


# --- The module ---


def test_the_module_maps_data_to_responsibilities(estimator_class, blobs, small):
    X = blobs[0].astype(np.float32)
    model = small(estimator_class).fit(X)
    module = model.to_module()
    assert isinstance(module, nn.Module)
    assert not module.training
    with torch.inference_mode():
        resp = module(torch.tensor(X)).numpy()
    np.testing.assert_allclose(resp, model.predict_proba(X), rtol=1e-4, atol=1e-6)


def test_training_the_module_does_not_change_the_estimator(estimator_class, blobs, small):
    X, _ = blobs
    model = small(estimator_class).fit(X)
    before = model.predict_proba(X)
    with torch.no_grad():
        for parameter in model.module_.parameters():
            parameter.add_(1)
    np.testing.assert_array_equal(model.predict_proba(X), before)


# --- Going on, stopping short ---


def test_warm_start_goes_on_from_the_last_solution(estimator_class, overlapping, small):
    X, _ = overlapping
    model = small(estimator_class, warm_start=True, learning_rate_init=1e-3).fit(X)
    # The other term of AutoencoderDeepDPM has another unit in each alternation.
    other = estimator_class is AutoencoderDeepDPM
    term, slack = ("reconstruction", 2e-2) if other else ("loss", 1e-2)
    before = model.history_[term][-1], model.labels_
    model.fit(X)
    assert model.history_[term][0] < before[0] * (1 + slack)
    assert adjusted_rand_score(before[1], model.labels_) > 0.8
    fresh = small(estimator_class, learning_rate_init=1e-3).fit(X)
    assert model.history_[term][-1] < fresh.history_[term][0]


def test_warm_start_with_no_epoch_changes_nothing(estimator_class, blobs, small):
    X, _ = blobs
    model = small(estimator_class, warm_start=True).fit(X)
    before = model.predict_proba(X)
    quietly(model.set_params(max_iter=0).fit, X)
    np.testing.assert_allclose(model.predict_proba(X), before, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("change", ["features", "clusters"])
def test_warm_start_refuses_what_does_not_fit_the_last_solution(
    change, estimator_class, blobs, small
):
    X, _ = blobs
    model = small(estimator_class, warm_start=True, max_iter=1).fit(X)
    X = X[:, :2] if change == "features" else X
    if estimator_class in FINDS_NUMBER:  # goes on from the clusters found: another net is refused
        model.set_params(hidden_layer_sizes=(50,) if change == "features" else (20,))
    else:
        model.set_params(n_clusters=4 if change == "features" else 3)
    with pytest.raises(ValueError, match=r"Training goes on with a model of .*warm_start=False"):
        model.fit(X)


def test_partial_fit_refuses_another_number_of_clusters(blobs, small):
    model = small(ClusteringModule).partial_fit(blobs[0])
    with pytest.raises(ValueError, match=r"goes on with a model of n_clusters=4; got"):
        model.set_params(n_clusters=3).partial_fit(blobs[0])


def interrupt_in(monkeypatch, press_ctrl_c, task, epoch):
    """Press Ctrl-C in an epoch of a stage, by way of a callback; no stage stops early."""
    from deepmix.callbacks import EarlyStopping

    def press(state):
        if (state.task, state.epoch) == (task, epoch):
            press_ctrl_c()
        return False

    def watched(*args, callbacks=(), **options):
        return minimize(*args, callbacks=[*callbacks, press], **options)

    monkeypatch.setattr("deepmix.base.minimize", watched)
    for stopping in (EarlyStopping, *EarlyStopping.__subclasses__()):  # DeepDPM has one of its own
        monkeypatch.setattr(stopping, "__call__", lambda self, state: False)


@pytest.mark.parametrize("n_init", [1, 3])
def test_an_interruption_leaves_a_fitted_estimator(
    n_init, estimator_class, blobs, small, monkeypatch, press_ctrl_c
):
    X, _ = blobs
    interrupt_in(monkeypatch, press_ctrl_c, "fit", 2)
    with pytest.warns(ConvergenceWarning, match=r"interrupted after 3 of 20 epochs \(fit\)"):
        model = small(estimator_class, max_iter=20, tol=1e-9, n_init=n_init).fit(X)
    assert model.n_iter_ == 3
    np.testing.assert_array_equal(model.predict(X), model.labels_)
    monkeypatch.undo()
    # The averaging epoch is left out, and what is kept is the last whole epoch.
    short = small(estimator_class, max_iter=3, n_init=1, **UNAVERAGED[estimator_class])
    if n_init == 1:
        np.testing.assert_array_equal(short.fit(X).transform(X), model.transform(X))


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("init", ["pretrain", "pretrain-pinv"])
def test_an_interruption_in_pretraining_leaves_a_fitted_estimator(
    init, epoch, blobs, small, monkeypatch, press_ctrl_c
):
    X, _ = blobs
    interrupt_in(monkeypatch, press_ctrl_c, "pretrain", epoch)
    with pytest.warns(ConvergenceWarning, match=r"interrupted after \d of 15 epochs \(pretrain"):
        model = small(AECM, init=init, tol=1e-9).fit(X)
    assert model.n_iter_ == 0
    assert len(model.history_["pretrain_reconstruction"]) == epoch + 1
    np.testing.assert_array_equal(model.predict(X), model.labels_)


def test_an_interruption_between_pretraining_and_joint_training_ends_the_fit(
    blobs, small, monkeypatch, press_ctrl_c
):
    interrupt_in(monkeypatch, press_ctrl_c, "clustering", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = small(AECM, init="pretrain-pinv", tol=1e-9).fit(blobs[0])
    assert any("(clustering)" in str(w.message) for w in caught)
    assert model.n_iter_ == 0


# --- Progress ---


def test_nothing_is_printed_unless_asked_for(estimator_class, blobs, small, capsys):
    small(estimator_class).fit(blobs[0])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("verbose", "n_lines"), [(1, 3), (10, 20)])
def test_verbose_prints_epochs(verbose, n_lines, estimator_class, blobs, small, capsys):
    options = {"max_iter": 20, "verbose": verbose, **UNAVERAGED[estimator_class]}
    small(estimator_class, **options).fit(blobs[0])
    lines = capsys.readouterr().out.splitlines()
    fits = [line for line in lines if line.startswith(f"[{estimator_class.__name__}] fit ")]
    assert len(fits) == n_lines
    assert fits[-1].split()[2] == "20/20"


# --- Divergence ---


def test_a_model_that_diverges_in_its_last_step_is_refused(blobs):
    model = ClusteringModule(
        4,
        solver="sgd",
        learning_rate_init=1e38,
        max_iter=1,
        batch_size=1000,
        averaging=False,
        n_init=1,
        tol=0,
        random_state=0,
    )
    with pytest.raises(FloatingPointError, match="Lower learning_rate_init"):
        model.fit(blobs[0])
