r"""Losses of the clustering module, and the prior on its mean responsibilities.

Boubekki, Kampffmeyer, Brefeld and Jenssen, "Joint optimization of an autoencoder for clustering
and embedding", Machine Learning 110 (2021): E1 to E4 of Eq. 3, their gradients, and what Eq. 10 has
in their place around orthonormal centres.
"""

import numpy as np
import torch


def reconstruction(x, resp, centers, weight):
    r"""E1 of Eq. 3: distance of each row to the mean of the centres under its responsibilities.

    .. math:: E_1 = \sum_i w_i \lVert x_i - \bar x_i \rVert^2, \qquad
        \bar x_i = \sum_k \gamma_{ik} \mu_k

    Parameters
    ----------
    x : Tensor of shape (B, d)
    resp : Tensor of shape (B, K)
    centers : Tensor of shape (K, d)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (x - resp @ centers).square().sum(dim=1)


def sparsity(resp, centers, weight):
    r"""E2 of Eq. 3: the Gini impurity of the responsibilities, weighted by the centres' norms.

    .. math:: E_2 = \sum_i w_i \sum_k \gamma_{ik} (1 - \gamma_{ik}) \lVert \mu_k \rVert^2

    Parameters and result as in `reconstruction`.
    """
    return weight @ (resp * (1 - resp)) @ centers.square().sum(dim=1)


def merging(resp, centers, weight):
    r"""E3 of Eq. 3, over pairs of *different* clusters.

    .. math:: E_3 = -\sum_i w_i \sum_{k \neq l} \gamma_{ik} \gamma_{il} \mu_k^\top \mu_l

    The paper's sum runs over all pairs; with its diagonal the loss is unbounded below.
    Parameters and result as in `reconstruction`.
    """
    pairs = (resp * weight[:, None]).T @ resp
    pairs = pairs - torch.diag(pairs.diagonal())
    return -(pairs * (centers @ centers.T)).sum()


def balance(log_resp, weight, strength):
    r"""E4 of Eq. 3: minus the log of a Dirichlet density at the mean responsibilities.

    .. math:: E_4 = \sum_k (1 - \alpha_k) \log \tilde\gamma_k, \qquad
        \tilde\gamma_k = \sum_i w_i \gamma_{ik} \big/ \sum_i w_i

    Computed from log-responsibilities: a cluster that has lost every row keeps its gradient.

    Parameters
    ----------
    log_resp : Tensor of shape (B, ..., K)
    weight : Tensor of shape (B,)
    strength : Tensor of shape (..., K)
        ``alpha - 1``, paired with the clusters (see `DirichletPrior`).

    Returns
    -------
    Tensor of shape (...)
    """
    return -(strength * log_mean_resp(log_resp, weight)).sum(dim=-1)


def cluster_shares(log_resp, weight):
    r"""Mean responsibilities of a batch, and each row's share of its cluster.

    .. math:: \tilde\gamma_k = \sum_i w_i \gamma_{ik}, \qquad
        r_{ik} = w_i \gamma_{ik} / \tilde\gamma_k

    Parameters
    ----------
    log_resp : Tensor of shape (B, R, K)
    weight : Tensor of shape (B,)
        Sums to one.

    Returns
    -------
    log_mean : Tensor of shape (R, K)
    share : Tensor of shape (B, R, K)
        Finite also for a cluster whose responsibilities underflow.
    """
    log_weighted = log_resp + weight.log()[:, None, None]
    log_mean = torch.logsumexp(log_weighted, dim=0)
    return log_mean, log_weighted.sub_(log_mean).exp_()


def inertia(x, resp, centers, weight):
    r"""E1 + E2 + E3 in one sum: the inertia of soft k-means.

    .. math:: E_1 + E_2 + E_3 = \sum_i w_i \sum_k \gamma_{ik} \lVert x_i - \mu_k \rVert^2

    Parameters and result as in `reconstruction`.
    """
    energy = centers.square().sum(dim=1) - 2 * x @ centers.T
    return weight @ ((resp * energy).sum(dim=1) + x.square().sum(dim=1))


def ambiguity(x, resp, centers, weight):
    r"""The paper's label-free criterion, Sec. 5.2.4: :math:`L_{sp} = E_2 + E_3`.

    Parameters and result as in `reconstruction`; ``x`` plays no part.
    """
    return sparsity(resp, centers, weight) + merging(resp, centers, weight)


def inertia_and_gradients(x, log_resp, centers, weight, prior):
    r"""The loss of Eq. 7 for restarts side by side, with its gradient in closed form.

    With :math:`G_{ik} = \lVert \mu_k \rVert^2 - 2 x_i^\top \mu_k` and the share
    :math:`r_{ik} = w_i \gamma_{ik} / \sum_j w_j \gamma_{jk}` of a row in its cluster,

    .. math::
        \partial L / \partial s_{ik} &= w_i \gamma_{ik} \Big( G_{ik} -
            \sum_l \gamma_{il} G_{il} \Big) - (\alpha_k - 1) r_{ik}
            + \gamma_{ik} \sum_l (\alpha_l - 1) r_{il} \\
        \partial L / \partial \mu_k &= 2 \Big( \sum_i w_i \gamma_{ik} \, \mu_k
            - \sum_i w_i \gamma_{ik} x_i \Big)

    for logits s. This is five times faster than automatic differentiation, with the same result.

    Parameters
    ----------
    x : Tensor of shape (B, d)
    log_resp : Tensor of shape (B, R, K)
    centers : Tensor of shape (R, K, d)
    weight : Tensor of shape (B,)
    prior : DirichletPrior

    Returns
    -------
    terms : dict of str to Tensor of shape (R,)
    logit_gradient : Tensor of shape (B, R, K)
    center_gradient : Tensor of shape (R, K, d)
    """
    flat = centers.flatten(0, 1)  # all products run over restarts and clusters at once
    resp = log_resp.exp()
    energy = torch.addmm(flat.square().sum(dim=1), x, flat.T, alpha=-2).view_as(resp)
    expected = (resp * energy).sum(dim=2, keepdim=True)
    weighted = resp * weight[:, None, None]
    total_weight = weight.sum()
    log_mean, share = cluster_shares(log_resp, weight / total_weight)
    penalty = -prior.strength_of(log_mean, total_weight)  # 1 - alpha
    share = share * penalty
    logit_gradient = torch.addcmul(share, weighted, energy - expected)
    logit_gradient.addcmul_(resp, share.sum(dim=2, keepdim=True), value=-1)
    weighted = weighted.flatten(1)
    center_gradient = torch.addmm(
        weighted.sum(dim=0)[:, None] * flat, weighted.T, x, beta=2, alpha=-2
    )
    terms = {
        "inertia": weight @ (expected.squeeze(2) + x.square().sum(dim=1, keepdim=True)),
        "balance": (penalty * log_mean).sum(dim=1),
    }
    return terms, logit_gradient, center_gradient.view_as(centers)


def gini(resp, weight):
    r"""Sparsity of Eq. 10: E2 with centres of norm one.

    .. math:: \sum_i w_i \sum_k \gamma_{ik} (1 - \gamma_{ik})

    Parameters
    ----------
    resp : Tensor of shape (B, K)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
        Between 0 for hard assignments and ``(1 - 1/K) * sum(weight)`` for uniform ones.
    """
    return weight @ (resp * (1 - resp)).sum(dim=1)


def orthonormality(centers):
    r"""Distance of the centres from an orthonormal set, Eq. 8 and 10.

    .. math:: \lVert U U^\top - I_K \rVert_1 \quad \text{(entrywise), rows of } U
        \text{ the centres}

    Parameters
    ----------
    centers : Tensor of shape (K, p)

    Returns
    -------
    Tensor of shape ()
    """
    identity = torch.eye(len(centers), dtype=centers.dtype, device=centers.device)
    return (centers @ centers.T - identity).abs().sum()


# Strength of the Dirichlet prior for concentration='auto', per row and in units of the data's
# variance. On Pendigits the clustering module is best between .03 and .1, where the values that its
# paper tuned lie too (Table 12).
AUTO_STRENGTH = 0.05


def log_mean_resp(log_resp, weight):
    r"""Log of the mean responsibilities of a batch.

    .. math:: \log \tilde\gamma_k = \log \sum_i w_i \gamma_{ik} - \log \sum_i w_i

    Parameters
    ----------
    log_resp : Tensor of shape (B, ..., K)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape (..., K)
    """
    log_weight = (weight / weight.sum()).log()
    return torch.logsumexp(log_resp + log_weight.view(-1, *[1] * (log_resp.dim() - 1)), dim=0)


class DirichletPrior:
    """The concentration of the Dirichlet prior on the mean responsibilities.

    Parameters
    ----------
    concentration : 'auto', float or array-like of shape (n_clusters,)
    variance : float
        Total variance of what is clustered: the unit of ``'auto'``.
    like : Tensor
        Tensor whose device and dtype are taken.
    """

    def __init__(self, concentration, variance, like):
        # E1 to E3 are sums over the batch and E4 is not: 'auto' grows with the batch instead.
        self.per_row = isinstance(concentration, str)
        strength = AUTO_STRENGTH * variance if self.per_row else np.asarray(concentration) - 1.0
        self.strength = torch.as_tensor(strength, dtype=like.dtype, device=like.device)
        self.asymmetric = self.strength.dim() > 0
        if self.asymmetric:
            self.strength = self.strength.sort().values

    def __call__(self, log_resp, weight):
        """Strength in a batch: (B, ..., K) and (B,) -> (..., K)."""
        # Only ranks need the mean; otherwise any row has its shape.
        log_mean = log_mean_resp(log_resp, weight) if self.asymmetric else log_resp[0]
        return self.strength_of(log_mean, weight.sum()).expand(log_mean.shape)

    def strength_of(self, log_mean, total_weight):
        """Strength alpha - 1 of each cluster in a batch.

        Parameters
        ----------
        log_mean : Tensor of shape (..., K)
            Log of the mean responsibilities.
        total_weight : Tensor of shape ()

        Returns
        -------
        Tensor that broadcasts to (..., K)
        """
        if self.per_row:
            return self.strength * total_weight
        if not self.asymmetric:
            return self.strength
        # Appendix 2: the largest concentration goes to the cluster that is largest now.
        return self.strength[log_mean.detach().argsort(dim=-1).argsort(dim=-1)]
