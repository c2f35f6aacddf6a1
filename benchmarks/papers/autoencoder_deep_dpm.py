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

import sys

import numpy as np
from baselines import parameters
from benchmark import Benchmark, runs_of
from claims import Claim
from sets import about, load_rows
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

from deepmix import AutoencoderDeepDPM, DeepDPM

DATASETS = ("digits", "pendigits", "usps", "mnist 14x14")
QUICK = ("digits",)
N_SEEDS = 3
N_ROWS = 20_000  # sample of MNIST that is clustered

CLAIMS = (
    *(Claim("3", dataset, "AE-DPM", metric="k", low=8, high=12) for dataset in DATASETS),
    Claim("3", "usps", "AE-DPM", metric="nmi", low=76),
    Claim("3", "mnist 14x14", "AE-DPM", metric="nmi", low=90),  # the paper's .90
)

# --- Methods ---------------------------------------------------------------------------


@parameters
class OnFeatures(BaseEstimator):
    """A clusterer on the codes of the pretrained autoencoder, or on principal components."""

    clusterer: BaseEstimator
    features: str = "codes"
    wide_prior: bool = False
    random_state: object = None

    def fit(self, X, y=None):
        seed = self.random_state
        if self.features == "codes":
            # Only the pretrained autoencoder is used: the one epoch of clustering plays no part.
            once = DeepDPM(amortized=False, max_iter=1, tol=0)
            alone = {"n_alternations": 0, "device": "cpu", "random_state": seed}
            Z = AutoencoderDeepDPM(once, **alone).fit_transform(X)
        else:
            Z = PCA(10, random_state=seed).fit_transform(X)
        model = clone(self.clusterer).set_params(random_state=seed)
        if self.wide_prior:
            model.set_params(prior_scale="codes")
        self.labels_ = model.fit_predict(Z.astype(np.float64))
        self.n_iter_, self.converged_ = model.n_iter_, getattr(model, "converged_", True)
        return self


class PriorStays(DeepDPM):
    """An ablation: the prior scale of the first clustering in all of them."""

    def _prior(self, data, factor=1.0):
        return super()._prior(data)


def methods(dataset):
    n_clusters = about(dataset).n_clusters
    dpm = DeepDPM(amortized=False)
    slow = {}
    if dataset == "digits":
        epochs = {"pretrain_max_iter": 30, "max_iter": 20}
        slow = {
            "AE-DPM, nets": AutoencoderDeepDPM(DeepDPM(prior_scale="codes")),
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
        "AE-DPM, prior stays": AutoencoderDeepDPM(PriorStays(amortized=False, prior_scale="codes")),
        **slow,
    }


def load_some(dataset, data_home, seed):
    """Rows and labels, of MNIST some."""
    X, y = load_rows(dataset, data_home)
    if dataset == "mnist 14x14":
        chosen = np.random.default_rng(0).permutation(len(X))[:N_ROWS]
        X, y = X[chosen], y[chosen]
    return X, y


def numbers(estimator, X):
    """Details of a run: the number of clusters found, and that after each clustering."""
    found = [len(np.unique(estimator.labels_))]
    steps = getattr(estimator, "history_", {}).get("n_clusters", found)
    return [{"k": found[0], "by_clustering": " ".join(str(int(k)) for k in steps)}]


def plan(options):
    runs = []
    for dataset in QUICK if options.quick else DATASETS:
        asked = methods(dataset)
        if options.quick:
            asked = {m: e for m, e in asked.items() if m not in ("AE-DPM, nets", "AE-DPM, program")}
        n_seeds = options.seeds or (1 if options.quick else N_SEEDS)
        runs += runs_of("3", dataset, asked, n_seeds, load=load_some, details=numbers)
    return runs


BENCHMARK = Benchmark(
    "autoencoder_deep_dpm",
    __doc__,
    "ronen_2022",
    plan,
    CLAIMS,
    details="numbers",
    summary={
        "metrics": ("nmi", "ari", "acc", "k"),
        "means": ("epochs", "seconds"),
        "firsts": ("by_clustering",),
        "aliases": {"AE-DPM": "DeepDPM"},
    },
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
