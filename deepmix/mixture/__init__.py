"""One paper, one file."""

from deepmix.mixture.aecm import AECM
from deepmix.mixture.clustering_module import ClusteringModule

__all__ = ["AECM", "ClusteringModule"]
