"""Tables 1, 2, 4 and 6 and Figure 4 of Ronen et al. (2022): DeepDPM.

UMAP embeddings of MNIST, USPS and Fashion-MNIST in 10 dimensions, published with the paper, and
50 Gaussians in 16 dimensions. DeepDPM and DPM (the same mixture by EM, without nets) are told no
number of clusters; k-means and the full-covariance mixture are told the true one. "DeepDPM,
paper's prior" has rows of norm one and the prior of the authors' program, under our schedule.
BGMM is scikit-learn's Dirichlet process mixture, truncated at 50. The baselines see the rows as
they are.
DBSCAN's radius is the 99 % quantile of the distances to the tenth neighbour, HDBSCAN wants 50 rows
in a cluster; both get 10,000 rows at most, their noise counts as one cluster.

Table 4 is of 2,500 MoCo features of ImageNet-50 (the paper's 64,000 training rows cannot be had),
reduced to 20 principal components for every method; BGMM is truncated at 100 there. Beyond the
paper: tables of the UCI Repository ("uci"; standardised for the baselines, which DeepDPM does
itself), and batches and units of other sizes ("sizes").

    python benchmarks/papers/deep_dpm.py --quick --check
"""

import sys
from typing import NamedTuple

import numpy as np
from benchmark import Benchmark
from claims import Claim
from deep_dpm_ablations import (
    IsotropicLoss,
    NoMerges,
    NoMoves,
    NoPriors,
    NoSplits,
    TwoMeans,
)
from runs import Run
from sets import UCI, about, load_rows
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import DBSCAN, HDBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from tables import latest_groups, summarize

from deepmix import DeepDPM

DATASETS = ("umap_usps", "umap_mnist", "umap_mnist_imb", "umap_fashion", "gaussians50")
STARTS = (1, 3, 10, 30)
FIGURE_4 = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50)
TABLES = (*UCI, "pendigits", "digits")
MAX_ROWS = 10_000  # for the methods that look at neighbours

# --- Data and methods ------------------------------------------------------------------


def load_all(dataset, data_home, seed):
    X, y = load_rows(dataset, data_home)
    return X.astype(np.float64), y


def load_few(dataset, data_home, seed):
    X, y = load_all(dataset, data_home, seed)
    chosen = np.random.default_rng(0).permutation(len(X))[:MAX_ROWS]
    return (X[chosen], y[chosen]) if len(X) > MAX_ROWS else (X, y)


class QuantileDBSCAN(DBSCAN):
    """DBSCAN by the 99 % quantile of the distances to the tenth neighbour."""

    def fit(self, X, y=None):
        distances, _ = NearestNeighbors(n_neighbors=10).fit(X).kneighbors()
        self.eps = float(np.quantile(distances[:, -1], 0.99))
        return super().fit(X)


class Method(NamedTuple):
    """An estimator, and how it is run.

    Attributes
    ----------
    estimator : BaseEstimator
    starts : tuple of int
        Numbers of clusters to begin with; 0 where there is no such thing.
    n_seeds : int
        0: as many as the options say.
    load : callable
        As in `Run`.
    """

    estimator: BaseEstimator
    starts: tuple = (0,)
    n_seeds: int = 0
    load: object = load_all

    def started(self, start):
        """The estimator, beginning with a number of clusters."""
        names = [n for n in self.estimator.get_params() if n.endswith("n_clusters_init")]
        return clone(self.estimator).set_params(**dict.fromkeys(names, start))


def units(X):
    """Columns in units of a thousandth to a thousand times as large."""
    return X * np.logspace(-3, 3, X.shape[1])


def bayesian(n_components=50):
    return BayesianGaussianMixture(n_components=n_components, max_iter=100)


PAPER_PRIOR = {"scaling": "normalize", "prior_scale": 0.005, "prior_kappa": 1e-4}


def table_1(n):
    """Methods on a set of n classes: dict of name to `Method`."""
    return {
        "KMeans": Method(KMeans(n, n_init=10)),
        "GMM": Method(GaussianMixture(n)),
        "BGMM": Method(bayesian(), n_seeds=1),
        "DBSCAN": Method(QuantileDBSCAN(min_samples=10), n_seeds=1, load=load_few),
        "HDBSCAN": Method(HDBSCAN(min_cluster_size=50, copy=True), n_seeds=1, load=load_few),
        "DPM": Method(DeepDPM(amortized=False), STARTS),
        "DeepDPM": Method(DeepDPM(), STARTS),
        "DeepDPM, paper's prior": Method(DeepDPM(**PAPER_PRIOR), STARTS, 1),
    }


def table_4(n):
    models = {
        "KMeans": KMeans(n, n_init=10),
        "GMM": GaussianMixture(n),
        "BGMM": bayesian(100),
        "DPM": DeepDPM(amortized=False),
        "DeepDPM": DeepDPM(),
    }
    starts = {"DPM": (1,), "DeepDPM": (1,)}
    return {
        name: Method(make_pipeline(PCA(20), model), starts.get(name, (0,)), 3)
        for name, model in models.items()
    }


def table_6(n):
    models = {
        "no splits or merges": NoMoves(),
        "no splits": NoSplits(),
        "no merges": NoMerges(),
        "2-means instead of nets": TwoMeans(),
        "no priors in the M-step": NoPriors(),
        "isotropic loss": IsotropicLoss(),
        "no check of unions": DeepDPM(check_unions=False),
        "EM instead of nets": DeepDPM(amortized=False),
        "DeepDPM": DeepDPM(),
    }
    return {name: Method(model, (3, 10, 30), 3) for name, model in models.items()}


def figure_4(n):
    return {"DeepDPM": Method(DeepDPM(), FIGURE_4, 1)}


def table_uci(n):
    def scaled(model):
        return Method(make_pipeline(StandardScaler(), model), n_seeds=3)

    return {
        "KMeans": scaled(KMeans(n, n_init=10)),
        "GMM": scaled(GaussianMixture(n, reg_covar=1e-3)),
        "BGMM": scaled(bayesian()),
        "DPM": Method(DeepDPM(amortized=False), (1,), 1),
        "DeepDPM": Method(DeepDPM(), (1,), 3),
    }


def sizes(n):
    models = {f"batch of {size}": DeepDPM(batch_size=size) for size in (64, 256, 1024, 4096)}
    models["other units"] = make_pipeline(FunctionTransformer(units), DeepDPM())
    return {name: Method(model, (1,), 1) for name, model in models.items()}


# --- Claims ----------------------------------------------------------------------------


def against_bgmm(table, dataset):
    """NMI at most a little below BGMM's; and a number of clusters as near to the classes'."""
    n_classes = about(dataset).n_clusters
    yield Claim(table, dataset, "DeepDPM", metric="nmi", above=("BGMM",), slack=1.0)
    yield Claim(table, dataset, "DeepDPM", metric="k", target=n_classes, below=("BGMM",))


CLAIMS = (
    # The paper's .98 and .68 for Fashion-MNIST, rounded as there.
    Claim("1", "umap_mnist", "DeepDPM", metric="acc", low=97.5),
    Claim("1", "umap_mnist", "DeepDPM", metric="nmi", low=94),
    Claim("1", "umap_mnist", "DeepDPM", metric="ari", low=95),
    Claim("1", "umap_mnist", "DeepDPM", metric="k", low=9.5, high=10.5),
    Claim("1", "umap_usps", "DeepDPM", metric="acc", low=95),
    Claim("1", "umap_usps", "DeepDPM", metric="nmi", low=88),
    Claim("1", "umap_usps", "DeepDPM", metric="k", low=9, high=11),
    Claim("1", "umap_mnist_imb", "DeepDPM", metric="acc", low=98),
    Claim("1", "umap_fashion", "DeepDPM", metric="nmi", low=67.5),
    Claim("1", "umap_fashion", "DeepDPM", metric="acc", low=62),
    Claim("1", "umap_fashion", "DeepDPM", metric="k", low=9.2, high=11.2),
    Claim("1", "umap_fashion", "DeepDPM, paper's prior", metric="nmi", low=67.5),
    Claim("1", "umap_fashion", "DeepDPM, paper's prior", metric="acc", low=62),
    Claim("1", "gaussians50", "DeepDPM", metric="k", low=49, high=51),
    Claim("uci", "wine", "DeepDPM", metric="k", low=3, high=3),
    *(Claim("sizes", "umap_mnist", method, metric="k", low=10, high=10) for method in sizes(10)),
    *(claim for dataset in TABLES for claim in against_bgmm("uci", dataset)),
    *(claim for dataset in DATASETS for claim in against_bgmm("1", dataset)),
    *against_bgmm("4", "imagenet50_moco_test"),
)

# --- The benchmark ---------------------------------------------------------------------


def plan(options):
    """All runs, the sets of the fewest rows first."""
    quick = options.quick
    entries = [("uci", dataset, table_uci) for dataset in (TABLES[:3] if quick else TABLES)]
    entries += [("1", dataset, table_1) for dataset in (DATASETS[:1] if quick else DATASETS)]
    if not quick:
        entries += [("4", "imagenet50_moco_test", table_4), ("sizes", "umap_mnist", sizes)]
        entries += [("figure 4", f"umap_{name}", figure_4) for name in ("usps", "mnist", "fashion")]
        entries += [("6", "umap_fashion", table_6)]
    runs = []
    for table, dataset, methods_of in entries:
        methods = methods_of(about(dataset).n_clusters)
        seeds = {n: m.n_seeds or options.seeds or (2 if quick else 10) for n, m in methods.items()}
        # A benchmark that is stopped has as many seeds of each method and start.
        runs += [
            Run(table, dataset, name, seed, method.started(start), start, load=method.load)
            for seed in range(max(seeds.values()))
            for name, method in methods.items()
            if seed < seeds[name]
            for start in method.starts
            # Without nets and from one cluster nothing is drawn.
            if seed == 0 or name != "DPM" or start > 1
        ]
    return runs


def named_by_start(rows):
    """Runs of Table 6, which has a column for each start, and of Figure 4, which has a point."""
    return [
        row | {"method": f"{row['method']} K_init={row['start']}"}
        if row["table"] in ("6", "figure 4")
        else row
        for row in rows
    ]


def starts(rows, paper):
    """Each start of Table 1 by itself."""
    found = []
    for (_, dataset, method), group in latest_groups([row for row in rows if row["table"] == "1"]):
        for start in sorted({int(row["start"]) for row in group} - {0}):
            part = [row for row in group if row["start"] == str(start)]
            (summary,) = summarize(part, {}, **SUMMARY)
            shown = ("n_seeds", *(f"{m}_{s}" for m in SUMMARY["metrics"] for s in ("mean", "std")))
            about_it = {"dataset": dataset, "method": method, "start": start}
            found.append(about_it | {name: summary[name] for name in (*shown, "cpu_seconds")})
    return found


SUMMARY = {"metrics": ("nmi", "ari", "acc", "k"), "means": ("epochs", "cpu_seconds")}
BENCHMARK = Benchmark(
    "deep_dpm",
    __doc__,
    "ronen_2022",
    plan,
    CLAIMS,
    prepare=named_by_start,
    summary=SUMMARY,
    tables={"starts": starts},
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
