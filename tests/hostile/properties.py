"""What has to hold of every fit: it works, or it is refused in words, and nothing else changes."""

import ast
import contextlib
import functools
import io
import random
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.base import clone

import deepmix
from hostile.data import fingerprint, one_row

PACKAGE, SKLEARN = (str(Path(package.__file__).parent) for package in (deepmix, sklearn))
# Where scikit-learn looks at parameters and data, as opposed to its algorithms.
VALIDATION = tuple(f"{SKLEARN}/{name}" for name in ("utils/", "externals/", "base.py", "callback/"))
REFUSALS = (ValueError, TypeError, FloatingPointError)
# Differences by rounding between a row alone and the same row in its batch.
ROUNDING = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-6}


@dataclass(frozen=True)
class Fault:
    """What did not hold, where in the package, and what was seen instead."""

    kind: str
    where: str = ""
    detail: str = ""

    @property
    def key(self):
        return self.kind, self.where


# --- Who raised, who warned ------------------------------------------------------------


@functools.cache
def own_words(path):
    """Lines of a file that are part of a ``raise``, and of a call of ``warn``."""
    raises, warns = set(), set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        lines = range(getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) + 1)
        if isinstance(node, ast.Raise):
            raises.update(lines)
        elif isinstance(node, ast.Call) and "warn" in ast.unparse(node.func):
            warns.update(lines)
    return raises, warns


def place(frames):
    """The innermost line of the package, of (path, line, function): 'file.py:function'."""
    inside = [frame for frame in frames if frame[0].startswith(PACKAGE)]
    path, _, function = inside[-1] if inside else frames[-1]
    return f"{Path(path).name}:{function}"


def is_refusal(error, frames):
    """Whether an error was raised in words, by the package or by validation in scikit-learn."""
    if not isinstance(error, REFUSALS):
        return False
    path, line, _ = frames[-1]
    if path.startswith(PACKAGE):
        return line in own_words(path)[0]
    # NumPy or pandas below the validation is a value that is no number.
    inside = [frame[0] for frame in frames if frame[0].startswith(SKLEARN)]
    algorithms = any(not path.startswith(VALIDATION) for path in inside)
    below = [path for path, *_ in frames if path.startswith((PACKAGE, SKLEARN))]
    return bool(inside) and not algorithms and below[-1] == inside[-1]


def error_fault(error, doing):
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)[1:]]
    if doing == "fit" and is_refusal(error, frames):
        return None
    text = f"{type(error).__name__}: {error}"
    by = "" if frames[-1][0].startswith(PACKAGE) else f" (from {Path(frames[-1][0]).name})"
    return Fault(f"{doing} raises {type(error).__name__}", place(frames), text[:300] + by)


@contextlib.contextmanager
def listening(heard):
    """Collect a `Fault` for each warning that neither the package nor scikit-learn worded."""

    def hear(message, category, *_):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.endswith("warnings.py") and code.co_filename != __file__:
                frames.insert(0, (code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back
        if not any(path.startswith((PACKAGE, SKLEARN)) for path, *_ in frames):
            return  # of making the case
        path, line, _ = frames[-1]
        worded = path.startswith((PACKAGE, SKLEARN)) and line in own_words(path)[1]
        if not worded or issubclass(category, RuntimeWarning):
            heard.append(Fault(f"warns {category.__name__}", place(frames), str(message)[:300]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear
        yield


# --- Global states ---------------------------------------------------------------------


def global_states():
    """Everything outside that a fit must leave as it was: dict of name to value."""
    return {
        "numpy generator": repr(np.random.get_state()),  # noqa: NPY002
        "Python generator": random.getstate(),
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "errstate": np.geterr(),
        # Torch imports SymPy, which adds one, when it makes its first optimiser.
        "warnings filters": [f for f in warnings.filters if "sympy" not in f[2].__module__],
    }


def parameter_states(model):
    """Parameters by their values."""
    states = {}
    for name, value in model.get_params(deep=False).items():
        if isinstance(value, torch.nn.Module):
            lazy = torch.nn.parameter.is_lazy
            value = [repr(t) if lazy(t) else fingerprint(t) for t in value.state_dict().values()]
        elif isinstance(value, np.random.RandomState):
            continue  # drawing from it is what it is for
        states[name] = fingerprint(value)
    return states


# --- Properties of a fit ---------------------------------------------------------------


def fitted_values(model):
    """Public fitted numbers and arrays, those of the history too: dict of name to value."""
    values = {}
    for name in dir(model):
        if name.endswith("_") and not name.startswith("_") and name != "module_":
            value = getattr(model, name)
            parts = value if isinstance(value, dict) else {None: value}
            for key, part in parts.items():
                if isinstance(part, np.ndarray | float | int) and name != "feature_names_in_":
                    values[name if key is None else f"{name}[{key}]"] = np.asarray(part)
    return values


def is_finite(array):
    if array.dtype.names:  # proposals: the logarithm of a ratio of zero is what it should be
        numbers = [array[name] for name in array.dtype.names if array[name].dtype.kind == "f"]
        return all(is_finite(np.where(part == -np.inf, 0.0, part)) for part in numbers)
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def attribute_faults(model):
    for name, value in fitted_values(model).items():
        if not is_finite(value):
            yield Fault(f"{name} is not finite", detail=np.array2string(value, threshold=8))


def label_faults(model, X, n):
    labels = model.labels_
    if labels.dtype != np.int64 or labels.shape != (n,):
        yield Fault("labels_ have another dtype or shape", detail=f"{labels.dtype}{labels.shape}")
    if labels.min() < 0 or labels.max() >= model.n_clusters_:
        yield Fault("labels_ out of range", detail=f"{labels.min()}..{labels.max()}")
    if not np.array_equal(model.predict(X), labels):
        yield Fault("labels_ are not predict(X)", detail=f"{model.predict(X)} {labels}")


def probability_faults(model, X, n):
    resp = model.predict_proba(X)
    if resp.shape != (n, model.n_clusters_):
        yield Fault("predict_proba has another shape", detail=str(resp.shape))
    if not np.isfinite(resp).all():
        yield Fault("predict_proba is not finite")
        return
    if resp.min() < 0 or resp.max() > 1 + 1e-6:
        yield Fault("predict_proba out of [0, 1]", detail=f"{resp.min()}..{resp.max()}")
    error = np.abs(resp.sum(axis=1, dtype=np.float64) - 1).max()
    if error > 1e-5:
        yield Fault("rows of predict_proba do not sum to one", detail=f"off by {error}")
    chosen = resp[np.arange(n), model.labels_]
    if (chosen < resp.max(axis=1) - ROUNDING[resp.dtype]).any():
        yield Fault("predict is not the argmax of predict_proba")


def output_faults(model, X, n):
    embedded, scores = model.transform(X), model.score_samples(X)
    if embedded.shape != (n, len(model.get_feature_names_out())):
        yield Fault("transform has another shape", detail=str(embedded.shape))
    if scores.shape != (n,):
        yield Fault("score_samples has another shape", detail=str(scores.shape))
    for name, value in (("transform", embedded), ("score_samples", scores)):
        if not np.isfinite(value).all():
            yield Fault(f"{name} is not finite", detail=np.array2string(value, threshold=8))
    if np.isfinite(scores).all() and not np.isfinite(model.score(X)):
        yield Fault("score is not finite", detail=f"scores up to {np.abs(scores).max()}")
    if hasattr(model, "sample") and not np.isfinite(model.sample(5)[0]).all():
        yield Fault("sample is not finite")


def row_faults(model, X, n):
    """A row alone is what it is in its batch."""
    i = n // 2
    row = one_row(X, i)
    for method in ("predict_proba", "transform", "score_samples"):
        batch = getattr(model, method)(X).astype(np.float64)
        alone = getattr(model, method)(row)
        if not np.isfinite(batch).all():
            continue
        error = np.abs(alone[0].astype(np.float64) - batch[i]).max()
        if not error <= ROUNDING[alone.dtype] * max(1.0, np.abs(batch).max()):
            yield Fault(f"{method} of a row alone differs", detail=f"{alone[0]} != {batch[i]}")


def refit_faults(model, fresh, X, weight):
    fresh.fit(X, sample_weight=weight)
    first, second = fitted_values(model), fitted_values(fresh)
    differing = [
        name
        for name in first
        if name not in second or first[name].tobytes() != second[name].tobytes()
    ]
    if differing:
        yield Fault("a clone fits to other values", detail=", ".join(differing))


# --- A case ----------------------------------------------------------------------------


def outcome_and_faults(case):
    """Fit a case and look at everything: 'fitted', 'refused' or 'failed', and list of `Fault`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, X = case.estimator(), case.data.make()
        weight = None if case.weights is None else case.weights.make(case.data.n)
        fresh = clone(model)
    n, faults = case.data.n, []
    given = fingerprint(X), fingerprint(weight), parameter_states(model)
    printed = io.StringIO()
    with listening(faults), contextlib.redirect_stdout(printed):
        before = global_states()
        outcome = "fitted"
        try:
            model.fit(X, sample_weight=weight)
        except Exception as error:
            faults.append(error_fault(error, "fit"))
            outcome = "refused" if faults[-1] is None else "failed"
        if outcome == "fitted":
            faults.extend(later_faults(model, fresh, X, n, weight))
        after = global_states()
    if printed.getvalue() and not model.verbose:
        faults.append(Fault("prints without being asked to", detail=printed.getvalue()[:80]))
    for name, state in before.items():
        if state != after[name]:
            faults.append(Fault(f"changes the {name}"))
    now = fingerprint(X), fingerprint(weight), parameter_states(model)
    for name, old, new in zip(("X", "sample_weight", "a parameter"), given, now):
        if old != new:
            faults.append(Fault(f"changes {name}"))
    # Each once: a warning may come in every prediction.
    unique = {fault.key: fault for fault in faults if fault is not None}
    return outcome, list(unique.values())


def later_faults(model, fresh, X, n, weight):
    """What does not hold of a fitted model. Each part is looked at, whatever failed before."""
    parts = {
        "reading attributes": lambda: attribute_faults(model),
        "predict": lambda: label_faults(model, X, n),
        "predict_proba": lambda: probability_faults(model, X, n),
        "a prediction": lambda: output_faults(model, X, n),
        "one row": lambda: row_faults(model, X, n),
        "a refit": lambda: refit_faults(model, fresh, X, weight),
    }
    for doing, faults in parts.items():
        try:
            yield from faults()
        except Exception as error:
            yield error_fault(error, doing)
