"""What the package costs beside a loop written by hand, and how much memory it takes.

Contestants take turns, an epoch each, in one process: what else the machine does meets all of them,
and the figure is the median of the ratios. Exit code 1 if a limit is broken.

    OMP_NUM_THREADS=1 python benchmarks/speed/overhead.py --quick
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from measuring import (
    MIB,
    EngineEpochs,
    HandEpochs,
    Measurement,
    PeakMemory,
    in_child,
    main,
    random_rows,
    ratios,
    take_turns,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepmix import AECM, ClusteringModule
from deepmix.autoencoder import ReconstructionObjective, build_autoencoder, draw_autoencoder
from deepmix.mixture.clustering_module.aecm import JointObjective
from deepmix.mixture.clustering_module.clustering_module import ClusteringObjective
from deepmix.mixture.clustering_module.losses import DirichletPrior
from deepmix.mixture.clustering_module.network import AECMNetwork, ClusteringNetwork
from deepmix.networks import Standardizer

PENDIGITS = (10_992, 16)  # rows and features of the data that the figures are about
MNIST_FEATURES = 784
N_CLUSTERS = 10
CM_BATCH_SIZE = 80

# Limits of the ratios and figures below.
SMALL_NET, LARGE_NET = 1.2, 1.05
CM_MILLISECONDS, CM_RESTARTS = 30.0, 4.0
BFLOAT16_GAIN = 1.8
FIT_MEMORY = 0.5  # over the size of the data, besides data and weights; a copy would be 1
TRANSFORM_MEMORY = 64.0  # MiB beside input and output: some batches

# --- Contestants -----------------------------------------------------------------------


class HandAutoencoder(HandEpochs):
    """The loop that one would write for an autoencoder."""

    def __init__(self, autoencoder, X, batch_size):
        super().__init__(autoencoder, X, batch_size)
        self.autoencoder = autoencoder

    def loss(self, x):
        return (x - self.autoencoder(x)).square().sum() / x.shape[1]


class DataLoaderEpochs:
    """A clustering module in the usual style: modules, autograd, DataLoader, Adam."""

    def __init__(self, X, batch_size, concentration):
        n_features, device = X.shape[1], X.device
        self.encoder = nn.Linear(n_features, N_CLUSTERS, device=device)
        self.decoder = nn.Linear(N_CLUSTERS, n_features, device=device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)
        self.batches = DataLoader(TensorDataset(X), batch_size, shuffle=True)
        self.concentration = concentration

    def __call__(self):
        for (x,) in self.batches:
            resp = self.encoder(x).softmax(dim=1)
            centers = self.decoder.weight.T + self.decoder.bias
            products = centers @ centers.T
            pairs = resp.T @ resp
            energy = (x - self.decoder(resp)).square().sum()
            energy = energy + (resp * (1 - resp)).sum(dim=0) @ products.diagonal()
            energy = energy - (pairs * products).sum() + (pairs * products).diagonal().sum()
            balance = (1 - self.concentration) * (resp.mean(dim=0) + 1e-10).log().sum()
            self.optimizer.zero_grad()
            (energy + balance).backward()
            self.optimizer.step()


# --- What is measured ------------------------------------------------------------------


def engine_against_hand(name, sizes, n_rows, limit, n_rounds, device):
    """The engine's time as a ratio to that of the loop by hand, on the same autoencoder."""
    rows, X = random_rows(n_rows, sizes[0], device)
    generator = torch.Generator().manual_seed(0)
    autoencoder = build_autoencoder(sizes[0], sizes[-1], sizes[1:-1])
    draw_autoencoder(autoencoder, sizes[0], sizes[-1], generator).to(device)
    objective = ReconstructionObjective(copy.deepcopy(autoencoder), nn.Identity())
    others = {"hand": HandAutoencoder(autoencoder, X, 256)}
    times = take_turns(objective, rows, others, n_rounds, batch_size=256)
    shape = "-".join(map(str, sizes))
    label = f"engine / loop by hand, {name} net ({shape})"
    yield Measurement.of(label, ratios(times, "engine", "hand"), "", at_most=limit)


def clustering_module(n_rounds, device):
    """Epochs of the clustering module on data of the shape of Pendigits."""
    rows, X = random_rows(*PENDIGITS, device)

    def objective(n_restarts):
        generator = torch.Generator().manual_seed(0)
        network = ClusteringNetwork(PENDIGITS[1], N_CLUSTERS, n_restarts).init_random(generator)
        prior = DirichletPrior(13.0, None, X)
        scaler = Standardizer(PENDIGITS[1]).to(device)
        return ClusteringObjective(scaler, network.to(device), prior)

    options = {"batch_size": CM_BATCH_SIZE}
    others = {
        "ten": EngineEpochs(objective(10), rows, **options),
        "autograd": DataLoaderEpochs(X, CM_BATCH_SIZE, 13.0),
    }
    times = take_turns(objective(1), rows, others, n_rounds, **options)
    limit = CM_MILLISECONDS if device.type == "cpu" else None
    label = f"ClusteringModule, batch {CM_BATCH_SIZE}: "
    yield Measurement.of(label + "epoch", [1e3 * t for t in times["engine"]], "ms", at_most=limit)
    against_one = ratios(times, "ten", "engine")
    yield Measurement.of(label + "ten restarts / one", against_one, "", at_most=CM_RESTARTS)
    yield Measurement.of(
        label + "autograd and DataLoader / engine", ratios(times, "autograd", "engine"), ""
    )


def bfloat16(n_rows, n_rounds, device):
    """How much faster AECM trains with ``precision='bfloat16'``."""
    rows, _ = random_rows(n_rows, MNIST_FEATURES, device)

    def objective():
        generator = torch.Generator().manual_seed(0)
        arguments = {"n_features": MNIST_FEATURES, "latent_dim": 10}
        arguments["hidden_layer_sizes"] = (500, 500, 2000)
        network = AECMNetwork(n_clusters=N_CLUSTERS, **arguments)
        draw_autoencoder(network.autoencoder, MNIST_FEATURES, 10, generator)
        network.clustering.init_random(generator)
        network.to(device)
        prior = DirichletPrior("auto", 2.0, network.scaler.scale)
        return JointObjective(network, prior, 1.0, 1.0)

    others = {"bfloat16": EngineEpochs(objective(), rows, batch_size=500, precision="bfloat16")}
    times = take_turns(objective(), rows, others, n_rounds, batch_size=500)
    steps = n_rows / 500
    per_step = [1e3 * t / steps for t in times["engine"]]
    yield Measurement.of("AECM, batch 500: step in float32", per_step, "ms")
    limit = BFLOAT16_GAIN if has_bfloat16(device) else None
    gain = ratios(times, "engine", "bfloat16")
    yield Measurement.of("AECM, batch 500: float32 / bfloat16", gain, "", at_least=limit)


def has_bfloat16(device):
    """Whether a CPU multiplies bfloat16 matrices in hardware; no limit for other devices."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


# --- Memory ----------------------------------------------------------------------------


def memory(quick, device):
    """Peaks of memory, each in a process of its own: allocators keep what they once had."""
    n_fit, n_rows = 400_000, 200_000 if quick else 1_000_000
    for name in ("ClusteringModule", "AECM"):
        runs = [in_child(__file__, "fit", name, n_fit, device) for _ in range(1 if quick else 3)]
        label = f"{name}.fit: peak beside data and weights / data"
        shares = [run["excess"] / run["data"] for run in runs]
        yield Measurement.of(label, shares, "", at_most=FIT_MEMORY)
        found = in_child(__file__, "transform", name, n_rows, device)
        label = f"{name}.transform, {n_rows} rows: peak beside the result"
        excess = (found["excess"] - found["result"]) / MIB
        yield Measurement.of(label, [excess], "MiB", at_most=TRANSFORM_MEMORY)


def child(task, name, n_rows, device):
    """The peak of one task, and the sizes of its data and result, in bytes."""
    torch.set_num_threads(1)
    n_features = 256 if task == "fit" else 16
    X = np.random.default_rng(0).random((int(n_rows), n_features), dtype=np.float32)
    few = {"max_iter": 2, "tol": 0, "device": device, "random_state": 0}
    if name == "AECM":
        model = AECM(10, hidden_layer_sizes=(64, 32), pretrain_max_iter=2, **few)
    else:
        model = ClusteringModule(10, n_init=1, **few)
    model.fit(X[:4096])  # once before: libraries and pools are loaded
    with PeakMemory(torch.device(device)) as peak:
        result = model.fit(X).labels_ if task == "fit" else model.transform(X)
    weights = sum(tensor.nbytes for tensor in model.module_.state_dict().values())
    excess = peak.excess - (8 * weights if task == "fit" else 0)
    return {"data": X.nbytes, "result": result.nbytes, "excess": max(excess, 0)}


# --- The benchmark ---------------------------------------------------------------------


def measurements(options, device):
    """All measurements, one after another."""
    n_rounds, n_rows = (7, 5_120) if options.quick else (15, 10_240)
    few = 3 if options.quick else 7
    small, large = (16, 64, 32, 10), (784, 500, 500, 2000, 10)
    yield from engine_against_hand("small", small, PENDIGITS[0], SMALL_NET, n_rounds, device)
    yield from engine_against_hand("large", large, n_rows, LARGE_NET, n_rounds, device)
    yield from clustering_module(n_rounds, device)
    yield from bfloat16(n_rows, few, device)
    if device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        yield from memory(options.quick, device)


if __name__ == "__main__":
    sys.exit(main("overhead", __doc__, measurements, child=child))
