"""What the benchmarks of speed share: contestants that take turns, figures with limits, a file."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from deepmix._torch import Rows, resolve_device
from deepmix.training import minimize

sys.path.append(str(Path(__file__).parents[1]))  # of records.py, which papers/ has too
from records import VERSIONS, device_name, write_rows

MIB = 2**20

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


class HandEpochs:
    """Epochs of a loop written by hand, one a call: resident data, autograd, fused Adam.

    Parameters
    ----------
    network : nn.Module
    X : Tensor
    batch_size : int
    """

    def __init__(self, network, X, batch_size):
        self.X, self.batch_size = X, batch_size
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self):
        order = torch.randperm(len(self.X), generator=self.generator).to(self.X.device)
        total = torch.zeros((), device=self.X.device)
        for index in order.split(self.batch_size):
            loss = self.loss(self.X[index])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return total.item() / len(self.X)

    def loss(self, x):
        """Loss of a batch, summed over its rows."""
        raise NotImplementedError


def random_rows(n_rows, n_features, device):
    """Uniform random rows, as `Rows` and as the tensor on the device."""
    X = np.random.default_rng(0).random((n_rows, n_features), dtype=np.float32)
    rows = Rows(X, device, torch.float32)
    return rows, torch.from_numpy(X).to(device)


# --- Memory ----------------------------------------------------------------------------


class PeakMemory:
    """Bytes by which the peak of this process (or of its accelerator) exceeds the start."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = self._status("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = self._status("VmHWM")
        self.excess = peak - self.start

    @staticmethod
    def _status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


# --- A benchmark -----------------------------------------------------------------------


def main(name, description, measurements, child=None, threads=1):
    """Print and write what a benchmark measures; the exit code, 1 if a limit is broken.

    Parameters
    ----------
    name : str
        Name of the file of results.
    description : str
        Text whose first line is shown by ``--help``.
    measurements : callable
        ``measurements(options, device)`` yields each `Measurement`, or rows as dict for a file
        that holds them in place of measurements.
    child : callable or None
        What `in_child` calls, with strings; it returns a dict.
    threads : int
        Default of the option ``--threads``.
    """
    options = parse_options(description, threads)
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(child(*options.child)))
        return 0
    device, found = resolve_device(options.device), []
    for figure in measurements(options, device):
        print(figure, flush=True)
        found.append(figure)
    figures = [asdict(f) for f in found if isinstance(f, Measurement)]
    rows = [f for f in found if isinstance(f, dict)]
    about = {"device": device_name(device), "threads": options.threads, "quick": options.quick}
    about |= {package: VERSIONS[package] for package in ("deepmix", "torch")}
    path = options.out / f"{name}_{device.type}.csv"
    write_rows(path, [row | about for row in rows or figures])
    return int(any(figure["verdict"] == "FAILS" for figure in figures))


def parse_options(description, threads):
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds and rows: a minute or two")
    add("--device", default="cpu")
    add("--threads", type=int, default=threads)
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    add("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_child(script, *task):
    """What ``child(*task)`` of a benchmark returns in a process of its own."""
    command = [sys.executable, script, "--child", *map(str, task)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
