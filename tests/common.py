"""What test files share: every estimator, small, and how to call it.

A new estimator comes under all common tests by one line in `SMALL`.
"""

import inspect
import warnings

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)
from deepmix._torch import Rows

# A step of a small network takes a millisecond or two, however few its rows are: fits are short by
# few steps. Two or three batches, so that what mini-batches bring can go wrong.
SMALL = {
    ClusteringModule: {"n_init": 2, "max_iter": 6, "batch_size": 120, "learning_rate_init": 0.05},
    AECM: {
        "hidden_layer_sizes": (8,),
        "latent_dim": 5,
        "pretrain_max_iter": 5,
        "clustering_max_iter": 1,
        "max_iter": 4,
        "batch_size": 120,
        "learning_rate_init": 0.02,
    },
    NeuralMixtureEM: {"n_init": 2, "max_iter": 20, "learning_rate_init": 0.02},
    DeepDPM: {
        "n_init": 1,
        "max_iter": 6,
        "batch_size": 120,
        "learning_rate_init": 0.05,
        "subcluster_learning_rate": 0.05,
        "split_merge_every": 3,
        "freeze": 1,
    },
    AutoencoderDeepDPM: {
        "hidden_layer_sizes": (8,),
        "latent_dim": 3,
        "pretrain_max_iter": 8,
        "n_alternations": 1,
        "max_iter": 4,
        "clustering_max_iter": 2,
        "batch_size": 120,
        "learning_rate_init": 0.02,
        "check_unions": False,
    },
    DCAN: {
        "hidden_layer_sizes": (8,),
        "pretrain_max_iter": 10,
        "max_iter": 6,
        "batch_size": 120,
        "learning_rate_init": 0.01,
        "readout_n_init": 2,
        # Longer than this fit; what the loss is should not hang on the epoch.
        "warm_up": 0,
    },
}


# Whether a fit this short leaves a cluster empty hangs on the last digits of the machine's kernels:
# tests that are not about it do not ask. For ``pytestmark``.
MAY_BE_EMPTY = [
    pytest.mark.filterwarnings(f"ignore:{message}:sklearn.exceptions.ConvergenceWarning")
    for message in ("Number of distinct clusters", r"\d+ of \d+ components of the mixture")
]


def small(cls, n_clusters=4, **parameters):
    """An estimator that trains in a tenth of a second and, as tol=0, warns of no few epochs."""
    return cls(n_clusters, **{"tol": 0, "random_state": 0, **SMALL[cls], **parameters})


def parameters_of(cls):
    """Names of the parameters of an estimator, in the order of its signature."""
    return list(inspect.signature(cls).parameters)


def number(cls):
    """The parameter that says with how many clusters a fit begins."""
    return parameters_of(cls)[0]


def finds_number(cls):
    """Whether a fit ends with another number of clusters than it begins with."""
    return "n_clusters" not in parameters_of(cls)


def taken(cls, **parameters):
    """Those of some parameters that an estimator has."""
    return {name: parameters[name] for name in parameters_of(cls) if name in parameters}


def stage_that_converges(cls):
    """The parameter with the epochs of the stage that ``tol`` ends."""
    clusters = finds_number(cls) and "clustering_max_iter" in parameters_of(cls)
    return "clustering_max_iter" if clusters else "max_iter"


FINDS_NUMBER = [cls for cls in SMALL if finds_number(cls)]
AUTOENCODERS = [cls for cls in SMALL if "encoder" in parameters_of(cls)]


def quietly(function, *args, **kwargs):
    """Call a fit that rightly warns: of few epochs, or of clusters that stay empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return function(*args, **kwargs)


def rows_of(X, dtype=torch.float64, **options):
    return Rows(X, torch.device("cpu"), dtype, **options)
