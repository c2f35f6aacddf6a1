"""Displays: what they draw, for codes of any dimension."""

import numpy as np
import pytest
from sklearn.datasets import load_iris

from deepmix import AECM, ClusteringModule
from deepmix.plotting import CenterDisplay, EmbeddingDisplay

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def X():
    return load_iris().data


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_embedding_is_drawn_in_the_plane_with_its_centres(latent_dim, X):
    model = AECM(
        3,
        hidden_layer_sizes=(8,),
        latent_dim=latent_dim,
        pretrain_max_iter=2,
        max_iter=2,
        tol=0,
        random_state=0,
    ).fit(X)
    rows, centers = EmbeddingDisplay.from_estimator(model, X).ax_.collections
    assert rows.get_offsets().shape == (len(X), 2)
    assert centers.get_offsets().shape == (3, 2)


def test_labels_of_any_kind_colour_an_embedding(X):
    names = np.array(["setosa", "versicolor", "virginica"])[load_iris().target]
    model = ClusteringModule(3, n_init=1, max_iter=2, tol=0, random_state=0).fit(X)
    (rows,) = EmbeddingDisplay.from_estimator(model, X, names).ax_.collections
    assert len(np.unique(rows.get_array())) == 3


@pytest.mark.parametrize("image_shape", [None, (2, 2)])
def test_centres_are_drawn_as_lines_or_images(image_shape, X):
    model = ClusteringModule(3, n_init=1, max_iter=2, tol=0, random_state=0).fit(X)
    axes = CenterDisplay.from_estimator(model, image_shape=image_shape, n_columns=2).axes_
    assert axes.shape == (2, 2)
    drawn = [len(ax.lines) + len(ax.images) for ax in axes.flat]
    assert drawn == [1, 1, 1, 0]
    if image_shape:
        np.testing.assert_array_equal(
            axes[0, 0].images[0].get_array().ravel(), model.cluster_centers_[0]
        )
