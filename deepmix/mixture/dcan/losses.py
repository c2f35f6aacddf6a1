r"""Losses of the critic and of the encoder, and the closed forms that they replace.

Lim, "Deep clustering using adversarial net based clustering loss", arXiv 2412.08933: Eqs. 1 and 13
to 18, and Eqs. 3, 6 and 7.
"""

from torch.nn.functional import softplus

from deepmix.losses import squared_error


def critic_loss(positive, negative, weight, smoothing=0.0):
    r"""Eqs. 1, 13, 15 and 17, with the sign of a loss: what the critic minimises.

    .. math:: -\sum_i w_i \Big( \ln(1 - D(z_i)) + \tfrac1M \sum_m \ln D(z^*_m) \Big),
        \qquad z^*_m \sim p(z \mid \theta^*)

    At its minimum over all *D* the mean over rows is :math:`2 \ln 2 - 2 \, \mathrm{JS}(p \Vert q)`.

    Parameters
    ----------
    positive : Tensor of shape (M,)
        Logits of D for draws from the mixture (T = 1).
    negative : Tensor of shape (B,)
        Logits of D for codes (T = 0).
    weight : Tensor of shape (B,)
        Weights of the codes; all draws together weigh as much as all codes.
    smoothing : float, default=0
        Amount that is subtracted from the target 1 of the draws.

    Returns
    -------
    Tensor of shape ()
    """
    drawn = softplus(-positive)
    if smoothing:
        drawn = (1 - smoothing) * drawn + smoothing * softplus(positive)
    return weight @ softplus(negative) + weight.sum() * drawn.mean()


def encoder_loss(logits, weight, saturating=False):
    r"""Eq. 18, with the sign of a loss, or its form with a gradient that does not vanish.

    .. math:: \sum_i w_i \ln(1 - D(z_i)) \qquad \text{or} \qquad -\sum_i w_i \ln D(z_i)

    The second, which is the default, has the same fixed point; the first is flat where the critic
    is sure, which is where codes most need to move.

    Parameters
    ----------
    logits : Tensor of shape (B,)
        Logits of D for codes.
    weight : Tensor of shape (B,)
    saturating : bool, default=False

    Returns
    -------
    Tensor of shape ()
    """
    return -(weight @ softplus(logits)) if saturating else weight @ softplus(-logits)


def euclidean_loss(z, centers, weight):
    r"""Eqs. 3 and 7.

    .. math:: \sum_i w_i \, \tfrac12 \lVert z_i - \eta^*_i \rVert^2

    Parameters
    ----------
    z : Tensor of shape (B, d)
    centers : Tensor of shape (B, d)
        Mean of each row's own component.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return 0.5 * squared_error(z, centers, weight)


def kl_loss(z, log_deviation, centers, variance, weight):
    r"""Eq. 6: from each row's own component to the Gaussian that the encoder gives for the row.

    .. math:: \sum_i w_i \sum_j \Big( \ln \sigma_{ij} + \tfrac12 \ln \tau
        + \frac{\tau^{-1} + (\eta^*_{ij} - \mu_{ij})^2}{2 \sigma_{ij}^2} - \tfrac12 \Big)

    Eq. 9 prints :math:`\ln \tau` without its half.

    Parameters
    ----------
    z, log_deviation : Tensor of shape (B, d)
        :math:`\mu` and :math:`\ln \sigma`.
    centers : Tensor of shape (B, d)
    variance : Tensor of shape ()
        :math:`1 / \tau`.
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    ratio = (variance + (centers - z).square()) * (-2 * log_deviation).exp()
    each = log_deviation - 0.5 * variance.log() + 0.5 * ratio - 0.5
    return weight @ each.sum(dim=1)
