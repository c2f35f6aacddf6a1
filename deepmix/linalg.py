"""Factors, inverses and eigenvectors of matrices made of data, with errors that name a remedy.

torch raises errors of its own where a matrix has lost its definiteness to rounding or holds values
that are not finite; they come from deep inside a fit and name neither a cause nor a remedy. Every
function here takes batches of matrices.
"""

import math
from contextlib import contextmanager

import torch

REMEDY = (
    "The values of the data, or of a prior, are too large, too small or too nearly constant to "
    "compute with in {dtype}. Standardise the data (StandardScaler), take parameters of the prior "
    "nearer to their defaults, or, if training has diverged, lower learning_rate_init."
)


def cholesky(matrices):
    r"""Lower Cholesky factors of matrices that are positive definite but for rounding.

    .. math:: L L^\top = A

    Where A is positive definite this is `torch.linalg.cholesky`, to the bit. Where rounding has
    made it indefinite, it is the factor of

    .. math:: A + \epsilon \, 10^j \, \tfrac1d \operatorname{tr}(A) \, I

    with machine epsilon and the least j = 0, 1, ... that makes this matrix, of those of the batch,
    positive definite.

    Parameters
    ----------
    matrices : Tensor of shape (..., d, d)
        Symmetric matrices, of which only the lower triangle is read.

    Returns
    -------
    Tensor of shape (..., d, d)

    Raises
    ------
    FloatingPointError
        If a matrix is not finite, or has a negative eigenvalue as large as its mean diagonal.

    Examples
    --------
    >>> import torch
    >>> from deepmix.linalg import cholesky
    >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))  # singular
    tensor([[2.0000e+00, 0.0000e+00],
            [1.0000e+00, 4.8828e-04]])
    """
    factors, info = torch.linalg.cholesky_ex(matrices)
    # LAPACK reports no failure for an infinite variance, hence the sum. Calls are few because EM of
    # small mixtures spends a good part of its time here.
    well = math.isfinite(factors.sum()) and not info.any()
    return factors if well else _mended_cholesky(matrices)


def _mended_cholesky(matrices):
    """`cholesky` where at least one matrix of the batch has no factor."""
    refuse_not_finite(matrices)
    n_features = matrices.shape[-1]
    flat = matrices.reshape(-1, n_features, n_features)
    factors, info = torch.linalg.cholesky_ex(flat)
    size = (flat.diagonal(dim1=1, dim2=2) / n_features).sum(dim=1, keepdim=True)
    left, ridge = info.nonzero().squeeze(1), torch.finfo(matrices.dtype).eps
    while len(left) and ridge < 1:
        mended = flat[left]
        mended.diagonal(dim1=1, dim2=2).add_(ridge * size[left])
        factors[left], info = torch.linalg.cholesky_ex(mended)
        left, ridge = left[info != 0], 10 * ridge
    if len(left):
        raise _error(matrices, "is not positive definite")
    return factors.view(matrices.shape)


def inverse_cholesky(matrices):
    r"""Lower Cholesky factors of the inverses of definite matrices, :math:`L L^\top = A^{-1}`.

    They whiten: rows of covariance A, multiplied by L, have the identity as covariance.

    Parameters
    ----------
    matrices : Tensor of shape (..., d, d)

    Returns
    -------
    Tensor of shape (..., d, d)

    Raises
    ------
    FloatingPointError
        As for `cholesky`.
    """
    inverses, singular = torch.linalg.inv_ex(matrices)
    factors, info = torch.linalg.cholesky_ex(inverses)
    if not (singular.any() | info.any()) and factors.isfinite().all():
        return factors
    refuse_not_finite(matrices)
    # The computed inverse of a nearly singular matrix may be indefinite, but that of its factor
    # exists. Reversing the order of the features turns an upper triangle into a lower one.
    reverse = cholesky(matrices.flip(-2, -1))
    return inverse_triangle(reverse).mT.flip(-2, -1)


def inverse_triangle(factors):
    """Inverses of lower triangular matrices: Tensor of shape (..., d, d)."""
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    return torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)


def eigh(matrices):
    """`torch.linalg.eigh` of matrices, which raises FloatingPointError if they are not finite."""
    with _failures_of(matrices, "has no eigenvectors that an iteration could find"):
        return torch.linalg.eigh(matrices)


def inv(matrices):
    """`torch.linalg.inv` of matrices, which raises FloatingPointError if they have no inverse."""
    with _failures_of(matrices, "has no inverse"):
        return torch.linalg.inv(matrices)


def pinv(matrices):
    """`torch.linalg.pinv` of matrices, which raises FloatingPointError if they are not finite."""
    with _failures_of(matrices, "has no singular values that an iteration could find"):
        return torch.linalg.pinv(matrices)


def spectral_norm(matrix):
    """Largest singular value of a matrix of weights: NaN if the weights are not finite.

    The loss is NaN then too, and the loop of training says in which epoch.
    """
    if matrix.isfinite().all():
        return torch.linalg.matrix_norm(matrix, 2)
    return matrix.sum() * torch.nan


def refuse_not_finite(matrices):
    """Raise FloatingPointError for matrices with values that are not finite."""
    if not matrices.isfinite().all():
        raise _error(matrices, "holds values that are not finite")


@contextmanager
def _failures_of(matrices, what):
    refuse_not_finite(matrices)
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise _error(matrices, what) from error


def _error(matrices, what):
    shape, remedy = tuple(matrices.shape[-2:]), REMEDY.format(dtype=matrices.dtype)
    return FloatingPointError(f"A matrix of shape {shape} {what}. {remedy}")
