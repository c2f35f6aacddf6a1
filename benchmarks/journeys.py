"""How much code a reader meets who follows one fit: functions, files, and the deepest stack.

Counted are functions and frames of the package alone, in one small fit of each estimator; beside
them scikit-learn's `GaussianMixture`, in its own. Comprehensions and lambdas are parts of the
function that they stand in.

    python benchmarks/journeys.py
"""

import argparse
import sys
import warnings
from pathlib import Path

import sklearn
from sklearn.datasets import make_blobs
from sklearn.mixture import GaussianMixture

import deepmix
from deepmix import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)
from deepmix.baselines import DEC

SMALL = {"hidden_layer_sizes": (8,), "pretrain_max_iter": 2, "max_iter": 2, "random_state": 0}
FITS = {
    "ClusteringModule": ClusteringModule(4, max_iter=2, random_state=0),
    "NeuralMixtureEM": NeuralMixtureEM(4, max_iter=2, random_state=0),
    "NeuralMixtureEM, learned weights": NeuralMixtureEM(
        4, weights="learned", max_iter=2, random_state=0
    ),
    "AECM": AECM(4, **SMALL),
    "DEC": DEC(4, **SMALL),
    "DCAN": DCAN(4, **SMALL),
    "DeepDPM, EM": DeepDPM(amortized=False),
    "DeepDPM, nets": DeepDPM(n_init=1, max_iter=60, random_state=0),
    "AutoencoderDeepDPM": AutoencoderDeepDPM(n_alternations=1, **SMALL),
    "GaussianMixture of scikit-learn": GaussianMixture(4, random_state=0),
}


class Journey:
    """Functions that run while it is installed as profiler, of the modules under some folder."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.functions, self.depth, self.deepest = set(), 0, 0

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(self.folder) or code.co_name.startswith("<"):
            return
        if event == "call":
            self.functions.add((code.co_filename, code.co_qualname))
            self.depth += 1
            self.deepest = max(self.deepest, self.depth)
        elif event == "return":
            self.depth -= 1

    @property
    def files(self):
        return {file for file, _ in self.functions}


def follow(estimator, X):
    """The journey of one fit."""
    ours = type(estimator).__module__.startswith("deepmix")
    package = deepmix if ours else sklearn
    folder = Path(package.__file__).parent
    journey = Journey(folder if ours else folder / "mixture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about too few epochs
        sys.setprofile(journey)
        try:
            estimator.fit(X)
        finally:
            sys.setprofile(None)
    return journey


def main(arguments=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    X, _ = make_blobs(400, n_features=5, centers=4, random_state=0)
    print(f"{'':34}functions  files  depth")
    for name, estimator in FITS.items():
        found = follow(estimator, X)
        print(f"{name:34}{len(found.functions):9}{len(found.files):7}{found.deepest:7}")


if __name__ == "__main__":
    main()
