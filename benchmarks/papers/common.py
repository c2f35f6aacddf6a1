"""What the benchmarks of the papers share: options, data sets, runs and their file.

A benchmark is a list of `Run`. Each is one row of ``results/<name>_runs.csv``, appended as soon as
it is done; a run whose row is there is not repeated, so that a benchmark can be stopped and started
at any time.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import sklearn
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

import deepmix
from deepmix import ClusteringModule
from deepmix._torch import Rows, resolve_device
from deepmix.datasets import load, make_five_gaussians
from deepmix.metrics import clustering_accuracy
from deepmix.mixture.clustering_module.clustering_module import restart_criterion
from deepmix.mixture.clustering_module.losses import ambiguity, inertia

HERE = Path(__file__).parent

# --- Data sets -------------------------------------------------------------------------

# Of the benchmark's name to that whose hyper-parameters the paper lists; the last two stand in
# for sets that cannot be had.
SETTINGS_OF = {
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "usps": "usps",
    "cifar10": "cifar10",
    "news20": "news20",
    "pendigits": "pendigits",
    "reuters_r8": "reuters10k",
    "pbmc4k_10x": "10x73k",
}
UCI = ("breast_original", "breast_wdbc", "ecoli", "glass", "iris", "wine", "yeast")
N_CLUSTERS = {
    **dict.fromkeys(("mnist", "fashion_mnist", "usps", "cifar10", "pendigits", "digits"), 10),
    **dict.fromkeys(("umap_mnist", "umap_mnist_imb"), 10),
    "news20": 20,
    "reuters_r8": 8,
    "pbmc4k_10x": 8,
    "five_gaussians": 5,
    "breast_original": 2,
    "breast_wdbc": 2,
    "ecoli": 8,
    "glass": 6,
    "iris": 3,
    "wine": 3,
    "yeast": 10,
}
N_FEATURES = {
    "mnist": 784,
    "fashion_mnist": 784,
    "usps": 256,
    "cifar10": 3072,
    "pendigits": 16,
    "news20": 2000,
    "reuters_r8": 2000,
    "pbmc4k_10x": 2000,
    "digits": 64,
    "five_gaussians": 2,
    "umap_mnist": 10,
    "umap_mnist_imb": 10,
    "breast_original": 9,
    "breast_wdbc": 30,
    "ecoli": 7,
    "glass": 9,
    "iris": 4,
    "wine": 13,
    "yeast": 8,
}
LARGE = ("mnist", "fashion_mnist", "cifar10", "news20")


@lru_cache(maxsize=1)
def load_rows(dataset, data_home):
    """Rows scaled as in the paper (UCI sets standardised), and labels."""
    if dataset == "five_gaussians":
        return make_five_gaussians(random_state=0)
    X, y = load(
        dataset,
        data_home=data_home,
        scale="standard" if dataset in UCI else "paper",
        grayscale=False,  # the paper clusters CIFAR10 in colour
        return_X_y=True,
    )
    if dataset == "reuters_r8":  # as the paper does with Reuters10k
        X = X * np.sqrt(X.shape[1], dtype=X.dtype)
    elif dataset == "pbmc4k_10x":  # as the paper does with 10x73k
        X = X / X.max()
    return X, y


def load_set(dataset, data_home, seed):
    """What `Run.load` is for a set that is the same in every run."""
    return load_rows(dataset, data_home)


# --- Baselines -------------------------------------------------------------------------

# More features than this and a full covariance of each of ten clusters has more entries than
# there are numbers in most of the data sets.
MAX_FULL_COVARIANCE = 300


def k_means(n_clusters, init="k-means++", n_init=1):
    return KMeans(n_clusters, init=init, n_init=n_init)


def spherical_mixture(n_clusters, init="k-means++"):
    return GaussianMixture(n_clusters, covariance_type="spherical", init_params=init)


def full_mixture(dataset, reg_covar=1e-3):
    """A full-covariance mixture started from k-means, or the reason why there is none."""
    if N_FEATURES[dataset] > MAX_FULL_COVARIANCE:
        return f"not run: {N_FEATURES[dataset]} features are too many for full covariances"
    return GaussianMixture(N_CLUSTERS[dataset], init_params="kmeans", reg_covar=reg_covar)


# --- Runs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One fit of one method on one data set.

    Attributes
    ----------
    table : str
        Of the paper.
    dataset, method : str
    seed : int
    estimator : BaseEstimator or str
        Not fitted; or the reason why the method is not run.
    timed : bool
        Run by itself, not beside others.
    load : callable
        ``load(dataset, data_home, seed) -> X, y``.
    details : callable or None
        ``details(estimator, X) -> rows`` of the fitted estimator, for ``results/<name>_<name of
        the function>.csv``.
    """

    table: str
    dataset: str
    method: str
    seed: int
    estimator: object
    timed: bool = False
    load: Callable = load_set
    details: Callable | None = None

    @property
    def parameters(self):
        """Parameters that determine the result, as JSON: an old row of others does not count."""
        if isinstance(self.estimator, str):
            return ""
        left_out = ("random_state", "device", "verbose", "n_jobs", "copy_x", "verbose_interval")
        parameters = self.estimator.get_params(deep=False)
        kept = {name: value for name, value in parameters.items() if name not in left_out}
        return json.dumps(kept, sort_keys=True, default=str)

    @property
    def key(self):
        return (self.table, self.dataset, self.method, str(self.seed), self.parameters)


FIELDS = (
    *("table", "dataset", "method", "seed", "n_samples", "n_features", "n_clusters"),
    *("ari", "nmi", "acc", "inertia", "sparsity", "gini", "loss"),
    *("epochs", "converged", "seconds", "status", "device", "threads", "jobs"),
    *("deepmix", "torch", "sklearn", "parameters"),
)


@lru_cache
def warm_up():
    """Let torch import what it imports at the first step of an optimiser: seconds, once."""
    ClusteringModule(2, n_init=1, max_iter=1, tol=0).fit(np.eye(40, 2))


def execute(run, options):
    """Fit and score: a row of the runs' file as a dict, and a list of rows of details."""
    warm_up()
    row = dict.fromkeys(FIELDS, "")
    row.update(table=run.table, dataset=run.dataset, method=run.method, seed=run.seed)
    row.update(parameters=run.parameters, threads=options.threads, jobs=options.jobs)
    row.update(deepmix=deepmix.__version__, torch=torch.__version__, sklearn=sklearn.__version__)
    if isinstance(run.estimator, str):
        return {**row, "status": run.estimator}, []
    X, y = run.load(run.dataset, options.data, run.seed)
    row.update(n_samples=X.shape[0], n_features=X.shape[1], n_clusters=len(np.unique(y)))
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        found, details = _fit_and_score(run, X, y, options.device)
    return {**row, **found}, details


def _fit_and_score(run, X, y, device):
    estimator = clone(run.estimator).set_params(random_state=run.seed)
    ours = "device" in estimator.get_params()
    if ours:
        estimator.set_params(device=device)
    elif isinstance(estimator, GaussianMixture):
        X = X.toarray() if sp.issparse(X) else X
        if estimator.covariance_type == "full":
            X = X.astype(np.float64)  # near-singular covariances want the digits
    start = time.perf_counter()
    try:
        _fit(estimator, X)
    except FloatingPointError:
        return {"status": "diverged", "seconds": time.perf_counter() - start}, []
    seconds = time.perf_counter() - start
    labels = estimator.labels_ if hasattr(estimator, "labels_") else estimator.predict(X)
    found = {
        "ari": 100 * adjusted_rand_score(y, labels),
        "nmi": 100 * normalized_mutual_info_score(y, labels),
        "acc": 100 * clustering_accuracy(y, labels),
        "epochs": estimator.n_iter_,
        "converged": converged(estimator),
        # Estimators that share work know what their part of it took.
        "seconds": getattr(estimator, "seconds_", seconds),
        "status": "done",
        "device": device_name(getattr(estimator, "device_", "cpu")),
        **criteria(estimator, X),
    }
    return found, [] if run.details is None else run.details(estimator, X)


def _fit(estimator, X):
    """Fit without warnings of convergence, which is a column; an interrupt ends the benchmark."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(X)
    for warning in caught:
        if "interrupted" in str(warning.message):  # deepmix would go on with a shorter training
            raise KeyboardInterrupt
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def converged(estimator):
    if hasattr(estimator, "converged_"):
        return bool(estimator.converged_)
    return bool(estimator.n_iter_ < estimator.max_iter)


def criteria(estimator, X):
    """Label-free criteria per row: soft inertia, L_sp and Gini impurity, and the loss."""
    if isinstance(estimator, KMeans):
        return {"inertia": estimator.inertia_ / X.shape[0]}
    if not hasattr(estimator, "module_"):
        return {}
    loss = estimator.history_.get("loss", ())
    found = {"loss": loss[-1] if len(loss) else ""}
    device = resolve_device(estimator.device_)
    network = estimator.module_.to(device)
    if not hasattr(getattr(network, "clustering", None), "centers"):
        return found
    embed = getattr(network, "encode", None) or network.scaler
    rows = Rows(X, device, torch.float32)
    for name, function in (("inertia", inertia), ("sparsity", ambiguity), ("gini", _impurity)):
        value = restart_criterion(function, embed, network.clustering, rows)[0]
        found[name] = float(value) / X.shape[0]
    return found


def _impurity(x, resp, centers, weight):
    return weight @ (resp * (1 - resp)).sum(dim=1)


@lru_cache
def device_name(device):
    """Name of the processor that ``device`` stands for."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- The runs' file --------------------------------------------------------------------


def read_rows(path):
    """Rows of a CSV file: list of dict of str to str; empty where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path, row):
    """Add a row; the file is whole after every one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    shown = rounded(row)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(shown)


def rounded(row):
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def write_rows(path, rows):
    """Write a CSV file anew: one column for each key of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key_of(row):
    return tuple(row[name] for name in ("table", "dataset", "method", "seed", "parameters"))


def record_details(path, run, details):
    """Put rows of a run into the file of its kind, in place of those of an earlier run."""
    about = {"table": run.table, "dataset": run.dataset, "method": run.method, "seed": run.seed}
    path = path.with_name(path.name.replace("_runs.csv", f"_{run.details.__name__}.csv"))
    mine = tuple(map(str, about.values()))
    others = [row for row in read_rows(path) if tuple(row[n] for n in about) != mine]
    write_rows(path, [*others, *(rounded(about | row) for row in details)])


def complete(runs, path, options):
    """Do the runs that have no row yet, ``options.jobs`` at a time."""
    rows = read_rows(path)
    if rows and tuple(rows[0]) != FIELDS:
        sys.exit(f"{path} has other columns than this version writes: move it away.")
    done = {key_of(row) for row in rows}
    missing = [run for run in runs if run.key not in done]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {path}", flush=True)
    missing.sort(key=lambda run: run.timed)  # stable; clocks run when nothing else does
    beside = [run for run in missing if options.jobs > 1 and not run.timed]
    for run, result in _in_processes(beside, options):
        _record(path, run, *result)
    for run in missing[len(beside) :]:
        _record(path, run, *execute(run, options))


def _in_processes(runs, options):
    if not runs:
        return
    # A forked process cannot use the threads or the accelerator of its parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        futures = {pool.submit(execute, run, options): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _record(path, run, row, details):
    append_row(path, row)
    if details:
        record_details(path, run, details)
    found = row["status"]
    if row["ari"] != "":
        found = f"ARI {row['ari']:5.1f}  ACC {row['acc']:5.1f}  {row['seconds']:6.1f} s"
    print(f"{row['table']:>2}  {row['dataset']:<17}{row['method']:<22}{row['seed']:>3}  {found}")
    sys.stdout.flush()


# --- Options ---------------------------------------------------------------------------


def parse_options(description, results, arguments=None, extend=None):
    """Options of a benchmark.

    Parameters
    ----------
    description : str
    results : str
        Name of the default folder of results.
    arguments : list of str or None
        Of the command line.
    extend : callable or None
        Adds options to the parser.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small sets, few seeds and epochs: minutes")
    add("--data", default=os.environ.get("DEEPMIX_DATA"), help="folder of data sets")
    add("--datasets", nargs="+", metavar="NAME", help="only these")
    add("--methods", nargs="+", metavar="NAME", help="only these")
    add("--only-table", nargs="+", metavar="N", help="only these tables of the paper")
    add("--seeds", type=int, help="runs of each method")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=1, help="threads of a run")
    add("--device", default="auto", help="of deepmix's estimators")
    add("--out", type=Path, default=HERE / results, help="folder of results")
    add("--check", action="store_true", help="exit 1 unless every claim holds")
    add("--no-runs", action="store_true", help="only summarise the rows that are there")
    if extend is not None:
        extend(add)
    options = parser.parse_args(arguments)
    if options.quick and options.out == HERE / results:
        options.out /= "quick"
    return options


def selected(runs, options):
    """The runs that the options ask for."""

    def wanted(value, choice):
        return choice is None or value in choice

    return [
        run
        for run in runs
        if wanted(run.dataset, options.datasets)
        and wanted(run.method, options.methods)
        and wanted(run.table, options.only_table)
    ]
