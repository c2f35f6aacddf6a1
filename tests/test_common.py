"""scikit-learn's checks, and its tools around every estimator: clone, pickle, search, routing."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from estimators import number, with_parameters
from sklearn.base import clone, is_clusterer
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)
from deepmix.datasets import load
from deepmix.metrics import silhouette_scorer

try:
    from sklearn.callback import ProgressBar, ScoringMonitor
except ImportError:
    ProgressBar = ScoringMonitor = None

SKLEARN = tuple(int(part) for part in sklearn.__version__.split(".")[:2])

needs_callbacks = pytest.mark.skipif(
    ProgressBar is None, reason="scikit-learn has callbacks from 1.9 on"
)
# The checks fit on few distinct rows and for few epochs: clusters stay empty, rightly so.
few_rows = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

TINY = {
    ClusteringModule: {"n_init": 2, "max_iter": 8},
    AECM: {
        "hidden_layer_sizes": (8,),
        "latent_dim": 5,
        "pretrain_max_iter": 6,
        "max_iter": 8,
        "learning_rate_init": 1e-2,
    },
    DCAN: {
        "hidden_layer_sizes": (8,),
        "pretrain_max_iter": 12,
        "max_iter": 8,
        "batch_size": 40,
        "learning_rate_init": 1e-2,
        "readout_n_init": 2,
    },
    NeuralMixtureEM: {"n_init": 2, "max_iter": 20, "learning_rate_init": 1e-2},
    DeepDPM: {"n_init": 1, "max_iter": 40, "split_merge_every": 10, "freeze": 5},
    AutoencoderDeepDPM: {
        "hidden_layer_sizes": (8,),
        "latent_dim": 3,
        "pretrain_max_iter": 6,
        "n_alternations": 1,
        "max_iter": 8,
        # Changes no number of clusters: a check of sparse rows wants one column of predict_proba
        # for each of the four classes of its y.
        "clusterer": DeepDPM(amortized=False, max_iter=2),
        "learning_rate_init": 1e-2,
    },
}
# Stages of a fit, by the parameters that say how many epochs they have; by default pretraining,
# where there is such a thing, and the main one.
STAGES = {
    AutoencoderDeepDPM: (
        "pretrain_max_iter",
        "clusterer__max_iter",
        "max_iter",
        "clusterer__max_iter",
    )
}
FINDS_NUMBER = (DeepDPM, AutoencoderDeepDPM)


def tiny(cls, **parameters):
    model = clone(cls(random_state=0, **TINY[cls]))
    return with_parameters(model, **{number(cls): 4, "tol": 0, **parameters})


MINI_BATCHES = [tiny(cls) for cls in TINY]
FULL_BATCHES = [
    *(tiny(cls, dtype="auto", batch_size=1000) for cls in TINY if cls is not DeepDPM),
    # Two epochs, as above.
    tiny(DeepDPM, dtype="auto", amortized=False, max_iter=2),
]
DEFAULTS = [*(cls(4) for cls in TINY if cls not in FINDS_NUMBER), *(cls() for cls in FINDS_NUMBER)]

REASON = (
    "replace by a statistical test, see scikit-learn#16298: mini-batches hold other rows when "
    "rows are repeated, as in scikit-learn's KMeans; dtype='auto' in full batches passes"
)


COLUMNS = (
    "the check wants as many columns of predict_proba as its y has classes; by default DeepDPM and "
    "AutoencoderDeepDPM find the number of their clusters"
)


def expected_failures(estimator):
    failures = {}
    if any(repr(estimator) == repr(cls()) for cls in FINDS_NUMBER):
        failures = {f"check_estimator_sparse_{kind}": COLUMNS for kind in ("array", "matrix")}
    if estimator.dtype == "auto":
        return failures
    return failures | {
        f"check_sample_weight_equivalence_on_{data}_data": REASON for data in ("dense", "sparse")
    }


# --- scikit-learn's checks ---


@few_rows
@parametrize_with_checks([*MINI_BATCHES, *FULL_BATCHES], expected_failed_checks=expected_failures)
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


@pytest.mark.slow
@few_rows
@parametrize_with_checks(DEFAULTS, expected_failed_checks=expected_failures)
def test_scikit_learns_checks_pass_with_the_defaults(estimator, check):
    check(estimator)


@few_rows
def test_the_defaults_find_blobs():
    """The check that uses the true defaults; all others with them, and AECM's, are slow."""
    estimator_checks.check_clustering("ClusteringModule", ClusteringModule())


# What scikit-learn runs on its own estimators only.
OWN_CHECKS = [
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_get_feature_names_out_error",
    "check_dataframe_column_names_consistency",
    "check_param_validation",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_inplace_ensure_writeable",
]


@few_rows
# The checks predict on arrays after a fit on frames, and the other way round.
@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names:UserWarning")
@pytest.mark.parametrize("name", OWN_CHECKS)
@pytest.mark.parametrize("estimator", [*MINI_BATCHES, *FULL_BATCHES], ids=repr)
def test_checks_that_scikit_learn_runs_on_itself_pass(estimator, name):
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip(f"scikit-learn {sklearn.__version__} has no {name}")
    check(type(estimator).__name__, clone(estimator))


def test_they_are_clusterers_with_a_one_line_repr(estimator_class):
    assert is_clusterer(estimator_class())
    first = (
        "max_iter" if issubclass(estimator_class, AutoencoderDeepDPM) else number(estimator_class)
    )
    assert repr(estimator_class(**{first: 5})) == f"{estimator_class.__name__}({first}=5)"


# --- Copies ---


def fitted_attributes(model):
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, np.ndarray) and name.endswith("_")
    }


def assert_same_model(first, second, X):
    ours, theirs = fitted_attributes(first), fitted_attributes(second)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    np.testing.assert_array_equal(first.transform(X), second.transform(X))
    np.testing.assert_array_equal(first.predict(X), second.predict(X))


def test_a_clone_fits_to_the_same_bits(estimator_class, blobs):
    X, _ = blobs
    model = tiny(estimator_class).fit(X)
    assert_same_model(clone(model).fit(X), model, X)


def test_a_pickle_holds_no_tensor_and_gives_the_same_model(estimator_class, blobs):
    X, _ = blobs
    model = tiny(estimator_class).fit(X)
    text = pickle.dumps(model)
    assert b"torch" not in text
    assert_same_model(pickle.loads(text), model, X)


def test_a_pickled_model_goes_on_with_partial_fit(blobs):
    X, _ = blobs
    model = tiny(ClusteringModule).partial_fit(X)
    copy = pickle.loads(pickle.dumps(model))
    assert_same_model(copy.partial_fit(X), model.partial_fit(X), X)


def test_a_memory_mapped_model_predicts_and_goes_on(estimator_class, blobs, tmp_path):
    X, _ = blobs
    model = tiny(estimator_class).fit(X)
    joblib.dump(model, tmp_path / "model.joblib")
    mapped = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    assert not mapped.cluster_centers_.flags.writeable
    assert_same_model(mapped, model, X)
    np.testing.assert_array_equal(mapped.score_samples(X), model.score_samples(X))
    mapped.set_params(warm_start=True).fit(X)


# --- Pipelines and searches ---


def test_in_a_pipeline_every_method_passes_through(estimator_class, blobs):
    X, _ = blobs
    pipeline = make_pipeline(StandardScaler(), tiny(estimator_class)).fit(X)
    scaled = StandardScaler().fit_transform(X)
    model = tiny(estimator_class).fit(scaled)
    for method in ("predict", "predict_proba", "transform", "score_samples"):
        got, expected = getattr(pipeline, method)(X), getattr(model, method)(scaled)
        np.testing.assert_array_equal(got, expected)
    assert pipeline.score(X) == model.score(scaled)


def test_a_cached_pipeline_fits_an_embedding_once(estimator_class, blobs, tmp_path, monkeypatch):
    X, _ = blobs
    fits = []
    whole = estimator_class._fit_restarts
    monkeypatch.setattr(
        estimator_class, "_fit_restarts", lambda *args: fits.append(1) or whole(*args)
    )
    for n_clusters in (2, 3, 4):
        last = tiny(ClusteringModule).set_params(n_clusters=n_clusters)
        pipeline = make_pipeline(tiny(estimator_class), last, memory=str(tmp_path))
        pipeline.fit(X)
    n_last = 3 if estimator_class is ClusteringModule else 0
    assert len(fits) == 1 + n_last


def search(estimator_class, blobs, **options):
    X, y = blobs
    options = {"cv": 2, "error_score": "raise", **options}
    grid = {number(estimator_class): [2, 4]}
    found = GridSearchCV(tiny(estimator_class), grid, **options)
    return found.fit(X, y)


@few_rows
@pytest.mark.parametrize("scoring", [None, silhouette_scorer, "adjusted_rand_score"], ids=str)
def test_a_grid_search_finds_the_number_of_clusters(scoring, estimator_class, blobs):
    parameters = {"max_iter": 40} if estimator_class is ClusteringModule else {"max_iter": 60}
    X, y = blobs
    name, model = number(estimator_class), tiny(estimator_class, **parameters)
    if estimator_class in FINDS_NUMBER:  # from any: here two compete that it may not exceed
        name, model = name.replace("n_clusters_init", "max_clusters"), tiny(estimator_class)
        model.set_params(**{number(estimator_class): 1})
        if estimator_class is AutoencoderDeepDPM:
            model.set_params(clusterer__max_iter=30)
    grid = GridSearchCV(model, {name: [2, 4]}, cv=2, scoring=scoring, error_score="raise").fit(X, y)
    if estimator_class is not DCAN or scoring is not None:  # densities of other codes compare badly
        assert grid.best_params_ == {name: 4}
    assert np.all(np.isfinite(grid.cv_results_["mean_test_score"]))


@few_rows
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_a_search_in_parallel_gives_the_same_scores(backend, estimator_class, blobs):
    alone = search(estimator_class, blobs)
    with joblib.parallel_backend(backend, n_jobs=2):
        together = search(estimator_class, blobs, n_jobs=2)
    for key in ("mean_test_score", "std_test_score"):
        # In another process arrays begin at other addresses, and float32 sums end otherwise.
        rtol = 1e-5 if backend == "loky" else 0
        np.testing.assert_allclose(together.cv_results_[key], alone.cv_results_[key], rtol=rtol)


def test_eight_fits_in_threads_are_one_fit(estimator_class, overlapping, global_random_states):
    X, _ = overlapping
    alone = tiny(estimator_class).fit(X)
    before = global_random_states()
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda _: tiny(estimator_class).fit(X), range(8)))
    assert global_random_states() == before
    for model in models:
        assert_same_model(model, alone, X)


# --- Metadata, output containers, data frames ---


@few_rows
@pytest.mark.skipif(SKLEARN < (1, 8), reason="scikit-learn < 1.8 cannot route to Pipeline.score")
def test_sample_weight_is_routed_through_a_search(estimator_class, blobs):
    X, _ = blobs
    weight = np.arange(len(X)) % 3.0
    with sklearn.config_context(enable_metadata_routing=True):
        model = tiny(estimator_class).set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), model)
        name = f"{estimator_class.__name__.lower()}__{number(estimator_class)}"
        grid = GridSearchCV(pipeline, {name: [4]}, cv=2, error_score="raise")
        routed = grid.fit(X, sample_weight=weight).best_estimator_
        plain = pipeline.fit(X)
    direct = tiny(estimator_class).fit(StandardScaler().fit_transform(X), sample_weight=weight)
    np.testing.assert_array_equal(routed[-1].cluster_centers_, direct.cluster_centers_)
    assert np.any(plain[-1].cluster_centers_ != direct.cluster_centers_)


def test_output_in_frames(estimator_class, blobs):
    X, _ = blobs
    model = tiny(estimator_class).fit(X)
    plain = model.transform(X)
    prefix = estimator_class.__name__.lower()
    names = [f"{prefix}{i}" for i in range(plain.shape[1])]
    assert list(model.get_feature_names_out()) == names
    for container, frame in (("pandas", pd.DataFrame), ("polars", pl.DataFrame)):
        out = model.set_output(transform=container).transform(X)
        assert isinstance(out, frame)
        assert list(out.columns) == names
        np.testing.assert_array_equal(out.to_numpy(), plain)


# A fault of its own: scikit-learn reads the column names of today's polars from 1.9 on.
polars_frame = pytest.param(
    pl.DataFrame,
    id="polars",
    marks=pytest.mark.skipif(SKLEARN < (1, 9), reason="scikit-learn < 1.9 loses polars' names"),
)


@pytest.mark.parametrize("frame", [pytest.param(pd.DataFrame, id="pandas"), polars_frame])
def test_data_frames_are_their_values(frame, estimator_class, blobs):
    X, _ = blobs
    named = frame({name: X[:, i] for i, name in enumerate("abc")})
    model = tiny(estimator_class).fit(named)
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_array_equal(model.labels_, model.predict(named))
    np.testing.assert_array_equal(model.labels_, tiny(estimator_class).fit(X).labels_)


def test_columns_of_another_order_are_refused(estimator_class, blobs):
    frame = pd.DataFrame(blobs[0], columns=["a", "b", "c"])
    model = tiny(estimator_class).fit(frame)
    with pytest.raises(ValueError, match="must be in the same order"):
        model.predict(frame[["b", "a", "c"]])
    with pytest.raises(ValueError, match="should match those that were passed during fit"):
        model.transform(frame.rename(columns={"a": "z"}))


# --- scikit-learn's callbacks ---


class Watching:
    """Counts the epochs of every stage, and may stop one."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.epochs, self.labels = [], []

    def setup(self, estimator, context):
        self.epochs.append("setup")

    def teardown(self, estimator, context):
        self.epochs.append("teardown")

    def on_fit_task_begin(self, estimator, context, **told):
        pass

    def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None, **told):
        if context.task_name != "epoch":
            return False
        self.epochs.append(context.task_id)
        self.labels.append(fitted_estimator.predict(X))
        return self.stop_at is not None and context.task_id + 1 >= self.stop_at


@needs_callbacks
def test_a_callback_sees_every_epoch_with_an_estimator_that_predicts(estimator_class, blobs):
    X, _ = blobs
    watching = Watching()
    averages = "averaging" in estimator_class().get_params()
    once = {"averaging": False} if averages else {}
    model = tiny(estimator_class, **once).set_callbacks(watching).fit(X)
    first, *epochs, last = watching.epochs
    assert (first, last) == ("setup", "teardown")
    settings = TINY[estimator_class]
    names = STAGES.get(estimator_class, ("pretrain_max_iter", "max_iter"))
    stages = [settings[name] for name in names if name in settings]
    assert epochs == [epoch for stage in stages for epoch in range(stage)]
    assert all(len(labels) == len(X) for labels in watching.labels)
    if estimator_class is AECM:  # one restart: what it saw last is what was kept
        np.testing.assert_array_equal(watching.labels[-1], model.labels_)


@needs_callbacks
def test_a_callback_changes_nothing(estimator_class, blobs):
    X, _ = blobs
    watched = tiny(estimator_class).set_callbacks(Watching()).fit(X)
    assert_same_model(watched, tiny(estimator_class).fit(X), X)


@needs_callbacks
def test_a_callback_stops_training(estimator_class, blobs):
    # With a tolerance, but without a warning: stopping was meant.
    model = tiny(estimator_class).set_params(tol=1e-9).set_callbacks(Watching(stop_at=3))
    model.fit(blobs[0])
    assert model.n_iter_ == 3
    assert not model.converged_


@needs_callbacks
def test_a_callback_gets_the_data_as_the_user_gave_them(estimator_class, blobs):
    frame = pd.DataFrame(blobs[0], columns=["a", "b", "c"])
    watching = Watching()
    tiny(estimator_class).set_callbacks(watching).fit(frame)  # warns of names otherwise
    assert len(watching.labels[0]) == len(frame)


@needs_callbacks
def test_a_progress_bar_and_a_scoring_monitor_go_along(estimator_class, blobs, capsys):
    X, y = blobs
    monitor = ScoringMonitor(scoring="adjusted_rand_score")
    model = tiny(estimator_class).set_callbacks(ProgressBar(), monitor)
    model.fit(X, y)
    assert estimator_class.__name__ in capsys.readouterr().out
    assert model.n_iter_ == TINY[estimator_class]["max_iter"]


# --- Real data ---


@pytest.mark.slow
def test_clustering_module_on_pendigits_reaches_the_papers_ari():
    if "DEEPMIX_DATA" not in os.environ:
        pytest.skip("DEEPMIX_DATA names no folder with pendigits.npz")
    data = load("pendigits")
    models = [ClusteringModule(10, random_state=seed).fit(data.data) for seed in range(3)]
    assert np.mean([adjusted_rand_score(data.target, m.labels_) for m in models]) >= 0.58
