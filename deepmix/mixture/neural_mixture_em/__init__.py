"""Neural mixture EM (Tissera et al., 2022)."""

from deepmix.mixture.neural_mixture_em.neural_mixture_em import NeuralMixtureEM

__all__ = ["NeuralMixtureEM"]
