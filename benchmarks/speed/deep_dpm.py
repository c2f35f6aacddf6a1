"""Time and memory of DeepDPM against the number of rows, of features and of clusters.

Gaussian blobs; training begins with the true number of clusters and ends when no proposal is left,
so that what is measured is not a search of unlike lengths. Each fit has a process of its own.
Seconds are those of the process on one thread; an exponent is the slope of a power law.

    python benchmarks/speed/deep_dpm.py --quick
"""

import argparse
import csv
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from measuring import cpu_name
from overhead import MIB, PeakMemory
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning

import deepmix
from deepmix import DeepDPM

BASE = {"n": 20_000, "d": 10, "k": 10}
SIZES = {
    "n": (1_000, 10_000, 100_000, 1_000_000),
    "d": (2, 8, 32, 128),
    "k": (3, 30, 300),
}
QUICK = {"n": (1_000, 10_000, 50_000), "d": (2, 8, 32), "k": (3, 30)}
# Exponents of the power laws of seconds: at most linear.
LIMITS = {"n": 1.1, "k": 1.1}


def child(n, d, k, amortized):
    """Fit once and print seconds, epochs and peak memory as JSON."""
    torch.set_num_threads(1)
    X, _ = make_blobs(n, d, centers=k, cluster_std=0.5, random_state=0)
    X = X.astype(np.float32)
    model = DeepDPM(k, amortized=amortized, random_state=0, max_iter=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X[: max(500, 2 * k)])  # once before: libraries are loaded
        with PeakMemory(torch.device("cpu")) as peak:
            begin = time.process_time()
            model.fit(X)
            seconds = time.process_time() - begin
    epochs = max(1, model.n_iter_)
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3),
                "epochs": epochs,
                "peak_mib": round(peak.excess / MIB, 1),
                "found": model.n_clusters_,
            }
        )
    )


def measure(n, d, k, amortized):
    task = [str(n), str(d), str(k), str(int(amortized))]
    command = [sys.executable, __file__, "--child", *task]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def exponents(rows):
    """Slope of log seconds, for each axis and way of training."""
    for axis, limit in LIMITS.items():
        for amortized in (False, True):
            part = [r for r in rows if r["axis"] == axis and r["amortized"] == amortized]
            part = [row for row in part if axis != "n" or row["n"] >= 10_000]  # past the overhead
            x = np.log([row[axis] for row in part])
            slope = np.polyfit(x, np.log([row["seconds"] for row in part]), 1)[0]
            yield axis, amortized, float(slope), limit


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes: a minute or two")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child[:3], bool(options.child[3]))
    about = {"device": cpu_name(), "deepmix": deepmix.__version__, "torch": torch.__version__}
    rows = []
    for axis, sizes in (QUICK if options.quick else SIZES).items():
        for size in sizes:
            for amortized in (False, True):
                shape = {**BASE, axis: size}
                found = measure(**shape, amortized=amortized)
                rows.append({"axis": axis, **shape, "amortized": amortized, **found, **about})
                print(rows[-1], flush=True)
        write(options.out / "deep_dpm_cpu.csv", rows)
    code = 0
    for axis, amortized, slope, limit in exponents(rows):
        verdict = "holds" if slope <= limit else "FAILS"
        code |= verdict == "FAILS"
        way = "nets" if amortized else "EM"
        print(f"seconds ~ {axis}^{slope:.2f} ({way}), <= {limit}: {verdict}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
