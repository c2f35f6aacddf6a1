"""Runs of a benchmark, and their file: what has a row there is not run again.

Each `Run` is one row of ``results/<name>_runs.csv``, appended as soon as it is done, so that a
benchmark can be stopped and started at any time. A row holds the parameters that made it. A row of
other parameters than the present ones does not count, and its run is repeated; a row from before
parameters were recorded is kept, and the summary says how many there are.
"""

import json
import multiprocessing
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
import torch
from sets import load_set
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from deepmix import ClusteringModule
from deepmix.metrics import clustering_accuracy

sys.path.append(str(Path(__file__).parents[1]))  # of records.py, which speed/ has too
from records import VERSIONS, append_row, device_name, read_rows, rounded, write_rows

FIELDS = (
    *("table", "dataset", "method", "start", "seed", "n_samples", "n_features", "n_clusters"),
    *("ari", "nmi", "acc", "k", "inertia", "sparsity", "gini", "loss"),
    *("epochs", "converged", "seconds", "cpu_seconds", "status", "device", "threads", "jobs"),
    *("deepmix", "torch", "sklearn", "parameters"),
)
# Values for columns that a file of an earlier version lacks; its rows are runs that were done.
MISSING = dict.fromkeys(FIELDS, "") | {"status": "done"}
# Parameters that do not determine the result.
LEFT_OUT = ("random_state", "device", "verbose", "n_jobs", "copy_x", "verbose_interval")


@dataclass(frozen=True)
class Run:
    """One fit of one method on one data set.

    Attributes
    ----------
    table : str
        Number of the table in the paper.
    dataset, method : str
    seed : int
    estimator : BaseEstimator or str
        Estimator, not fitted; or the reason why the method is not run.
    start : int or str
        Number of clusters that training begins with, where runs of one method differ in it.
    timed : bool
        Whether the run has the machine to itself, because its time is a result.
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
    start: int | str = ""
    timed: bool = False
    load: Callable = load_set
    details: Callable | None = None

    @property
    def parameters(self):
        """Parameters that determine the result, as JSON; of a pipeline those of its steps."""
        if isinstance(self.estimator, str):
            return ""
        steps = isinstance(self.estimator, Pipeline)
        kept = {
            name: value
            for name, value in self.estimator.get_params(deep=steps).items()
            if name.split("__")[-1] not in LEFT_OUT
            and not (steps and (name == "steps" or isinstance(value, BaseEstimator)))
        }
        return json.dumps(kept, sort_keys=True, default=lambda v: getattr(v, "__name__", str(v)))

    @property
    def about(self):
        names = ("table", "dataset", "method", "start", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def key(self):
        return (*map(str, self.about.values()), self.parameters)


# --- A run -----------------------------------------------------------------------------


@lru_cache
def warm_up():
    """Let torch import what it imports at the first step of an optimiser: seconds, once."""
    ClusteringModule(2, n_init=1, max_iter=1, tol=0).fit(np.eye(40, 2))


def execute(run, options):
    """Fit and score: a row of the runs' file as a dict, and a list of rows of details."""
    warm_up()
    row = dict.fromkeys(FIELDS, "") | run.about | VERSIONS
    row.update(parameters=run.parameters, threads=options.threads, jobs=options.jobs)
    if isinstance(run.estimator, str):
        return {**row, "status": run.estimator}, []
    X, y = run.load(run.dataset, options.data, run.seed)
    row.update(n_samples=X.shape[0], n_features=X.shape[1], n_clusters=len(np.unique(y)))
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        found, details = _fit_and_score(run, X, y, options.device)
    return {**row, **found}, details


def _fit_and_score(run, X, y, device):
    estimator = clone(run.estimator)
    random = [name for name in estimator.get_params() if name.endswith("random_state")]
    estimator.set_params(**dict.fromkeys(random, run.seed))
    if "device" in estimator.get_params():
        estimator.set_params(device=device)
    elif isinstance(estimator, GaussianMixture):
        X = X.toarray() if sp.issparse(X) else X
        if estimator.covariance_type == "full":
            X = X.astype(np.float64)  # near-singular covariances want the digits
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        _fit(estimator, X)
    except FloatingPointError:
        return {"status": "diverged", "seconds": time.perf_counter() - start}, []
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    labels = estimator.labels_ if hasattr(estimator, "labels_") else estimator.predict(X)
    last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    found = {
        "ari": 100 * adjusted_rand_score(y, labels),
        "nmi": 100 * normalized_mutual_info_score(y, labels),
        "acc": 100 * clustering_accuracy(y, labels),
        "k": len(np.unique(labels)),
        "epochs": getattr(last, "n_iter_", ""),
        "converged": converged(last),
        # Estimators that share work know what their part of it took.
        "seconds": getattr(estimator, "seconds_", seconds),
        "cpu_seconds": "" if hasattr(estimator, "seconds_") else cpu_seconds,
        "status": "done",
        "device": device_name(getattr(last, "device_", "cpu")),
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
    return bool(estimator.n_iter_ < estimator.max_iter) if hasattr(estimator, "n_iter_") else ""


def criteria(estimator, X):
    """Label-free criteria: the loss; soft inertia, L_sp and Gini impurity per row."""
    if isinstance(estimator, KMeans):
        return {"inertia": estimator.inertia_ / X.shape[0]}
    if not hasattr(estimator, "module_"):
        return {}
    loss = estimator.history_.get("loss", ())
    found = {"loss": loss[-1] if len(loss) else ""}
    network = estimator.module_.to(estimator.device_)
    if not hasattr(getattr(network, "clustering", None), "centers"):
        return found
    embed = getattr(network, "encode", None) or network.scaler
    sums = dict.fromkeys(("inertia", "sparsity", "gini"), 0.0)
    with torch.inference_mode():
        centers = network.clustering.centers()[0].double()
        for i in range(0, X.shape[0], 4096):
            batch = X[i : i + 4096].toarray() if sp.issparse(X) else X[i : i + 4096]
            x = embed(torch.as_tensor(batch, dtype=torch.float32, device=estimator.device_))
            resp = network.clustering.log_resp(x)[:, 0].exp().double()
            mean = resp @ centers
            within = float(resp.sum(dim=0) @ centers.square().sum(dim=1) - mean.square().sum())
            sums["inertia"] += within + float((x - mean).square().sum())
            sums["sparsity"] += within
            sums["gini"] += float((resp * (1 - resp)).sum())
    return found | {name: value / X.shape[0] for name, value in sums.items()}


# --- The runs' file --------------------------------------------------------------------


def read_runs(path):
    """Rows of the file, with the columns that an earlier version did not write."""
    return [MISSING | row for row in read_rows(path)]


def key_of(row):
    return tuple(row[n] for n in ("table", "dataset", "method", "start", "seed", "parameters"))


def is_undated(row):
    """Whether a result does not say which parameters made it, so that its age is unknown."""
    return row["status"] == "done" and not row["parameters"]


def states(rows, runs):
    """Age of each row beside the present runs: 'present', 'undated', 'stale', or 'other'.

    A stale row is one of a present run with other parameters than its present ones; another row is
    one of no present run, such as that of a further seed.
    """
    present = {run.key: None for run in runs}
    names = {key[:-1] for key in present}
    dated = {key_of(row)[:-1] for row in rows if not is_undated(row)}
    for row in rows:
        key = key_of(row)
        if key in present:
            yield "present"
        elif key[:-1] not in names:
            yield "other"
        else:
            yield "undated" if is_undated(row) and key[:-1] not in dated else "stale"


def complete(runs, path, options):
    """Do the runs that have no row yet, ``options.jobs`` at a time."""
    rows = read_runs(path)
    if rows and set(rows[0]) != set(FIELDS):
        sys.exit(f"{path} has other columns than this version writes: move it away.")
    counted = zip(rows, states(rows, runs), strict=True)
    done = {key_of(row)[:-1] for row, state in counted if state in ("present", "undated")}
    missing = [run for run in runs if run.key[:-1] not in done]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {path}", flush=True)
    if missing and rows:
        write_rows(path, rows, FIELDS)
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
    append_row(path, rounded(row), FIELDS)
    if details:
        record_details(path, run, details)
    found = row["status"]
    if row["ari"] != "":
        found = f"ARI {row['ari']:5.1f}  ACC {row['acc']:5.1f}  {row['seconds']:6.1f} s"
    print(f"{row['table']:>2}  {row['dataset']:<17}{row['method']:<22}{row['seed']:>3}  {found}")
    sys.stdout.flush()


DETAIL = ("table", "dataset", "method", "seed")


def record_details(path, run, details):
    """Put rows of a run into the file of its kind, in place of those of an earlier run."""
    about = {name: getattr(run, name) for name in DETAIL}
    path = path.with_name(path.name.replace("_runs.csv", f"_{run.details.__name__}.csv"))
    mine = tuple(map(str, about.values()))
    others = [row for row in read_rows(path) if tuple(row[n] for n in DETAIL) != mine]
    write_rows(path, [*others, *(rounded(about | row) for row in details)])


def with_details(rows, path):
    """Runs with the columns of a file of details that has one row for each."""
    details = {tuple(row[n] for n in DETAIL): row for row in read_rows(path)}
    known = [{k: v for k, v in row.items() if v != ""} for row in rows]
    found = [details.get(tuple(row[n] for n in DETAIL), {}) for row in rows]
    return [a | b | c for a, b, c in zip(rows, found, known, strict=True)]
