"""Tables 1 and 3 of Tissera et al. (2022), vectors and unequal clusters: neural mixture EM.

Table 1 and Sec. 8.1: the plane that a supervised network makes of MNIST, clustered with the paper's
settings (rows "paper"), and the mean of each density over a batch, with and without the
normalisation of the scores. Table 3: images; Eq. 7 and two-fold training from the same seeds, with
curves in a file of their own. ``--budget cpu`` has MNIST at 14 x 14 pixels with a smaller network
for ten epochs, at which no figure is a reproduction of the paper's beside it; ``--budget paper``
has the paper's sizes and epochs, and CIFAR10, from a copy whose images were JPEG files. Two tables
are not of the paper: vectors, and unequal clusters, with ``weights='learned'`` beside the paper's
equal ones.

NM-EM has its defaults, ten restarts of which the most stable is kept; x1 is a single run, "loss"
keeps that of lowest loss, "merged" averages all, "raw" has ``scale=False``. KM is the best of ten
runs of k-means, GMM a mixture with full covariances.

    python benchmarks/papers/neural_mixture_em.py --quick --check
    OMP_NUM_THREADS=1 python benchmarks/papers/neural_mixture_em.py --only-table 3
    python benchmarks/papers/neural_mixture_em.py --only-table 3 --budget paper --device cuda
"""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from baselines import full_mixture, k_means, parameters
from benchmark import Benchmark
from claims import Claim
from runs import Run
from sets import SETS, UCI, load_rows, load_set
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from tables import latest_groups
from torch import nn
from torch.nn.functional import cross_entropy

from deepmix import NeuralMixtureEM
from deepmix._torch import Rows, apply_batchwise, make_generator
from deepmix.mixture.neural_mixture_em.losses import log_density, normalize
from deepmix.mixture.neural_mixture_em.network import NeuralMixtureNetwork
from deepmix.mixture.neural_mixture_em.training import MixtureEM
from deepmix.networks import ConvNet, init_weights
from deepmix.training import Objective, Phase, minimize

N_SEEDS = 10
N_SEEDS_LARGE = 3  # images, most restarts on 70,000 rows, and quick runs

# --- Claims ----------------------------------------------------------------------------

accuracy = partial(Claim, metric="acc")
UNEQUAL = {"blobs 60/25/10/5": (60, 25, 10, 5), "blobs 80/20": (80, 20)}
BALANCED = {"blobs 4 equal": (1,) * 4, "blobs 10 equal": (1,) * 10}
CLAIMS = (
    accuracy("1", "mnist_2d", "NM-EM paper", low=95.0),
    # For every seed the mean of each cluster's density is near 1/2, and without normalisation one
    # cluster has all rows.
    Claim("1", "mnist_2d", "NM-EM paper", high=0.01, metric="deviation", exceptions=0),
    Claim("1", "mnist_2d", "NM-EM not normalised", low=0.99, metric="largest", exceptions=0),
    accuracy("vectors", "umap_mnist", "NM-EM paper", low=97.5),
    accuracy("vectors", "umap_mnist", "NM-EM raw", low=97.5),
    accuracy("vectors", "pendigits", "NM-EM", low=70.0),
    accuracy("vectors", "digits", "NM-EM", low=80.0),
    # The mean of ten seeds is close to this bound, so quick runs of fewer seeds are not judged.
    accuracy("vectors", "digits", "NM-EM raw merged", low=86.0, quick=False),
    *(accuracy("unequal", name, "NM-EM learned", low=95.0, exceptions=1) for name in UNEQUAL),
    *(accuracy("unequal", name, "NM-EM learned", above=("NM-EM",), slack=1.0) for name in BALANCED),
    # The first claim is for the budget 'cpu', the others are for 'paper'.
    accuracy("3", "mnist 14x14", "NM-EM Eq. 7", low=95.0),
    accuracy("3", "mnist", "NM-EM two-fold", low=98.8),
    accuracy("3", "cifar10", "NM-EM Eq. 7", low=49.5),
    accuracy("3", "cifar10", "NM-EM two-fold", low=58.0),
)

# --- Table 1 ---------------------------------------------------------------------------


class Bottleneck(Objective):
    """A classifier whose classes are linear in the two numbers that an encoder makes of an image.

    Parameters
    ----------
    labels : Tensor of shape (n_samples,)
    generator : torch.Generator
    side : int
        Side of the images, in pixels.
    """

    def __init__(self, labels, generator, side):
        self.labels, self.side = labels, side
        self.encoder = init_weights(ConvNet("C16 M C32 M F64", (1, side, side), 2), generator)
        self.head = init_weights(nn.Linear(2, 10), generator)

    def phases(self):
        return (Phase((*self.encoder.parameters(), *self.head.parameters()), self.step),)

    def step(self, batch, index, weight):
        scores = self.head(self.encode(batch))
        return {"entropy": weight @ cross_entropy(scores, self.labels[index], reduction="none")}

    def encode(self, x):
        return self.encoder(x.view(-1, 1, self.side, self.side))


def load_plane(dataset, data_home, seed, side=14, n_epochs=20):
    """The two-dimensional space of Sec. 8.1, made once and kept beside this file."""
    path = Path(__file__).parent / ".cache" / f"mnist_2d_{side}_{n_epochs}.npz"
    if not path.is_file():
        X, y = load_rows(f"mnist {side}x{side}", data_home)
        rows = Rows(X, torch.device("cpu"), torch.float32)
        generator = make_generator(check_random_state(0))
        objective = Bottleneck(torch.as_tensor(y), generator, side)
        for rate, share in ((1e-3, 0.75), (1e-4, 0.25)):
            options = {"learning_rate": rate, "batch_size": 128, "generator": generator}
            minimize(objective, rows, max_iter=round(share * n_epochs), **options)
        Z = apply_batchwise(objective.encode, rows)
        classes = apply_batchwise(lambda x: objective.head(objective.encode(x)), rows)
        print(f"a plane of MNIST, classified with accuracy {np.mean(classes.argmax(1) == y):.4f}")
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, X=Z, y=y)
    with np.load(path) as file:
        return file["X"], file["y"]


class NotNormalized(MixtureEM):
    """Eq. 6 on the scores as they are."""

    normalize = staticmethod(lambda scores, weight: scores)


@parameters
class MixtureWithoutNormalization(BaseEstimator):
    """The paper's settings for the plane, but for the normalisation of the scores (Fig. 5a)."""

    n_clusters: int = 10
    max_iter: int = 10
    batch_size: int = 128
    random_state: object = None

    def fit(self, X, y=None):
        generator = make_generator(check_random_state(self.random_state))
        self.network_ = NeuralMixtureNetwork(X.shape[1], self.n_clusters).init_weights(generator)
        rows = Rows(X, torch.device("cpu"), torch.float32)
        minimize(
            NotNormalized(self.network_),
            rows,
            batch_size=self.batch_size,
            max_iter=self.max_iter,
            generator=generator,
        )
        scores = apply_batchwise(self.network_.scores, rows)
        self.labels_ = scores[:, 0].argmax(axis=1)
        self.n_iter_, self.converged_ = self.max_iter, False
        return self


def integrals(estimator, X):
    """Mean of each density over the first 128 rows, its distance from 1/2, the largest cluster."""
    network = getattr(estimator, "network_", None) or estimator.module_
    batch = torch.as_tensor(np.asarray(X[:128], dtype=np.float32))
    with torch.inference_mode():
        scores = network.scores(network.prepare(batch))[:, 0]
        if isinstance(estimator, NeuralMixtureEM):
            scores = normalize(scores, torch.ones(len(batch)))
        means = log_density(scores, network.gamma).exp().mean(dim=0).double().numpy()
    shares = np.bincount(estimator.labels_) / len(X)
    columns = {f"cluster_{j}": float(mean) for j, mean in enumerate(means, start=1)}
    deviation = float(np.abs(means - 0.5).max())
    return [{**columns, "deviation": deviation, "largest": float(shares.max())}]


def ranges(rows, paper):
    """Ranges of the integrals over seeds and clusters beside the paper's three clusters."""
    found = []
    for key, group in latest_groups([row for row in rows if row.get("largest")]):
        means = [float(v) for r in group for k, v in r.items() if k.startswith("cluster_") and v]
        theirs = [float(v) for k, v in paper.get(key, {}).items() if k.startswith("integral_")]
        columns = {"dataset": key[1], "method": key[2], "n_seeds": len(group)}
        columns["mean of a density"] = _range(means)
        columns["paper_mean of a density"] = _range(theirs)
        columns["share of the largest cluster"] = _range([float(r["largest"]) for r in group], 3)
        found.append(columns)
    return found


def _range(values, digits=4):
    if not values:
        return ""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def table_1():
    return {
        **baselines(10, 2),
        "NM-EM paper": NeuralMixtureEM.from_paper("mnist_2d"),
        "NM-EM not normalised": MixtureWithoutNormalization(),
    }


# --- Vectors ---------------------------------------------------------------------------


def baselines(n_clusters, n_features):
    return {
        "KM": k_means(n_clusters, n_init=10),
        "GMM": full_mixture(n_clusters, n_features),
    }


def variants(n_clusters, prefix="NM-EM", **parameters):
    """Ways to make one clustering of restarts: dict of name to estimator."""
    make = partial(NeuralMixtureEM, n_clusters, **parameters)
    return {
        f"{prefix} x1": make(n_init=1),
        prefix: make(),
        f"{prefix} loss": make(selection="loss"),
        f"{prefix} merged": make(ensemble=True),
        f"{prefix} learned": make(weights="learned"),
    }


def vectors(dataset):
    n_clusters, n_features, _ = SETS[dataset]
    methods = {**baselines(n_clusters, n_features), **variants(n_clusters)}
    if dataset == "umap_mnist":
        methods |= variants(n_clusters, "NM-EM raw", scale=False)
        methods["NM-EM paper"] = NeuralMixtureEM.from_paper("mnist_2d")
    if dataset == "digits":
        raw = {"scale": False, "n_init": 16, "learning_rate_init": 3e-3, "selection": "loss"}
        methods["NM-EM raw loss"] = NeuralMixtureEM(n_clusters, **raw)
        methods["NM-EM raw merged"] = NeuralMixtureEM(n_clusters, **raw, ensemble=True)
    return methods


# --- Unequal clusters ------------------------------------------------------------------


def make_unequal_blobs(shares, random_state, n_samples=2000, distance=7.0):
    """Round clusters in the plane, of variance 1 and of given shares.

    Parameters
    ----------
    shares : sequence of float
        Need not sum to one.
    random_state : int or RandomState
    n_samples : int
    distance : float
        Least distance of two centres.

    Returns
    -------
    X : ndarray of shape (n_samples, 2)
    y : ndarray of shape (n_samples,)
    """
    random_state = check_random_state(random_state)
    n_clusters = len(shares)
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * n_samples).astype(int)
    y = np.repeat(np.arange(n_clusters), np.diff(ends, prepend=0))
    reach = distance * math.sqrt(n_clusters)
    gaps = np.zeros(1)
    while gaps.min() <= distance:
        centers = random_state.uniform(-reach, reach, (n_clusters, 2))
        first, second = np.triu_indices(n_clusters, k=1)
        gaps = np.linalg.norm(centers[first] - centers[second], axis=1)
    X = centers[y] + random_state.standard_normal((n_samples, 2))
    order = random_state.permutation(n_samples)
    return X[order], y[order]


def load_blobs(dataset, data_home, seed):
    return make_unequal_blobs({**UNEQUAL, **BALANCED}[dataset], seed)


def unequal(n_clusters, n_features=2):
    return {
        **baselines(n_clusters, n_features),
        "NM-EM": NeuralMixtureEM(n_clusters),
        "NM-EM learned": NeuralMixtureEM(n_clusters, weights="learned"),
    }


# --- Table 3 ---------------------------------------------------------------------------


# For each budget: the data sets of images, the side to which those of MNIST are shrunk (None leaves
# them), and parameters of the estimator that differ from its defaults or from the paper's.
SMALL_NET = {"network": "C32 M C64 M C128 F32", "max_iter": 10, "precision": "bfloat16"}
BUDGETS = {
    "quick": ((), None, {}),
    "cpu": (("mnist",), 14, SMALL_NET),
    "paper": (("mnist", "cifar10"), None, {}),
}


def curves(estimator, X):
    """The history of a fit, an epoch a row."""
    names = ("loss", "em", "em_view", "confidence", "consistency")
    history = {name: estimator.history_.get(name, ()) for name in names}
    late = {name: estimator.n_iter_ - len(values) for name, values in history.items()}
    return [
        {"epoch": epoch + 1}
        | {
            name: float(values[epoch - late[name]]) if epoch >= late[name] else ""
            for name, values in history.items()
        }
        for epoch in range(estimator.n_iter_)
    ]


def table_3(dataset, options):
    """Name of the set at the size asked for, and dict of name to estimator."""
    _, side, given = BUDGETS[options.budget]
    side = options.side or side
    asked = {
        "network": options.network,
        "max_iter": options.epochs,
        "precision": options.precision,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    name, shape = dataset, (1, 28, 28) if dataset == "mnist" else (3, 32, 32)
    if dataset == "mnist" and side not in (None, 28):
        name, shape = f"mnist {side}x{side}", (1, side, side)
    overrides = {**given, **asked, "image_shape": shape}
    if options.budget == "paper":
        make = partial(NeuralMixtureEM.from_paper, dataset, **overrides)
    else:
        make = partial(NeuralMixtureEM, 10, **overrides)
    return name, {
        "NM-EM Eq. 7": make(two_fold=False),
        "NM-EM two-fold": make(two_fold=True),
        **baselines(10, math.prod(shape)),
    }


# --- The benchmark ---------------------------------------------------------------------


def plan(options):
    """All runs, those of claims on small sets first, images last."""
    blobs = {**UNEQUAL, **BALANCED}
    entries = [("vectors", name, vectors(name), load_set) for name in ("digits", "pendigits")]
    entries += [("unequal", name, unequal(len(blobs[name])), load_blobs) for name in blobs]
    if not options.quick:
        entries.append(("1", "mnist_2d", table_1(), load_plane))
    names = ("iris", "wine") if options.quick else (*UCI, "umap_mnist")
    entries += [("vectors", name, vectors(name), load_set) for name in names]
    if not options.quick:
        entries.append(("unequal", "umap_mnist_imb", unequal(10), load_set))
    for dataset in BUDGETS[options.budget][0]:
        entries.append(("3", *table_3(dataset, options), load_set))
    details = {"1": integrals, "3": curves}
    return [
        Run(
            *(table, dataset, method, seed, estimator),
            load=load,
            details=details.get(table) if method.startswith("NM-EM") else None,
        )
        for table, dataset, methods, load in entries
        for method, estimator in methods.items()
        for seed in range(n_seeds(table, dataset, method, estimator, options))
    ]


def n_seeds(table, dataset, method, estimator, options):
    if isinstance(estimator, str):
        return 1
    large = table == "3" or dataset == "umap_mnist_imb"
    restarts = dataset == "umap_mnist" and method.endswith(("NM-EM", "loss", "merged", "learned"))
    few = options.quick or large or restarts
    return options.seeds or (N_SEEDS_LARGE if few else N_SEEDS)


def add_options(add):
    add("--side", type=int, choices=(14, 28), help="of MNIST's images in Table 3")
    add("--network", help="in Table 3: a name of Table 2, or layers such as 'C32 M C64 F32'")
    add("--epochs", type=int, help="in Table 3")
    add("--precision", choices=("float32", "bfloat16"), help="in Table 3")


BENCHMARK = Benchmark(
    "neural_mixture_em",
    __doc__,
    "tissera_2022",
    plan,
    CLAIMS,
    add_options,
    budgets=tuple(BUDGETS),
    details="integrals",
    tables={"table_1": ranges},
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
