"""The one training loop. It knows batches, optimisers and losses; it knows no method.

A method describes each stage of its training as an `Objective`; `minimize` does the rest.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from deepmix._torch import TORCH_DTYPES
from deepmix.callbacks import Checkpoint, EpochState, Interruption

# --- What a stage minimises ------------------------------------------------------------


class Phase(NamedTuple):
    """One loss and the parameters that it trains.

    Attributes
    ----------
    parameters : sequence of torch.nn.Parameter
        Empty for a pass that only gathers sums, such as an E-step.
    step : callable
        ``step(batch, index, weight) -> terms``: named loss terms as a dict of tensors, each
        the *sum* over the rows of the batch, row i counted ``weight[i]`` times. A term of
        shape (n_restarts,) holds the losses of restarts that train together. ``index`` of shape
        (B,), on the device, numbers the rows of the batch.
    closed_form : bool
        Whether ``step`` returns ``(terms, gradients)``, one gradient for each parameter, so that
        nothing is differentiated.
    learning_rate : float or None
        Step size of this phase; None takes that of `minimize`.
    """

    parameters: tuple
    step: Callable
    closed_form: bool = False
    learning_rate: float | None = None


class Objective:
    """What a stage minimises: phases that run in turn on each batch, and epoch hooks.

    One phase is ordinary training; two alternate on every batch, each with its own loss and
    optimiser. Updates in closed form (centroids, mixtures) belong in the hooks.
    """

    # Names of the terms whose sum is the loss that early stopping watches; None means all. The
    # losses of two adversaries have no meaningful sum, and a term may only be recorded: it has no
    # gradient and is not named here.
    watch = None
    # Map of each row, without trained parameters, that is applied before the steps: callable or
    # None. It is called on several small batches at once.
    prepare = None
    # Whether batches are made as equal as can be, for losses that depend on statistics of the
    # batch: a short last batch would do harm.
    even_batches = False

    def phases(self):
        """Return the phases: tuple of `Phase`; no two of them may share the name of a term."""
        raise NotImplementedError

    def on_epoch_start(self, epoch):
        """Run before the first batch of an epoch."""

    def on_epoch_end(self, epoch):
        """Run after the last batch. True rebuilds the optimisers from `phases`."""
        return False


class Averaged(Objective):
    """Train like ``objective`` for an epoch, then replace every parameter by its mean.

    The mean runs over the values after each step of the epoch: the averaging epoch of
    Boubekki et al. (2021), Sec. 4.1, which removes the scatter of the last mini-batches.
    """

    def __init__(self, objective):
        self.objective, self.watch = objective, objective.watch
        self.prepare, self.even_batches = objective.prepare, objective.even_batches

    def phases(self):
        first, *others = self.objective.phases()
        self._parameters = [p for phase in (first, *others) for p in phase.parameters]
        self._sum = [torch.zeros_like(p) for p in self._parameters]
        self._n_steps = 0

        def step(batch, index, weight):
            if self._n_steps:  # add the parameters after the previous step
                self._accumulate()
            self._n_steps += 1
            return first.step(batch, index, weight)

        return (first._replace(step=step), *others)

    def on_epoch_start(self, epoch):
        self.objective.on_epoch_start(epoch)

    def on_epoch_end(self, epoch):
        self._accumulate()
        with torch.no_grad():
            for parameter, total in zip(self._parameters, self._sum, strict=True):
                parameter.copy_(total / self._n_steps)
        return self.objective.on_epoch_end(epoch)

    def _accumulate(self):
        torch._foreach_add_(self._sum, [p.detach() for p in self._parameters])


# --- History ---------------------------------------------------------------------------


@dataclass
class History:
    """What a stage of training returns: the curves of the loss, and how training ended.

    Attributes
    ----------
    terms : dict of str to list of ndarray
        Each loss term per unit of sample weight, one entry an epoch; shape () or (n_restarts,).
    converged : bool
        Whether a callback with an attribute ``converged``, such as `EarlyStopping`, has set it.
    interrupted : bool
        Whether Ctrl-C ended training.
    stopped : bool
        Whether a callback without that attribute ended training.
    watch : tuple of str or None
        Terms that the loss sums; None means all.
    optimizers : list
        Optimisers, to be passed to the next `minimize` on the same parameters.
    before : dict of str to list of ndarray
        Terms of the stages before this one.
    others : dict of str to ndarray
        Curves other than loss terms, such as the number of clusters.
    """

    terms: dict = field(default_factory=dict)
    converged: bool = False
    interrupted: bool = False
    stopped: bool = False
    watch: tuple | None = None
    optimizers: list = field(default_factory=list)
    before: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)

    @property
    def n_iter(self):
        return max((len(values) for values in self.terms.values()), default=0)

    def record(self, state, callbacks):
        """Append the terms of an epoch and call every callback: whether one of them stops."""
        for name, value in state.terms.items():
            self.terms.setdefault(name, []).append(value)
        # Every callback is called, even if an earlier one stops.
        ends = [(callback(state), callback) for callback in callbacks]
        self.converged = any(getattr(callback, "converged", False) for callback in callbacks)
        self.stopped = any(end for end, callback in ends if not hasattr(callback, "converged"))
        return any(end for end, _ in ends)

    def prepend(self, earlier):
        """Take the terms of an earlier stage that trained the same parameters before this one."""
        names = {**earlier.terms, **self.terms}
        self.terms = {n: [*earlier.terms.get(n, []), *self.terms.get(n, [])] for n in names}

    def after(self, pretraining):
        """The same history, with the terms of a stage ``'pretrain'`` before it."""
        self.before = {f"pretrain_{name}": values for name, values in pretraining.terms.items()}
        return self

    def arrays(self, restart=0):
        """Curves of one restart, and the sum of its terms: dict of ndarray of shape (n_iter,)."""
        curves, before = _curves(self.terms, restart), _curves(self.before, restart)
        if curves:
            curves = {"loss": sum(curves[name] for name in self.watch or curves), **curves}
        return {**curves, **before, **self.others}


def _curves(terms, restart):
    # A term without an axis of restarts has one value for all of them.
    return {
        name: np.array([np.ravel(v)[min(restart, np.size(v) - 1)] for v in values])
        for name, values in terms.items()
    }


# --- The loop --------------------------------------------------------------------------


def minimize(
    objective,
    rows,
    *,
    learning_rate=1e-3,
    batch_size=256,
    max_iter=100,
    generator=None,
    callbacks=(),
    solver="adam",
    epsilon=1e-8,
    momentum=None,
    weight_decay=0.0,
    max_grad_norm=None,
    precision="float32",
    optimizers=None,
    task="fit",
    buffers=None,
    interruption=None,
):
    """Minimise an objective by mini-batches.

    Parameters
    ----------
    objective : Objective
    rows : Rows
        The data, on the device of the parameters.
    learning_rate : float
        Step size of every phase that has none of its own.
    batch_size, max_iter : int
        Rows in a step and epochs.
    generator : torch.Generator or None
        Draws the order of the rows; None keeps their order.
    callbacks : sequence of callable
        ``callback(EpochState) -> True`` stops after that epoch.
    solver : {'adam', 'sgd'}
    epsilon : float
        Term added to the denominator of Adam's step for numerical stability.
    momentum : float or None
        Decay rate of the first moment for Adam (None is 0.9), momentum for SGD (None is 0).
    weight_decay : float
        Factor of half the squared norm of the parameters, which is added to the loss of a batch.
        That loss is a sum over rows: multiply a factor for a mean loss by the weight of a batch.
    max_grad_norm : float or None
        Clip the gradient of each phase to this norm, restarts together.
    precision : {'float32', 'bfloat16'}
        ``'bfloat16'`` runs matrix products in that precision (autocast).
    optimizers : list or None
        Optimisers to go on with, or their states from `optimizer_to_numpy`, one for each phase.
        None starts anew.
    task : str
        Name of the stage, in messages.
    buffers : callable or None
        Returns an iterable of the Tensors that steps change beside trained parameters, such as
        running statistics. It is called again whenever the phases are renewed.
    interruption : Interruption or None
        Request to end training, with parameters and buffers of the last whole epoch. None is
        never requested.

    Returns
    -------
    History

    Raises
    ------
    FloatingPointError
        If a loss term is not finite at the end of an epoch, in all of the restarts that train
        together.
    """
    phases = objective.phases()
    build = _OptimizerFactory(solver, learning_rate, epsilon, momentum, weight_decay)
    history = History(
        watch=objective.watch,
        optimizers=_resume(optimizers, [build(phase) for phase in phases]),
    )
    interruption = interruption or Interruption()
    guard = _guard(phases, buffers)
    autocast = _autocast(rows.device, precision)
    for epoch in range(max_iter):
        objective.on_epoch_start(epoch)
        batches = rows.batches(batch_size, generator, objective.prepare, objective.even_batches)
        batches = _until(interruption, batches)
        totals = _run_epoch(phases, history.optimizers, batches, autocast, max_grad_norm)
        if interruption.requested:
            guard.restore()
            history.interrupted = True
            interruption.notice(f"after {epoch} of {max_iter} epochs ({task})")
            break
        terms = _read(totals, rows.total_weight, epoch, task)
        if objective.on_epoch_end(epoch):
            phases = objective.phases()
            history.optimizers = [build(phase) for phase in phases]
            guard = _guard(phases, buffers)
        guard.save()
        state = EpochState(task, epoch, max_iter, terms, objective.watch)
        if history.record(state, callbacks):
            break
    return history


def _guard(phases, buffers):
    parameters = (p for phase in phases for p in phase.parameters)
    return Checkpoint([*parameters, *(buffers() if buffers else ())])


def _until(interruption, batches):
    """Yield batches until an interruption is requested."""
    for batch in batches:
        if interruption.requested:
            return
        yield batch


def _run_epoch(phases, optimizers, batches, autocast, max_grad_norm):
    """One pass over the rows; returns the running sum of each term, on the device."""
    totals = {}
    for batch, index, weight in batches:
        for phase, optimizer in zip(phases, optimizers, strict=True):
            terms = _differentiate(phase, autocast, batch, index, weight)
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(phase.parameters, max_grad_norm)
            if optimizer is not None:
                optimizer.step()
            for name, value in terms.items():
                if name in totals:
                    totals[name].add_(value)
                else:
                    totals[name] = value.clone()
    return totals


def _differentiate(phase, autocast, batch, index, weight):
    """Leave the gradient of a phase in its parameters; return its loss terms."""
    if phase.closed_form:
        with torch.no_grad():
            terms, gradients = phase.step(batch, index, weight)
        for parameter, gradient in zip(phase.parameters, gradients, strict=True):
            parameter.grad = gradient
        return terms
    for parameter in phase.parameters:
        parameter.grad = None
    with autocast:
        terms = phase.step(batch, index, weight)
        losses = [term.sum() for term in terms.values() if term.requires_grad]
        loss = losses[0] if len(losses) == 1 else sum(losses)
    # Only this phase's parameters get gradients, whatever else the loss depends on.
    loss.backward(inputs=list(phase.parameters))
    return {name: term.detach() for name, term in terms.items()}


def _read(totals, total_weight, epoch, task):
    """Bring the sums of an epoch to the host, once, and refuse what is not finite."""
    names = list(totals)
    flat = torch.cat([totals[name].reshape(-1) for name in names]).cpu().double().numpy()
    sizes = [totals[name].numel() for name in names]
    parts = np.split(flat / total_weight, np.cumsum(sizes)[:-1])
    terms = {n: p.reshape(tuple(totals[n].shape)) for n, p in zip(names, parts, strict=True)}
    refuse_divergence(terms, epoch, task)
    return terms


def refuse_divergence(terms, epoch, task):
    """Raise FloatingPointError for a loss term that is not finite in any restart.

    While one restart is finite, training goes on and the others may diverge.
    """
    for name, value in terms.items():
        if not np.any(np.isfinite(value)):
            raise FloatingPointError(
                f"The loss term {name!r} became {np.ravel(value)[0]} in epoch {epoch + 1} "
                f"({task}): training has diverged. Lower learning_rate_init, set max_grad_norm, "
                "or standardise the data."
            )


# --- Optimisers ------------------------------------------------------------------------


class _OptimizerFactory:
    """Builds the optimiser of a phase, fused into one kernel where torch has one."""

    def __init__(self, solver, learning_rate, epsilon, momentum, weight_decay):
        self.solver, self.learning_rate = solver, learning_rate
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.momentum = momentum

    def __call__(self, phase):
        if not phase.parameters:
            return None
        rate = self.learning_rate if phase.learning_rate is None else phase.learning_rate
        device = phase.parameters[0].device.type
        options = {"fused": True} if device in ("cpu", "cuda") else {"foreach": True}
        options |= {"lr": rate, "weight_decay": self.weight_decay}
        if self.solver == "sgd":
            return torch.optim.SGD(phase.parameters, momentum=float(self.momentum or 0), **options)
        betas = (0.9 if self.momentum is None else float(self.momentum), 0.999)
        return torch.optim.Adam(phase.parameters, eps=self.epsilon, betas=betas, **options)


def optimizer_to_numpy(optimizer):
    """Moments and step counts of an optimiser: dict of dict of ndarray."""
    state = optimizer.state_dict()["state"]
    return {
        i: {name: value.detach().cpu().numpy().copy() for name, value in moments.items()}
        for i, moments in state.items()
    }


def _resume(given, built):
    """Optimisers to begin with, from what `minimize` was given and what it would build."""
    if given is None:
        return built
    resumed = []
    for state, optimizer in zip(given, built, strict=True):
        if isinstance(state, torch.optim.Optimizer):
            optimizer = state
        else:
            moments = {
                i: {name: torch.tensor(value) for name, value in values.items()}
                for i, values in state.items()
            }
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        resumed.append(optimizer)
    return resumed


def _autocast(device, precision):
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=TORCH_DTYPES[precision])
