"""DeepDPM with one of its parts left out: Table 6 of Ronen et al. (2022)."""

import torch

from deepmix import DeepDPM
from deepmix.mixture.deep_dpm.proposals import Splitter
from deepmix.mixture.deep_dpm.split_merge import Partition
from deepmix.mixture.deep_dpm.training import AmortizedObjective


class NoMoves(DeepDPM):
    """Neither splits nor merges: the number of the beginning stays."""

    class _partition_class(Partition):
        moves = ()


class NoSplits(DeepDPM):
    class _partition_class(Partition):
        moves = ("merge",)


class NoMerges(DeepDPM):
    class _partition_class(Partition):
        moves = ("split",)


class TwoMeans(DeepDPM):
    """Halves by 2-means on the first principal component instead of the subclustering nets."""

    class _partition_class(Partition):
        def __init__(self, data, prior, splitter, *args):
            options = {"n_directions": 1, "n_refinements": 0}
            splitter = Splitter(data, prior, splitter.log_concentration, **options)
            super().__init__(data, prior, splitter, *args)

    class _objective_class(AmortizedObjective):
        def cuts(self, sides):
            return None


class NoPriors(DeepDPM):
    """Maximum-likelihood estimates in the M-step."""

    class _partition_class(Partition):
        def estimate(self, statistics):
            nk = statistics.nk.clamp_min(1e-300)[:, None]
            mean = statistics.first / nk
            covariance = statistics.second / nk[:, :, None] - mean[:, :, None] * mean[:, None, :]
            # As GaussianMixture has: a cluster of few rows has no density without.
            ridge = 1e-6 * torch.eye(mean.shape[1], dtype=mean.dtype)
            self.mixture = statistics.nk / statistics.nk.sum(), mean, covariance + ridge


class IsotropicLoss(DeepDPM):
    """Soft k-means by the clustering net instead of the divergence from the mixture."""

    class _objective_class(AmortizedObjective):
        def loss(self, x, target, weight):
            distance = torch.cdist(x, self.network.mixture.means).square()
            return weight @ (self.network.log_resp(x).exp() * distance).sum(dim=1)
