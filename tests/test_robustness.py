"""Nothing outside a fit changes it, and nothing that it is given breaks it: every estimator."""

import contextlib
import signal
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from torch import nn

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)
from deepmix._torch import THREADED_WORK, threads_for

# After so few epochs it hangs on the last digits whether each cluster has a row.
pytestmark = pytest.mark.filterwarnings("ignore:Number of distinct clusters")

# A second of training is more than these tests need.
PRETRAINED = {"pretrain_max_iter": 4, "max_iter": 4}
QUICK = {
    ClusteringModule: {"max_iter": 6},
    AECM: PRETRAINED,
    DCAN: PRETRAINED,
    NeuralMixtureEM: {"max_iter": 10},
    DeepDPM: {"max_iter": 8, "split_merge_every": 20, "freeze": 5},
    AutoencoderDeepDPM: {**PRETRAINED, "clustering_max_iter": 6},
}


@pytest.fixture
def small(small):
    """The estimators of the other tests, trained for a few epochs."""
    return lambda cls, *args, **options: small(cls, *args, **{**QUICK[cls], **options})


FINDS_NUMBER = (DeepDPM, AutoencoderDeepDPM)
AUTOENCODERS = [AECM, DCAN, AutoencoderDeepDPM]


def results(model, X):
    """What a user reads from a model: arrays by name."""
    methods = ("predict", "predict_proba", "transform", "score_samples")
    found = {name: getattr(model, name)(X) for name in methods}
    return {**found, "labels_": model.labels_, "cluster_centers_": model.cluster_centers_}


def assert_same(first, second):
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# --- Modes of torch around a fit ---


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_and_predictions_are_the_same_in_any_mode(mode, estimator_class, overlapping, small):
    X, _ = overlapping
    expected = results(small(estimator_class).fit(X), X)
    with MODES[mode]():
        model = small(estimator_class).fit(X)
        found = results(model, X)
        if hasattr(model, "sample"):
            drawn = model.sample(5)[0]
        assert model.module_.training is False
    assert_same(expected, found)
    if hasattr(model, "sample"):
        np.testing.assert_array_equal(model.sample(5)[0], drawn)


@pytest.mark.parametrize("mode", MODES)
def test_amortized_and_em_find_the_same_number_in_any_mode(mode, blobs, small):
    X, _ = blobs
    with MODES[mode]():
        model = small(DeepDPM, 1, amortized=False, max_iter=200, tol=1e-3).fit(X)
    assert model.n_clusters_ == 4


@pytest.mark.parametrize("cls", AUTOENCODERS)
@pytest.mark.parametrize("mode", ["autocast", "default dtype float64"])
def test_a_network_of_the_user_is_the_same_in_any_mode(mode, cls, blobs, small):
    X, _ = blobs

    def build(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, n_out))

    expected = small(cls, encoder=build).fit(X).transform(X)
    with MODES[mode]():
        found = small(cls, encoder=build).fit(X).transform(X)
    np.testing.assert_array_equal(found, expected)


# --- Threads ---


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_little_work_has_one_thread_and_the_users_number_comes_back():
    with threads_for(1000):
        assert torch.get_num_threads() == 1
        with threads_for(THREADED_WORK):
            assert torch.get_num_threads() == 1  # what is inside a small stage is small
    assert torch.get_num_threads() == 2
    with threads_for(THREADED_WORK):
        assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), threads_for(0):
        1 / 0  # noqa: B018 (an error inside)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_limit_holds_for_mkl_too():
    """`torch.set_num_threads` gives MKL a number of its own, which OpenMP's limit leaves alone."""
    a = torch.ones(600, 600)
    with threads_for(1000):
        a @ a  # what has to be loaded is
        process, thread = time.process_time(), time.thread_time()
        for _ in range(20):
            a @ a
        process, thread = time.process_time() - process, time.thread_time() - thread
    assert process < 1.3 * thread + 0.01  # with two threads it would be about twice as much


@pytest.mark.usefixtures("two_threads")
def test_limits_of_parallel_threads_do_not_meet():
    inside, leave = threading.Barrier(3), threading.Event()

    def small_fit():
        with threads_for(1000):
            inside.wait()
            leave.wait()
            within = torch.get_num_threads()
        return within, torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        fits = [pool.submit(small_fit) for _ in range(2)]
        inside.wait()
        assert torch.get_num_threads() == 2  # they are not of this thread
        leave.set()
        assert [fit.result() for fit in fits] == [(1, 2), (1, 2)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_fit_of_a_small_network_runs_on_one_thread(estimator_class, blobs, small, monkeypatch):
    seen = []
    whole = estimator_class._train

    def train(*args):
        seen.append(torch.get_num_threads())
        return whole(*args)

    monkeypatch.setattr(estimator_class, "_train", train)
    small(estimator_class).fit(blobs[0])
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_fit_of_a_large_network_has_the_users_threads(blobs, monkeypatch):
    seen = []
    whole = AECM._train
    monkeypatch.setattr(
        AECM, "_train", lambda *args: seen.append(torch.get_num_threads()) or whole(*args)
    )
    model = AECM(4, pretrain_max_iter=0, max_iter=1, tol=0, averaging=False, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of one epoch
        model.fit(blobs[0])
    assert seen == [2]


# --- Sample weights ---

RELATIVE = [ClusteringModule, AECM, NeuralMixtureEM, DCAN]
CONSTANTS = [1 / 300, 0.1, 0.9, 3.0, 1e6, 1e9, 1e-46]


@pytest.mark.parametrize("cls", RELATIVE)
def test_equal_weights_of_any_size_are_no_weights(cls, overlapping, small):
    X, _ = overlapping
    plain = small(cls).fit(X)
    for constant in CONSTANTS:
        model = small(cls).fit(X, sample_weight=np.full(len(X), constant))
        np.testing.assert_array_equal(model.labels_, plain.labels_, err_msg=str(constant))


@pytest.mark.parametrize("cls", RELATIVE)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_only_the_ratios_of_weights_count(factor, cls, overlapping, small):
    X, _ = overlapping
    # Of a mean that cannot be one of counts, so that both are brought to the same.
    weight = 2.0**-20 * (1 + np.arange(len(X)) % 3)
    first = small(cls).fit(X, sample_weight=weight)
    second = small(cls).fit(X, sample_weight=factor * weight)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))


@pytest.mark.parametrize("cls", FINDS_NUMBER)
def test_weights_that_count_hardly_any_rows_are_warned_of(cls, blobs, small):
    X, _ = blobs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of one cluster, said besides
        with pytest.warns(UserWarning, match=r"sample weights sum to 1, and 240 rows.*Multiply"):
            small(cls).fit(X, sample_weight=np.full(len(X), 1 / len(X)))


@pytest.mark.parametrize("cls", FINDS_NUMBER)
def test_weights_that_underflow_are_what_is_refused(cls, blobs, small):
    with pytest.raises(ValueError, match=r"sample_weight has no value that torch.float32 holds"):
        small(cls).fit(blobs[0], sample_weight=np.full(240, 1e-46))


# --- Memory that torch cannot use as it is ---


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_one_row_of_a_reversed_array_is_a_row(dtype, estimator_class, blobs, small):
    X = (10 * blobs[0] + 100).clip(0, 255).astype(dtype)
    model = small(estimator_class).fit(X)
    row = X[::-1][:1]
    assert row.strides[0] < 0
    for name in ("predict", "predict_proba", "transform", "score_samples"):
        expected = getattr(model, name)(row.copy())
        np.testing.assert_array_equal(getattr(model, name)(row), expected)


def test_one_reversed_column_and_reversed_weights_are_what_they_hold(estimator_class, blobs, small):
    X, weight = blobs[0][:, :1], 1.0 + np.arange(240) % 3
    options = {"max_clusters": 2} if estimator_class in FINDS_NUMBER else {}
    model = small(estimator_class, 2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = clone(model).fit(X, sample_weight=weight)
        found = clone(model).fit(X[::-1].copy()[::-1], sample_weight=weight[::-1].copy()[::-1])
    np.testing.assert_array_equal(found.labels_, expected.labels_)


def test_a_row_of_a_structured_array_is_a_row(blobs, small):
    record = np.dtype({"names": ["x"], "formats": [("f8", 3)], "itemsize": 29})
    table = np.zeros(1, record)
    table["x"] = blobs[0][:1]
    model = small(ClusteringModule).fit(blobs[0])
    np.testing.assert_array_equal(model.predict(table["x"]), model.labels_[:1])


# --- Networks of the user ---


@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_the_truth_value_of_a_network_is_not_asked(cls, blobs, small):
    """An empty nn.Sequential is false, and here the identity: codes are the standardised rows."""
    X, _ = blobs
    options = {"encoder": nn.Sequential(), "decoder": nn.Sequential(), "latent_dim": 3}
    model = small(cls, **options).fit(X)
    assert not any("autoencoder" in name for name in model._state)


@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_a_compiled_encoder_is_an_encoder(cls, blobs, small):
    X, _ = blobs
    plain = nn.Linear(3, 3)
    compiled = torch.compile(plain, backend="eager")
    options = {"latent_dim": 3, "max_iter": 2}
    expected = small(cls, encoder=plain, **options)
    found = small(cls, encoder=compiled, **options)
    np.testing.assert_allclose(found.fit(X).transform(X), expected.fit(X).transform(X), rtol=1e-4)


@pytest.mark.parametrize("cls", AUTOENCODERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_encoder_of_another_dtype_is_converted(dtype, cls, blobs, small):
    model = small(cls, encoder=nn.Linear(3, 2).double(), latent_dim=2, dtype=dtype).fit(blobs[0])
    assert model.transform(blobs[0]).shape == (240, 2)


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_dropout_draws_from_the_generator_of_the_fit(
    cls, as_module, blobs, small, global_random_states
):
    X, _ = blobs
    twice = nn.Dropout(0.2)
    dropouts = (twice, nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), twice)

    def build(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 8), *dropouts, nn.ReLU(), nn.Linear(8, n_out))

    with torch.random.fork_rng():
        encoder = build(3, 3) if as_module else build
    before = global_random_states()
    models = [small(cls, encoder=encoder, latent_dim=3).fit(X) for _ in range(2)]
    assert global_random_states() == before
    np.testing.assert_array_equal(models[0].transform(X), models[1].transform(X))
    np.testing.assert_array_equal(models[0].predict(X), models[0].labels_)


@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_lazy_layers_of_a_callable_draw_from_the_generator_of_the_fit(
    cls, blobs, small, global_random_states
):
    X, _ = blobs

    def build(n_in, n_out):
        return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, n_out))

    before = global_random_states()
    models = [small(cls, encoder=build).fit(X) for _ in range(2)]
    assert global_random_states() == before
    np.testing.assert_array_equal(models[0].transform(X), models[1].transform(X))


@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_a_buffer_of_the_user_may_be_infinite(cls, blobs, small):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 5)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    assert small(cls, encoder=Masked(), latent_dim=5).fit(blobs[0]).labels_.shape == (240,)


@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_a_lazy_module_is_refused(cls, blobs, small):
    with pytest.raises(ValueError, match=r"encoder has lazy layers.*pass a callable"):
        small(cls, encoder=nn.LazyLinear(3), latent_dim=3).fit(blobs[0])


def test_dropout_of_our_own_is_dropout():
    """Shares, scale and moments of torch's layers, whose draws come from another generator."""
    from deepmix.networks import SeededDropout

    x = torch.randn(400, 50, 6, generator=torch.Generator().manual_seed(0))
    for layer in (nn.Dropout(0.3), nn.Dropout1d(0.3), nn.AlphaDropout(0.3), nn.Dropout(0.0)):
        ours = SeededDropout(layer, torch.Generator().manual_seed(1))
        y = ours(x)
        changed = (y != layer.eval()(x)).double().mean()
        assert torch.equal(ours.eval()(x), x)
        if layer.p == 0:
            assert torch.equal(y, x)
        elif isinstance(layer, nn.AlphaDropout):  # keeps mean and variance
            assert abs(y.mean()) < 0.01
            assert abs(y.var() - 1) < 0.02
        else:
            assert abs((y == 0).double().mean() - 0.3) < 0.01
            torch.testing.assert_close(y[y != 0], (x / 0.7)[y != 0])
            assert changed == 1.0
        if isinstance(layer, nn.Dropout1d):  # whole channels
            share = (y == 0).double().mean(dim=2)
            assert set(share.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("cls", AUTOENCODERS)
def test_one_row_has_no_batch_statistics(cls, blobs, small):
    def build(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.Linear(8, n_out))

    with pytest.raises(ValueError, match=r"Batch normalisation has no variance of one row.*batch_"):
        small(cls, 1, encoder=build).fit(blobs[0][:1])


def test_even_batches_of_two_rows_leave_none_alone():
    def build(n_in, n_out):
        return nn.Sequential(nn.Linear(n_in, 8), nn.BatchNorm1d(8), nn.Linear(8, n_out))

    X = np.random.default_rng(0).normal(size=(85, 3))
    model = NeuralMixtureEM(
        2, network=build, batch_size=2, max_iter=2, n_init=1, augmentation=None, random_state=0
    ).fit(X)
    np.testing.assert_array_equal(model.predict(X), model.labels_)


# --- Memory ---


def test_labels_are_made_without_all_responsibilities():
    """400,000 rows and 500 clusters: their responsibilities would take 1.6 GB in float64."""
    X = np.random.default_rng(0).random((400_000, 2))
    model = ClusteringModule(500, init=X[:500], max_iter=0, tol=0).fit(X[:20_000])
    tracemalloc.start()
    labels = model.predict(X)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(labels) == len(X)
    assert peak < 64 * 2**20


# --- Messages ---


def test_an_anndata_object_is_told_its_matrices(estimator_class):
    adata = SimpleNamespace(X=np.zeros((10, 3)), obsm={}, shape=(10, 3))
    with pytest.raises(TypeError, match=r"SimpleNamespace object.*adata.obsm\['X_pca'\]"):
        estimator_class().fit(adata)


def test_images_are_told_how_to_unfold(estimator_class):
    with pytest.raises(ValueError, match=r"3 dimensions, \(10, 8, 8\).*X.reshape.*image_shape"):
        estimator_class().fit(np.zeros((10, 8, 8)))


@pytest.mark.parametrize("cls", FINDS_NUMBER)
def test_a_number_of_clusters_is_told_what_stands_for_it(cls):
    with pytest.raises(TypeError, match=r"finds the number of clusters.*n_clusters_init.*max_clus"):
        cls(n_clusters=10)


def test_nan_that_nobody_looked_for_is_told_to_be_nan(estimator_class, blobs, small):
    import sklearn

    X = np.array(blobs[0])
    X[3, 1] = np.nan
    with (
        sklearn.config_context(assume_finite=True),
        pytest.raises(ValueError, match=r"contains NaN or infinity.*assume_finite"),
    ):
        small(estimator_class).fit(X)


def test_raw_counts_are_told_to_be_normalised(estimator_class, small):
    rng = np.random.default_rng(0)
    X = rng.poisson(rng.lognormal(-2.0, 2.0, (90, 30))).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        with pytest.warns(UserWarning, match=r"looks like raw counts.*np.log1p"):
            small(estimator_class).fit(X)


def test_pixels_are_no_counts(small):
    from sklearn.datasets import load_digits

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(ClusteringModule).fit(load_digits().data[:300])


def test_a_fitted_state_of_another_network_is_refused(estimator_class, blobs, small):
    model = small(estimator_class).fit(blobs[0])
    name = next(iter(model._state))
    model._state[name] = np.zeros((7, 7, 7))
    with pytest.raises(ValueError, match=r"are not those of its network.*Fit it again"):
        model.predict(blobs[0])


# --- Far rows ---


def test_one_bad_row_is_left_out(estimator_class, blobs, small):
    X, y = blobs
    plain = small(estimator_class, max_iter=15).fit(X)
    with pytest.warns(UserWarning, match=r"1 of 241 rows \(the first is row 240\) have \d+%"):
        model = small(estimator_class, max_iter=15).fit(np.vstack([X, np.full((1, 3), -9999.0)]))
    assert adjusted_rand_score(y, plain.labels_) > 0.9
    np.testing.assert_array_equal(model.labels_[:240], plain.labels_)
    assert model.labels_.shape == (241,)


def test_a_small_far_cluster_is_no_bad_row(small):
    X, y = make_blobs([500, 20], n_features=3, cluster_std=1.0, random_state=0)
    X[y == 1] += 1000.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ClusteringModule(2, random_state=0).fit(X)
    assert adjusted_rand_score(y, model.labels_) == 1.0


def test_a_row_that_counts_many_times_is_no_bad_row():
    X = np.vstack([np.random.default_rng(0).normal(size=(1000, 3)), np.full((1, 3), 100.0)])
    weight = np.r_[np.ones(1000), 300.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ClusteringModule(2, random_state=0).fit(X, sample_weight=weight)
    assert model.labels_[-1] not in model.labels_[:-1]


def test_warnings_of_data_are_in_the_name_of_the_caller(estimator_class, blobs, small):
    X = np.vstack([blobs[0], np.full((1, 3), -9999.0)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small(estimator_class).fit(X)
    assert [w.filename for w in caught if "left out" in str(w.message)] == [__file__]


def stream(first, X, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.partial_fit(first)
        for start in range(0, len(X), 100):
            model.partial_fit(X[start : start + 100])
    return model


@pytest.mark.parametrize("kind", ["outlier", "closer", "wider", "elsewhere"])
def test_a_first_batch_unlike_the_others_does_not_spoil_the_stream(kind):
    X, y = make_blobs(3000, n_features=4, centers=4, cluster_std=0.5, random_state=0)
    first = X[:100].copy()
    if kind == "outlier":
        first[0] = -1e6
    elif kind == "elsewhere":
        first += 1e4
    else:
        first *= 1e3 if kind == "wider" else 1e-3
    model = stream(first, X[100:], ClusteringModule(4, random_state=0))
    assert adjusted_rand_score(y, model.predict(X)) > 0.95


def test_a_batch_of_another_scale_is_warned_of():
    X, _ = make_blobs(200, n_features=4, centers=4, random_state=0)
    model = ClusteringModule(4, random_state=0).partial_fit(X)
    with pytest.warns(UserWarning, match="The model begins anew from it"):
        model.partial_fit(1e3 * X)
    model = ClusteringModule(4, random_state=0).partial_fit(X)
    with pytest.warns(UserWarning, match="too few to begin anew"):
        model.partial_fit(1e3 * X[:2])


# --- Ctrl-C ---


def pressed_in(monkeypatch, press, cls, hook):
    """Press Ctrl-C at the beginning of a method of the estimator, once."""
    whole, times = getattr(cls, hook), []

    def watched(*args, **options):
        if not times:
            times.append(1)
            press()
        return whole(*args, **options)

    monkeypatch.setattr(cls, hook, watched)


@pytest.mark.parametrize(
    "hook", ["_init_network", "_train", "_criterion", "_attributes", "_labels"]
)
def test_ctrl_c_anywhere_in_a_fit_leaves_a_fitted_estimator(
    hook, estimator_class, blobs, small, monkeypatch, press_ctrl_c
):
    X, _ = blobs
    pressed_in(monkeypatch, press_ctrl_c, estimator_class, hook)
    with pytest.warns(ConvergenceWarning, match="Training was interrupted"):
        model = small(estimator_class, n_init=2).fit(X)
    np.testing.assert_array_equal(model.predict(X), model.labels_)
    assert np.all(np.isfinite(model.predict_proba(X)))


def test_ctrl_c_in_a_second_restart_keeps_the_first(blobs, small, monkeypatch, press_ctrl_c):
    X, _ = blobs
    criteria = []
    whole = AECM._criterion

    def criterion(*args):
        if not criteria:
            press_ctrl_c()
        criteria.append(whole(*args))
        return criteria[-1]

    monkeypatch.setattr(AECM, "_criterion", criterion)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        model = small(AECM, n_init=5).fit(X)
    assert len(criteria) == 1
    monkeypatch.undo()
    np.testing.assert_array_equal(model.labels_, small(AECM).fit(X).labels_)


def test_a_second_ctrl_c_raises_and_leaves_the_estimator_as_it_was(
    estimator_class, blobs, small, monkeypatch, press_ctrl_c
):
    X, _ = blobs
    model = small(estimator_class).fit(X)
    before = dict(vars(model))

    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    # The last thing that a fit does: all but the labels are known.
    pressed_in(monkeypatch, press_twice, estimator_class, "_labels")
    with pytest.raises(KeyboardInterrupt):
        model.fit(X + 1)
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[name] is value for name, value in before.items())


def test_what_goes_back_are_buffers_too(blobs, small, press_ctrl_c):
    """Running statistics of batch normalisation belong to the epoch of the weights."""
    X, _ = blobs
    model = small(AECM, max_iter=5, averaging=False, pretrain_max_iter=2)
    expected = clone(model).set_params(max_iter=2)
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    expected = expected.set_params(encoder=encoder).fit(X)

    class Pressing(nn.BatchNorm1d):
        def forward(self, x):
            # Pretraining has 2 epochs of 12 steps, this is the third step of the third epoch.
            self.calls = getattr(self, "calls", 0) + self.training
            if self.training and self.calls == 2 * 12 + 2 * 12 + 3:
                press_ctrl_c()
            return super().forward(x)

    pressing = nn.Sequential(encoder[0], Pressing(8), encoder[2])
    with pytest.warns(ConvergenceWarning, match="interrupted after 2 of 5 epochs"):
        found = model.set_params(encoder=pressing).fit(X)
    np.testing.assert_array_equal(found.transform(X), expected.transform(X))


def test_in_a_search_the_first_ctrl_c_ends_the_search(blobs, small, monkeypatch, press_ctrl_c):
    pressed_in(monkeypatch, press_ctrl_c, ClusteringModule, "_train")
    search = GridSearchCV(small(ClusteringModule), {"n_clusters": [2, 3, 4]}, cv=2)
    with pytest.raises(KeyboardInterrupt):
        search.fit(blobs[0])


def test_an_interrupted_partial_fit_has_not_been(blobs, small, monkeypatch, press_ctrl_c):
    """What the pass has moved goes back, the moments of Adam too."""
    X, _ = blobs
    first, second, third = X[:80], X[80:160], X[160:]
    model = small(ClusteringModule).partial_fit(first)
    with monkeypatch.context() as during:
        pressed_in(during, press_ctrl_c, ClusteringModule, "_objective")
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            model.partial_fit(second)
    expected = small(ClusteringModule).partial_fit(first).partial_fit(third)
    np.testing.assert_array_equal(
        model.partial_fit(third).predict_proba(X), expected.predict_proba(X)
    )


def test_a_handler_of_the_user_stays(estimator_class, blobs, small, monkeypatch, press_ctrl_c):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *args: seen.append(args))
    try:
        pressed_in(monkeypatch, press_ctrl_c, estimator_class, "_train")
        small(estimator_class).fit(blobs[0])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 1


# --- What was right and stays so ---


def test_thirty_fits_do_not_grow(blobs, small):
    X, _ = blobs
    model = small(ClusteringModule, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X)
        tracemalloc.start()
        model.fit(X)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(30):
            model.fit(X)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 2**18


def test_sixty_four_predictions_from_eight_threads_are_one(estimator_class, overlapping, small):
    X, _ = overlapping
    model = small(estimator_class).fit(X)
    expected = model.predict_proba(X)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: model.predict_proba(X), range(64)):
            np.testing.assert_array_equal(found, expected)


def test_one_row_is_the_same_alone(estimator_class, overlapping, small):
    X, _ = overlapping
    model = small(estimator_class).fit(X)
    alone = np.vstack([model.predict_proba(X[i : i + 1]) for i in range(0, 300, 30)])
    np.testing.assert_allclose(alone, model.predict_proba(X)[::30], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_samples", [1, 2])
def test_one_row_and_two_rows_are_clustered(n_samples, estimator_class, blobs, small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = small(estimator_class, 1).fit(blobs[0][:n_samples])
    np.testing.assert_array_equal(model.labels_, np.zeros(n_samples))
