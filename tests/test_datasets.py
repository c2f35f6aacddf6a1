"""Loaders on small files, on what scikit-learn bundles, and on faked downloads: no network."""

import io

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn import datasets as sklearn_datasets
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.utils import Bunch

from deepmix.datasets import list_datasets, load, make_five_gaussians


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Tests neither see the user's folder nor reach the network."""

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.delenv("DEEPMIX_DATA", raising=False)
    monkeypatch.setattr(sklearn_datasets, "fetch_openml", refuse)
    monkeypatch.setattr(sklearn_datasets, "fetch_20newsgroups", refuse)


def jpeg_bytes(color, shape=(32, 32)):
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new("RGB", shape, color).save(stream, format="JPEG", quality=95)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


# --- Files ---


def test_images_become_rows_in_the_unit_interval(tmp_path):
    images = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    np.savez(tmp_path / "mnist.npz", images=images, labels=np.array([1, 0, 1, 2], np.uint8))
    mnist = load("mnist", data_home=tmp_path)
    np.testing.assert_allclose(mnist.data, images.reshape(4, -1) / 255, rtol=1e-6)
    assert mnist.data.dtype == np.float32
    assert mnist.image_shape == (1, 28, 28)
    assert mnist.target.tolist() == [1, 0, 1, 2]
    assert mnist.target_names.tolist() == ["0", "1", "2"]
    assert mnist.source == "file"


def test_folder_from_the_environment(tmp_path, monkeypatch):
    np.savez(tmp_path / "pendigits.npz", X=np.full((2, 16), 50, np.uint8), y=np.array([0, 1]))
    monkeypatch.setenv("DEEPMIX_DATA", str(tmp_path))
    X, y = load("pendigits", return_X_y=True, dtype=np.float64)
    assert X.dtype == np.float64
    assert X.tolist() == np.full((2, 16), 0.5).tolist()
    assert y.tolist() == [0, 1]


def test_argument_goes_before_the_environment(tmp_path, monkeypatch):
    for folder, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "yeast.npz", X=np.full((2, 8), value), y=[0, 1])
    monkeypatch.setenv("DEEPMIX_DATA", str(tmp_path / "one"))
    assert load("yeast", data_home=tmp_path / "two").data.max() == 2.0


def test_scale_option(tmp_path):
    X = np.array([[0, 100], [50, 0], [100, 50]], np.uint8)
    np.savez(tmp_path / "pendigits.npz", X=X, y=[0, 1, 1])
    np.testing.assert_array_equal(load("pendigits", data_home=tmp_path, scale=None).data, X)
    standard = load("pendigits", data_home=tmp_path, scale="standard").data
    np.testing.assert_allclose(standard.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(standard.std(axis=0), 1, rtol=1e-6)
    assert load("pendigits", data_home=tmp_path).data.max() == 1.0


def csr_file(path, counts, **more):
    rows = sp.csr_array(counts)
    np.savez(
        path,
        data=rows.data.astype(np.float32),
        indices=rows.indices,
        indptr=rows.indptr,
        shape=rows.shape,
        **more,
    )


def test_text_stays_sparse_and_keeps_words_and_split(tmp_path):
    dense = np.array([[0.6, 0.8, 0], [0, 0, 1.0]])
    more = {"vocab": ["a", "b", "c"], "target_names": ["acq", "earn"], "is_test": [0, 1]}
    csr_file(tmp_path / "reuters_r8.npz", dense, y=[0, 1], **more)
    reuters = load("reuters_r8", data_home=tmp_path)
    assert sp.issparse(reuters.data)
    assert reuters.data.format == "csr"
    np.testing.assert_allclose(reuters.data.toarray(), dense, rtol=1e-6)
    assert reuters.feature_names.tolist() == ["a", "b", "c"]
    assert reuters.target_names.tolist() == ["acq", "earn"]
    assert reuters.is_test.tolist() == [False, True]
    variance = load("reuters_r8", data_home=tmp_path, scale="standard").data.toarray().var(axis=0)
    np.testing.assert_allclose(variance, 1, rtol=1e-6)


def test_counts_are_normalised_to_the_median_library(tmp_path):
    counts = np.array([[1, 3, 0], [0, 2, 6], [0, 0, 0], [10, 0, 2]])
    csr_file(tmp_path / "pbmc4k_10x.npz", counts, y=[0, 1, 1, 0])
    pbmc = load("pbmc4k_10x", data_home=tmp_path)
    median = 6.0  # of 4, 8, 0, 12
    expected = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * median)
    np.testing.assert_allclose(pbmc.data.toarray(), expected, rtol=1e-6)
    assert pbmc.data.dtype == np.float32


def test_jpeg_images_in_grey_and_in_colour(tmp_path):
    streams = [jpeg_bytes((200, 100, 0)), jpeg_bytes((0, 0, 250))]
    offsets = np.cumsum([0, *(len(stream) for stream in streams)])
    content = {"jpeg": np.concatenate(streams), "offsets": offsets, "labels": [0, 1]}
    np.savez(tmp_path / "cifar10_rgb_jpeg.npz", class_names=["plane", "car"], **content)
    grey = load("cifar10", data_home=tmp_path)
    assert grey.image_shape == (1, 32, 32)
    np.testing.assert_allclose(grey.data[0] * 255, 0.299 * 200 + 0.587 * 100, atol=3)
    color = load("cifar10", data_home=tmp_path, grayscale=False)
    assert color.image_shape == (3, 32, 32)
    planes = color.data.reshape(2, 3, -1).mean(axis=2) * 255
    np.testing.assert_allclose(planes, [[200, 100, 0], [0, 0, 250]], atol=5)
    assert color.target_names.tolist() == ["plane", "car"]


def test_jpeg_without_pillow_says_so(tmp_path, monkeypatch):
    content = {"jpeg": jpeg_bytes((0, 0, 0)), "offsets": [0, 1], "labels": [0]}
    np.savez(tmp_path / "cifar10_rgb_jpeg.npz", **content)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        load("cifar10", data_home=tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "wine.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds the arrays \['weights'\]"):
        load("wine", data_home=tmp_path)


# --- scikit-learn and downloads ---


@pytest.mark.parametrize(
    ("name", "shape"),
    [("digits", (1797, 64)), ("iris", (150, 4)), ("wine", (178, 13)), ("breast_wdbc", (569, 30))],
)
def test_bundled_sets_need_no_folder(name, shape):
    bunch = load(name)
    assert bunch.data.shape == shape
    assert bunch.source == "scikit-learn"
    assert len(bunch.target_names) == bunch.target.max() + 1


def test_download_where_there_is_no_file(tmp_path, monkeypatch):
    def fetch(*, data_id, as_frame):
        assert (data_id, as_frame) == (41082, False)
        return Bunch(data=np.array([[-1.0, 0.0], [1.0, 0.5]]), target=np.array(["10", "9"]))

    monkeypatch.setattr(sklearn_datasets, "fetch_openml", fetch)
    usps = load("usps", data_home=tmp_path)
    assert usps.source == "download"
    np.testing.assert_allclose(usps.data, [[0, 0.5], [1, 0.75]])
    # Numeric names in numeric order: as strings '10' would come before '9'.
    assert usps.target.tolist() == [1, 0]
    assert usps.target_names.tolist() == ["9", "10"]


def test_downloaded_rows_with_missing_values_are_dropped(monkeypatch):
    bunch = Bunch(data=np.array([[1.0], [np.nan], [3.0]]), target=np.array(["b", "a", "a"]))
    monkeypatch.setattr(sklearn_datasets, "fetch_openml", lambda **_: bunch)
    X, y = load("breast_original", return_X_y=True)
    assert X.tolist() == [[1.0], [3.0]]
    assert y.tolist() == [1, 0]


def test_newsgroups_are_vectorised_after_download(monkeypatch):
    texts = Bunch(data=["red fish", "blue fish"], target=[1, 0], target_names=["x", "y"])
    monkeypatch.setattr(sklearn_datasets, "fetch_20newsgroups", lambda **_: texts)
    news = load("news20")
    assert sp.issparse(news.data)
    assert news.feature_names.tolist() == ["blue", "fish", "red"]
    assert news.target_names.tolist() == ["x", "y"]
    np.testing.assert_allclose(sp.linalg.norm(news.data, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("data_home", [None, "empty"])
def test_neither_file_nor_network(tmp_path, data_home):
    folder = None if data_home is None else tmp_path / data_home
    looked = "no folder of data sets is given" if folder is None else "no file mnist.npz in"
    with pytest.raises(FileNotFoundError, match=f"{looked}.*no route.*DEEPMIX_DATA"):
        load("mnist", data_home=folder)


def test_sets_that_cannot_be_downloaded():
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded; .*umap_mnist\.npz"):
        load("umap_mnist")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "mnits"}, "name must be one of .*mnist.*got 'mnits'"),
        ({"name": "iris", "scale": "minmax"}, "scale must be 'paper', 'standard' or None"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        load(**options)


def test_names_are_listed_in_order():
    assert list_datasets() == sorted(set(list_datasets()))
    assert {"mnist", "usps", "pendigits", "digits"} <= set(list_datasets())


# --- Generated ---


def test_five_gaussians_are_standardised_and_reproducible():
    X, y = make_five_gaussians(random_state=3)
    again, _ = make_five_gaussians(random_state=3)
    np.testing.assert_array_equal(X, again)
    assert X.shape == (2000, 2)
    assert np.bincount(y).tolist() == [400] * 5
    np.testing.assert_allclose(X.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(X.std(axis=0), 1, rtol=1e-12)


def test_five_gaussians_overlap_as_meant():
    scores = []
    for seed in range(5):
        X, y = make_five_gaussians(random_state=seed)
        labels = KMeans(5, n_init=4, random_state=0).fit_predict(X)
        scores.append(adjusted_rand_score(y, labels))
    assert np.mean(scores) == pytest.approx(0.83, abs=0.015)
