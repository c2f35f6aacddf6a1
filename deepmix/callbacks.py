"""What watches a training stage: ``callback(state) -> True`` to stop it.

The loop calls every callback at the end of each epoch, in order.
"""

import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

try:  # scikit-learn >= 1.9
    from sklearn.callback import CallbackSupportMixin
except ImportError:

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin where scikit-learn has none."""


@dataclass
class EpochState:
    """What a callback sees at the end of an epoch.

    Attributes
    ----------
    task : str
        The stage: ``'pretrain'``, ``'fit'``, ...
    epoch, max_iter : int
        Number of the epoch, from 0, and how many there are at most.
    terms : dict of str to ndarray
        Mean of each loss term over the epoch; one value for each restart trained together.
    watch : tuple of str or None
        Terms that `loss` sums; None means all.
    """

    task: str
    epoch: int
    max_iter: int
    terms: dict = field(default_factory=dict)
    watch: tuple | None = None

    @property
    def loss(self):
        """Sum of the terms to watch: ndarray of shape () or (n_restarts,)."""
        names = self.terms if self.watch is None else self.watch
        return sum(self.terms[name] for name in names)


class EarlyStopping:
    """Stop when no restart has improved its loss for a while.

    Parameters
    ----------
    tol : float
        An epoch improves when the loss falls below the best so far by more than
        ``tol * abs(best)``.
    n_iter_no_change : int
        Epochs without improvement before the stage ends.

    Attributes
    ----------
    converged : bool
        Whether the callback has ended the stage.
    """

    def __init__(self, tol, n_iter_no_change):
        self.tol, self.n_iter_no_change = tol, n_iter_no_change
        self.best, self.waited, self.converged = None, None, False

    def __call__(self, state):
        loss = np.asarray(state.loss, dtype=np.float64)
        if self.best is None:
            self.best, self.waited = loss, np.zeros(loss.shape, dtype=int)
            return False
        improved = loss < self.best - self.tol * np.abs(self.best)
        self.best = np.minimum(self.best, loss)
        self.waited = np.where(improved, 0, self.waited + 1)
        self.converged = bool(np.all(self.waited >= self.n_iter_no_change))
        return self.converged


class StopWhen:
    """Stop, as converged, when a condition holds at the end of an epoch.

    Parameters
    ----------
    condition : callable
        Takes nothing, gives a bool.
    """

    def __init__(self, condition):
        self.condition, self.converged = condition, False

    def __call__(self, state):
        self.converged = self.condition()
        return self.converged


class Progress:
    """Print a line every ``every`` epochs: what ``verbose`` asks for."""

    def __init__(self, name, every=1):
        self.name, self.every = name, every

    def __call__(self, state):
        last = state.epoch + 1 == state.max_iter
        if state.epoch % self.every == 0 or last:
            terms = "  ".join(f"{name} {np.min(value):.5g}" for name, value in state.terms.items())
            print(f"[{self.name}] {state.task} {state.epoch + 1}/{state.max_iter}  {terms}")
        return False


# --- Ctrl-C ----------------------------------------------------------------------------

# Modules that call `fit` and would score, cache or send on a fit that ended early like a whole one.
SEARCHES = ("joblib", "sklearn.model_selection", "dask", "distributed", "ray")


class Interruption:
    """The first Ctrl-C of a fit asks it to end; the second raises KeyboardInterrupt.

    A context manager around the whole fit. It replaces Python's own handler of SIGINT, and no
    other, in the main thread only. Inside a search, cross-validation or any call of joblib it does
    nothing, so that the first Ctrl-C ends the search.

    Attributes
    ----------
    requested : bool
        Whether the fit was asked to end.
    place : str or None
        How far the first stage that was cut short had come, in words for the warning; None if no
        stage was.
    """

    def __init__(self):
        self.requested, self.place, self._installed = False, None, False

    def __enter__(self):
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and not _in_a_search()
        ):
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_):
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number, frame):
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True

    def notice(self, place):
        """Say where training ended, if it has not ended before."""
        self.place = self.place or place


def _in_a_search():
    """Whether a function of `SEARCHES` is among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if any(module == name or module.startswith(f"{name}.") for name in SEARCHES):
            return True
        frame = frame.f_back
    return False


class Checkpoint:
    """Keep tensors of the last whole epoch in memory, to return to them.

    Parameters
    ----------
    tensors : iterable of torch.Tensor
        Parameters and buffers.
    """

    def __init__(self, tensors):
        self.tensors = list(tensors)
        self.saved = [t.detach().clone() for t in self.tensors]

    def save(self):
        """Take the values as they are now."""
        if self.saved:
            torch._foreach_copy_(self.saved, [t.detach() for t in self.tensors])

    def restore(self):
        """Put the saved values back."""
        if self.saved:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, self.saved)


# --- scikit-learn's callbacks ----------------------------------------------------------


class Reports:
    """Report the stages of a fit to `sklearn.callback`, if scikit-learn has it; heed Ctrl-C.

    A context manager around the whole fit.

    Parameters
    ----------
    estimator : CallbackSupportMixin
    X : array-like or DataFrame
        Training data as the user gave them: callbacks may predict on them.
    y : array-like
    """

    def __init__(self, estimator, X, y):
        self.estimator, self.root = estimator, None
        self.interruption = Interruption()
        self.common = {"estimator": estimator, "X": X, "y": y}

    def __enter__(self):
        if hasattr(self.estimator, "_init_callback_context"):
            self.root = self.estimator._init_callback_context(max_subtasks=None)
            self.root.call_on_fit_task_begin(**self.common)
        self.interruption.__enter__()
        return self

    def __exit__(self, kind, *_):
        self.interruption.__exit__()
        if self.root is not None and kind is None:
            self.root.call_on_fit_task_end(**self.common)

    @contextmanager
    def task(self, name, max_iter, reconstruct):
        """Report one stage: yields the callbacks that the loop is to call.

        Parameters
        ----------
        name : str
        max_iter : int
        reconstruct : callable
            Gives the fitted attributes with which a callback can use the estimator mid-way.
        """
        if self.root is None:
            yield []
            return
        context = self.root.subcontext(task_name=name, max_subtasks=max_iter)
        context.call_on_fit_task_begin(**self.common)

        def report(state):
            epoch = context.subcontext(task_name="epoch")
            epoch.call_on_fit_task_begin(**self.common)
            end = epoch.call_on_fit_task_end
            return bool(end(**self.common, reconstruction_attributes=reconstruct))

        yield [report]
        context.call_on_fit_task_end(**self.common)
