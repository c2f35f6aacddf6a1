"""What test files share: every estimator, small, and how to call it.

A new estimator comes under all common tests by one line in `SMALL`.
"""

import inspect
import warnings

import pytest
import torch
from sklearn.base import clone
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
from deepmix.baselines import DEC

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
        "clusterer": DeepDPM(
            amortized=False, prior_scale="codes", check_unions=False, batch_size=120, max_iter=2
        ),
        "n_alternations": 1,
        "max_iter": 4,
        "batch_size": 120,
        "learning_rate_init": 0.02,
    },
    DEC: {
        "hidden_layer_sizes": (8,),
        "latent_dim": 3,
        "pretrain_max_iter": 8,
        "max_iter": 4,
        "batch_size": 120,
        "learning_rate_init": 0.01,
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
    model = clone(cls(random_state=0, **SMALL[cls]))
    parameters = {number(cls): n_clusters, "tol": 0, **parameters}
    return model.set_params(**{qualified(cls, name): v for name, v in parameters.items()})


def parameters_of(cls):
    """Names of the parameters of an estimator, in the order of its signature."""
    return list(inspect.signature(cls).parameters)


def qualified(cls, name):
    """The name under which an estimator has a parameter: its own, or that of its clusterer."""
    return name if name.split("__")[0] in parameters_of(cls) else f"clusterer__{name}"


def number(cls):
    """The parameter that says with how many clusters a fit begins."""
    first = parameters_of(cls)[0]
    return "clusterer__n_clusters_init" if first == "clusterer" else first


def finds_number(cls):
    """Whether a fit ends with another number of clusters than it begins with."""
    return "n_clusters" not in parameters_of(cls)


def taken(cls, **parameters):
    """Those of some parameters that an estimator, or its clusterer, has."""
    known = set(small(cls).get_params())
    named = {qualified(cls, name): value for name, value in parameters.items()}
    return {name: value for name, value in named.items() if name in known}


def stage_that_converges(cls):
    """The parameter with the epochs of the stage that ``tol`` ends."""
    return "clusterer__max_iter" if "clusterer" in parameters_of(cls) else "max_iter"


FINDS_NUMBER = [cls for cls in SMALL if finds_number(cls)]
AUTOENCODERS = [cls for cls in SMALL if "encoder" in parameters_of(cls)]


def quietly(function, *args, **kwargs):
    """Call a fit that rightly warns: of few epochs, or of clusters that stay empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return function(*args, **kwargs)


def rows_of(X, dtype=torch.float64, **options):
    return Rows(X, torch.device("cpu"), dtype, **options)
