"""What every estimator does with data, good and bad, with weights, dtypes and interruptions."""

import re
import warnings

import common
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from common import (
    AUTOENCODERS,
    MAY_BE_EMPTY,
    SMALL,
    finds_number,
    number,
    parameters_of,
    quietly,
    stage_that_converges,
    taken,
)
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.utils._param_validation import InvalidParameterError, validate_parameter_constraints
from torch import nn

from deepmix import AECM, ClusteringModule, DeepDPM
from deepmix.callbacks import EarlyStopping, EpochState, StopWhen

pytestmark = MAY_BE_EMPTY


def named(message, cls):
    """A message with the class's own name of the number of clusters."""
    return message.replace("n_clusters=", f"{number(cls)}=")


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
    [cls for cls in SMALL if hasattr(cls, "sample")],
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
def test_predictions_refuse_another_number_of_features(method, fitted):
    message = f"X has 3 features, but {type(fitted).__name__} is expecting 4 features"
    with pytest.raises(ValueError, match=message):
        getattr(fitted, method)(PLAIN)


@pytest.mark.parametrize("method", METHODS)
def test_predictions_refuse_bad_values(method, fitted):
    for name in ("NaN", "infinity", "one dimension", "complex", "strings"):
        X, message = BAD_DATA[name]
        with pytest.raises(ValueError, match=message):
            getattr(fitted, method)(X)


@pytest.mark.parametrize("method", [*METHODS, "module_", "to_module"])
def test_before_fit_there_is_nothing_to_ask(method, estimator_class):
    arguments = (PLAIN,) if method in METHODS else ()
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(estimator_class(), method)(*arguments)


@with_centers
def test_before_fit_there_is_nothing_to_draw_from(estimator_class):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        estimator_class().sample()


@pytest.mark.parametrize("cls", AUTOENCODERS)
@pytest.mark.parametrize("method", ["inverse_transform", "interpolate"])
def test_before_fit_there_is_nothing_to_decode(method, cls):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(cls(), method)(*((PLAIN,) if method == "inverse_transform" else (0, 1)))


@with_centers
@pytest.mark.parametrize("n_samples", [0, -1, 1.5, "2"])
def test_a_number_of_samples_that_cannot_be_is_refused(n_samples, estimator_class, fitted):
    with pytest.raises(ValueError, match="n_samples must be an integer >= 1; got"):
        fitted.sample(n_samples)


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

# Values that no estimator takes, by parameter; not those of other types, which scikit-learn's
# check of parameters tries.
BAD_PARAMETERS = {
    "activation": ("leaky",),
    "amortized": ("yes",),
    "assignment": ("nearest",),
    "augmentation": (0.1,),
    "averaging": ("yes",),
    "batch_size": (0, "all"),
    "check_unions": (None,),
    "clusterer": (4, KMeans()),
    "clustering_max_iter": (1.5, -1),
    "clustering_weight": (-1.0, None),
    "concentration": (0.0, -1.0, "paper", None),
    "conditional": ("yes",),
    "consistency_learning_rate": (0.0,),
    "consistency_warm_up": (-1,),
    "covariance_type": ("ellipse",),
    "critic_hidden_layer_sizes": (64,),
    "decoder": (3, "MLP"),
    "device": (0.5, None),
    "divergence": ("wasserstein", None),
    "dtype": ("float16", np.float32),
    "encoder": (3, "MLP"),
    "encoder_init": ("random",),
    "ensemble": (2,),
    "epsilon": (0.0,),
    "equal_weights": (None,),
    "freeze": (-1,),
    "gamma": (0.0,),
    "generator_loss": ("hinge",),
    "hidden_layer_sizes": (100, "100", None),
    "image_shape": (28,),
    "init": ("kmeans", None, 3),
    "label_smoothing": (0.5,),
    "latent_dim": (0, 2.0),
    "learning_rate_init": (0.0, -1.0, "small"),
    "logit_gain": (0.0, "auto"),
    "max_clusters": (0,),
    "max_grad_norm": (0.0,),
    "max_iter": (-1, 1.5, "all"),
    "memory": (1.0,),
    "momentum": (1.0,),
    "n_alternations": (-1,),
    "n_clusters": (0, -1, 2.5, "4", None),
    "n_clusters_init": (0, 2.5, None),
    "n_init": (0, "best"),
    "n_iter_no_change": (0,),
    "network": (3,),
    "orthogonality_weight": (-1.0,),
    "pool_size": (0,),
    "precision": ("float16",),
    "pretrain_max_iter": (-1, None),
    "prior_dof": (0.0,),
    "prior_kappa": (0.0,),
    "prior_scale": (0.0, None),
    "random_state": ("seed",),
    "readout_n_init": (0,),
    "reconstruction_weight": (-1.0, "beta"),
    "relative_loss": (None,),
    "scale": (None,),
    "scaling": ("norm",),
    "selection": ("bic",),
    "sobel": ("yes",),
    "solver": ("lbfgs",),
    "spectral_norm": ("yes",),
    "split_merge_every": (0,),
    "stochastic": ("yes",),
    "subcluster_learning_rate": (0.0,),
    "tol": (-1e-3, None),
    "two_fold": (None,),
    "update_every": (-1,),
    "verbose": (-1, "loud"),
    "warm_start": ("yes",),
    "warm_up": (-1,),
    "weight_decay": (-1e-3,),
    "weights": ("balanced", None),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_a_bad_parameter_is_refused_by_name_before_training(name, small):
    for cls in (cls for cls in SMALL if name in parameters_of(cls)):
        for value in BAD_PARAMETERS[name]:
            with pytest.raises(ValueError, match=f"The '{name}' parameter of {cls.__name__} must"):
                small(cls).set_params(**{name: value}).fit(PLAIN)


def test_no_parameter_escapes_the_table_of_bad_ones(estimator_class):
    assert set(parameters_of(estimator_class)) <= set(BAD_PARAMETERS)


# Parameters that are legal one by one: each estimator that has them refuses them together.
COMBINATIONS = [
    ({"device": "gpu"}, "device='gpu' is not a device that torch knows"),
    ({"device": "cuda:99"}, "device='cuda:99' cannot be used on this machine"),
    ({"device": "meta"}, "device='meta' cannot be used on this machine"),
    ({"precision": "bfloat16", "dtype": "float64"}, "'bfloat16' goes with dtype='float32'"),
    ({"precision": "bfloat16", "dtype": "auto"}, "'bfloat16' goes with dtype='float32'"),
    ({"concentration": [1.0, 2.0]}, "concentration must hold n_clusters=4 positive"),
    ({"concentration": [1.0, 2.0, 0.0, 1.0]}, "concentration must hold n_clusters=4"),
    ({"concentration": [[1.0] * 4]}, "concentration must hold n_clusters=4"),
    ({"concentration": [1.0, 2.0, np.nan, 1.0]}, "concentration must hold n_clusters=4"),
    ({"concentration": [1.0, 2.0, np.inf, 1.0]}, "concentration must hold n_clusters=4"),
    ({"concentration": ["a"] * 4}, "concentration|could not convert"),
    ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must hold .*integers >= 1; got"),
    ({"hidden_layer_sizes": (8, 2.5)}, "hidden_layer_sizes must hold .*integers >= 1"),
    ({"hidden_layer_sizes": ((8,), 8)}, "hidden_layer_sizes must hold .*integers >= 1"),
    ({"critic_hidden_layer_sizes": (0.5,)}, "critic_hidden_layer_sizes must hold integers"),
    ({"clusterer__hidden_layer_sizes": ()}, "hidden_layer_sizes must hold one or more"),
    ({"clusterer__scaling": "normalize"}, "centres could not be decoded"),
    ({"max_clusters": 3}, "max_clusters=3 should be >= n_clusters_init=4"),
    ({"prior_dof": 1.5}, r"prior_dof=1.5 should be > n_features - 1 = 2"),
    ({"prior_scale": [1.0, 2.0]}, "prior_scale must be 'auto', 'codes', a positive"),
    ({"init": np.zeros((4, 2))}, r"init has shape \(4, 2\); expected"),
    ({"init": np.zeros((3, 3))}, r"init has shape \(3, 3\); expected"),
    ({"init": np.full((4, 3), np.nan)}, "init contains NaN"),
    ({"init": lambda X, k, random_state: X[:2]}, r"init has shape \(2, 3\)"),
]


def is_legal(cls, parameters):
    """Whether an estimator has these parameters and its constraints let each value pass."""
    if len(taken(cls, **parameters)) < len(parameters):
        return False
    model = common.small(cls)
    owners = {"": model, "clusterer": getattr(model, "clusterer", None)}
    try:
        for name, value in taken(cls, **parameters).items():
            owner, _, name = name.rpartition("__")
            constraints = owners[owner]._parameter_constraints
            validate_parameter_constraints(constraints, {name: value}, owner)
    except InvalidParameterError:
        return False
    return True


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("parameters", "message"), COMBINATIONS)
def test_parameters_that_do_not_fit_are_refused_before_training(parameters, message, small):
    classes = [cls for cls in SMALL if is_legal(cls, parameters)]
    assert classes
    for cls in classes:
        with pytest.raises(ValueError, match=message):
            small(cls, **parameters).fit(PLAIN)


def test_a_clustering_net_needs_a_hidden_layer(small):
    with pytest.raises(ValueError, match="hidden_layer_sizes must hold one or more integers"):
        small(DeepDPM, hidden_layer_sizes=()).fit(PLAIN)


# --- What works, and says so ---


def test_constant_features_are_no_obstacle(estimator_class, blobs, small):
    X, y = blobs
    model = small(estimator_class, **taken(estimator_class, pretrain_max_iter=30)).fit(
        np.c_[X, np.full(len(X), 7.0)]
    )
    assert adjusted_rand_score(model.labels_, y) > 0.9
    np.testing.assert_allclose(model.cluster_centers_[:, -1], 7.0, atol=1.0)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_rows_that_are_all_equal_give_one_cluster_and_a_warning(value, estimator_class, small):
    message = r"distinct clusters \(1\) found smaller than n_clusters \(4\).*duplicate rows"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = small(estimator_class).fit(np.full((30, 3), value))
    if finds_number(estimator_class):  # one cluster is what was to be found
        assert not caught
        assert model.n_clusters_ == 1
    else:
        assert {w.category for w in caught} == {ConvergenceWarning}
        assert any(re.search(message, str(w.message)) for w in caught)
    assert len(np.unique(model.labels_)) == 1
    assert np.isfinite(model.score(np.full((2, 3), value)))


def test_fewer_distinct_rows_than_clusters_warn(estimator_class, small):
    X = np.repeat([[0.0, 0.0], [5.0, 5.0]], 20, axis=0)
    if finds_number(estimator_class):  # two clusters are what was to be found
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
    stage = stage_that_converges(estimator_class)
    message = rf"did not (converge|settle) in .*{stage}=0\D.* Increase {stage}, .*tol"
    with pytest.warns(ConvergenceWarning, match=message):
        model = small(estimator_class, tol=1e-4, **{stage: 0}).fit(blobs[0])
    assert not model.converged_


def test_without_tolerance_few_epochs_do_not_warn(estimator_class, blobs, small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small(estimator_class, tol=0).fit(blobs[0])
    assert not model.converged_


def test_early_stopping_ends_training_and_says_so(estimator_class, blobs, small):
    options = taken(estimator_class, tol=1e-2, n_iter_no_change=2)
    options[stage_that_converges(estimator_class)] = 2000
    model = small(estimator_class, **options).fit(blobs[0])
    assert model.converged_
    assert 1 < model.n_iter_ < 200
    assert len(model.history_["loss"]) == model.n_iter_


def test_as_many_rows_as_clusters_work(estimator_class, small):
    X = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    model = quietly(small(estimator_class).fit, X)
    assert model.labels_.shape == (4,)


def test_one_feature_and_one_cluster_work(estimator_class, blobs, small):
    X = blobs[0][:, :1]
    model = quietly(small(estimator_class).fit, X)
    assert finds_number(estimator_class) or model.n_clusters_ == 4
    assert model.cluster_centers_.shape == (model.n_clusters_, 1)
    most = taken(estimator_class, max_clusters=1)
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


def assert_the_same_model_from(kind, model, X):
    X = X.astype(np.float32).astype(np.float64)  # numbers that float32 holds, too
    expected, given = clone(model).fit(X), KINDS[kind](X)
    model.fit(given)
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    np.testing.assert_array_equal(model.predict(given), model.labels_)
    np.testing.assert_allclose(
        model.predict_proba(given), expected.predict_proba(X), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(model.score(given), expected.score(X), rtol=1e-5)


# What is dense becomes one array before an estimator sees it: one estimator is enough.
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_in_any_container_give_the_same_model(kind, overlapping, small):
    assert_the_same_model_from(kind, small(ClusteringModule), overlapping[0])


def test_sparse_rows_give_the_model_of_dense_ones(estimator_class, overlapping, small):
    assert_the_same_model_from("CSR array", small(estimator_class), overlapping[0])


def test_bfloat16_tensors_are_their_values(blobs, small):
    X = torch.tensor(blobs[0]).to(torch.bfloat16)
    model = small(ClusteringModule).fit(X)
    np.testing.assert_array_equal(model.labels_, small(ClusteringModule).fit(X.float()).labels_)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_cuda_device_give_arrays(estimator_class, blobs, small):
    X, y = blobs
    model = small(estimator_class, device="cuda").fit(torch.tensor(X, device="cuda"))
    assert model.device_ == "cuda:0" or model.device_ == "cuda"
    assert isinstance(model.labels_, np.ndarray)
    assert adjusted_rand_score(model.labels_, y) > 0.9
    np.testing.assert_array_equal(model.set_params(device="cpu").predict(X), model.labels_)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_integers_are_computed_as_floats(dtype, overlapping, small):
    X = np.round(2 * overlapping[0] + 60).clip(0, 127)
    integers = small(ClusteringModule).fit(X.astype(dtype))
    floats = small(ClusteringModule).fit(X)
    np.testing.assert_array_equal(integers.labels_, floats.labels_)
    np.testing.assert_array_equal(integers.labels_, integers.predict(X.astype(dtype)))
    np.testing.assert_array_equal(integers.labels_, integers.predict(X))


def test_booleans_are_zeros_and_ones(estimator_class, blobs, small):
    X = blobs[0] > 0
    booleans = quietly(small(estimator_class).fit, X)
    floats = quietly(small(estimator_class).fit, X.astype(np.float32))
    np.testing.assert_array_equal(booleans.labels_, floats.labels_)


@pytest.mark.parametrize(
    ("dtype", "training"),
    [(np.float32, "auto"), (np.float64, "auto"), (np.float64, "float32"), (np.uint8, "float32")],
)
def test_labels_are_predictions_of_the_training_data(
    dtype, training, estimator_class, overlapping, small
):
    X = (2 * overlapping[0] + 60).clip(0, 127).astype(dtype)
    model = small(estimator_class, dtype=training)
    np.testing.assert_array_equal(model.fit_predict(X), model.labels_)
    np.testing.assert_array_equal(model.predict(X), model.labels_)
    assert model.labels_.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predictions_are_in_the_dtype_of_the_data(dtype, fitted, overlapping):
    X = overlapping[0].astype(dtype)
    for method in ("predict_proba", "transform", "score_samples"):
        assert getattr(fitted, method)(X).dtype == dtype
    assert type(fitted.score(X)) is float


def test_a_read_only_memory_map_is_used_in_place(estimator_class, blobs, small, tmp_path):
    np.save(tmp_path / "X.npy", blobs[0].astype(np.float32))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    model = small(estimator_class).fit(mapped)
    np.testing.assert_array_equal(model.predict(mapped), model.labels_)


def test_predictions_do_not_hang_on_how_rows_are_batched(fitted, overlapping, monkeypatch):
    X, model = overlapping[0], fitted
    whole = model.predict_proba(X), model.transform(X), model.score_samples(X)
    monkeypatch.setattr("deepmix._torch.inference_batch_size", lambda *a: 7)
    parts = model.predict_proba(X), model.transform(X), model.score_samples(X)
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_weights_of_any_container_are_weights(blobs, small):
    X, _ = blobs
    weight = 1 + np.arange(len(X)) % 3
    expected = small(ClusteringModule).fit(X, sample_weight=weight.astype(float))
    for given in (weight, weight.tolist(), pd.Series(weight), torch.tensor(weight)):
        model = small(ClusteringModule).fit(X, sample_weight=given)
        np.testing.assert_array_equal(model.cluster_centers_, expected.cluster_centers_)


def test_equal_weights_are_no_weights(estimator_class, blobs, small):
    X, _ = blobs
    plain = small(estimator_class).fit(X)
    ones = small(estimator_class).fit(X, sample_weight=np.ones(len(X)))
    np.testing.assert_allclose(ones.cluster_centers_, plain.cluster_centers_, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(ones.labels_, plain.labels_)


# --- Nothing else is changed ---


# Arrays that a user gives as parameters, to the estimators that take them.
ARRAYS = {
    "concentration": np.array([4.0, 2.0, 3.0, 5.0]),
    "weights": np.array([4.0, 2.0, 3.0, 5.0]) / 14,
    "prior_scale": np.array([4.0, 2.0, 3.0]),
    "hidden_layer_sizes": np.array([8, 6]),
}


def test_neither_the_users_arrays_nor_global_states_are_changed(
    estimator_class, blobs, small, global_random_states
):
    X, weight = np.array(blobs[0]), 1.0 + np.arange(240) % 3
    parameters = {n: a.copy() for n, a in ARRAYS.items() if is_legal(estimator_class, {n: a})}
    random_state = np.random.RandomState(0)
    copies = X.copy(), weight.copy()
    model = small(estimator_class, random_state=random_state, **parameters)
    before = global_random_states()
    model.fit(X, sample_weight=weight)
    for method in METHODS:
        getattr(model, method)(X)
    if hasattr(model, "sample"):
        model.sample(5)
    model.module_(torch.tensor(X, dtype=torch.float32))
    assert global_random_states() == before
    for given, copy in zip(
        (X, weight, *parameters.values()), (*copies, *map(ARRAYS.get, parameters))
    ):
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


def test_the_module_maps_data_to_responsibilities(fitted, overlapping):
    X, model = overlapping[0].astype(np.float32), fitted
    module = model.to_module()
    assert isinstance(module, nn.Module)
    assert not module.training
    with torch.inference_mode():
        resp = module(torch.tensor(X)).numpy()
    np.testing.assert_allclose(resp, model.predict_proba(X), rtol=1e-4, atol=1e-6)


def test_training_the_module_does_not_change_the_estimator(fitted, overlapping):
    X, model = overlapping[0], fitted
    before = model.predict_proba(X)
    with torch.no_grad():
        for parameter in model.module_.parameters():
            parameter.add_(1)
    np.testing.assert_array_equal(model.predict_proba(X), before)


# --- Going on, stopping short ---


def test_warm_start_goes_on_from_the_last_solution(estimator_class, blobs, small):
    X, _ = blobs
    model = small(estimator_class, warm_start=True).fit(X)
    # The loss of a game is no measure, nor one that is relative to a unit of its alternation, nor
    # one whose target becomes sharper.
    term = "reconstruction" if "reconstruction" in model.history_ else "loss"
    first, labels = model.history_[term], model.labels_
    # So slowly that an epoch hardly moves the loss.
    model.set_params(learning_rate_init=1e-3).fit(X)
    assert adjusted_rand_score(labels, model.labels_) > 0.8
    if first[-1] < first[0]:
        assert model.history_[term][0] - first[-1] < 0.3 * (first[0] - first[-1])
        assert model.history_[term][-1] < first[0]
    else:
        assert abs(model.history_[term][0] - first[-1]) < 0.1 * first[-1]


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
    model = quietly(small(estimator_class, warm_start=True, max_iter=1).fit, X)
    X = X[:, :2] if change == "features" else X
    if finds_number(estimator_class):  # goes on from the clusters found: another net is refused
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
    """Press Ctrl-C at the end of an epoch of a stage; no stage stops early."""
    whole = EpochState.__init__

    def ended(state, name, number, *args):
        if (name, number) == (task, epoch):
            press_ctrl_c()
        whole(state, name, number, *args)

    monkeypatch.setattr(EpochState, "__init__", ended)
    for stopping in (EarlyStopping, StopWhen, *StopWhen.__subclasses__()):
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
    short = small(estimator_class, max_iter=3, n_init=1, **taken(estimator_class, averaging=False))
    if n_init == 1:
        np.testing.assert_array_equal(short.fit(X).transform(X), model.transform(X))


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("init", ["pretrain", "pretrain-pinv"])
def test_an_interruption_in_pretraining_leaves_a_fitted_estimator(
    init, epoch, blobs, small, monkeypatch, press_ctrl_c
):
    X, _ = blobs
    interrupt_in(monkeypatch, press_ctrl_c, "pretrain", epoch)
    with pytest.warns(ConvergenceWarning, match=r"interrupted after \d of 5 epochs \(pretrain"):
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
        model = small(AECM, init="pretrain-pinv", clustering_max_iter=2, tol=1e-9).fit(blobs[0])
    assert any("(clustering)" in str(w.message) for w in caught)
    assert model.n_iter_ == 0


# --- Progress ---


def test_nothing_is_printed_unless_asked_for(estimator_class, blobs, small, capsys):
    small(estimator_class).fit(blobs[0])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("verbose", "n_lines"), [(1, 3), (10, 20)])
def test_verbose_prints_epochs(verbose, n_lines, estimator_class, blobs, small, capsys):
    options = taken(estimator_class, max_iter=20, verbose=verbose, averaging=False)
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
