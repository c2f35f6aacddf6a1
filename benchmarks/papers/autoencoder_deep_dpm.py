"""Table 3 of Ronen et al. (2022): DeepDPM with features that an autoencoder learns, end to end.

AE+... are methods on the codes of the pretrained autoencoder, the same codes in every row of a
seed: k-means and the full-covariance mixture, told the number of clusters; BGMM, scikit-learn's
Dirichlet process mixture truncated at 30; DPM, which is `DeepDPM` by EM with its own prior; and DPM
wide, with the prior scale that `AutoencoderDeepDPM` has by default. PCA+DPM are the same two on ten
principal components. AE-DPM is `AutoencoderDeepDPM`, three alternations after the codes of AE+DPM
wide; *prior stays* does not let the prior shrink with the clusters; *nets* learns responsibilities
by networks; *program* has the settings of the authors' program, but for 30 epochs of pretraining
and 20 in each alternation. MNIST is pooled to 14x14 pixels, 20,000 rows of it. The seconds of the
results that are here were taken beside other work.

    python benchmarks/papers/autoencoder_deep_dpm.py --quick --check
"""

import statistics
import sys

import numpy as np
from common import (
    HERE,
    N_CLUSTERS,
    Run,
    complete,
    load_rows,
    parse_options,
    read_rows,
    selected,
    write_rows,
)
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

from deepmix import AutoencoderDeepDPM, DeepDPM
from deepmix.mixture.deep_dpm.deep_dpm import CODE_FLOOR

DATASETS = ("digits", "pendigits", "usps", "mnist 14x14")
QUICK = ("digits",)
N_SEEDS = 3
N_ROWS = 20_000  # of MNIST
METRICS = ("nmi", "ari", "acc", "k")

CLAIMS = (
    # dataset, method, metric, least or most
    *((dataset, "AE-DPM", "k", 8, 12) for dataset in DATASETS),
    ("usps", "AE-DPM", "nmi", 76, 100),
    ("mnist 14x14", "AE-DPM", "nmi", 90, 100),  # the paper's .90
)

# --- Methods ---------------------------------------------------------------------------


class OnFeatures(BaseEstimator):
    """A clusterer on the codes of the pretrained autoencoder, or on principal components."""

    def __init__(self, clusterer, features="codes", wide_prior=False, random_state=None):
        self.clusterer, self.features = clusterer, features
        self.wide_prior, self.random_state = wide_prior, random_state

    def fit(self, X, y=None):
        seed = self.random_state
        if self.features == "codes":
            # Not clustered: one epoch, of which nothing is used.
            alone = {"n_alternations": 0, "clustering_max_iter": 1, "tol": 0, "device": "cpu"}
            Z = AutoencoderDeepDPM(random_state=seed, **alone).fit_transform(X)
        else:
            Z = PCA(10, random_state=seed).fit_transform(X)
        model = clone(self.clusterer).set_params(random_state=seed)
        if self.wide_prior:
            model.set_params(prior_scale=CODE_FLOOR * len(Z))
        self.labels_ = model.fit_predict(Z.astype(np.float64))
        self.n_iter_, self.converged_ = model.n_iter_, getattr(model, "converged_", True)
        return self


class PriorStays(AutoencoderDeepDPM):
    """An ablation: the prior scale of the first clustering in all of them."""

    _prior = DeepDPM._prior


def methods(dataset):
    n_clusters = N_CLUSTERS[dataset.split()[0]]
    dpm = DeepDPM(amortized=False)
    slow = {}
    if dataset == "digits":
        epochs = {"pretrain_max_iter": 30, "max_iter": 20}
        slow = {
            "AE-DPM, nets": AutoencoderDeepDPM(amortized=True),
            "AE-DPM, program": AutoencoderDeepDPM.from_paper(n_samples=1797, **epochs),
        }
    return {
        "PCA+DPM": OnFeatures(dpm, "pca"),
        "PCA+DPM wide": OnFeatures(dpm, "pca", wide_prior=True),
        "AE+KM": OnFeatures(KMeans(n_clusters, n_init=10)),
        "AE+GMM": OnFeatures(GaussianMixture(n_clusters)),
        "AE+BGMM": OnFeatures(BayesianGaussianMixture(n_components=30, max_iter=100)),
        "AE+DPM": OnFeatures(dpm),
        "AE+DPM wide": OnFeatures(dpm, wide_prior=True),
        "AE-DPM": AutoencoderDeepDPM(),
        "AE-DPM, prior stays": PriorStays(),
        **slow,
    }


def load_pooled(dataset, data_home, seed):
    """MNIST in 14x14 pixels, some of its rows; other sets as they are."""
    name = dataset.split()[0]
    X, y = load_rows(name, data_home)
    if name != "mnist":
        return X, y
    chosen = np.random.default_rng(0).permutation(len(X))[:N_ROWS]
    images = X[chosen].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    return images.reshape(len(images), -1), y[chosen]


def numbers(estimator, X):
    """Details of a run: the number of clusters found, and that after each clustering."""
    found = [len(np.unique(estimator.labels_))]
    steps = getattr(estimator, "history_", {}).get("n_clusters", found)
    return [{"k": found[0], "by_clustering": " ".join(str(int(k)) for k in steps)}]


def plan(options):
    datasets = QUICK if options.quick else DATASETS
    n_seeds = options.seeds or (1 if options.quick else N_SEEDS)
    runs = [
        Run("3", dataset, method, seed, estimator, load=load_pooled, details=numbers)
        for dataset in datasets
        for method, estimator in methods(dataset).items()
        if not (options.quick and method in ("AE-DPM, nets", "AE-DPM, program"))
        for seed in range(n_seeds)
    ]
    return selected(runs, options)


# --- Summary ---------------------------------------------------------------------------


def summarize(path):
    """Means over seeds beside the paper's."""
    published = read_rows(HERE / "published" / "ronen_2022.csv")
    paper = {(r["table"], r["dataset"], r["method"]): r for r in published}
    details = read_rows(path.with_name("autoencoder_deep_dpm_numbers.csv"))
    found = {(r["dataset"], r["method"], r["seed"]): r for r in details}
    groups = {}
    for row in read_rows(path):
        if row["status"] == "done":
            key = (row["dataset"], row["method"])
            groups.setdefault(key, {})[row["seed"]] = row  # the last of each seed
    for (dataset, method), rows in groups.items():
        theirs = {}
        if method == "AE-DPM":
            theirs = paper.get(("3", dataset.split()[0], "DeepDPM"), {})
        row = {"table": "3", "dataset": dataset, "method": method, "n_seeds": len(rows)}
        for metric in METRICS:
            values = [
                float(found[dataset, method, seed]["k"] if metric == "k" else r[metric])
                for seed, r in rows.items()
            ]
            row[f"{metric}_mean"] = round(statistics.fmean(values), 2)
            row[f"{metric}_std"] = round(statistics.pstdev(values), 2)
            row[f"paper_{metric}"] = theirs.get(f"{metric}_mean", "")
        row["by_clustering"] = found[dataset, method, min(rows)]["by_clustering"]
        row["seconds"] = round(statistics.fmean(float(r["seconds"]) for r in rows.values()), 1)
        yield row


def verdicts(summary):
    found = {(row["dataset"], row["method"]): row for row in summary}
    for dataset, method, metric, low, high in CLAIMS:
        row = found.get((dataset, method))
        value = row and row[f"{metric}_mean"]
        verdict = "not run" if row is None else "holds" if low <= value <= high else "FAILS"
        yield {
            "dataset": dataset,
            "method": method,
            "metric": metric,
            "value": value,
            "least": low,
            "most": high,
            "verdict": verdict,
        }


def main(arguments=None):
    options = parse_options(__doc__, "results", arguments)
    path = options.out / "autoencoder_deep_dpm_runs.csv"
    if not options.no_runs:
        complete(plan(options), path, options)
    summary = list(summarize(path))
    if not summary:
        print("no runs")
        return 1
    claims = list(verdicts(summary))
    write_rows(options.out / "autoencoder_deep_dpm.csv", summary)
    write_rows(options.out / "autoencoder_deep_dpm_verdicts.csv", claims)
    for row in (*summary, *claims):
        print("  ".join(str(value) for value in row.values()))
    run = [row for row in claims if row["verdict"] != "not run" or not options.quick]
    return int(options.check and any(row["verdict"] != "holds" for row in run))


if __name__ == "__main__":
    sys.exit(main())
