r"""Directions along which a cloud of rows looks most like two: those of least kurtosis.

Two groups of one size, far apart, have a kurtosis of 1, a uniform cloud of 1.8, a Gaussian of 3 in
any direction (Peña and Prieto, "Cluster identification using projections", JASA 2001). Unlike the
directions of largest variance these do not depend on the units of the features. All functions work
on all clusters side by side.
"""

import math

import torch

# Number of steps of steepest descent, and of angles that each step tries.
N_STEPS, N_ANGLES = 6, 180
# Directions whose variance is a smaller share of the largest are rounding errors, not searched.
FLAT = 1e-9


def whitening(directions, variance):
    """Map of each cluster to variance one in every direction that it has.

    Parameters
    ----------
    directions : Tensor of shape (K, d, d)
    variance : Tensor of shape (K, d)
        Variances along the directions, the largest first.

    Returns
    -------
    Tensor of shape (K, d, d)
        Columns are directions, divided by the deviation along them.
    """
    thin = variance <= FLAT * variance[:, :1]
    return directions * torch.where(thin, 0.0, variance.rsqrt())[:, None]


def great_circle(y, u, moment):
    r"""Where the kurtosis of :math:`y \cos\theta + u \sin\theta` is least.

    Parameters
    ----------
    y, u : Tensor of shape (n, Q)
        Scores on two directions, for each of Q searches.
    moment : callable
        Mean of a Tensor of shape (n, Q) over each cluster: (K, Q).

    Returns
    -------
    cos, sin : Tensor of shape (K, Q)
    """
    angles = (torch.arange(N_ANGLES, dtype=y.dtype, device=y.device) / N_ANGLES - 0.5) * math.pi
    c, s = angles.cos(), angles.sin()

    def along(power):
        """Moment of that power at every angle, by the binomial theorem: (K, Q, N_ANGLES)."""
        terms = (
            math.comb(power, i)
            * moment(y ** (power - i) * u**i)[..., None]
            * c ** (power - i)
            * s**i
            for i in range(power + 1)
        )
        return sum(terms)

    kurtosis = along(4) / along(2).square().clamp_min(1e-300)
    best = kurtosis.argmin(dim=2)
    return c[best], s[best]


def least_kurtosis(data, labels, mean, whiten, n_directions):
    """Scores of each row on directions of least kurtosis of its cluster.

    The search begins at each of the first columns of ``whiten`` and goes down the steepest way, in
    the space where the cluster has variance one; each step is exact but for the grid of angles.

    Parameters
    ----------
    data : ScaledRows
    labels : Tensor of shape (n,)
    mean : Tensor of shape (K, d)
    whiten : Tensor of shape (K, d, d)
    n_directions : int

    Returns
    -------
    scores : Tensor of shape (n, n_directions)
    kurtosis : Tensor of shape (K, n_directions)
    """
    n_clusters, n_features = mean.shape
    nk = torch.zeros_like(mean[:, 0]).index_add_(0, labels, data.weight).clamp_min(1e-300)

    def moment(values):
        total = values.new_zeros(n_clusters, values.shape[1])
        return total.index_add_(0, labels, data.weight[:, None] * values) / nk[:, None]

    def project(vectors):
        maps = whiten @ vectors

        def scores(x, part):
            z = labels[part]
            return ((x - mean[z])[:, None] @ maps[z]).squeeze(1)

        return data.map(scores)

    def gradient(y):
        """Mean of whitened row times cube of score: (K, d, n_directions)."""
        total = mean.new_zeros(n_clusters, n_features, y.shape[1])
        for part, x in data.chunks():
            z = labels[part]
            cubes = data.weight[part, None] * y[part] ** 3
            total.index_add_(0, z, (x - mean[z])[:, :, None] * cubes[:, None])
        return whiten.mT @ total / nk[:, None, None]

    start = torch.eye(n_features, dtype=mean.dtype, device=mean.device)[:, :n_directions]
    vectors = start.expand(n_clusters, -1, -1)
    y = project(vectors)
    for _ in range(N_STEPS):
        slope = gradient(y)
        slope = slope - vectors * (vectors * slope).sum(dim=1, keepdim=True)
        slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-300)
        u = project(slope)
        cos, sin = great_circle(y, u, moment)
        vectors = vectors * cos[:, None] + slope * sin[:, None]
        y = y * cos[labels] + u * sin[labels]
    return y, moment(y**4) / moment(y**2).square().clamp_min(1e-300)
