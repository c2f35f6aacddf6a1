r"""Scores, densities, posteriors and losses of neural mixture EM.

Tissera et al., "Neural Mixture Models with Expectation-Maximization for End-to-end Deep
Clustering", Neurocomputing 505 (2022): normalisation and densities (Sec. 4), the loss of a batch
(Eqs. 6 and 7), consistency (Eq. 8).
"""

import torch
from torch.nn.functional import logsigmoid

# Added to the variance of the scores: values of 1e-5 to 1e-3 make no difference, 0.1 does harm.
EPSILON = 1e-5


def normalize(scores, weight, epsilon=EPSILON):
    r"""Relevance scores standardised over the batch, Sec. 5.

    .. math:: a^*_{ij} = \frac{a_{ij} - \mu_j}{\sigma_j}, \qquad
        \mu_j = \frac1n \sum_i a_{ij}, \qquad \sigma_j^2 = \frac1n \sum_i (a_{ij} - \mu_j)^2

    The gradient flows through the statistics; taken as constants, in a batch or as running
    means, training collapses to uniform posteriors.

    Parameters
    ----------
    scores : Tensor of shape (B, K) or (B, M, K)
        Scores of one network, or of M networks side by side.
    weight : Tensor of shape (B,)
        Row i counts ``weight[i]`` times.
    epsilon : float
        Constant that is added to the variance.

    Returns
    -------
    Tensor of shape (B, K) or (B, M, K)
    """
    share, flat = weight / weight.sum(), scores.flatten(1)
    centred = flat - share @ flat
    normalized = centred * (share @ centred.square() + epsilon).rsqrt()
    return normalized.view(scores.shape)


def log_density(normalized, gamma):
    r"""Log of a cluster's density, up to a constant that all clusters share, Sec. 5.

    .. math:: \log h_j(x_i) = \log \operatorname{sigmoid}(a^*_{ij} / \gamma)

    Parameters
    ----------
    normalized : Tensor of shape (..., K)
    gamma : float

    Returns
    -------
    Tensor of shape (..., K)
    """
    return logsigmoid(normalized / gamma)


def posterior(normalized):
    r"""The E-step, Sec. 6: a softmax stands for the ratio of the sigmoids.

    .. math:: p_{ij} = e^{a^*_{ij}} \big/ \sum_k e^{a^*_{ik}}

    Parameters
    ----------
    normalized : Tensor of shape (..., K)

    Returns
    -------
    Tensor of shape (..., K)
    """
    return normalized.softmax(dim=-1)


def em_loss(p, normalized, weight, gamma):
    r"""Minus the expected complete log-likelihood, Eq. 6; Eq. 7 adds that of another view.

    .. math:: L = - \sum_i w_i \sum_j p_{ij} \log h_j(x_i)

    Parameters
    ----------
    p : Tensor of shape (B, K) or (B, M, K)
        Posteriors, held constant by the caller.
    normalized : Tensor of shape (B, K) or (B, M, K)
    weight : Tensor of shape (B,)
    gamma : float

    Returns
    -------
    Tensor of shape () or (M,)
    """
    return -weight @ (p * log_density(normalized, gamma)).sum(dim=-1)


def consistency_loss(p, normalized, weight):
    r"""Kullback-Leibler divergence from the posteriors of a row to those of its view, Eq. 8.

    .. math:: \sum_i w_i \sum_j p_{ij} \log \frac{p_{ij}}{q_{ij}}, \qquad
        q_i = \operatorname{softmax}(a^{tr*}_i)

    Parameters
    ----------
    p : Tensor of shape (B, K) or (B, M, K)
        Posteriors of the rows, held constant by the caller.
    normalized : Tensor of shape (B, K) or (B, M, K)
        Standardised scores of their views.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape () or (M,)
    """
    return weight @ (torch.xlogy(p, p) - p * normalized.log_softmax(dim=-1)).sum(dim=-1)
