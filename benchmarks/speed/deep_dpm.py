"""Time and memory of DeepDPM against the number of rows, of features and of clusters.

Gaussian blobs; training begins with the true number of clusters and ends when no proposal is left,
so that what is measured is not a search of unlike lengths. Each fit has a process of its own.
Seconds are those of the process on one thread; an exponent is the slope of a power law.

    python benchmarks/speed/deep_dpm.py --quick
"""

import sys
import time
import warnings

import numpy as np
import torch
from measuring import MIB, Measurement, PeakMemory, in_child, main
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning

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


def child(*task):
    """Fit once: seconds, epochs, peak memory and the number of clusters found."""
    n, d, k, amortized = map(int, task)
    X, _ = make_blobs(n, d, centers=k, cluster_std=0.5, random_state=0)
    X = X.astype(np.float32)
    model = DeepDPM(k, amortized=bool(amortized), random_state=0, max_iter=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X[: max(500, 2 * k)])  # once before: libraries are loaded
        with PeakMemory(torch.device("cpu")) as peak:
            begin = time.process_time()
            model.fit(X)
            seconds = time.process_time() - begin
    return {
        "seconds": round(seconds, 3),
        "epochs": max(1, model.n_iter_),
        "peak_mib": round(peak.excess / MIB, 1),
        "found": model.n_clusters_,
    }


def exponents(rows):
    """Slope of log seconds, for each axis and way of training."""
    for axis, limit in LIMITS.items():
        for amortized, way in ((False, "EM"), (True, "nets")):
            part = [r for r in rows if r["axis"] == axis and r["amortized"] == amortized]
            part = [row for row in part if axis != "n" or row["n"] >= 10_000]  # past the overhead
            x = np.log([row[axis] for row in part])
            slope = np.polyfit(x, np.log([row["seconds"] for row in part]), 1)[0]
            name = f"exponent of {axis} in the seconds of {way}"
            yield Measurement.of(name, [float(slope)], "", at_most=limit)


def measurements(options, device):
    """Rows of each fit, which the file holds; then the exponents."""
    rows = []
    for axis, sizes in (QUICK if options.quick else SIZES).items():
        for size in sizes:
            for amortized in (False, True):
                shape = {**BASE, axis: size}
                found = in_child(__file__, *shape.values(), int(amortized))
                rows.append({"axis": axis, **shape, "amortized": amortized, **found})
                yield rows[-1]
    yield from exponents(rows)


if __name__ == "__main__":
    sys.exit(main("deep_dpm", __doc__, measurements, child=child))
