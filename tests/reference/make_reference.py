"""Record small float64 fits in ``reference.json``, which the tests compare with.

Run it when a change of the numbers is meant, and say why in the changelog::

    python tests/reference/make_reference.py
"""

import json
from pathlib import Path

import numpy as np
import torch

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)
from deepmix.baselines import DEC
from deepmix.gaussian_mixture import fit_gaussian_mixture, log_resp

PATH = Path(__file__).with_name("reference.json")

# No generator of NumPy or scikit-learn makes the data: their streams may change with versions.
FITS = {
    "ClusteringModule": (ClusteringModule, {"n_init": 3, "max_iter": 10}),
    "ClusteringModule, asymmetric, sgd": (
        ClusteringModule,
        {
            "concentration": [2.0, 4.0, 6.0],
            "solver": "sgd",
            "learning_rate_init": 1e-3,
            "max_iter": 10,
            "init": "k-means",
            "n_init": 1,  # k-means gives all restarts one partition: rounding would choose
        },
    ),
    "ClusteringModule, paper": (
        ClusteringModule,
        {"init": "random", "scale": False, "epsilon": 1e-3, "concentration": 5.0, "max_iter": 10},
    ),
    "AECM": (AECM, {"pretrain_max_iter": 10, "max_iter": 10}),
    "AECM, pretrain": (AECM, {"init": "pretrain", "pretrain_max_iter": 10, "max_iter": 10}),
    "AECM, orthonormal": (AECM, {"init": "orthonormal", "max_iter": 30}),
    "NeuralMixtureEM": (NeuralMixtureEM, {"n_init": 1, "max_iter": 20}),
    "NeuralMixtureEM, ensemble": (NeuralMixtureEM, {"n_init": 3, "ensemble": True, "max_iter": 20}),
    "NeuralMixtureEM, given weights": (
        NeuralMixtureEM,
        {"n_init": 1, "weights": [0.5, 0.3, 0.2], "max_iter": 30},
    ),
    "NeuralMixtureEM, two-fold on images": (
        NeuralMixtureEM,
        {
            "image_shape": (1, 1, 3),
            "network": "C2 F4",
            "n_init": 1,
            "two_fold": True,
            "max_iter": 10,
        },
    ),
    "DeepDPM": (DeepDPM, {"n_init": 1, "split_merge_every": 30, "freeze": 10, "max_iter": 40}),
    "DeepDPM, EM": (DeepDPM, {"amortized": False, "max_iter": 4}),
    "DCAN": (DCAN, {}),
    "DCAN, unconditional": (
        DCAN,
        {
            "conditional": False,
            "covariance_type": "tracked",
            "equal_weights": False,
            "spectral_norm": True,
            "label_smoothing": 0.1,
        },
    ),
    "DCAN, kl": (
        DCAN,
        {"divergence": "kl", "clustering_weight": 0.6, "covariance_type": "full"},
    ),
    "DCAN, euclidean": (DCAN, {"divergence": "euclidean", "covariance_type": "tied"}),
    "DEC": (DEC, {"pretrain_max_iter": 20, "max_iter": 10}),
    "AutoencoderDeepDPM": (
        AutoencoderDeepDPM,
        {
            "pretrain_max_iter": 20,
            "n_alternations": 2,
            "max_iter": 5,
            "clusterer": DeepDPM(3, amortized=False, max_iter=4, prior_scale=0.5, tol=0),
        },
    ),
}

MIXTURES = {
    "mixture, full": {"covariance_type": "full", "reg_covar": 1e-3},
    "mixture, shrunk and equal": {"shrinkage": 0.1, "equal_weights": True, "reg_covar": 1e-3},
    "mixture, tied": {"covariance_type": "tied"},
    "mixture, diag": {"covariance_type": "diag"},
    "mixture, spherical": {"covariance_type": "spherical"},
    "mixture, hard with one variance": {"covariance_type": "tied_spherical", "hard": True},
}
NAMES = (*FITS, *MIXTURES)


def data():
    """Three clusters of different size on an ellipse, by arithmetic: X of shape (60, 3)."""
    i = np.arange(60.0)
    # Equal sizes would leave it to rounding which cluster is the largest.
    cluster = np.tile([0, 0, 0, 0, 0, 1, 1, 1, 2, 2], 6)
    angle = 2 * np.pi * cluster / 3 + 0.4 * np.sin(1.7 * i)
    return np.c_[3 * np.cos(angle), 2 * np.sin(angle), np.cos(2.3 * i)] + 0.5


def fit(name):
    """One of the recorded fits."""
    cls, parameters = FITS[name]
    small = {
        AECM: {"hidden_layer_sizes": (6,), "latent_dim": 3, "learning_rate_init": 1e-2},
        DEC: {"hidden_layer_sizes": (6,), "latent_dim": 2, "learning_rate_init": 1e-2},
        AutoencoderDeepDPM: {
            "hidden_layer_sizes": (6,),
            "latent_dim": 2,
            "learning_rate_init": 1e-2,
        },
        NeuralMixtureEM: {"hidden_layer_sizes": (6,), "learning_rate_init": 1e-2},
        DCAN: {
            "hidden_layer_sizes": (6,),
            "learning_rate_init": 1e-2,
            "batch_size": 20,
            "pretrain_max_iter": 10,
            "max_iter": 10,
            "readout_n_init": 2,
            "warm_up": 0,
        },
    }
    settings = {"dtype": "auto", "random_state": 0, **small.get(cls, {}), **parameters}
    if cls is not AutoencoderDeepDPM:
        settings |= {"tol": 0}
        return cls(3, **settings).fit(data())
    return cls(**settings).fit(data())


def summary(model):
    """What is recorded of a fit: dict of lists."""
    arrays = {
        "cluster_centers": model.cluster_centers_,
        "weights": model.weights_,
        "variance": getattr(model, "variance_", getattr(model, "covariances_", 0.0)),
        "loss": model.history_["loss"],
        "resp": model.predict_proba(data()[:4]),
        "score_samples": model.score_samples(data()[:4]),
    }
    return {name: np.asarray(value).tolist() for name, value in arrays.items()}


def mixture_summary(name):
    """EM for one of the mixtures on weighted rows, by arithmetic all of it: dict of lists."""
    i = np.arange(60.0)
    x = torch.tensor(data() - data().mean(axis=0))
    start = torch.tensor(np.sin(np.outer(i, [1.0, 2.0, 3.0]))).softmax(dim=1)
    weight = torch.tensor(1.0 + i % 3)
    fit = fit_gaussian_mixture(x, start, weight, max_iter=15, tol=0.0, **MIXTURES[name])
    arrays = {
        "weights": fit.mixture.weights,
        "means": fit.mixture.means,
        "covariances": fit.mixture.covariances,
        "lower_bound": fit.lower_bound,
        "resp": log_resp(x[:4], fit.mixture).exp(),
    }
    return {key: value.tolist() for key, value in arrays.items()}


def record(name):
    """What is recorded under a name."""
    return mixture_summary(name) if name in MIXTURES else summary(fit(name))


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: record(name) for name in NAMES}, indent=1) + "\n")
