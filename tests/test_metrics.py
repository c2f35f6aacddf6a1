"""Clustering accuracy against brute force, and the scorers in GridSearchCV."""

import pickle
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import silhouette_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepmix.metrics import (
    SilhouetteScorer,
    StabilityScorer,
    clustering_accuracy,
    clustering_accuracy_scorer,
    silhouette_scorer,
    stability_scorer,
)


@pytest.fixture
def blobs():
    return make_blobs(300, centers=4, cluster_std=0.5, random_state=0)


class Constant(ClusterMixin, BaseEstimator):
    """One cluster, or one for each row."""

    def __init__(self, each_row=False):
        self.each_row = each_row

    def fit(self, X, y=None):
        self.labels_ = self.predict(X)
        return self

    def predict(self, X):
        return np.arange(X.shape[0]) if self.each_row else np.zeros(X.shape[0], dtype=int)


# --- clustering_accuracy ---


def accuracy_by_permutations(y, labels):
    """The best of all one-to-one maps, tried in turn; surplus clusters map to no class."""
    clusters = np.unique(labels)
    targets = list(np.unique(y)) + [None] * len(clusters)
    return max(
        np.mean([dict(zip(clusters, chosen))[c] == t for c, t in zip(labels, y)])
        for chosen in set(permutations(targets, len(clusters)))
    )


@pytest.mark.parametrize(("n_classes", "n_clusters"), [(3, 3), (2, 4), (4, 2), (1, 3), (3, 1)])
def test_accuracy_is_the_best_of_all_matchings(n_classes, n_clusters):
    rng = np.random.default_rng(n_classes + 10 * n_clusters)
    for _ in range(5):
        y = rng.integers(n_classes, size=20)
        labels = rng.integers(n_clusters, size=20)
        expected = accuracy_by_permutations(y, labels)
        assert clustering_accuracy(y, labels) == pytest.approx(expected, abs=1e-15)


def test_accuracy_does_not_depend_on_the_names_of_clusters():
    rng = np.random.default_rng(0)
    y, labels = rng.integers(6, size=200), rng.integers(8, size=200)
    renamed = rng.permutation(8)[labels] * 7 - 3
    assert clustering_accuracy(y, renamed) == clustering_accuracy(y, labels)
    names = np.array(list("fedcba"))
    assert clustering_accuracy(names[y], labels) == clustering_accuracy(y, labels)


def test_accuracy_of_renamed_classes_is_one():
    y = pd.Series(["b", "a", "c", "a"])
    assert clustering_accuracy(y, [5, -1, 9, -1]) == 1.0


def test_accuracy_counts_surplus_clusters_as_wrong():
    assert clustering_accuracy([0, 0, 0, 1], [0, 1, 2, 3]) == 0.5


@pytest.mark.parametrize(
    ("y", "labels", "match"),
    [([], [], "at least one sample"), ([0, 1], [0], "inconsistent"), ([[0, 1]], [0, 1], "1d|1-d")],
)
def test_accuracy_says_what_is_wrong(y, labels, match):
    with pytest.raises(ValueError, match=match):
        clustering_accuracy(y, labels)


# --- Scorers ---


@pytest.mark.parametrize(
    ("scorer", "n_clusters"),
    [
        (silhouette_scorer, [3, 4, 7]),
        (clustering_accuracy_scorer, [3, 4, 7]),
        # Fewer clusters than there are can be as stable: stability guards against too many.
        (stability_scorer, [4, 5, 7]),
    ],
    ids=["silhouette", "accuracy", "stability"],
)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_scorers_choose_the_number_of_clusters(blobs, scorer, n_clusters, n_jobs):
    X, y = blobs
    search = GridSearchCV(
        KMeans(n_init=5, random_state=0),
        {"n_clusters": n_clusters},
        scoring=scorer,
        cv=3,
        n_jobs=n_jobs,
        error_score="raise",
    )
    assert search.fit(X, y).best_params_ == {"n_clusters": 4}


@pytest.mark.parametrize("scorer", [silhouette_scorer, stability_scorer], ids=repr)
def test_label_free_scorers_ignore_y(blobs, scorer):
    X, y = blobs
    model = KMeans(4, random_state=0).fit(X)
    assert scorer(model, X) == scorer(model, X, y) == scorer(model, X, y[::-1])


@pytest.mark.parametrize("scorer", [SilhouetteScorer(100), stability_scorer], ids=repr)
@pytest.mark.parametrize("container", [sp.csr_array, sp.csr_matrix, pd.DataFrame])
def test_scorers_take_sparse_rows_and_frames(blobs, scorer, container):
    X, _ = blobs
    model = KMeans(4, random_state=0)
    expected = scorer(model.fit(X), X)
    held = container(X)
    assert scorer(model.fit(held), held) == pytest.approx(expected, rel=1e-6)


def test_silhouette_is_in_the_space_of_the_data(blobs):
    X, _ = blobs
    stretched = X * [1.0, 100.0]
    model = make_pipeline(StandardScaler(), KMeans(4, random_state=0)).fit(stretched)
    labels = model.predict(stretched)
    assert silhouette_scorer(model, stretched) == pytest.approx(silhouette_score(stretched, labels))


def test_silhouette_draws_the_same_rows_each_time(blobs):
    X, _ = blobs
    model = KMeans(4, random_state=0).fit(X)
    scorer = SilhouetteScorer(sample_size=50)
    assert scorer(model, X) == scorer(model, X)
    assert scorer(model, X) != SilhouetteScorer(sample_size=50, random_state=1)(model, X)
    assert scorer(model, X) == pytest.approx(silhouette_scorer(model, X), abs=0.1)


@pytest.mark.parametrize("each_row", [False, True])
def test_silhouette_of_no_partition_is_its_lower_limit(blobs, each_row):
    assert silhouette_scorer(Constant(each_row).fit(blobs[0]), blobs[0]) == -1.0


def test_stability_of_one_cluster_is_not_a_success(blobs):
    assert stability_scorer(Constant().fit(blobs[0]), blobs[0]) == -1.0


def test_stability_leaves_the_estimator_as_it_was(blobs):
    X, _ = blobs
    model = KMeans(4, random_state=0).fit(X)
    before = model.cluster_centers_.copy()
    stability_scorer(model, X)
    np.testing.assert_array_equal(model.cluster_centers_, before)


def test_stability_falls_where_clusters_are_arbitrary():
    X = np.random.default_rng(0).uniform(size=(400, 2))
    arbitrary = stability_scorer(KMeans(9, n_init=1, random_state=0).fit(X), X)
    assert arbitrary < 0.8


def test_stability_needs_a_repeat(blobs):
    X, _ = blobs
    with pytest.raises(ValueError, match="n_repeats must be at least 1, got 0"):
        StabilityScorer(n_repeats=0)(KMeans(4, random_state=0).fit(X), X)


@pytest.mark.parametrize("scorer", [silhouette_scorer, stability_scorer], ids=repr)
def test_scorers_survive_pickling(scorer):
    assert pickle.loads(pickle.dumps(scorer)) == scorer
