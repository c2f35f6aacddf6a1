"""Small data and small estimators that several test files share."""

import os
import signal

# Before scikit-learn and SciPy are imported: without it scikit-learn skips a check silently.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# On nets this small, threads that wait for each other cost twenty times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy

import common
import numpy as np
import pytest
from sklearn.datasets import make_blobs


@pytest.fixture
def small():
    """``small(cls, n_clusters=4, **parameters)``: an estimator that trains in no time."""
    return common.small


@pytest.fixture(params=common.SMALL, ids=lambda cls: cls.__name__)
def estimator_class(request):
    return request.param


@pytest.fixture(scope="session")
def fits():
    """The small estimators fitted to the overlapping blobs, by class, as far as asked for."""
    return {}


@pytest.fixture
def fitted(estimator_class, overlapping, fits):
    """The small estimator fitted to the overlapping blobs: a copy of the one fit of all tests."""
    if estimator_class not in fits:
        fits[estimator_class] = common.small(estimator_class).fit(overlapping[0])
    return copy.deepcopy(fits[estimator_class])


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
