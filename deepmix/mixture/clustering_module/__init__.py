"""The clustering module, alone and inside an autoencoder (Boubekki et al., 2021)."""

from deepmix.mixture.clustering_module.aecm import AECM
from deepmix.mixture.clustering_module.clustering_module import ClusteringModule

__all__ = ["AECM", "ClusteringModule"]
