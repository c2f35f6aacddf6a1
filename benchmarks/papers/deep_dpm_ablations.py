"""DeepDPM with one of its parts left out: Table 6 of Ronen et al. (2022).

Each class changes what the objective of the training does, after it is made.
"""

import torch

from deepmix import DeepDPM
from deepmix.mixture.deep_dpm.proposals import Splitter


class NoMoves(DeepDPM):
    """Neither splits nor merges: the number of the beginning stays."""

    moves = ()

    def _objective(self, network, partition, generator):
        partition.moves = self.moves
        return super()._objective(network, partition, generator)


class NoSplits(NoMoves):
    moves = ("merge",)


class NoMerges(NoMoves):
    moves = ("split",)


class TwoMeans(DeepDPM):
    """Halves by 2-means on the first principal component instead of the subclustering nets."""

    def _objective(self, network, partition, generator):
        old = partition.splitter
        partition.splitter = Splitter(
            old.data, old.prior, old.log_concentration, n_directions=1, n_refinements=0
        )
        objective = super()._objective(network, partition, generator)
        propose = objective.next_partition
        objective.next_partition = lambda cuts=None: propose()
        return objective


class NoPriors(DeepDPM):
    """Maximum-likelihood estimates in the M-step."""

    def _objective(self, network, partition, generator):
        def estimate(statistics):
            nk = statistics.nk.clamp_min(1e-300)[:, None]
            mean = statistics.first / nk
            covariance = statistics.second / nk[:, :, None] - mean[:, :, None] * mean[:, None, :]
            # As GaussianMixture has: a cluster of few rows has no density without.
            ridge = 1e-6 * torch.eye(mean.shape[1], dtype=mean.dtype)
            partition.weights = statistics.nk / statistics.nk.sum()
            partition.means, partition.covariances = mean, covariance + ridge

        partition.estimate = estimate
        return super()._objective(network, partition, generator)


class IsotropicLoss(DeepDPM):
    """Soft k-means by the clustering net instead of the divergence from the mixture."""

    def _objective(self, network, partition, generator):
        objective = super()._objective(network, partition, generator)

        def step(batch, index, weight):
            x, _ = objective._parts(batch)
            objective.n_steps += 1
            distance = torch.cdist(x, network.mixture.means).square()
            resp = network.log_resp(x).exp()
            return {"clustering": weight @ (resp * distance).sum(dim=1)}

        objective.step = step
        return objective
