r"""The rows that clusters are cut from: mapped, in float64, chunk by chunk; and what rounding took.

A density gains without bound by a cluster in which a rounded feature has one value. The variance
that rounding took from such a feature is given back to the statistics of every cluster.
"""

from functools import reduce
from operator import add

import torch

from deepmix.gaussians import GaussianStatistics, hard_statistics, soft_statistics

# Rows are taken in chunks of this many numbers: 32 MiB in float64 with the products of a few
# features.
CHUNK = 2**18
# Standardised rows are kept in float64 up to this many numbers (256 MiB), else made in each pass.
KEPT = 2**25
# SAME is the difference up to which two scaled values count as equal. OFF_GRID is the distance of a
# value from the nearest grid point, in steps of the grid, up to which it counts as on the grid.
# Both allow for the rounding of float32.
SAME, OFF_GRID = 1e-6, 1e-2

# --- Rows ------------------------------------------------------------------------------


class ScaledRows:
    """The rows of positive weight, after a map of each row, in float64 and in chunks.

    Parameters
    ----------
    rows : Rows
    function : callable
        Map of a batch of rows, (B, n_features) -> (B, d).

    Attributes
    ----------
    rounding : Tensor of shape (d,)
        Variance that rounding took from each feature, as `rounding_variance` estimates it.
    """

    def __init__(self, rows, function):
        self.rows, self.function = rows, function
        self.index = rows.visited
        self.weight = rows.weight[self.index.to(rows.device)].double()
        self.total_weight = float(self.weight.sum())
        size = max(256, CHUNK // rows.n_features)
        self.slices = [slice(i, i + size) for i in range(0, len(self.index), size)]
        self._kept = None
        if len(self.index) * rows.n_features <= KEPT:
            self._kept = torch.cat([self._make(part) for part in self.slices])
        self.rounding = rounding_variance(self)

    def __len__(self):
        return len(self.index)

    def _make(self, part):
        with torch.no_grad():
            return self.function(self.rows.take(self.index[part])).double()

    def chunks(self):
        """Yield ``(slice, x)`` over all rows."""
        for part in self.slices:
            yield part, self._make(part) if self._kept is None else self._kept[part]

    def map(self, function):
        """Apply ``function(x, slice)`` to each chunk and put the results together."""
        return torch.cat([function(x, part) for part, x in self.chunks()])

    def share(self, chosen):
        """Weighted share of the rows that a mask of shape (n,) chooses: float."""
        return float(chosen.double() @ self.weight) / self.total_weight

    def statistics(self, labels, n_clusters, covariance_type):
        """Statistics of the clusters that ``labels`` of shape (n,) name, of unrounded values."""
        return unrounded(self.sums(labels, n_clusters, covariance_type), self.rounding)

    def soft_statistics(self, x, resp, covariance_type):
        """The same of some of the rows, from responsibilities of shape (B, K)."""
        return unrounded(soft_statistics(x, resp, covariance_type), self.rounding)

    def sums(self, labels, n_clusters, covariance_type):
        """Statistics of the values as they are."""
        parts = (
            hard_statistics(x, labels[part], self.weight[part], n_clusters, covariance_type)
            for part, x in self.chunks()
        )
        return reduce(add, parts)


# --- Rounded values --------------------------------------------------------------------


def rounding_variance(data):
    r"""Variance of what rounding took from each feature, for values that lie on a grid.

    .. math:: \delta_j^2 / 12

    for a grid of step :math:`\delta_j`; 0 for a feature whose values lie on none. A density gains
    without bound by a cluster in which a rounded feature has one value: the more it has of them,
    the more clusters. Integers, decimals and indicators are rounded, coordinates of an embedding
    are not.

    Parameters
    ----------
    data : ScaledRows

    Returns
    -------
    Tensor of shape (d,)
    """
    steps, ends = [], []
    for _, x in data.chunks():
        ordered = x.sort(dim=0).values
        steps.append(least_gap(ordered))
        ends.append(ordered[[0, -1]])
    # A feature may have one value in each chunk, and two in all.
    ends = torch.cat(ends).sort(dim=0).values
    step, low = torch.stack([*steps, least_gap(ends)]).amin(dim=0), ends[0]
    miss = torch.zeros_like(step)
    for _, x in data.chunks():
        position = (x - low) / step
        miss = torch.maximum(miss, (position - position.round()).abs().amax(dim=0))
    return torch.where(step.isfinite() & (miss <= OFF_GRID), step.square() / 12, 0.0)


def least_gap(ordered):
    """Least difference of two values of each feature, infinite if it has one: (n, d) -> (d,)."""
    gaps = torch.cat([ordered.diff(dim=0), torch.full_like(ordered[:1], torch.inf)])
    return gaps.masked_fill(gaps <= SAME, torch.inf).amin(dim=0)


def unrounded(statistics, variance):
    """Statistics of values that lie evenly about the rounded ones: the second moments grow.

    Parameters
    ----------
    statistics : GaussianStatistics
    variance : Tensor of shape (d,)
        Variance of the original values about a rounded one.

    Returns
    -------
    GaussianStatistics
    """
    more = statistics.nk[:, None] * variance
    shape = statistics.second.dim()
    more = {3: torch.diag_embed, 2: torch.clone, 1: lambda sums: sums.sum(dim=1)}[shape](more)
    return GaussianStatistics(statistics.nk, statistics.first, statistics.second + more)
