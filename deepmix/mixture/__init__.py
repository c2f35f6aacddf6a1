"""The methods: a folder for each paper."""

from deepmix.mixture.clustering_module.aecm import AECM
from deepmix.mixture.clustering_module.clustering_module import ClusteringModule
from deepmix.mixture.dcan.dcan import DCAN
from deepmix.mixture.deep_dpm.autoencoder_deep_dpm import AutoencoderDeepDPM
from deepmix.mixture.deep_dpm.deep_dpm import DeepDPM
from deepmix.mixture.neural_mixture_em.neural_mixture_em import NeuralMixtureEM

__all__ = [
    "AECM",
    "DCAN",
    "AutoencoderDeepDPM",
    "ClusteringModule",
    "DeepDPM",
    "NeuralMixtureEM",
]
