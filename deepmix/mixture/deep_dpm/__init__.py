"""DeepDPM, on given features and on those that an autoencoder learns (Ronen et al., 2022)."""

from deepmix.mixture.deep_dpm.autoencoder_deep_dpm import AutoencoderDeepDPM
from deepmix.mixture.deep_dpm.deep_dpm import DeepDPM

__all__ = ["AutoencoderDeepDPM", "DeepDPM"]
