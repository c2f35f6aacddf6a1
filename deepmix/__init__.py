"""Deep mixture models for clustering, as scikit-learn estimators."""

from deepmix.initialization import pretrain_autoencoder
from deepmix.mixture import AECM, ClusteringModule, DeepDPM, NeuralMixtureEM

__version__ = "0.1.0"

__all__ = ["AECM", "ClusteringModule", "DeepDPM", "NeuralMixtureEM", "pretrain_autoencoder"]
