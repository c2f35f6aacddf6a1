"""Data sets of the papers, scaled as in the papers: for docs, tests and benchmarks.

A set is read from ``<name>.npz`` in a folder (``data_home`` or the environment variable
``DEEPMIX_DATA``); else it comes with scikit-learn, or is downloaded from OpenML where that has it.
"""

import io
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import DTypeLike
from sklearn import datasets as sklearn_datasets
from sklearn.preprocessing import StandardScaler
from sklearn.utils import Bunch, check_random_state

__all__ = ["list_datasets", "load", "make_five_gaussians"]


# --- Scalings of the papers ---


def _divide(X, by):
    X /= by
    return X


def _unit_range(X):
    low, high = X.min(), X.max()
    return _divide(X - low, high - low)


def _log_library_size(X):
    """Counts of each cell scaled to the median library size, then log(1 + x)."""
    totals = np.asarray(X.sum(axis=1)).ravel()
    # A cell without counts stays a row of zeros.
    factors = np.median(totals) / np.maximum(totals, 1)
    X.data *= np.repeat(factors, np.diff(X.indptr)).astype(X.dtype)
    return X.log1p()


# --- Sources: each gives rows, labels and names, not yet scaled ---


class _Raw(NamedTuple):
    X: object  # ndarray or CSR of shape (n_samples, n_features)
    y: np.ndarray
    target_names: np.ndarray
    feature_names: np.ndarray | None = None
    is_test: np.ndarray | None = None


def _encode(labels, names=None):
    """Labels as 0..K-1; names in numeric order where they are numbers ('10' after '9')."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        values = np.unique(labels)
        try:
            names = sorted(values, key=float)
        except ValueError:
            names = list(values)
        position = {name: k for k, name in enumerate(names)}
        labels = np.array([position[label] for label in labels])
    values, y = np.unique(labels, return_inverse=True)
    return y.astype(np.int64), np.asarray(values if names is None else names).astype(str)


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        content = {key: file[key] for key in file.files}
    key = next((key for key in _FORMATS if key in content), None)
    if key is None:
        raise ValueError(
            f"{path} holds the arrays {sorted(content)}, but a data set has one of "
            f"{sorted(_FORMATS)}: check that the file belongs to deepmix.datasets."
        )
    names = content.get("target_names", content.get("class_names"))
    y, target_names = _encode(content["y"] if "y" in content else content["labels"], names)
    return _Raw(
        _FORMATS[key](content), y, target_names, content.get("vocab"), content.get("is_test")
    )


def _rows_from_csr(content):
    arrays = content["data"], content["indices"], content["indptr"]
    return sp.csr_array(arrays, shape=tuple(int(n) for n in content["shape"]))


def _rows_from_jpeg(content):
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Decoding JPEG images expects Pillow, which is not installed: pip install pillow."
        ) from error
    stream, offsets = content["jpeg"], content["offsets"]
    images = [
        np.asarray(Image.open(io.BytesIO(stream[start:stop].tobytes())).convert("RGB"))
        for start, stop in itertools.pairwise(offsets)
    ]
    channels_first = np.stack(images).transpose(0, 3, 1, 2)
    return channels_first.reshape(len(images), -1)


# The first key found in a file says how its rows are stored. 'data' alone would not tell CSR.
_FORMATS = {
    "images": lambda content: content["images"].reshape(len(content["images"]), -1),
    "jpeg": _rows_from_jpeg,
    "indptr": _rows_from_csr,
    "X": lambda content: content["X"],
}


def _bundled(name):
    bunch = getattr(sklearn_datasets, f"load_{name}")()
    y, names = _encode(bunch.target, bunch.target_names)
    return _Raw(bunch.data, y, names, np.asarray(bunch.feature_names))


def _openml(data_id):
    bunch = sklearn_datasets.fetch_openml(data_id=data_id, as_frame=False)
    complete = np.isfinite(bunch.data).all(axis=1)
    y, names = _encode(bunch.target[complete])
    return _Raw(bunch.data[complete], y, names)


def _newsgroups():
    from sklearn.feature_extraction.text import TfidfVectorizer

    bunch = sklearn_datasets.fetch_20newsgroups(subset="all")
    vectorizer = TfidfVectorizer(max_features=2000)
    X = vectorizer.fit_transform(bunch.data)
    y, names = _encode(bunch.target, bunch.target_names)
    return _Raw(sp.csr_array(X), y, names, vectorizer.get_feature_names_out())


# --- The table ---


@dataclass(frozen=True)
class _Dataset:
    summary: str
    scaling: Callable | None = None
    image_shape: tuple | None = None  # (channels, height, width)
    bundled: str | None = None  # sklearn.datasets.load_<bundled>
    download: int | Callable | None = None  # number at OpenML, or a function
    file: str | None = None  # where it is not <name>.npz


_BYTES, _PERCENT, _SIXTEENTHS = (partial(_divide, by=by) for by in (255.0, 100.0, 16.0))
_UMAP = "UMAP embedding (10-d) of {}, as clustered in the DeepDPM paper."

_DATASETS = {
    "breast_original": _Dataset("UCI Breast Cancer Wisconsin (Original).", download=15),
    "breast_wdbc": _Dataset("UCI Breast Cancer Wisconsin (Diagnostic).", bundled="breast_cancer"),
    "cifar10": _Dataset(
        "CIFAR-10; a file has its rows sorted by class: shuffle.",
        _BYTES,
        (3, 32, 32),
        download=40927,
        file="cifar10_rgb_jpeg.npz",
    ),
    "digits": _Dataset(
        "Handwritten digits of 8x8 pixels.", _SIXTEENTHS, (1, 8, 8), bundled="digits"
    ),
    "ecoli": _Dataset("UCI Ecoli.", download=39),
    "fashion_mnist": _Dataset(
        "Fashion-MNIST, train and test.", _BYTES, (1, 28, 28), download=40996
    ),
    "glass": _Dataset("UCI Glass Identification.", download=41),
    "imagenet50_moco_test": _Dataset("MoCo features of the validation images of ImageNet-50."),
    "iris": _Dataset("Iris.", bundled="iris"),
    "mnist": _Dataset("MNIST, train and test.", _BYTES, (1, 28, 28), download=554),
    "news20": _Dataset("20 Newsgroups as tf-idf of 2000 words.", download=_newsgroups),
    "pbmc4k_10x": _Dataset("10x PBMC 4k, 2000 genes, library-size normalised.", _log_library_size),
    "pbmc68k_reduced": _Dataset("700 cells of 10x PBMC 68k, scaled expression."),
    "pendigits": _Dataset("Pen-based handwritten digits.", _PERCENT, download=32),
    "reuters_r8": _Dataset("Reuters-21578 R8 as tf-idf of 2000 words."),
    "umap_fashion": _Dataset(_UMAP.format("Fashion-MNIST")),
    "umap_mnist": _Dataset(_UMAP.format("MNIST")),
    "umap_mnist_imb": _Dataset(_UMAP.format("an imbalanced subset of MNIST")),
    "umap_usps": _Dataset(_UMAP.format("USPS")),
    "usps": _Dataset("USPS, train and test.", _unit_range, (1, 16, 16), download=41082),
    "wine": _Dataset("UCI Wine.", bundled="wine"),
    "yeast": _Dataset("UCI Yeast.", download=181),
}


# --- Public functions ---


def list_datasets() -> list[str]:
    """Names that :func:`load` knows.

    Returns
    -------
    list of str
        In alphabetical order.

    Examples
    --------
    >>> from deepmix.datasets import list_datasets
    >>> list_datasets()[:4]
    ['breast_original', 'breast_wdbc', 'cifar10', 'digits']
    """
    return sorted(_DATASETS)


def load(
    name: str,
    *,
    data_home: str | os.PathLike | None = None,
    scale: Literal["paper", "standard"] | None = "paper",
    grayscale: bool = True,
    return_X_y: bool = False,
    dtype: DTypeLike = np.float32,
) -> Any:
    """Load a data set by name, training and test rows together.

    Parameters
    ----------
    name : str
        One of :func:`list_datasets`.
    data_home : str or path-like, default=None
        Folder with ``<name>.npz`` (cifar10: ``cifar10_rgb_jpeg.npz``); None takes the environment
        variable ``DEEPMIX_DATA``. Without such a file the set comes with scikit-learn or is
        downloaded where possible.
    scale : {'paper', 'standard', None}, default='paper'
        'paper': as the papers do, i.e. images and Pendigits in [0, 1], counts of cells normalised
        to library size and log1p, all others as they are. 'standard': zero mean and unit
        variance (only unit variance for CSR). None: as stored.
    grayscale : bool, default=True
        Turn colour images to grey (ITU-R 601 weights, rounded as bytes).
    return_X_y : bool, default=False
        Return ``(data, target)`` instead of a Bunch.
    dtype : dtype, default=numpy.float32
        Floating-point type of the rows: float32 or float64.

    Returns
    -------
    Bunch or tuple of (data, target)
        ``data`` of shape (n_samples, n_features), dense or CSR; ``target`` of shape (n_samples,),
        classes 0..K-1; ``target_names``; ``feature_names`` and ``image_shape`` (channels, height,
        width), or None; ``is_test``, the official split where the file tells, or None; ``DESCR``;
        ``source``, 'file', 'scikit-learn' or 'download'.

    Notes
    -----
    The rights to each set are those of its collection; deepmix contains no data.

    Examples
    --------
    >>> from deepmix.datasets import load
    >>> digits = load("digits")
    >>> digits.data.shape, digits.image_shape, float(digits.data.max())
    ((1797, 64), (1, 8, 8), 1.0)
    """
    if name not in _DATASETS:
        raise ValueError(f"name must be one of {', '.join(list_datasets())}; got {name!r}.")
    if scale not in ("paper", "standard", None):
        raise ValueError(f"scale must be 'paper', 'standard' or None; got {scale!r}.")
    dataset = _DATASETS[name]
    raw, source = _find(name, data_home)
    X, image_shape = raw.X, dataset.image_shape
    if grayscale and image_shape is not None and image_shape[0] == 3:
        X, image_shape = _to_grayscale(X), (1, *image_shape[1:])
    X = _scaled(X.astype(dtype), scale, dataset.scaling)
    if return_X_y:
        return X, raw.y
    return Bunch(
        data=X,
        target=raw.y,
        target_names=raw.target_names,
        feature_names=raw.feature_names,
        image_shape=image_shape,
        is_test=None if raw.is_test is None else raw.is_test.astype(bool),
        DESCR=dataset.summary,
        source=source,
    )


def make_five_gaussians(
    n_samples: int = 2000, *, random_state: int | np.random.RandomState | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Five overlapping Gaussians in the plane, standardised: the toy set "5 Gaussians".

    One Gaussian in the middle and four around it, spherical and of equal size, which overlap so
    that k-means reaches an ARI of about 0.83. The paper shows the set as a figure without giving
    its parameters; these are chosen to give its k-means score.

    Parameters
    ----------
    n_samples : int, default=2000
        Number of points, divided as evenly as can be.
    random_state : int, RandomState instance or None, default=None
        Seed of the points and of their order.

    Returns
    -------
    X : ndarray of shape (n_samples, 2)
        The points, float64.
    y : ndarray of shape (n_samples,)
        The Gaussian each point comes from, 0..4.

    Examples
    --------
    >>> import numpy as np
    >>> from deepmix.datasets import make_five_gaussians
    >>> X, y = make_five_gaussians(random_state=0)
    >>> X.shape, np.bincount(y).tolist()
    ((2000, 2), [400, 400, 400, 400, 400])
    """
    random = check_random_state(random_state)
    means = np.array([[0.0, 0.0], [3.0, 3.0], [3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]])
    y = random.permutation(np.arange(n_samples) % len(means))
    X = means[y] + 1.25 * random.standard_normal((n_samples, 2))
    return StandardScaler().fit_transform(X), y


# --- Steps of load ---


def _find(name, data_home):
    """The raw rows and where they come from: the folder, scikit-learn, a download."""
    dataset, folder = _DATASETS[name], data_home or os.environ.get("DEEPMIX_DATA")
    file = dataset.file or f"{name}.npz"
    if folder:
        path = Path(folder).expanduser() / file
        if path.is_file():
            return _read_npz(path), "file"
    if dataset.bundled is not None:
        return _bundled(dataset.bundled), "scikit-learn"
    looked = f"no file {file} in {folder}" if folder else "no folder of data sets is given"
    remedy = f"pass data_home or set DEEPMIX_DATA to a folder that holds {file}"
    if dataset.download is None:
        raise FileNotFoundError(
            f"Data set {name!r}: {looked}, and it cannot be downloaded; {remedy}."
        )
    try:
        fetch = (
            dataset.download if callable(dataset.download) else partial(_openml, dataset.download)
        )
        return fetch(), "download"
    except OSError as error:
        raise FileNotFoundError(
            f"Data set {name!r}: {looked}, and the download failed ({error}); {remedy}, or try "
            "again with network access."
        ) from error


def _to_grayscale(X):
    """Rows of red, green and blue planes (0..255) to rows of one plane."""
    planes = X.reshape(len(X), 3, -1)
    gray = np.zeros((len(X), planes.shape[2]), dtype=np.float32)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        gray += np.float32(weight) * planes[:, channel]
    return np.rint(gray, out=gray)


def _scaled(X, scale, paper_scaling):
    if scale == "standard":
        return StandardScaler(with_mean=not sp.issparse(X)).fit_transform(X)
    if scale == "paper" and paper_scaling is not None:
        return paper_scaling(X)
    return X
