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

import csv
import statistics
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import sklearn
import torch
from common import HERE, N_CLUSTERS, UCI, device_name, parse_options, read_rows, write_rows
from deep_dpm_ablations import (
    IsotropicLoss,
    NoMerges,
    NoMoves,
    NoPriors,
    NoSplits,
    TwoMeans,
)
from sklearn.base import clone
from sklearn.cluster import DBSCAN, HDBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from threadpoolctl import threadpool_limits

import deepmix
from deepmix import DeepDPM
from deepmix.datasets import load
from deepmix.metrics import clustering_accuracy

DATASETS = ("umap_usps", "umap_mnist", "umap_mnist_imb", "umap_fashion", "gaussians50")
STARTS = (1, 3, 10, 30)
FIGURE_4 = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50)
TABLES = (*UCI, "pendigits", "digits")
N_CLASSES = {
    **N_CLUSTERS,
    **dict.fromkeys(("umap_usps", "umap_fashion"), 10),
    **dict.fromkeys(("gaussians50", "imagenet50_moco_test"), 50),
}
MAX_ROWS = 10_000  # for the methods that look at neighbours
METRICS = ("nmi", "ari", "acc", "k")
FIELDS = (
    *("table", "dataset", "method", "start", "seed", "n_samples", "nmi", "ari", "acc", "k"),
    *("epochs", "converged", "cpu_seconds", "device", "deepmix", "torch", "sklearn"),
)

# --- Data and methods ------------------------------------------------------------------


def fifty_gaussians():
    """50 Gaussians of random means and full covariances: X of shape (50000, 16), labels."""
    draw = np.random.default_rng(0)
    means, y = 3 * draw.normal(size=(50, 16)), draw.integers(0, 50, 50_000)
    shapes = draw.normal(size=(50, 16, 16)) / 4
    X = means[y] + 0.3 * draw.normal(size=(len(y), 16))
    for k in range(50):
        X[y == k] += draw.normal(size=(np.sum(y == k), 16)) @ shapes[k]
    return X, y


def rows_of(dataset, data_home):
    if dataset == "gaussians50":
        return fifty_gaussians()
    X, y = load(dataset, data_home=data_home, return_X_y=True)
    return X.astype(np.float64), y


def radius(X):
    """The 99 % quantile of the distances to the tenth neighbour."""
    distances, _ = NearestNeighbors(n_neighbors=10).fit(X).kneighbors()
    return float(np.quantile(distances[:, -1], 0.99))


@dataclass(frozen=True)
class Method:
    """A way to make an estimator, and how it is run.

    Attributes
    ----------
    make : callable
        ``(n_classes, start, X) -> estimator``.
    starts : tuple of int
        Numbers of clusters to begin with; 0 where there is no such thing.
    n_seeds : int
        0: as many as the options say.
    few_rows : bool
    """

    make: callable
    starts: tuple = (0,)
    n_seeds: int = 0
    few_rows: bool = False


def units(X):
    """Columns in units of a thousandth to a thousand times as large."""
    return X * np.logspace(-3, 3, X.shape[1])


def bayesian(n_components=50, **parameters):
    return BayesianGaussianMixture(n_components=n_components, max_iter=100, **parameters)


def reduced(estimator):
    return make_pipeline(PCA(20), estimator)


def scaled(estimator):
    return make_pipeline(StandardScaler(), estimator)


def ablation(cls, **parameters):
    return Method(lambda n, start, X: cls(start, **parameters), (3, 10, 30), 3)


def sized(**parameters):
    return Method(lambda n, start, X: DeepDPM(start, **parameters), (1,), 1)


PAPER_PRIOR = {"scaling": "normalize", "prior_scale": 0.005, "prior_kappa": 1e-4}
TABLE_1 = {
    "KMeans": Method(lambda n, start, X: KMeans(n, n_init=10)),
    "GMM": Method(lambda n, start, X: GaussianMixture(n)),
    "BGMM": Method(lambda n, start, X: bayesian(), n_seeds=1),
    "DBSCAN": Method(
        lambda n, start, X: DBSCAN(eps=radius(X), min_samples=10), n_seeds=1, few_rows=True
    ),
    "HDBSCAN": Method(
        lambda n, start, X: HDBSCAN(min_cluster_size=50, copy=True), n_seeds=1, few_rows=True
    ),
    "DPM": Method(lambda n, start, X: DeepDPM(start, amortized=False), STARTS),
    "DeepDPM": Method(lambda n, start, X: DeepDPM(start), STARTS),
    "DeepDPM, paper's prior": Method(
        lambda n, start, X: DeepDPM(start, **PAPER_PRIOR), STARTS, n_seeds=1
    ),
}
TABLE_4 = {
    "KMeans": Method(lambda n, start, X: reduced(KMeans(n, n_init=10)), n_seeds=3),
    "GMM": Method(lambda n, start, X: reduced(GaussianMixture(n)), n_seeds=3),
    "BGMM": Method(lambda n, start, X: reduced(bayesian(100)), n_seeds=3),
    "DPM": Method(lambda n, start, X: reduced(DeepDPM(start, amortized=False)), (1,), 3),
    "DeepDPM": Method(lambda n, start, X: reduced(DeepDPM(start)), (1,), 3),
}
TABLE_6 = {
    "no splits or merges": ablation(NoMoves),
    "no splits": ablation(NoSplits),
    "no merges": ablation(NoMerges),
    "2-means instead of nets": ablation(TwoMeans),
    "no priors in the M-step": ablation(NoPriors),
    "isotropic loss": ablation(IsotropicLoss),
    "no check of unions": ablation(DeepDPM, check_unions=False),
    "EM instead of nets": ablation(DeepDPM, amortized=False),
    "DeepDPM": ablation(DeepDPM),
}
FIGURE = {"DeepDPM": Method(lambda n, start, X: DeepDPM(start), FIGURE_4, 1)}
TABLE_UCI = {
    "KMeans": Method(lambda n, start, X: scaled(KMeans(n, n_init=10)), n_seeds=3),
    "GMM": Method(lambda n, start, X: scaled(GaussianMixture(n, reg_covar=1e-3)), n_seeds=3),
    "BGMM": Method(lambda n, start, X: scaled(bayesian()), n_seeds=3),
    "DPM": Method(lambda n, start, X: DeepDPM(start, amortized=False), (1,), 1),
    "DeepDPM": Method(lambda n, start, X: DeepDPM(start), (1,), 3),
}
SIZES = {
    **{f"batch of {size}": sized(batch_size=size) for size in (64, 256, 1024, 4096)},
    "other units": Method(
        lambda n, start, X: make_pipeline(FunctionTransformer(units), DeepDPM(start)), (1,), 1
    ),
}

CLAIMS = (
    # dataset, method, metric, least or most
    ("umap_mnist", "DeepDPM", "acc", 97.5, 100),  # the paper's .98, rounded as there
    ("umap_mnist", "DeepDPM", "nmi", 94.0, 100),
    ("umap_mnist", "DeepDPM", "ari", 95.0, 100),
    ("umap_mnist", "DeepDPM", "k", 9.5, 10.5),
    ("umap_usps", "DeepDPM", "acc", 95.0, 100),
    ("umap_usps", "DeepDPM", "nmi", 88.0, 100),
    ("umap_usps", "DeepDPM", "k", 9.0, 11.0),
    ("umap_mnist_imb", "DeepDPM", "acc", 98.0, 100),
    ("umap_fashion", "DeepDPM", "nmi", 67.5, 100),  # the paper's .68, rounded as there
    ("umap_fashion", "DeepDPM", "acc", 62.0, 100),
    ("umap_fashion", "DeepDPM", "k", 9.2, 11.2),
    ("umap_fashion", "DeepDPM, paper's prior", "nmi", 67.5, 100),
    ("umap_fashion", "DeepDPM, paper's prior", "acc", 62.0, 100),
    ("gaussians50", "DeepDPM", "k", 49.0, 51.0),
    ("wine", "DeepDPM", "k", 3.0, 3.0),
    *(("umap_mnist", method, "k", 10.0, 10.0) for method in SIZES),
)
# NMI that BGMM may have more than DeepDPM, on any set.
MARGIN = 1.0

# --- Runs ------------------------------------------------------------------------------


def execute(table, dataset, name, method, start, seed, options):
    """Fit and score: a row of the runs' file."""
    X, y = rows_of(dataset, options.data)
    if method.few_rows and len(X) > MAX_ROWS:
        chosen = np.random.default_rng(0).permutation(len(X))[:MAX_ROWS]
        X, y = X[chosen], y[chosen]
    estimator = clone(method.make(len(np.unique(y)), start, X))
    random = [name for name in estimator.get_params() if name.endswith("random_state")]
    estimator.set_params(**dict.fromkeys(random, seed))
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        begin = time.process_time()
        labels = estimator.fit_predict(X)
        seconds = time.process_time() - begin
    last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    return {
        "table": table,
        "dataset": dataset,
        "method": name,
        "start": start,
        "seed": seed,
        "n_samples": len(X),
        "nmi": 100 * normalized_mutual_info_score(y, labels),
        "ari": 100 * adjusted_rand_score(y, labels),
        "acc": 100 * clustering_accuracy(y, labels),
        "k": len(np.unique(labels)),
        "epochs": getattr(last, "n_iter_", ""),
        "converged": getattr(last, "converged_", ""),
        "cpu_seconds": round(seconds, 2),
        "device": device_name("cpu"),
        "deepmix": deepmix.__version__,
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
    }


def plan(options):
    """All runs as tuples, the sets of the fewest rows first."""
    quick = options.quick
    entries = [("uci", dataset, TABLE_UCI) for dataset in (TABLES[:3] if quick else TABLES)]
    entries += [("1", dataset, TABLE_1) for dataset in (DATASETS[:1] if quick else DATASETS)]
    if not quick:
        entries += [("4", "imagenet50_moco_test", TABLE_4), ("sizes", "umap_mnist", SIZES)]
        entries += [("figure 4", f"umap_{name}", FIGURE) for name in ("usps", "mnist", "fashion")]
        entries += [("6", "umap_fashion", TABLE_6)]
    for table, dataset, methods in entries:
        seeds = {m: methods[m].n_seeds or options.seeds or (2 if quick else 10) for m in methods}
        # A benchmark that is stopped has as many seeds of each method and start.
        for seed in range(max(seeds.values())):
            for name, method in methods.items():
                # Without nets and from one cluster nothing is drawn.
                drawn = [start for start in method.starts if name != "DPM" or start > 1]
                for start in method.starts if seed == 0 else drawn:
                    if seed < seeds[name]:
                        yield table, dataset, name, method, start, seed


def complete(options, path):
    """Do the runs that have no row yet; one row of the file after another."""
    done = {tuple(row[name] for name in FIELDS[:5]) for row in read_rows(path)}
    for table, dataset, name, method, start, seed in plan(options):
        key = (table, dataset, name, str(start), str(seed))
        wanted = (options.datasets, dataset), (options.methods, name), (options.only_table, table)
        if key in done or any(choice and value not in choice for choice, value in wanted):
            continue
        row = execute(table, dataset, name, method, start, seed, options)
        print({k: row[k] for k in ("dataset", "method", "start", "nmi", "acc", "k")}, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(shown)


# --- Summary ---------------------------------------------------------------------------


def summarize(rows):
    """Means over seeds and starts beside the paper's; and each start by itself."""
    published = read_rows(HERE / "published" / "ronen_2022.csv")
    paper = {(r["table"], r["dataset"], r["method"]): r for r in published}
    groups, by_start = {}, {}
    for row in rows:
        key = (row["table"], row["dataset"], row["method"])
        # Table 6 has a column for each start, Figure 4 a point.
        by_column = row["table"] in ("6", "figure 4")
        whole = (*key[:2], f"{key[2]} K_init={row['start']}") if by_column else key
        groups.setdefault(whole, []).append(row)
        if row["start"] != "0" and row["table"] == "1":
            by_start.setdefault((*key[1:], int(row["start"])), []).append(row)
    summary = [
        dict(zip(("table", "dataset", "method"), key))
        | moments(group)
        | {f"paper_{m}": paper.get(key, {}).get(f"{m}_mean", "") for m in METRICS}
        for key, group in groups.items()
    ]
    starts = [
        dict(zip(("dataset", "method", "start"), key)) | moments(group)
        for key, group in sorted(by_start.items())
    ]
    return summary, starts


def moments(group):
    found = {"n_runs": len(group)}
    for metric in METRICS:
        values = [float(row[metric]) for row in group]
        found[f"{metric}_mean"] = round(statistics.fmean(values), 2)
        found[f"{metric}_std"] = round(statistics.pstdev(values), 2)
    seconds = [float(row["cpu_seconds"]) for row in group]
    return found | {"cpu_seconds": round(statistics.fmean(seconds), 1)}


def verdicts(summary):
    """The claims as rows, those of the comparison with BGMM among them."""
    found = {(r["table"], r["dataset"], r["method"]): r for r in summary}
    for dataset, method, metric, low, high in CLAIMS:
        table = "sizes" if method in SIZES else "uci" if dataset in TABLES else "1"
        row = found.get((table, dataset, method))
        yield verdict(dataset, method, metric, row and row[f"{metric}_mean"], low, high)
    rivals = [("uci", name) for name in TABLES] + [("1", name) for name in DATASETS]
    for table, dataset in (*rivals, ("4", "imagenet50_moco_test")):
        pair = [found.get((table, dataset, method)) for method in ("DeepDPM", "BGMM")]
        ours, theirs = (row and error(row) for row in pair)
        both = None not in (ours, theirs)
        nmi = round(ours[0] - theirs[0], 2) if both else None
        yield verdict(dataset, "DeepDPM", "nmi above BGMM's", nmi, -MARGIN, 100)
        k = round(ours[1] - theirs[1], 2) if both else None
        yield verdict(dataset, "DeepDPM", "error of k above BGMM's", k, -100, 0)


def error(row):
    """NMI, and how far the number of clusters is from that of the classes."""
    return row["nmi_mean"], abs(row["k_mean"] - N_CLASSES[row["dataset"]])


def verdict(dataset, method, metric, value, low, high):
    holds = "not run" if value is None else "holds" if low <= value <= high else "FAILS"
    about = {"dataset": dataset, "method": method, "metric": metric, "value": value}
    return {**about, "least": low, "most": high, "verdict": holds}


def main(arguments=None):
    options = parse_options(__doc__, "results", arguments)
    path = options.out / "deep_dpm_runs.csv"
    if not options.no_runs:
        complete(options, path)
    rows = read_rows(path)
    if not rows:
        print("no runs")
        return 1
    summary, starts = summarize(rows)
    claims = list(verdicts(summary))
    for suffix, content in (("", summary), ("_starts", starts), ("_verdicts", claims)):
        if content:
            write_rows(options.out / f"deep_dpm{suffix}.csv", content)
    for row in (*summary, *claims):
        print("  ".join(str(value) for value in row.values()))
    run = [row for row in claims if row["verdict"] != "not run" or not options.quick]
    return int(options.check and any(row["verdict"] != "holds" for row in run))


if __name__ == "__main__":
    sys.exit(main())
