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

import matplotlib.pyplot as plt
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

# For each data set: the mixture's reg_covar (pixels that never vary make covariances singular), and
# the largest number of epochs of the mixture, of AECM's autoencoder and of its joint training.
SETTINGS = {
    "digits": (1e-3, 100, 20, 40),
    "pendigits": (1e-3, 100, 15, 20),
    "mnist": (1e-2, 5, 15, 15),
}
COLOURS = plt.get_cmap("tab10").colors


def compare(name, X, y, seed):
    """Fit the models, print a line for each; return the fitted AECM, the last of them."""
    reg, n_em, n_pretrain, n_joint = SETTINGS[name]
    mixture = GaussianMixture(10, reg_covar=reg, max_iter=n_em)
    models = {
        "KMeans (n_init=10)": KMeans(10, n_init=10),
        f"GaussianMixture (full, reg_covar={reg:g})": mixture,
        "ClusteringModule": ClusteringModule(10),
        "NeuralMixtureEM": NeuralMixtureEM(10, scale=False),
        "AECM": AECM(10, pretrain_max_iter=n_pretrain, max_iter=n_joint),
    }
    print(f"\n{name}: {X.shape[0]} rows, {X.shape[1]} features, 10 digits")
    print(
        f"AECM: {n_pretrain} epochs of the autoencoder, at most {n_joint} of joint training; "
        f"GaussianMixture: at most {n_em} of EM"
    )
    print(f"{'':42}{'ACC':>7}{'NMI':>7}{'ARI':>7}{'seconds':>10}")
    for label, model in models.items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the limits are meant
            labels = model.set_params(random_state=seed).fit_predict(X)
        seconds = time.perf_counter() - start
        scores = (clustering_accuracy, normalized_mutual_info_score, adjusted_rand_score)
        cells = "".join(f"{100 * score(y, labels):7.1f}" for score in scores)
        print(f"{label:<42}{cells}{seconds:10.1f}", flush=True)
    return model


def draw(block, name, model, X):
    """Codes of a fitted AECM, and below them its centres decoded, on a part of a figure."""
    top, bottom = block.subfigures(2, 1, height_ratios=(4.4, 1.25))
    top.suptitle(f"{name}: codes of AECM along their principal axes, and the centres decoded")
    rows = X[np.random.default_rng(0).permutation(len(X))[:4000]]
    codes = model.transform(rows)
    projection = PCA(4).fit(codes)
    points, centres = map(projection.transform, (codes, model.latent_centers_))
    limits = np.quantile(points, (0.002, 0.998), axis=0) * 1.08
    # Components 1 and 2, and 3 and 4: orthonormal centres lie in no plane.
    for axes, first in zip(top.subplots(1, 2), (0, 2), strict=True):
        pair = [first, first + 1]
        EmbeddingDisplay(points[:, pair], model.predict(rows)).plot(ax=axes)
        for k, (x, y) in enumerate(centres[:, pair]):
            axes.scatter(x, y, s=210, color="white", edgecolors=[COLOURS[k]], lw=2, zorder=3)
            axes.text(x, y, str(k), ha="center", va="center_baseline", weight="bold", zorder=3)
        share = projection.explained_variance_ratio_[pair]
        axes.set(xticks=[], yticks=[], xlim=limits[:, first], ylim=limits[:, first + 1])
        axes.set_xlabel(f"component {first + 1} ({share[0]:.0%} of the variance)", color="0.3")
        axes.set_ylabel(f"component {first + 2} ({share[1]:.0%})", color="0.3")
        axes.spines[:].set_color("0.8")
    for k, axes in enumerate(bottom.subplots(1, 10)):
        axes.set(xticks=[], yticks=[])
        if name == "pendigits":
            x, y = model.cluster_centers_[k].reshape(-1, 2).T  # the pen at eight moments
            ends = {"solid_capstyle": "round", "solid_joinstyle": "round"}
            axes.plot(x, y, color="0.15", linewidth=3, **ends)
            axes.plot(x[0], y[0], "o", color="0.15", markersize=6)
            axes.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.12), aspect="equal")
        else:
            side = int(np.sqrt(X.shape[1]))
            image = model.cluster_centers_[k].reshape(side, side)
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(k, color=COLOURS[k], fontweight="bold", pad=4)
        axes.spines[:].set(color=COLOURS[k], linewidth=2.5)


def main():
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
    plt.switch_backend("Agg")
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    start = time.perf_counter()
    names = options.datasets or (list(SETTINGS) if options.data else ["digits"])
    figure = plt.figure(figsize=(10, 6.4 * len(names)), layout="constrained")
    blocks = figure.subfigures(len(names), 1, squeeze=False, hspace=0.04).flat
    for name, block in zip(names, blocks, strict=True):
        X, y = load(name, data_home=options.data, return_X_y=True)
        if name == "mnist":
            chosen = np.random.default_rng(options.seed).permutation(len(X))[: options.mnist_rows]
            X, y = X[chosen], y[chosen]
        draw(block, name, compare(name, X, y, options.seed), X)
    figure.savefig(options.output, dpi=130)
    print(f"\npicture: {options.output}  ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
