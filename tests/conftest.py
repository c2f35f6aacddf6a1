"""Small data and small estimators that several test files share."""

import os
import signal

# Before scikit-learn and SciPy are imported: without it scikit-learn skips a check silently.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# On nets this small, threads that wait for each other cost twenty times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from sklearn.datasets import make_blobs

from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)

# tol=0: train for max_iter epochs, and do not warn that they were few.
SMALL = {
    ClusteringModule: {"n_init": 2, "max_iter": 20, "tol": 0},
    AECM: {
        "hidden_layer_sizes": (16,),
        "latent_dim": 5,
        "pretrain_max_iter": 15,
        "clustering_max_iter": 2,
        "max_iter": 15,
        "learning_rate_init": 5e-3,
        "tol": 0,
    },
    DCAN: {
        "hidden_layer_sizes": (16,),
        "batch_size": 40,
        "pretrain_max_iter": 20,
        "max_iter": 15,
        "learning_rate_init": 5e-3,
        "readout_n_init": 2,
        # Longer than this fit; what the loss is should not hang on the epoch.
        "warm_up": 0,
    },
    NeuralMixtureEM: {"n_init": 2, "max_iter": 30, "learning_rate_init": 1e-2},
    # Nets soft enough after 60 epochs of 12 steps for responsibilities to hang on every digit.
    DeepDPM: {"n_init": 1, "max_iter": 60, "split_merge_every": 60, "freeze": 20, "tol": 0},
    AutoencoderDeepDPM: {
        "hidden_layer_sizes": (16,),
        "latent_dim": 3,
        "pretrain_max_iter": 15,
        "n_alternations": 1,
        "max_iter": 15,
        "clustering_max_iter": 20,
        "learning_rate_init": 5e-3,
        "tol": 0,
    },
}


@pytest.fixture
def small():
    """``small(cls, **parameters)``: an estimator that trains in a fraction of a second."""

    def build(cls, n_clusters=4, **parameters):
        return cls(n_clusters, **{"random_state": 0, **SMALL[cls], **parameters})

    return build


@pytest.fixture(params=SMALL, ids=lambda cls: cls.__name__)
def estimator_class(request):
    return request.param


@pytest.fixture(scope="session")
def blobs():
    """Four blobs that touch nowhere: X float64 of shape (240, 3), and their labels."""
    X, y = make_blobs(240, n_features=3, centers=4, cluster_std=0.6, random_state=3)
    X.setflags(write=False)
    return X, y


@pytest.fixture(scope="session")
def overlapping():
    """Four blobs that overlap: labels of rows near the borders hang on every digit."""
    X, y = make_blobs(300, n_features=4, centers=4, cluster_std=3.0, random_state=1)
    X.setflags(write=False)
    return X, y


@pytest.fixture
def press_ctrl_c():
    """A callable that does what Ctrl-C does: it sends SIGINT, to Python's own handler at first."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def global_random_states():
    """A callable that gives the state of every global generator, to be compared."""
    import torch

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002 (the legacy state is meant)
        return (
            numpy_state[0],
            numpy_state[1].tobytes(),
            *numpy_state[2:],
            torch.get_rng_state().numpy().tobytes(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
        )

    return states
