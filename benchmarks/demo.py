"""Cluster handwritten digits with deep mixture models beside KMeans and GaussianMixture.

The digits come with scikit-learn. With ``--data FOLDER`` or the environment variable
``DEEPMIX_DATA`` Pendigits and MNIST follow; MNIST is a subset and trained briefly.

    python benchmarks/demo.py
    python benchmarks/demo.py --data FOLDER --mnist-rows 70000 --output digits.png
"""

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from deepmix import AECM, ClusteringModule, NeuralMixtureEM
from deepmix.datasets import load
from deepmix.metrics import clustering_accuracy
from deepmix.plotting import EmbeddingDisplay


class Setting(NamedTuple):
    """What is trained on a data set, and how its rows are drawn.

    Attributes
    ----------
    reg_covar : float
        Of the full-covariance mixture: pixels that never vary make covariances singular.
    mixture_max_iter, pretrain_max_iter, max_iter : int
        Epochs of GaussianMixture, and of AECM before and during joint training.
    draw : {'image', 'strokes'}
    """

    reg_covar: float
    mixture_max_iter: int
    pretrain_max_iter: int
    max_iter: int
    draw: str


SETTINGS = {
    "digits": Setting(1e-3, 100, 20, 40, "image"),
    "pendigits": Setting(1e-3, 100, 15, 20, "strokes"),
    "mnist": Setting(1e-2, 5, 15, 15, "image"),
}

# --- Clustering ------------------------------------------------------------------------


def make_models(setting, seed):
    """The models of the table: dict of name to estimator."""
    full = f"GaussianMixture (full, reg_covar={setting.reg_covar:g})"
    deep = {"pretrain_max_iter": setting.pretrain_max_iter, "max_iter": setting.max_iter}
    return {
        "KMeans (n_init=10)": KMeans(10, n_init=10, random_state=seed),
        full: GaussianMixture(
            10,
            reg_covar=setting.reg_covar,
            max_iter=setting.mixture_max_iter,
            random_state=seed,
        ),
        "ClusteringModule": ClusteringModule(10, random_state=seed),
        "NeuralMixtureEM": NeuralMixtureEM(10, scale=False, random_state=seed),
        "AECM": AECM(10, **deep, random_state=seed),
    }


def compare(name, X, y, seed):
    """Fit the models, print a line for each; return the fitted AECM."""
    setting = SETTINGS[name]
    print(f"\n{name}: {X.shape[0]} rows, {X.shape[1]} features, 10 digits")
    print(
        f"AECM: {setting.pretrain_max_iter} epochs of the autoencoder, at most "
        f"{setting.max_iter} of joint training; GaussianMixture: at most "
        f"{setting.mixture_max_iter} of EM"
    )
    print(f"{'':42}{'ACC':>7}{'NMI':>7}{'ARI':>7}{'seconds':>10}")
    for label, model in make_models(setting, seed).items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the limits are meant
            labels = model.fit_predict(X)
        seconds = time.perf_counter() - start
        scores = (clustering_accuracy, normalized_mutual_info_score, adjusted_rand_score)
        cells = "".join(f"{100 * score(y, labels):7.1f}" for score in scores)
        print(f"{label:<42}{cells}{seconds:10.1f}", flush=True)
    return model


# --- Picture ---------------------------------------------------------------------------


def draw(fitted, path):
    """Codes and decoded centres of each fitted AECM, a row of the figure each.

    Parameters
    ----------
    fitted : dict of str to (AECM, ndarray of shape (n_samples, n_features))
    path : Path
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 6.4 * len(fitted)), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    blocks = figure.subfigures(len(fitted), 1, squeeze=False, hspace=0.04).flat
    for block, (name, (model, X)) in zip(blocks, fitted.items(), strict=True):
        top, bottom = block.subfigures(2, 1, height_ratios=(4.4, 1.25))
        top.suptitle(f"{name}: codes of AECM along their principal axes, and the centres decoded")
        _draw_codes(top.subplots(1, 2), model, X, colours)
        for k, axes in enumerate(bottom.subplots(1, 10)):
            _draw_centre(axes, model.cluster_centers_[k], SETTINGS[name].draw)
            axes.set_title(k, color=colours[k], fontweight="bold", pad=4)
            for spine in axes.spines.values():
                spine.set(color=colours[k], linewidth=2.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_codes(panels, model, X, colours):
    """Components 1 and 2, and 3 and 4: orthonormal centres lie in no plane."""
    chosen = np.random.default_rng(0).permutation(len(X))[:4000]
    codes, labels = model.transform(X[chosen]), model.predict(X[chosen])
    projection = PCA(4).fit(codes)
    points = projection.transform(codes)
    centres = projection.transform(model.latent_centers_)
    limits = np.quantile(points, (0.002, 0.998), axis=0) * 1.08
    for axes, first in zip(panels, (0, 2), strict=True):
        pair = [first, first + 1]
        EmbeddingDisplay(points[:, pair], labels).plot(ax=axes)
        for k, (x, y) in enumerate(centres[:, pair]):
            axes.scatter(x, y, s=210, color="white", edgecolors=[colours[k]], lw=2, zorder=3)
            axes.text(x, y, str(k), ha="center", va="center_baseline", weight="bold", zorder=3)
        share = projection.explained_variance_ratio_[pair]
        axes.set(xticks=[], yticks=[], xlim=limits[:, first], ylim=limits[:, first + 1])
        axes.set_xlabel(f"component {first + 1} ({share[0]:.0%} of the variance)", color="0.3")
        axes.set_ylabel(f"component {first + 2} ({share[1]:.0%})", color="0.3")
        axes.spines[:].set_color("0.8")


def _draw_centre(axes, centre, how):
    axes.set(xticks=[], yticks=[])
    if how == "image":
        side = int(np.sqrt(len(centre)))
        axes.imshow(centre.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
        return
    x, y = centre.reshape(-1, 2).T  # the pen at eight moments
    axes.plot(x, y, color="0.15", linewidth=3, solid_capstyle="round", solid_joinstyle="round")
    axes.plot(x[0], y[0], "o", color="0.15", markersize=6)
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.12), aspect="equal")


# --- The demo --------------------------------------------------------------------------


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default=os.environ.get("DEEPMIX_DATA"), help="folder with more data sets")
    add("--datasets", nargs="+", choices=SETTINGS, help="default: all that are at hand")
    add("--mnist-rows", type=int, default=10_000, help="rows of MNIST to take")
    add("--seed", type=int, default=0)
    # Small batches gain little from a second thread, and lose much to it on a busy machine.
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=Path(__file__).parent / "demo.png", help="the picture")
    options = parser.parse_args()
    if options.datasets is None:
        options.datasets = list(SETTINGS) if options.data else ["digits"]
    return options


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    start = time.perf_counter()
    fitted = {}
    for name in options.datasets:
        X, y = load(name, data_home=options.data, return_X_y=True)
        if name == "mnist":
            chosen = np.random.default_rng(options.seed).permutation(len(X))[: options.mnist_rows]
            X, y = X[chosen], y[chosen]
        fitted[name] = compare(name, X, y, options.seed), X
    draw(fitted, options.output)
    print(f"\npicture: {options.output}  ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
