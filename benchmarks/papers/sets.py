"""The data sets of the papers' benchmarks: how many clusters and features, and their rows.

A name may say how a set is changed, as in 'grey cifar10' or 'mnist 14x14, 10000 rows', where pixels
are averaged to that size and rows are the first of a fixed shuffle.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from deepmix.datasets import load, make_five_gaussians


class DataSet(NamedTuple):
    """What a benchmark must know before it loads the rows.

    Attributes
    ----------
    n_clusters, n_features : int
    settings : str or None
        The set whose hyper-parameters Boubekki et al. list for it.
    """

    n_clusters: int
    n_features: int
    settings: str | None = None


SETS = {
    "mnist": DataSet(10, 784, "mnist"),
    "fashion_mnist": DataSet(10, 784, "fashion_mnist"),
    "usps": DataSet(10, 256, "usps"),
    "cifar10": DataSet(10, 3072, "cifar10"),
    "news20": DataSet(20, 2000, "news20"),
    "pendigits": DataSet(10, 16, "pendigits"),
    # These two stand in for sets that cannot be had.
    "reuters_r8": DataSet(8, 2000, "reuters10k"),
    "pbmc4k_10x": DataSet(8, 2000, "10x73k"),
    "digits": DataSet(10, 64),
    "five_gaussians": DataSet(5, 2),
    "gaussians50": DataSet(50, 16),
    "imagenet50_moco_test": DataSet(50, 128),
    "umap_mnist": DataSet(10, 10),
    "umap_mnist_imb": DataSet(10, 10),
    "umap_usps": DataSet(10, 10),
    "umap_fashion": DataSet(10, 10),
    "mnist_2d": DataSet(10, 2),
    "breast_original": DataSet(2, 9),
    "breast_wdbc": DataSet(2, 30),
    "ecoli": DataSet(8, 7),
    "glass": DataSet(6, 9),
    "iris": DataSet(3, 4),
    "wine": DataSet(3, 13),
    "yeast": DataSet(10, 8),
}
WITH_SETTINGS = tuple(name for name, about in SETS.items() if about.settings)
UCI = ("breast_original", "breast_wdbc", "ecoli", "glass", "iris", "wine", "yeast")
LARGE = ("mnist", "fashion_mnist", "cifar10", "news20")


def about(dataset):
    """The `DataSet` of a name that may say changes."""
    return SETS[dataset.replace(",", "").removeprefix("grey ").split()[0]]


@lru_cache(maxsize=1)
def load_rows(dataset, data_home, scale="paper"):
    """Rows and labels.

    Parameters
    ----------
    dataset : str
    data_home : str or None
    scale : {'paper', 'standard'}
        Scaling, as in `deepmix.datasets.load`; 'paper' also scales two sets as Boubekki et al. do.
    """
    if dataset == "five_gaussians":
        return make_five_gaussians(random_state=0)
    if dataset == "gaussians50":
        return fifty_gaussians()
    grey = dataset.startswith("grey ")
    name, *changes = dataset.replace(",", "").removeprefix("grey ").split()
    bunch = load(name, data_home=data_home, scale=scale, grayscale=grey)
    X, y = bunch.data, bunch.target
    if name == "reuters_r8":
        X = X * np.sqrt(X.shape[1], dtype=X.dtype)
    elif name == "pbmc4k_10x":
        X = X / X.max()
    if changes and "x" in changes[0]:
        X = pooled(X, bunch.image_shape, int(changes[0].split("x")[0]))
    if "rows" in changes:
        chosen = np.random.RandomState(0).permutation(len(X))[: int(changes[-2])]
        X, y = X[chosen], y[chosen]
    return X, y


def pooled(X, image_shape, side):
    """Images with pixels averaged to ``side`` times ``side``."""
    channels, height, width = image_shape
    parts = X.reshape(-1, channels, side, height // side, side, width // side)
    return parts.mean(axis=(3, 5)).reshape(len(X), -1)


def load_set(dataset, data_home, seed):
    """What `Run.load` is for a set that is the same in every run; UCI sets are standardised."""
    return load_rows(dataset, data_home, "standard" if dataset in UCI else "paper")


def fifty_gaussians():
    """50 Gaussians of random means and full covariances: X of shape (50000, 16), labels."""
    draw = np.random.default_rng(0)
    means, y = 3 * draw.normal(size=(50, 16)), draw.integers(0, 50, 50_000)
    shapes = draw.normal(size=(50, 16, 16)) / 4
    X = means[y] + 0.3 * draw.normal(size=(len(y), 16))
    for k in range(50):
        X[y == k] += draw.normal(size=(np.sum(y == k), 16)) @ shapes[k]
    return X, y
