"""What the benchmarks of speed share: contestants that take turns, figures with limits, a file."""

import argparse
import csv
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import deepmix
from deepmix._torch import Rows, resolve_device
from deepmix.training import minimize

# --- Measurements ----------------------------------------------------------------------


@dataclass
class Measurement:
    """A figure, the range it was seen in, and its limit."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    limit: str = ""
    verdict: str = ""

    @classmethod
    def of(cls, name, values, unit, at_most=None, at_least=None):
        value = statistics.median(values)
        found = cls(name, value, min(values), max(values), unit)
        if at_most is not None:
            found.limit, holds = f"<= {at_most:g}", value <= at_most
        elif at_least is not None:
            found.limit, holds = f">= {at_least:g}", value >= at_least
        else:
            return found
        found.verdict = "holds" if holds else "FAILS"
        return found

    def __str__(self):
        spread = f"{self.value:9.3f}  ({self.low:.3f} to {self.high:.3f}) {self.unit}"
        return f"{self.name:<58}{spread:<42}{self.limit:>9}  {self.verdict}"


class Turns:
    """A callback of the engine: after each of its epochs every other contestant has one.

    Parameters
    ----------
    others : dict of str to callable
        Each call is an epoch.
    device : torch.device

    Attributes
    ----------
    times : dict of str to list
        Seconds of each epoch; those of the engine under the name 'engine'.
    """

    def __init__(self, others, device):
        self.others, self.device = others, device
        self.times = {"engine": [], **{name: [] for name in others}}
        # On one thread of a CPU its own seconds count: a busy neighbour takes none of them.
        one_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if one_thread else time.perf_counter
        self.mark = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def __call__(self, state):
        self._lap("engine")
        for name, run_epoch in self.others.items():
            run_epoch()
            self._lap(name)
        return False

    def _lap(self, name):
        now = self.now()
        self.times[name].append(now - self.mark)
        self.mark = self.now()


def take_turns(objective, rows, others, n_rounds, **options):
    """Train by the engine, the others in turns with it: dict of name to list of seconds.

    One round more is run first, and not counted.
    """
    turns = Turns(others, rows.device)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "callbacks": [turns], **options}
    minimize(objective, rows, max_iter=n_rounds + 1, **options)
    return {name: values[1:] for name, values in turns.times.items()}


def ratios(times, name, reference):
    return [a / b for a, b in zip(times[name], times[reference], strict=True)]


class EngineEpochs:
    """Epochs of `deepmix.training.minimize`, one a call, the optimiser kept between them."""

    def __init__(self, objective, rows, **options):
        self.objective, self.rows, self.options = objective, rows, options
        self.options["generator"] = torch.Generator().manual_seed(0)
        self.optimizers = None

    def __call__(self):
        history = minimize(
            self.objective, self.rows, max_iter=1, optimizers=self.optimizers, **self.options
        )
        self.optimizers = history.optimizers


def random_rows(n_rows, n_features, device):
    """Uniform random rows, as `Rows` and as the tensor on the device."""
    X = np.random.default_rng(0).random((n_rows, n_features), dtype=np.float32)
    rows = Rows(X, device, torch.float32)
    return rows, torch.from_numpy(X).to(device)


# --- A benchmark -----------------------------------------------------------------------


def parse_options(description, extend=None):
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds and rows: a minute or two")
    add("--device", default="cpu")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    if extend is not None:
        extend(add)
    return parser.parse_args()


def run(name, measurements, options):
    """Print and write ``measurements(options, device)``; the exit code, 1 if a limit is broken."""
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    found = []
    for measurement in measurements(options, device):
        print(measurement, flush=True)
        found.append(measurement)
    write(options.out / f"{name}_{device.type}.csv", found, options, device)
    return int(any(measurement.verdict == "FAILS" for measurement in found))


def write(path, found, options, device):
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": options.threads,
        "quick": options.quick,
        "deepmix": deepmix.__version__,
        "torch": torch.__version__,
    }
    rows = [{**asdict(measurement), **about} for measurement in found]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "cpu")
