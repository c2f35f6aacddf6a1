"""Deep mixture models for clustering, as scikit-learn estimators."""

from deepmix.autoencoder import pretrain_autoencoder
from deepmix.mixture import (
    AECM,
    DCAN,
    AutoencoderDeepDPM,
    ClusteringModule,
    DeepDPM,
    NeuralMixtureEM,
)

__version__ = "0.1.0"

__all__ = [
    "AECM",
    "DCAN",
    "AutoencoderDeepDPM",
    "ClusteringModule",
    "DeepDPM",
    "NeuralMixtureEM",
    "pretrain_autoencoder",
]
