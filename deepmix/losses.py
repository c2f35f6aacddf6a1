"""Losses that several papers share: pure functions of tensors, summed over the batch."""


def squared_error(x, x_hat, weight):
    r"""Weighted sum of squared errors.

    .. math:: \sum_i w_i \lVert x_i - \hat x_i \rVert^2

    Parameters
    ----------
    x, x_hat : Tensor of shape (B, d)
    weight : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape ()
    """
    return weight @ (x - x_hat).square().sum(dim=1)
