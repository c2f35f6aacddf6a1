"""What neural mixture EM costs beside loops written by hand, and what its options cost.

The network is that of the paper for MNIST, on images of 14 x 14 pixels: at 28 x 28 it takes five
times as long, and what surrounds it a smaller share. Exit code 1 if a limit is broken.

    OMP_NUM_THREADS=1 python benchmarks/speed/neural_mixture_em.py --quick
"""

import copy
import itertools
import sys
from functools import partial

import numpy as np
import torch
from measuring import (
    EngineEpochs,
    HandEpochs,
    Measurement,
    Turns,
    main,
    random_rows,
    ratios,
    take_turns,
)
from sklearn.datasets import make_blobs
from torch import nn
from torch.nn.functional import logsigmoid

from deepmix import NeuralMixtureEM
from deepmix.augmentation import IMAGE_AUGMENTATIONS, sobel
from deepmix.mixture.neural_mixture_em.network import NeuralMixtureNetwork
from deepmix.mixture.neural_mixture_em.training import MixtureEM

PENDIGITS = (10_992, 16)  # rows and features
SIDE, N_CLUSTERS, BATCH_SIZE, GAMMA = 14, 10, 128, 5.0
AUGMENTATION = IMAGE_AUGMENTATIONS["medium"]

# Limits of the ratios below.
IMAGE_STEP, VECTOR_STEP = 1.05, 1.2
VIEWS = 0.05
RESTARTS = 3.0
LEARNED = 4.0

# --- Contestants -----------------------------------------------------------------------


class HandMixture(HandEpochs):
    """The loop that one would write for Eq. 6, or with ``view`` for Eq. 7.

    Parameters
    ----------
    network : nn.Module
        (B, ...) -> (B, n_clusters).
    X : Tensor
        The rows, as the network takes them.
    view : callable or None
    look : callable or None
        Maps rows and views to the input of the network.
    """

    def __init__(self, network, X, view=None, look=None):
        super().__init__(network, X, BATCH_SIZE)
        self.network, self.view, self.look = network, view, look

    def loss(self, x):
        batches = [x] if self.view is None else [x, self.view(x)]
        seen = torch.cat(batches) if len(batches) > 1 else x
        scores = self.network(seen if self.look is None else self.look(seen)).split(len(x))
        parts = [(a - a.mean(0)) / (a.var(0, correction=0) + 1e-5).sqrt() for a in scores]
        p = parts[0].detach().softmax(dim=1)
        return -sum((p * logsigmoid(part / GAMMA)).sum() for part in parts)


class ViewEpochs:
    """Of an epoch by Eq. 7 the views and the edges, and nothing else."""

    def __init__(self, X, view, look):
        self.X, self.view, self.look = X, view, look

    @torch.no_grad()
    def __call__(self):
        for x in self.X.split(BATCH_SIZE):
            self.look(torch.cat([x, self.view(x)]))


def look(x):
    """Edges in the layout of memory that is the faster one."""
    return sobel(x).contiguous(memory_format=torch.channels_last)


def perceptron(sizes):
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def make_view(seed=0):
    return partial(AUGMENTATION, generator=torch.Generator().manual_seed(seed))


# --- What is measured ------------------------------------------------------------------


def image_steps(n_rows, n_rounds, device):
    """Eq. 7 on images: the engine against the loop by hand, views and edges alone, two-fold."""
    rows, X = random_rows(n_rows, SIDE**2, device)
    X = X.view(-1, 1, SIDE, SIDE)
    generator = torch.Generator().manual_seed(0)
    arguments = {"network": "mnist", "image_shape": (1, SIDE, SIDE)}
    network = NeuralMixtureNetwork(SIDE**2, N_CLUSTERS, **arguments).init_weights(generator)
    network.to(device)
    two_fold = MixtureEM(copy.deepcopy(network), make_view(), consistency_learning_rate=1e-4)
    others = {
        "hand": HandMixture(copy.deepcopy(network.members[0]), X, make_view(), look),
        "views": ViewEpochs(X, make_view(), look),
        "two-fold": EngineEpochs(two_fold, rows, batch_size=BATCH_SIZE),
    }
    objective = MixtureEM(network, make_view())
    times = take_turns(objective, rows, others, n_rounds, batch_size=BATCH_SIZE)
    n_steps, name = n_rows / BATCH_SIZE, f"network of MNIST, {SIDE} x {SIDE}: "
    yield Measurement.of(name + "step", [1e3 * t / n_steps for t in times["engine"]], "ms")
    yield Measurement.of(
        name + "engine / loop by hand", ratios(times, "engine", "hand"), "", at_most=IMAGE_STEP
    )
    yield Measurement.of(
        name + "views and edges / step", ratios(times, "views", "engine"), "", at_most=VIEWS
    )
    yield Measurement.of(name + "two-fold / Eq. 7", ratios(times, "two-fold", "engine"), "")


def vector_steps(n_rounds, device):
    """Eq. 6 on data of the shape of Pendigits: the engine against the loop by hand, restarts."""
    rows, X = random_rows(*PENDIGITS, device)

    def objective(n_members):
        generator = torch.Generator().manual_seed(0)
        network = NeuralMixtureNetwork(PENDIGITS[1], N_CLUSTERS, n_members=n_members)
        return MixtureEM(network.init_weights(generator).to(device))

    sizes = (PENDIGITS[1], 32, 32, N_CLUSTERS)
    others = {
        "hand": HandMixture(perceptron(sizes).to(device), X),
        "ten": EngineEpochs(objective(10), rows, batch_size=BATCH_SIZE),
    }
    times = take_turns(objective(1), rows, others, n_rounds, batch_size=BATCH_SIZE)
    n_steps, name = -(-PENDIGITS[0] // BATCH_SIZE), "vectors ({}-{}-{}-{}): ".format(*sizes)
    yield Measurement.of(name + "step", [1e3 * t / n_steps for t in times["engine"]], "ms")
    yield Measurement.of(
        name + "engine / loop by hand", ratios(times, "engine", "hand"), "", at_most=VECTOR_STEP
    )
    yield Measurement.of(
        name + "ten restarts / one", ratios(times, "ten", "engine"), "", at_most=RESTARTS
    )


def fits(n_rounds, device):
    """Whole fits of blobs of the shape of Pendigits: restarts, and shares that are learned."""
    X, _ = make_blobs(*PENDIGITS, centers=N_CLUSTERS, random_state=0)
    X = X.astype(np.float32)
    make = partial(NeuralMixtureEM, N_CLUSTERS, device=device, random_state=0)
    models = {
        "one": make(n_init=1),
        "ten": make(n_init=10),
        "learned": make(n_init=10, weights="learned"),
    }
    turns = Turns({name: partial(model.fit, X) for name, model in models.items()}, device)
    for _ in range(n_rounds + 1):
        turns(None)
    times = {name: values[1:] for name, values in turns.times.items()}
    yield Measurement.of("fit of {} x {}: one restart".format(*PENDIGITS), times["one"], "s")
    yield Measurement.of("fit: ten / one", ratios(times, "ten", "one"), "", at_most=RESTARTS)
    yield Measurement.of(
        "fit: weights='learned' / 'uniform'", ratios(times, "learned", "ten"), "", at_most=LEARNED
    )


# --- The benchmark ---------------------------------------------------------------------


def measurements(options, device):
    n_rounds, few = (5, 2) if options.quick else (11, 3)
    yield from vector_steps(2 * n_rounds, device)
    yield from image_steps(5 * BATCH_SIZE if options.quick else 10 * BATCH_SIZE, n_rounds, device)
    yield from fits(few, device)


if __name__ == "__main__":
    sys.exit(main("neural_mixture_em", __doc__, measurements))
