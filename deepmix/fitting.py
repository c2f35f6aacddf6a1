"""What a fit carries from stage to stage, and what its training returns."""

import zlib
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn.utils import check_random_state
from torch import nn

from deepmix._torch import Rows, make_generator
from deepmix.callbacks import Reports
from deepmix.training import History


class RandomStreams:
    """The random numbers of a fit: one stream for NumPy, and one for torch that it has seeded.

    Parameters
    ----------
    random_state : int, RandomState instance or None

    Attributes
    ----------
    numpy : RandomState
    torch : torch.Generator
        Generator on the CPU, so that every device sees the same numbers.

    Examples
    --------
    >>> from deepmix.fitting import RandomStreams
    >>> streams = RandomStreams(0)
    >>> streams.child("read-out").numpy.randint(100) == streams.child("read-out").numpy.randint(100)
    True
    """

    def __init__(self, random_state):
        self.numpy = check_random_state(random_state)
        self.torch = make_generator(self.numpy)

    def child(self, name):
        """Streams of a stage that depend on its name, not on what other stages have drawn."""
        seed = np.random.SeedSequence([self.torch.initial_seed(), zlib.crc32(name.encode())])
        return RandomStreams(int(seed.generate_state(1)[0]))

    def next(self):
        """Streams of another restart: NumPy's goes on, and seeds torch's anew."""
        return RandomStreams(self.numpy)


@dataclass(frozen=True)
class Fit:
    """What one call of ``fit`` works with: every hook of an estimator takes it.

    Attributes
    ----------
    rows : Rows
        The training data, on the device and in the dtype of the fit.
    X : ndarray or sparse matrix of shape (n_samples, n_features)
        The training data as scikit-learn has validated them.
    rng : RandomStreams
    reports : Reports or None
        Tell callbacks of stages and epochs, and hold the interruption by Ctrl-C. None where nothing
        is trained.
    continues : bool
        Whether training goes on from the fitted state: ``warm_start`` or ``partial_fit``.
    """

    rows: Rows
    X: object
    rng: RandomStreams
    reports: Reports | None = None
    continues: bool = False

    @property
    def device(self):
        """Where the fit computes: torch.device."""
        return self.rows.device

    @property
    def dtype(self):
        """Floating-point type of training: torch.dtype."""
        return self.rows.dtype

    @property
    def interruption(self):
        """Whether Ctrl-C has asked the fit to end: `Interruption`."""
        return self.reports.interruption

    def another(self):
        """The same fit with the random streams of the next restart."""
        return replace(self, rng=self.rng.next())

    def through(self, network):
        """The same fit with inference batches sized for ``network``, see `Rows.through`."""
        return replace(self, rows=self.rows.through(network))


@dataclass
class Trained:
    """What training returns.

    Attributes
    ----------
    network : nn.Module
        The trained network in eval mode, which may hold several restarts side by side.
    history : History
        Curves of the main stage, with the terms of earlier stages in ``history.before``.
    criterion : float or ndarray of shape (n_restarts,)
        Label-free criterion that chooses among restarts; lower is better.
    restart : int
        Index of the best restart in the network.
    attributes : dict
        Further fitted attributes, by name.
    """

    network: nn.Module
    history: History
    criterion: object = 0.0
    restart: int = 0
    attributes: dict = field(default_factory=dict)
