r"""Losses of the nets of DeepDPM, and of the autoencoder that is trained in turn with it.

Ronen, Finder and Freifeld, "DeepDPM: Deep clustering with an unknown number of clusters", CVPR
2022.
"""

import torch


def clustering_loss(log_resp, target, weight):
    r"""Divergence of the net's responsibilities from those of the mixture.

    .. math:: L_{cl} = \sum_i w_i \, \mathrm{KL}(r^E_i \Vert r_i)
        = \sum_i w_i \sum_k r^E_{ik} (\log r^E_{ik} - \log r_{ik})

    In the direction of the authors' program; the paper has :math:`\mathrm{KL}(r_i \Vert r^E_i)`.

    Parameters
    ----------
    log_resp : Tensor of shape (B, K)
        Log-responsibilities of the net.
    target : Tensor of shape (B, K)
        Responsibilities of the mixture.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (torch.xlogy(target, target) - target * log_resp).sum(dim=1)


def subclustering_loss(x, resp, means, weight):
    r"""Soft 2-means of each cluster.

    .. math:: L_{sub} = \sum_i w_i \sum_{j=1}^2 \tilde r_{ij}
        \lVert x_i - \tilde\mu_{z_i j} \rVert^2

    Parameters
    ----------
    x : Tensor of shape (B, d)
    resp : Tensor of shape (B, 2)
        Responsibilities of the two halves of the row's own cluster.
    means : Tensor of shape (B, 2, d)
        Means of these two halves.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (resp * (x[:, None] - means).square().sum(dim=2)).sum(dim=1)


def center_distance(z, centers, labels, weight):
    r"""Squared distance of codes from the centres of their clusters.

    .. math:: \sum_i w_i \lVert z_i - \mu_{k_i} \rVert^2

    Parameters
    ----------
    z : Tensor of shape (B, p)
    centers : Tensor of shape (K, p)
    labels : Tensor of shape (B,)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (z - centers[labels]).square().sum(dim=1)


def within_share(statistics):
    r"""Share of the clusters' scatter in that of all rows, a sum over features.

    .. math:: \frac{\sum_k \sum_{i \in k} \lVert x_i - \bar x_k \rVert^2}
        {\sum_i \lVert x_i - \bar x \rVert^2}

    Parameters
    ----------
    statistics : GaussianStatistics
        Statistics for diagonal covariances.

    Returns
    -------
    float
        The share, 1 if all rows are equal.
    """
    nk, first, second = statistics.nk[:, None], statistics.first, statistics.second
    within = (second - first.square() / nk.clamp_min(1e-300)).sum()
    total = (second.sum(dim=0) - first.sum(dim=0).square() / nk.sum()).sum()
    return float(within / total) if total > 0 else 1.0
