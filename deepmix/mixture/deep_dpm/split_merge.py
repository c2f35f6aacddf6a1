"""A partition into Gaussian clusters, and the splits and merges that change their number.

Proposals come from `deepmix.mixture.deep_dpm.proposals` and from the subclustering nets; here they
are accepted in turn until none is left.
"""

from dataclasses import replace

import numpy as np
import torch

from deepmix.gaussian_mixture import Mixture
from deepmix.gaussians import log_evidence, niw_mode, niw_posterior
from deepmix.mixture.deep_dpm.proposals import LOOK_AHEAD, MIN_GAIN, disjoint_pairs, log_merge_ratio

# A merge that would lower the posterior is tried only if one cluster is among this many likeliest
# partners of the other.
N_NEIGHBOURS = 3

# --- Partition -------------------------------------------------------------------------

# Fields of the record of a proposal.
PROPOSAL = np.dtype(
    [
        ("epoch", int),
        ("kind", "U8"),
        ("cluster", int),
        ("partner", int),
        ("log_ratio", float),
        ("accepted", bool),
    ]
)


class Partition:
    """The clusters as they stand: labels, mixture, and the moves that change their number.

    Parameters
    ----------
    data : ScaledRows
    prior : NormalInverseWishart
    splitter : Splitter
    max_clusters : int or None
    check_unions : bool
        Whether two clusters are also merged where no cut that the search knows would part them.
    generator : torch.Generator or None
        Draws whether a proposal of a ratio below one is accepted; None accepts none.
    """

    moves = ("split", "merge")  # that are proposed

    def __init__(self, data, prior, splitter, max_clusters, check_unions=True, generator=None):
        self.data, self.prior, self.splitter = data, prior, splitter
        self.max_clusters, self.check_unions = max_clusters, check_unions
        self.generator = generator
        self.proposals, self.settled, self.resumed = [], False, False
        self._done, self._last, self._refused = set(), "merge", set()
        self._peak = -float("inf")  # log posterior after the last look ahead

    def start(self, labels):
        self.labels, self.n_clusters = labels, int(labels.max()) + 1
        self.estimate(self._statistics(labels, self.n_clusters))

    def resume(self, labels, mixture):
        """Go on with a mixture that was estimated before."""
        self.labels, self.n_clusters = labels, len(mixture.weights)
        self.mixture, self.resumed = mixture, True

    def _statistics(self, labels, n_clusters):
        return self.data.statistics(labels, n_clusters, self.prior.covariance_type)

    def estimate(self, statistics):
        """M-step: the mixture of highest posterior density."""
        weights = statistics.nk / statistics.nk.sum()
        mode = niw_mode(niw_posterior(self.prior, statistics))
        self.mixture = Mixture(weights, *mode, self.prior.covariance_type)

    def drop_empty(self):
        """Remove clusters that no row belongs to; the origins of those that stay, or None."""
        keep = torch.bincount(self.labels, minlength=self.n_clusters) > 0
        if keep.all():
            return None
        self.labels = (keep.long().cumsum(0) - 1)[self.labels]
        self.n_clusters = int(keep.sum())
        mixture = self.mixture.take(keep)
        self.mixture = replace(mixture, weights=mixture.weights / mixture.weights.sum())
        self._forget()
        return keep.nonzero().squeeze(1)

    def score(self):
        """Log posterior of the partition, up to a constant."""
        statistics = self._statistics(self.labels, self.n_clusters)
        terms = log_evidence(self.prior, statistics) + self.splitter.log_concentration
        return float(terms.sum())

    def change(self, epoch, cuts=None):
        """Propose splits and merges in turn until one is accepted or none is left.

        Parameters
        ----------
        epoch : int
            Number of the epoch, under which the proposals are recorded.
        cuts : Cuts or None
            Cuts by the subclustering nets, which compete with those of the splitter.

        Returns
        -------
        Tensor of shape (K,) or None
            For each cluster now the number that it, or its parent, had; None if nothing changed.
        """
        # A refused proposal changes nothing: the next can be made at once.
        while True:
            moves = [move for move in self.moves if move not in self._done]
            if not moves:
                self.settled = True
                return None
            self._last = moves[0] if len(moves) == 1 or self._last == "merge" else "merge"
            moved = self._split(epoch, cuts) if self._last == "split" else self._merge(epoch)
            if moved is not None:
                self._forget()
                return self._relabel(*moved)

    def _forget(self):
        self._done, self._refused, self.settled = set(), set(), False

    def _relabel(self, codes, origin):
        """Number the clusters anew by codes of the rows; origin of each code."""
        used, labels = codes.unique(return_inverse=True)
        self.start(labels)
        return origin[used]

    def _accepts(self, log_ratio):
        """Accept with probability min(1, H)."""
        accepted = log_ratio > 0
        if self.generator is not None:
            u = torch.rand(len(log_ratio), generator=self.generator, dtype=torch.float64)
            accepted = accepted | (u.to(log_ratio.device).log() < log_ratio)
        return accepted

    def _split(self, epoch, others):
        self._done.add("split")
        cuts = self.splitter(self.labels, self.n_clusters)
        if others is not None:
            cuts = cuts.better(others, self.labels)
        accepted = self._accepts(cuts.log_ratio)
        if not accepted.any():
            return self._look_ahead(epoch, cuts)
        if self.max_clusters is not None:
            room = max(0, self.max_clusters - self.n_clusters)
            best = cuts.log_ratio.masked_fill(~accepted, -torch.inf).argsort(descending=True)
            accepted = accepted & torch.zeros_like(accepted).index_fill_(0, best[:room], True)
        numbers = torch.arange(self.n_clusters, device=accepted.device)
        self._record(epoch, "split", numbers, numbers, cuts.log_ratio, accepted)
        if not accepted.any():
            return None
        codes = 2 * self.labels + cuts.side * accepted[self.labels]
        return codes, numbers.repeat_interleave(2)

    def _look_ahead(self, epoch, cuts):
        """Split into several pieces where two do not pay, along directions that are searched for.

        A cut through a row of clusters wins nothing by itself: each half is a row of clusters.
        """
        cuts = cuts.better(self.splitter.search(self.labels, self.n_clusters), self.labels)
        gain, codes = self.splitter.look_ahead(self.labels, cuts)
        numbers = torch.arange(self.n_clusters, device=codes.device)
        accepted = gain > 0
        codes = torch.where(accepted[self.labels], codes, 2**LOOK_AHEAD * self.labels)
        # What merges have undone is not done again: each look ahead ends higher, by a nat.
        peak = self.score() + float(gain.sum())
        no_higher = peak <= self._peak + 1.0
        limit = torch.inf if self.max_clusters is None else self.max_clusters
        if no_higher or len(codes.unique()) > limit:
            accepted = torch.zeros_like(accepted)
        log_ratio = torch.where(accepted, gain, cuts.log_ratio)
        self._record(epoch, "split", numbers, numbers, log_ratio, accepted)
        if not accepted.any():
            return None
        self._peak = peak
        return codes, numbers.repeat_interleave(2**LOOK_AHEAD)

    def _merge(self, epoch):
        if self.n_clusters < 2:
            self._done.add("merge")
            return None
        statistics = self._statistics(self.labels, self.n_clusters)
        pairs, ratio = log_merge_ratio(self.prior, statistics, self.splitter.log_concentration)
        neighbours = N_NEIGHBOURS if self.check_unions else 0
        chosen = disjoint_pairs(pairs, ratio, neighbours, self._refused)
        if not chosen:
            self._done.add("merge")
            return None
        pairs, ratio = pairs[chosen], ratio[chosen]
        target = torch.arange(self.n_clusters, device=pairs.device)
        accepted = self._accepts(ratio)
        exchanged = torch.zeros_like(accepted)
        if self.check_unions:
            union = target.index_copy(0, pairs[:, 1], pairs[:, 0])[self.labels]
            cuts = self.splitter(union, self.n_clusters)
            if (~accepted & (cuts.log_ratio[pairs[:, 0]] <= 0)).any():
                cuts = cuts.better(self.splitter.search(union, self.n_clusters), union)
            parted = cuts.log_ratio[pairs[:, 0]]
            accepted = accepted | (parted <= 0)
            # The evidence for the pair as it stands is minus its merge ratio.
            rows = statistics.nk[pairs].sum(dim=1)
            exchanged = ~accepted & (parted + ratio > MIN_GAIN * rows)
            self._record(epoch, "exchange", *pairs.T, parted + ratio, exchanged)
        self._record(epoch, "merge", *pairs.T, ratio, accepted)
        moved = accepted | exchanged
        self._refused |= {tuple(pair) for pair in pairs[~moved].tolist()}
        if not moved.any():
            return None
        larger = statistics.nk[pairs].argmax(dim=1, keepdim=True)
        origin = target.index_copy(0, pairs[:, 0], pairs.gather(1, larger).squeeze(1))
        origin = torch.where(torch.isin(target, pairs[accepted][:, 0]), origin, target)
        kept = pairs[accepted]
        codes = target.index_copy(0, kept[:, 1], kept[:, 0])[self.labels]
        if exchanged.any():
            codes = self._exchange(codes, pairs[exchanged], cuts.side)
        return codes, origin

    def _exchange(self, codes, pairs, side):
        """Give the rows of each pair to its members by the cut of the union."""
        numbers = torch.arange(self.n_clusters, device=pairs.device)
        first = numbers.index_copy(0, pairs[:, 1], pairs[:, 0])
        second = numbers.index_copy(0, pairs[:, 0], pairs[:, 1])
        weight = self.data.weight
        upper = torch.bincount(self.labels, weight * side, minlength=self.n_clusters)
        upper = upper / torch.bincount(self.labels, weight, minlength=self.n_clusters)
        # The half that holds more of a member keeps its number, and with it its net.
        flip = upper[first] > upper[second]
        side = torch.where(flip[self.labels], 1 - side, side)
        owner = torch.where(side == 1, second[self.labels], first[self.labels])
        return torch.where(torch.isin(self.labels, pairs), owner, codes)

    def _record(self, epoch, kind, first, second, log_ratio, accepted):
        columns = (first, second, log_ratio, accepted)
        for row in zip(*(column.tolist() for column in columns), strict=True):
            self.proposals.append((epoch, kind, *row))
