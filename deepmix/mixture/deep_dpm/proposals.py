r"""Proposals to change the number of Gaussian clusters: cuts, and Hastings ratios.

Chang and Fisher's moves as Ronen et al. (2022) use them: each cut of a cluster in two and each
union of two clusters is judged by the ratio of marginal likelihoods under a Dirichlet process with
a normal-inverse-Wishart prior. All functions work on all clusters side by side.
"""

from typing import NamedTuple

import torch

from deepmix.gaussians import GaussianStatistics, log_evidence
from deepmix.linalg import cholesky, eigh
from deepmix.mixture.deep_dpm.projection_pursuit import least_kurtosis, whitening

# Pairs of clusters are judged together as long as their statistics have fewer numbers: 8 MiB.
PAIRS = 2**20
# A direction along which a cluster has a kurtosis above this shows outliers, not two groups: two
# well separated groups have less if the smaller one holds more than a sixth of the rows.
MAX_KURTOSIS = 4.0
# N_DIRECTIONS is the number of principal directions across which a cluster is cut, N_REFINEMENTS
# the number of steps in which a cut is moved towards the discriminant of its halves.
N_DIRECTIONS, N_REFINEMENTS = 4, 5
# A cut is refused if one half has this many rows or fewer, as in the authors' program.
MIN_HALF = 5.0
# Levels of cuts in a look ahead: a cluster is cut into 2**3 pieces at most.
LOOK_AHEAD = 3
# Least gain, in nats for each row, of changes that are the best of many: of a look ahead, of a cut
# along a direction that was searched for, and of an exchange of two clusters for a cut of their
# union. Even in a uniform cloud the best of many cuts gains a little, by chance.
MIN_GAIN = 5e-3

# --- Hastings ratios -------------------------------------------------------------------


def log_split_ratio(prior, halves, log_concentration):
    r"""Hastings ratio of the split of each cluster into its two halves.

    .. math:: \log H_s = \log \alpha + \log \Gamma(n_{k1}) + \log f(X_{k1}) + \log \Gamma(n_{k2})
        + \log f(X_{k2}) - \log \Gamma(n_k) - \log f(X_k)

    Parameters
    ----------
    prior : NormalInverseWishart
    halves : GaussianStatistics
        Statistics of 2 K sets of rows: 2k and 2k + 1 are the halves of cluster k.
    log_concentration : float
        :math:`\log \alpha`.

    Returns
    -------
    Tensor of shape (K,)
        Minus infinity where a half has no more than `MIN_HALF` rows.
    """
    parts = log_evidence(prior, halves).view(-1, 2).sum(dim=1)
    ratio = log_concentration + parts - log_evidence(prior, halves.pairs())
    enough = halves.nk.view(-1, 2).amin(dim=1) > MIN_HALF
    return torch.where(enough, ratio, -torch.inf)


def log_merge_ratio(prior, statistics, log_concentration):
    r"""Hastings ratios of the merges of all pairs of clusters, :math:`H_m = 1 / H_s`.

    Parameters
    ----------
    prior : NormalInverseWishart
    statistics : GaussianStatistics
        Statistics of the K clusters.
    log_concentration : float

    Returns
    -------
    pairs : Tensor of shape (K (K - 1) / 2, 2)
    log_ratio : Tensor of shape (K (K - 1) / 2,)
    """
    n_clusters = len(statistics.nk)
    device = statistics.nk.device
    first, second = torch.triu_indices(n_clusters, n_clusters, 1, device=device)
    alone = log_evidence(prior, statistics)
    # 45,000 pairs of 300 clusters in 128 dimensions would take gigabytes at once.
    size = max(1, PAIRS // statistics.second[0].numel())
    union = torch.cat(
        [
            log_evidence(prior, statistics.take(a) + statistics.take(b))
            for a, b in zip(first.split(size), second.split(size), strict=True)
        ]
    )
    return torch.stack([first, second], dim=1), (
        union - alone[first] - alone[second] - log_concentration
    )


# --- Cuts ------------------------------------------------------------------------------


def two_means_1d(t, labels, weight, n_clusters):
    r"""The best cut of each cluster into two intervals, exactly, by sorting and prefix sums.

    It maximises the sum of squares between the halves, :math:`S_1^2 / W_1 + S_2^2 / W_2` with
    weights W and sums S, which is what 2-means minimises within them.

    Parameters
    ----------
    t : Tensor of shape (n,)
    labels : Tensor of shape (n,)
    weight : Tensor of shape (n,)
    n_clusters : int

    Returns
    -------
    Tensor of shape (n,)
        1 for the rows above the cut of their cluster, else 0.
    """
    order = t.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    value, cluster, w = t[order], labels[order], weight[order]
    size = torch.bincount(labels, minlength=n_clusters)
    end = size.cumsum(0)

    def sums(terms):
        """Within each cluster, up to and including each row; and of the whole cluster."""
        running = torch.cat([terms.new_zeros(1), terms.cumsum(0)])
        start = running[end - size][cluster]
        return running[1:] - start, running[end][cluster] - start

    (w1, w_all), (s1, s_all) = sums(w), sums(w * value)
    between = s1.square() / w1 + (s_all - s1).square() / (w_all - w1)
    position = torch.arange(len(t), device=t.device)
    below = torch.cat([value[:-1] < value[1:], value.new_zeros(1, dtype=torch.bool)])
    possible = (position + 1 < end[cluster]) & below & (w1 < w_all)
    between = torch.where(possible, between, -torch.inf)
    best = between.new_full((n_clusters,), -torch.inf)
    best = best.scatter_reduce(0, cluster, between, "amax")
    hit = possible & (between == best[cluster])
    cut = position.new_full((n_clusters,), len(t))
    cut = cut.scatter_reduce(0, cluster[hit], position[hit], "amin")
    side = torch.zeros_like(labels)
    side[order] = (position > cut[cluster]).to(side)
    return side


def principal_directions(statistics, n_directions):
    """Directions of largest variance of each cluster, the largest first, and the variances.

    Parameters
    ----------
    statistics : GaussianStatistics
        Statistics of the K clusters, with full second moments.
    n_directions : int

    Returns
    -------
    directions : Tensor of shape (K, d, n_directions)
    variance : Tensor of shape (K, n_directions)
    """
    nk = statistics.nk.clamp_min(1e-300)[:, None]
    mean = statistics.first / nk
    covariance = statistics.second / nk[:, :, None] - mean[:, :, None] * mean[:, None, :]
    variance, vectors = eigh(covariance)
    variance, vectors = variance.flip(1)[:, :n_directions], vectors.flip(2)[..., :n_directions]
    # eigh leaves the sign open, and with it which half is called the first.
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return vectors * vectors.gather(1, largest).sign(), variance.clamp_min(0.0)


class Cuts(NamedTuple):
    """The best cut found for each cluster.

    Attributes
    ----------
    log_ratio : Tensor of shape (K,)
        Log of the Hastings ratio of the split; minus infinity for a cut that is refused.
    side : Tensor of shape (n,)
        Half of each row, 0 or 1.
    halves : GaussianStatistics
        Statistics of 2 K sets of rows: 2k and 2k + 1 are the halves of cluster k.
    """

    log_ratio: torch.Tensor
    side: torch.Tensor
    halves: GaussianStatistics

    def better(self, other, labels):
        """The better of two cuts, cluster by cluster."""
        replace = other.log_ratio > self.log_ratio
        chosen = torch.where(replace.repeat_interleave(2), 1, 0)
        index = chosen * len(chosen) + torch.arange(len(chosen), device=chosen.device)
        return Cuts(
            torch.where(replace, other.log_ratio, self.log_ratio),
            torch.where(replace[labels], other.side, self.side),
            GaussianStatistics.cat([self.halves, other.halves]).take(index),
        )


class Splitter:
    """Finds the best cut of each cluster.

    Each cluster is projected on its leading principal directions and cut there by exact 2-means;
    each cut is then moved to two means with a common covariance (Mahalanobis 2-means), which does
    not depend on the units of the features and splits what lies side by side. Directions of
    heavy tails are passed over but for the first: splitting off outliers always pays where
    clusters are not Gaussian. `search` looks for directions of least kurtosis instead, at some
    ten times the cost.

    Parameters
    ----------
    data : ScaledRows
    prior : NormalInverseWishart
    log_concentration : float
    n_directions : int
    n_refinements : int
    """

    def __init__(
        self,
        data,
        prior,
        log_concentration,
        n_directions=N_DIRECTIONS,
        n_refinements=N_REFINEMENTS,
    ):
        self.data, self.prior, self.log_concentration = data, prior, log_concentration
        self.n_directions, self.n_refinements = n_directions, n_refinements

    def __call__(self, labels, n_clusters):
        """Cut every cluster: labels of shape (n,) -> `Cuts`."""
        scores, kurtosis = self._project(labels, n_clusters)
        allowed = kurtosis < MAX_KURTOSIS
        allowed[:, 0] = True
        return self._best(labels, n_clusters, scores, allowed)

    def search(self, labels, n_clusters):
        """Cut every cluster along directions of least kurtosis: `Cuts`, of those that win enough.

        Where several clusters fill a square, directions of largest variance are any directions,
        and a cut along them goes through the clusters.
        """
        statistics, directions, variance = self._principal(labels, n_clusters)
        mean = statistics.first / statistics.nk.clamp_min(1e-300)[:, None]
        n_directions = min(self.n_directions, mean.shape[1])
        whiten = whitening(directions, variance)
        scores, kurtosis = least_kurtosis(self.data, labels, mean, whiten, n_directions)
        cuts = self._best(labels, n_clusters, scores, kurtosis < MAX_KURTOSIS)
        if cuts is None:
            return self.cuts(labels, torch.zeros_like(labels), n_clusters)
        enough = cuts.log_ratio > MIN_GAIN * statistics.nk
        return cuts._replace(log_ratio=torch.where(enough, cuts.log_ratio, -torch.inf))

    def look_ahead(self, labels, cuts):
        """What each cluster wins by cuts, and cuts of the halves, where they pay together.

        The gain of a node of the tree of cuts is its own log ratio plus the gains of its halves, or
        0 if that is less: then it stays whole.

        Parameters
        ----------
        labels : Tensor of shape (n,)
        cuts : Cuts
            First cut of each cluster.

        Returns
        -------
        gain : Tensor of shape (K,)
            In nats; 0 where it is less than `MIN_GAIN` a row.
        codes : Tensor of shape (n,)
            2 ** LOOK_AHEAD times the cluster of a row plus the number of its piece.
        """
        ratios, nodes = [cuts.log_ratio], [2 * labels + cuts.side]
        for depth in range(1, LOOK_AHEAD):
            n_nodes = len(cuts.log_ratio) * 2**depth
            half = self(nodes[-1], n_nodes)
            ratios.append(half.log_ratio)
            nodes.append(2 * nodes[-1] + half.side)
        gains = [ratios[-1].clamp_min(0.0)]
        for ratio in ratios[-2::-1]:
            gains.insert(0, (ratio + gains[0].view(-1, 2).sum(dim=1)).clamp_min(0.0))
        rows = torch.zeros_like(gains[0]).index_add_(0, labels, self.data.weight)
        gains[0] = torch.where(gains[0] > MIN_GAIN * rows, gains[0], 0.0)
        cut, codes = torch.ones_like(labels, dtype=torch.bool), labels
        for gain, node in zip(gains, nodes, strict=True):
            parent = node // 2
            cut = cut & (gain[parent] > 0)  # the node, and all above it
            codes = torch.where(cut, node, 2 * codes)
        return gains[0], codes

    def cuts(self, labels, side, n_clusters, active=None):
        """Judge given halves."""
        halves = self._halves(labels, side, n_clusters)
        ratio = log_split_ratio(self.prior, halves, self.log_concentration)
        if active is not None:
            ratio = torch.where(active, ratio, -torch.inf)
        return Cuts(ratio, side, halves)

    def _best(self, labels, n_clusters, scores, allowed):
        best = None
        for q in range(scores.shape[1]):
            active = allowed[:, q]
            if not active.any():
                continue
            side = two_means_1d(scores[:, q], labels, self.data.weight, n_clusters)
            for cuts in self._refine(self.cuts(labels, side, n_clusters, active), labels, active):
                best = cuts if best is None else best.better(cuts, labels)
        return best

    def _halves(self, labels, side, n_clusters):
        return self.data.statistics(2 * labels + side, 2 * n_clusters, self.prior.covariance_type)

    def _principal(self, labels, n_clusters):
        statistics = self.data.sums(labels, n_clusters, "full")
        return statistics, *principal_directions(statistics, statistics.first.shape[1])

    def _project(self, labels, n_clusters):
        """Scores of each row on the directions of its cluster, and their kurtosis."""
        statistics, directions, variance = self._principal(labels, n_clusters)
        directions = directions[..., : self.n_directions]
        variance = variance[:, : self.n_directions]
        nk = statistics.nk.clamp_min(1e-300)[:, None]
        mean = statistics.first / nk

        def project(x, part):
            z = labels[part]
            return ((x - mean[z])[:, None] @ directions[z]).squeeze(1)

        scores = self.data.map(project)
        fourth = torch.zeros_like(variance)
        fourth.index_add_(0, labels, self.data.weight[:, None] * scores**4)
        return scores, fourth / nk / variance.square().clamp_min(1e-300)

    def _refine(self, cuts, labels, active):
        """The cut itself, and what Mahalanobis 2-means makes of it."""
        yield cuts
        n_clusters = len(cuts.log_ratio)
        halves = cuts.halves
        for _ in range(self.n_refinements):
            direction, middle = discriminant(halves, self.prior)

            def assign(x, part, direction=direction, middle=middle):
                z = labels[part]
                return ((x * direction[z]).sum(dim=1) > middle[z]).to(z)

            side = self.data.map(assign)
            halves = self._halves(labels, side, n_clusters)
        if self.n_refinements:
            yield self.cuts(labels, side, n_clusters, active)


def discriminant(halves, prior):
    r"""Fisher's discriminant of two halves with one covariance, of each cluster.

    .. math:: \delta = S^{-1} (\mu_2 - \mu_1), \qquad
        x^\top \delta > \tfrac12 (\mu_1 + \mu_2)^\top \delta

    Parameters
    ----------
    halves : GaussianStatistics
        Statistics of 2 K sets of rows: 2k and 2k + 1 are the halves of cluster k.
    prior : NormalInverseWishart
        Its scale is added to the scatter.

    Returns
    -------
    direction : Tensor of shape (K, d)
    middle : Tensor of shape (K,)
    """
    mean = halves.first / halves.nk.clamp_min(1e-300)[:, None]
    n_features = mean.shape[1]
    pairs = mean.view(-1, 2, n_features)
    difference = pairs[:, 1] - pairs[:, 0]
    if halves.second.dim() == 3:
        scatter = halves.second - halves.first[:, :, None] * mean[:, None, :]
        scatter = scatter.view(-1, 2, n_features, n_features).sum(dim=1) + prior.scale
        factor = cholesky(scatter)
        direction = torch.cholesky_solve(difference[:, :, None], factor).squeeze(2)
    elif halves.second.dim() == 2:
        scatter = halves.second - halves.first * mean
        direction = difference / (scatter.view(-1, 2, n_features).sum(dim=1) + prior.scale)
    else:
        direction = difference
    return direction, (pairs.mean(dim=1) * direction).sum(dim=1)


# --- Unions ----------------------------------------------------------------------------


def disjoint_pairs(pairs, log_ratio, neighbours, refused):
    """Pairs to be tried at once, no cluster in two of them, the likeliest first.

    Parameters
    ----------
    pairs : Tensor of shape (P, 2)
    log_ratio : Tensor of shape (P,)
    neighbours : int
        A pair of a ratio below one is tried only if one is among that many likeliest partners of
        the other.
    refused : set of tuple of int
        Pairs of a ratio below one that need not be tried again.

    Returns
    -------
    list of int
        Numbers of the pairs.
    """
    tried, seen, chosen = {}, set(), []
    order = log_ratio.argsort(descending=True, stable=True).tolist()
    ratio, members = log_ratio.tolist(), pairs.tolist()
    for number in order:
        a, b = members[number]
        near = min(tried.get(a, 0), tried.get(b, 0)) < neighbours
        tried[a], tried[b] = tried.get(a, 0) + 1, tried.get(b, 0) + 1
        if a in seen or b in seen:
            continue
        if ratio[number] <= 0 and (not near or (a, b) in refused):
            continue
        seen |= {a, b}
        chosen.append(number)
    return chosen
