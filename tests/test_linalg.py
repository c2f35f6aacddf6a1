"""Factors of matrices that rounding has spoilt, and errors that say what to do."""

import numpy as np
import pytest
import torch

from deepmix import linalg
from deepmix.linalg import cholesky, inverse_cholesky, inverse_triangle, spectral_norm


def definite(n=3, d=4, seed=0):
    root = torch.tensor(np.random.default_rng(seed).normal(size=(n, d, d)))
    return root @ root.mT + 0.1 * torch.eye(d, dtype=torch.float64)


def not_quite_definite(d=4, lowest=-1e-9, seed=0):
    """A matrix of mean diagonal one, but for ``lowest``, its least eigenvalue."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    values = np.full(d, d / (d - 1.0))
    values[0] = lowest
    matrix = q * values @ q.T
    return torch.tensor((matrix + matrix.T) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_definite_matrices_are_those_of_torch_to_the_bit(dtype):
    matrices = definite().to(dtype)
    assert torch.equal(cholesky(matrices), torch.linalg.cholesky(matrices))
    assert torch.equal(cholesky(matrices[0]), torch.linalg.cholesky(matrices[0]))
    expected = torch.linalg.cholesky(torch.linalg.inv(matrices))
    assert torch.equal(inverse_cholesky(matrices), expected)


@pytest.mark.parametrize("lowest", [-1e-13, -1e-9, -0.01])
def test_rounding_is_mended_by_the_least_power_of_ten_that_does(lowest):
    matrix = not_quite_definite(lowest=lowest)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(matrix)
    factor = cholesky(matrix)
    added = factor @ factor.T - matrix
    ridge = float(added.diagonal().mean())
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(added, ridge * eye, atol=2e-15, rtol=1e-2)
    assert 0.9 < ridge / -lowest < 11


def test_only_the_matrices_that_need_it_are_mended_each_by_what_it_needs():
    good, spoilt = definite(), not_quite_definite()
    batch = torch.stack([good[0], spoilt, good[1], 1e200 * spoilt])
    factors = cholesky(batch.view(2, 2, 4, 4)).view(4, 4, 4)
    assert torch.equal(factors[[0, 2]], torch.linalg.cholesky(good[:2]))
    torch.testing.assert_close(factors[1], cholesky(spoilt))
    torch.testing.assert_close(factors[3], 1e100 * factors[1], rtol=1e-4, atol=0)


BAD = {
    "nan": torch.full((2, 2), torch.nan),
    "one nan": torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]),
    "inf": torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["cholesky", "inverse_cholesky", "eigh", "inv", "pinv"])
def test_what_is_not_finite_is_refused_in_words(name, kind):
    match = r"matrix of shape \(2, 2\) holds values that are not finite.*float32.*Standardise"
    with pytest.raises(FloatingPointError, match=match):
        getattr(linalg, name)(torch.stack([torch.eye(2), BAD[kind]]))


@pytest.mark.parametrize("matrix", [-torch.eye(2), torch.zeros(2, 2), torch.eye(2) - 2])
@pytest.mark.parametrize("function", [cholesky, inverse_cholesky])
def test_what_is_far_from_definite_is_refused_in_words(function, matrix):
    with pytest.raises(FloatingPointError, match=r"is not positive definite.*Standardise"):
        function(matrix)


def test_a_matrix_without_inverse_is_refused_in_words():
    with pytest.raises(FloatingPointError, match=r"has no inverse.*Standardise"):
        linalg.inv(torch.zeros(2, 2))


def test_an_iteration_that_does_not_converge_is_refused_in_words(monkeypatch):
    def fail(matrices):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(FloatingPointError, match="no eigenvectors"):
        linalg.eigh(torch.eye(2))


def test_the_inverse_of_a_singular_matrix_has_a_factor_that_whitens_it_as_mended():
    root = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    matrix = root @ root.T
    factor = inverse_cholesky(matrix)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() > 0).all()
    # Along the one direction that the matrix has; the other is as thin as rounding leaves it.
    along = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert float((factor.T @ matrix @ factor).trace()) == pytest.approx(1.0, abs=0.3)
    assert float(along @ factor @ factor.T @ along) == pytest.approx(1 / 5, rel=0.3)


def test_both_ways_to_the_factor_of_an_inverse_agree():
    matrices = definite()
    reverse = cholesky(matrices.flip(-2, -1))
    other = inverse_triangle(reverse).mT.flip(-2, -1)
    torch.testing.assert_close(other, inverse_cholesky(matrices))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_spectral_norm_is_the_largest_singular_value_or_nan(value):
    assert float(spectral_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))) == pytest.approx(5.0)
    weight = torch.tensor([[1.0, value], [0.0, 1.0]], requires_grad=True)
    norm = spectral_norm(weight)
    norm.backward()
    assert norm.isnan()
