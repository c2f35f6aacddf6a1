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
from common import (
    FINDS_NUMBER,
    MAY_BE_EMPTY,
    SMALL,
    number,
    parameters_of,
    qualified,
    small,
    stage_that_converges,
    taken,
)
from sklearn.base import clone, is_clusterer
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

import deepmix
from deepmix import AECM, DCAN, ClusteringModule, baselines
from deepmix.datasets import load
from deepmix.metrics import silhouette_scorer

try:
    from sklearn.callback import ProgressBar, ScoringMonitor
except ImportError:
    ProgressBar = ScoringMonitor = None

pytestmark = MAY_BE_EMPTY

SKLEARN = tuple(int(part) for part in sklearn.__version__.split(".")[:2])

needs_callbacks = pytest.mark.skipif(
    ProgressBar is None, reason="scikit-learn has callbacks from 1.9 on"
)
# The checks fit on few distinct rows and for few epochs: clusters stay empty, rightly so.
few_rows = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

# The data of most checks have few rows: 20 in a batch are few enough for mini-batches. Without
# proposals, which take most of a fit; they would change the number of clusters, and a check wants
# one column of predict_proba for each of the four classes of its y.
SHORT = {
    "amortized": True,
    "clusterer__batch_size": 20,
    "clusterer__learning_rate_init": 0.05,
    "clusterer__max_iter": 4,
    "pretrain_max_iter": 4,
    "readout_n_init": 1,
}
MINI_BATCHES = [small(cls, batch_size=20, **taken(cls, **SHORT)) for cls in SMALL]
FULL_BATCHES = [
    small(cls, dtype="auto", batch_size=1000, **taken(cls, amortized=False)) for cls in SMALL
]
for model in FULL_BATCHES:
    if type(model) in FINDS_NUMBER:
        model.set_params(**{stage_that_converges(type(model)): 1})
DEFAULTS = [cls() if cls in FINDS_NUMBER else cls(4) for cls in SMALL]

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
@parametrize_with_checks(MINI_BATCHES, expected_failed_checks=expected_failures)
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


def run_check(name, estimator):
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip(f"scikit-learn {sklearn.__version__} has no {name}")
    check(type(estimator).__name__, clone(estimator))


# The checks that look at what full batches and the dtype of the data change; among them those that
# mini-batches cannot pass.
EXACT_CHECKS = [
    "check_sample_weight_equivalence_on_dense_data",
    "check_sample_weight_equivalence_on_sparse_data",
    "check_estimators_dtypes",
    "check_transformer_preserve_dtypes",
    "check_clustering",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_fit_idempotent",
]


@few_rows
@pytest.mark.parametrize("name", EXACT_CHECKS)
@pytest.mark.parametrize("estimator", FULL_BATCHES, ids=lambda model: type(model).__name__)
def test_full_batches_in_the_dtype_of_the_data_pass(estimator, name):
    run_check(name, estimator)


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
@pytest.mark.parametrize("estimator", MINI_BATCHES, ids=lambda model: type(model).__name__)
def test_checks_that_scikit_learn_runs_on_itself_pass(estimator, name):
    run_check(name, estimator)


def test_every_estimator_of_the_package_is_under_the_common_tests():
    named = ((package, name) for package in (deepmix, baselines) for name in package.__all__)
    things = (getattr(package, name) for package, name in named)
    assert {thing for thing in things if isinstance(thing, type)} == set(SMALL)


def test_they_are_clusterers_with_a_one_line_repr(estimator_class):
    assert is_clusterer(estimator_class())
    name = "max_iter"  # which all of them have
    assert repr(estimator_class(**{name: 5})) == f"{estimator_class.__name__}({name}=5)"


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


def test_a_clone_fits_to_the_same_bits(fitted, overlapping):
    X, _ = overlapping
    assert_same_model(clone(fitted).fit(X), fitted, X)


def test_a_pickle_holds_no_tensor_and_gives_the_same_model(fitted, overlapping):
    text = pickle.dumps(fitted)
    assert b"torch" not in text
    assert_same_model(pickle.loads(text), fitted, overlapping[0])


def test_a_pickled_model_goes_on_with_partial_fit(blobs):
    X, _ = blobs
    model = small(ClusteringModule).partial_fit(X)
    copy = pickle.loads(pickle.dumps(model))
    assert_same_model(copy.partial_fit(X), model.partial_fit(X), X)


def test_a_memory_mapped_model_predicts_and_goes_on(fitted, overlapping, tmp_path):
    X, model = overlapping[0], fitted
    joblib.dump(model, tmp_path / "model.joblib")
    mapped = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    assert not mapped.cluster_centers_.flags.writeable
    assert_same_model(mapped, model, X)
    np.testing.assert_array_equal(mapped.score_samples(X), model.score_samples(X))
    mapped.set_params(warm_start=True).fit(X)


# --- Pipelines and searches ---


def test_in_a_pipeline_every_method_passes_through(estimator_class, blobs):
    X, _ = blobs
    pipeline = make_pipeline(StandardScaler(), small(estimator_class)).fit(X)
    scaled = StandardScaler().fit_transform(X)
    model = small(estimator_class).fit(scaled)
    for method in ("predict", "predict_proba", "transform", "score_samples"):
        got, expected = getattr(pipeline, method)(X), getattr(model, method)(scaled)
        np.testing.assert_array_equal(got, expected)
    assert pipeline.score(X) == model.score(scaled)


def test_a_cached_pipeline_fits_an_embedding_once(estimator_class, blobs, tmp_path, monkeypatch):
    X, _ = blobs
    fits = []
    whole = estimator_class.fit

    def fit(self, *args, **options):
        fits.append(self)
        return whole(self, *args, **options)

    monkeypatch.setattr(estimator_class, "fit", fit)
    for n_clusters in (2, 3, 4):
        pipeline = make_pipeline(small(estimator_class), KMeans(n_clusters), memory=str(tmp_path))
        pipeline.fit(X)
    assert len(fits) == 1


def search(estimator_class, blobs, **options):
    X, y = blobs
    options = {"cv": 2, "error_score": "raise", **options}
    grid = {number(estimator_class): [2, 4]}
    found = GridSearchCV(small(estimator_class), grid, **options)
    return found.fit(X, y)


# Scores of DCAN are densities of codes, and those of other codes compare badly.
@few_rows
@pytest.mark.parametrize(
    ("estimator_class", "scoring"),
    [
        *((cls, None) for cls in SMALL if cls is not DCAN),
        *((cls, silhouette_scorer) for cls in SMALL),
        (ClusteringModule, "adjusted_rand_score"),
    ],
)
def test_a_grid_search_finds_the_number_of_clusters(estimator_class, scoring, blobs):
    X, y = blobs
    name, longer = number(estimator_class), {stage_that_converges(estimator_class): 30}
    if estimator_class in FINDS_NUMBER:  # from any: two limits of it are compared
        name = qualified(estimator_class, "max_clusters")
        longer |= {"batch_size": 30, "split_merge_every": 8}
    model = small(estimator_class, 1, **longer)
    grid = GridSearchCV(model, {name: [2, 4]}, cv=2, scoring=scoring, error_score="raise").fit(X, y)
    assert grid.best_params_ == {name: 4}
    assert np.all(np.isfinite(grid.cv_results_["mean_test_score"]))


def assert_the_same_scores(estimator_class, blobs, backend, rtol):
    alone = search(estimator_class, blobs)
    with joblib.parallel_backend(backend, n_jobs=2):
        together = search(estimator_class, blobs, n_jobs=2)
    for key in ("mean_test_score", "std_test_score"):
        assert np.all(np.isfinite(alone.cv_results_[key]))
        np.testing.assert_allclose(together.cv_results_[key], alone.cv_results_[key], rtol=rtol)


@few_rows
def test_a_search_in_threads_gives_the_same_scores(estimator_class, blobs):
    assert_the_same_scores(estimator_class, blobs, "threading", rtol=0)


@pytest.mark.slow  # the processes import everything anew
@few_rows
def test_a_search_in_processes_gives_the_same_scores(blobs):
    # In another process arrays begin at other addresses, and float32 sums end otherwise.
    assert_the_same_scores(AECM, blobs, "loky", rtol=1e-5)


def test_four_fits_in_threads_are_one_fit(fitted, overlapping, global_random_states):
    X, _ = overlapping
    before = global_random_states()
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: clone(fitted).fit(X), range(4)))
    assert global_random_states() == before
    for model in models:
        assert_same_model(model, fitted, X)


# --- Metadata, output containers, data frames ---


@few_rows
@pytest.mark.skipif(SKLEARN < (1, 8), reason="scikit-learn < 1.8 cannot route to Pipeline.score")
def test_sample_weight_is_routed_through_a_search(estimator_class, blobs):
    X, _ = blobs
    weight = np.arange(len(X)) % 3.0
    with sklearn.config_context(enable_metadata_routing=True):
        model = small(estimator_class).set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), model)
        name = f"{estimator_class.__name__.lower()}__{number(estimator_class)}"
        grid = GridSearchCV(pipeline, {name: [4]}, cv=2, error_score="raise")
        routed = grid.fit(X, sample_weight=weight).best_estimator_
        plain = pipeline.fit(X)
    direct = small(estimator_class).fit(StandardScaler().fit_transform(X), sample_weight=weight)
    np.testing.assert_array_equal(routed[-1].cluster_centers_, direct.cluster_centers_)
    assert np.any(plain[-1].cluster_centers_ != direct.cluster_centers_)


def test_output_in_frames(fitted, overlapping):
    X, model = overlapping[0], fitted
    plain = model.transform(X)
    prefix = type(model).__name__.lower()
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
    model = small(estimator_class).fit(named)
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_array_equal(model.labels_, model.predict(named))
    np.testing.assert_array_equal(model.labels_, small(estimator_class).fit(X).labels_)


def test_columns_of_another_order_are_refused(estimator_class, blobs):
    frame = pd.DataFrame(blobs[0], columns=["a", "b", "c"])
    model = small(estimator_class).fit(frame)
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
    model = small(estimator_class, **taken(estimator_class, averaging=False))
    model.set_callbacks(watching).fit(X)
    first, *epochs, last = watching.epochs
    assert (first, last) == ("setup", "teardown")
    assert all(len(labels) == len(X) for labels in watching.labels)
    starts = np.flatnonzero(np.equal(epochs, 0))
    stages = [stage.tolist() for stage in np.split(epochs, starts[1:])]
    lengths = [v for name, v in model.get_params().items() if name.endswith("max_iter")]
    assert all(stage == list(range(len(stage))) and len(stage) in lengths for stage in stages)
    if "pretrain_max_iter" in parameters_of(estimator_class):
        assert len(stages[0]) == model.pretrain_max_iter
    assert list(range(model.max_iter)) in stages


@needs_callbacks
def test_what_a_callback_sees_last_is_what_is_kept(blobs):
    watching = Watching()
    model = small(AECM, averaging=False).set_callbacks(watching).fit(blobs[0])
    np.testing.assert_array_equal(watching.labels[-1], model.labels_)


@needs_callbacks
def test_a_callback_changes_nothing(fitted, overlapping):
    X, _ = overlapping
    assert_same_model(clone(fitted).set_callbacks(Watching()).fit(X), fitted, X)


@needs_callbacks
def test_a_callback_stops_training(estimator_class, blobs):
    # With a tolerance, but without a warning: stopping was meant.
    model = small(estimator_class, tol=1e-9).set_callbacks(Watching(stop_at=1)).fit(blobs[0])
    assert model.n_iter_ == 1
    assert not model.converged_


@needs_callbacks
def test_a_callback_gets_the_data_as_the_user_gave_them(estimator_class, blobs):
    frame = pd.DataFrame(blobs[0], columns=["a", "b", "c"])
    watching = Watching()
    small(estimator_class).set_callbacks(watching).fit(frame)  # warns of names otherwise
    assert len(watching.labels[0]) == len(frame)


@needs_callbacks
def test_a_progress_bar_and_a_scoring_monitor_go_along(estimator_class, blobs, capsys):
    X, y = blobs
    monitor = ScoringMonitor(scoring="adjusted_rand_score")
    model = small(estimator_class).set_callbacks(ProgressBar(), monitor)
    model.fit(X, y)
    assert estimator_class.__name__ in capsys.readouterr().out
    assert model.n_iter_ == model.max_iter


# --- Real data ---


@pytest.mark.slow
def test_clustering_module_on_pendigits_reaches_the_papers_ari():
    if "DEEPMIX_DATA" not in os.environ:
        pytest.skip("DEEPMIX_DATA names no folder with pendigits.npz")
    data = load("pendigits")
    models = [ClusteringModule(10, random_state=seed).fit(data.data) for seed in range(3)]
    assert np.mean([adjusted_rand_score(data.target, m.labels_) for m in models]) >= 0.58
