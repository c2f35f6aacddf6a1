"""DCAN: adversarial clustering of the codes of an autoencoder."""

from deepmix.mixture.dcan.dcan import DCAN

__all__ = ["DCAN"]
