"""Threads: small networks cost no more CPU on two threads than on one, also on a busy machine.

Threads of OpenMP wait for each other after each parallel region by spinning. Where other processes
have the cores, a region of microseconds waits for milliseconds, and a small network opens tens of
thousands of them. Small fits are made with the number of threads set to one and to two in turn, on
idle cores and beside two busy loops, and their CPU seconds are compared; so are the seconds of a
large network's steps inside and outside of the limit, which is not one for them.

    python benchmarks/speed/threads.py [--quick]
"""

import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import torch
from measuring import Measurement, main
from sklearn.datasets import make_blobs

from deepmix import DCAN, AutoencoderDeepDPM, ClusteringModule, DeepDPM, NeuralMixtureEM
from deepmix._torch import state_size, threads_for
from deepmix.networks import MLP

CPU, LARGE = 1.3, 1.05  # limits: CPU seconds on two threads to those on one; a large net's steps
SIZES, BATCH_SIZE = (784, 500, 500, 2000, 10), 128

SMALL = {
    "DeepDPM by EM, 4271 x 30": (4271, DeepDPM, {"amortized": False, "max_iter": 22}),
    "ClusteringModule, 1000 x 30": (1000, ClusteringModule, {"n_clusters": 10, "max_iter": 20}),
    "NeuralMixtureEM, 1000 x 30": (1000, NeuralMixtureEM, {"n_clusters": 10, "max_iter": 40}),
    "DeepDPM with nets, 1000 x 30": (1000, DeepDPM, {"n_init": 1, "max_iter": 60}),
    "DCAN, 1000 x 30": (
        1000,
        DCAN,
        {"n_clusters": 10, "hidden_layer_sizes": (64,), "pretrain_max_iter": 10, "max_iter": 10},
    ),
    "AutoencoderDeepDPM, 1000 x 30": (
        1000,
        AutoencoderDeepDPM,
        {"hidden_layer_sizes": (64,), "pretrain_max_iter": 10, "n_alternations": 1},
    ),
}


@contextmanager
def busy_loops(number):
    """So many processes that compute for as long as the context is open."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def cpu_seconds(n_threads, cls, parameters, X):
    torch.set_num_threads(n_threads)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about too few epochs
        cls(random_state=0, **parameters).fit(X)
    return time.process_time() - start


def small_fits(n_rounds, machine):
    X, _ = make_blobs(4271, n_features=30, centers=12, cluster_std=4.0, random_state=0)
    for name, (n_rows, cls, parameters) in SMALL.items():
        cpu_seconds(1, cls, parameters, X[:n_rows])  # warm-up: imports and caches
        pairs = [
            [cpu_seconds(threads, cls, parameters, X[:n_rows]) for threads in (1, 2)]
            for _ in range(n_rounds)
        ]
        values = [two / one for one, two in pairs]
        yield Measurement.of(f"{name}, {machine}: 2 threads / 1", values, "x", at_most=CPU)
        yield Measurement.of(f"{name}, {machine}", [two for _, two in pairs], "CPU s")


def large_steps(n_rounds):
    """Steps of an autoencoder's encoder, inside of the limit and outside, in turn."""
    torch.set_num_threads(2)
    network, x = MLP(SIZES), torch.rand(BATCH_SIZE, SIZES[0])
    work = BATCH_SIZE * state_size(network)

    def seconds():
        start = time.perf_counter()
        for _ in range(10):
            network(x).square().sum().backward()
        return time.perf_counter() - start

    seconds()
    values = []
    for _ in range(5 * n_rounds):
        with threads_for(work):
            inside = seconds()
        values.append(inside / seconds())
    name = "-".join(map(str, SIZES))
    yield Measurement.of(f"steps of {name}: inside / outside", values, "x", at_most=LARGE)


def measurements(options, device):
    n_rounds = 3 if options.quick else 7
    yield from large_steps(n_rounds)
    yield from small_fits(n_rounds, "idle")
    with busy_loops(2):
        yield from small_fits(n_rounds, "busy")


if __name__ == "__main__":
    sys.exit(main("threads", __doc__, measurements, threads=2))
