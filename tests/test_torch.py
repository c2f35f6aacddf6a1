"""Devices, generators, rows served as batches, and module state."""

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from common import rows_of
from torch import nn

from deepmix._torch import (
    UNKNOWN_MEMORY,
    Rows,
    apply_batchwise,
    as_shared_tensor,
    inference_batch_size,
    load_state,
    make_generator,
    physical_memory,
    resolve_device,
    state_to_numpy,
    sum_batchwise,
    to_host,
)
from deepmix.networks import MLP, build_on_meta

CPU = torch.device("cpu")


def numbers(n=50, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def collected(rows, batch_size, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parts = list(rows.batches(batch_size, generator))
    return [torch.cat(column) for column in zip(*parts)]


def test_a_machine_that_does_not_say_its_memory_is_taken_to_have_enough(monkeypatch):
    assert 2**28 < physical_memory(CPU) < 2**50

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    assert physical_memory(CPU) == UNKNOWN_MEMORY
    monkeypatch.delattr("os.sysconf")
    assert physical_memory(CPU) == UNKNOWN_MEMORY


# --- Devices ---


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_known_device_is_taken(device):
    assert resolve_device(device) == CPU


def test_auto_is_a_device_that_works():
    assert torch.ones(2, device=resolve_device("auto")).sum() == 2


@pytest.mark.parametrize("device", ["gpu", "no device", "", "cpu:x"])
def test_an_unknown_device_is_refused_with_what_is_known(device):
    with pytest.raises(ValueError, match=r"not a device that torch knows. Use 'auto'"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'cuda' cannot be used on this machine.*device='cpu'"):
        resolve_device("cuda")


def test_a_device_without_memory_is_refused():
    with pytest.raises(ValueError, match=r"meta.*Use device='auto' or device='cpu'"):
        resolve_device("meta")


# --- Generators ---


def test_generators_of_one_random_state_differ_and_repeat():
    def draws(seed):
        random_state = np.random.RandomState(seed)
        return [torch.rand(3, generator=make_generator(random_state)) for _ in range(2)]

    first, second = draws(0)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(draws(0), draws(0)))


# --- To the host ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_tensors_become_arrays(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    np.testing.assert_array_equal(to_host(tensor), np.arange(6).reshape(2, 3))


def test_tensors_that_require_gradients_or_are_sparse_become_arrays():
    tensor = torch.eye(3, requires_grad=True)
    np.testing.assert_array_equal(to_host(tensor), np.eye(3))
    np.testing.assert_array_equal(to_host(torch.eye(3).to_sparse()), np.eye(3))


def test_what_is_no_tensor_is_left_alone():
    X = [[1, 2]]
    assert to_host(X) is X


# --- Rows ---


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, np.int8, np.int64, np.bool_])
@pytest.mark.parametrize("convert", [np.asarray, sp.csr_array, sp.csr_matrix])
def test_batches_hold_the_values_of_any_dtype_and_layout(convert, dtype):
    X = (5 * np.abs(numbers())).astype(dtype)
    batch, index, weight = collected(rows_of(convert(X)), 7, seed=0)
    assert batch.dtype == torch.float64
    np.testing.assert_array_equal(batch, X[index].astype(np.float64))
    np.testing.assert_array_equal(weight, np.ones(50))


def test_batches_are_a_permutation_that_the_generator_repeats():
    rows = rows_of(numbers())
    _, first, _ = collected(rows, 7, seed=0)
    _, again, _ = collected(rows, 7, seed=0)
    _, other, _ = collected(rows, 7, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, torch.arange(50))


@pytest.mark.parametrize("batch_size", [50, 51, 1000])
def test_one_batch_of_all_rows_keeps_their_order(batch_size):
    _, index, _ = collected(rows_of(numbers()), batch_size, seed=0)
    assert torch.equal(index, torch.arange(50))


def test_without_a_generator_rows_keep_their_order():
    _, index, _ = collected(rows_of(numbers()), 7)
    assert torch.equal(index, torch.arange(50))


@pytest.mark.parametrize("seed", [None, 0])
def test_rows_of_weight_zero_are_never_visited(seed):
    weight = np.arange(50) % 3 / 2
    _, index, seen = collected(rows_of(numbers(), weight=weight), 7, seed=seed)
    assert sorted(index.tolist()) == np.flatnonzero(weight).tolist()
    np.testing.assert_array_equal(seen, weight[index])


@pytest.mark.parametrize(
    ("n", "size", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (1, 4, [1]),
        (3, 4, [3]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_no_batch_of_one_row_follows_a_larger_one(n, size, sizes):
    rows = rows_of(numbers(n))
    assert rows.batch_sizes(size) == sizes
    assert [len(batch) for batch, _, _ in rows.batches(size)] == sizes


@pytest.mark.parametrize(
    ("n", "size", "sizes"),
    [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (9, 4, [3, 3, 3]), (1, 4, [1]), (3, 4, [3])],
)
def test_even_batches_differ_by_one_row_at_most(n, size, sizes):
    rows = rows_of(numbers(n))
    assert rows.batch_sizes(size, even=True) == sizes
    assert [len(batch) for batch, _, _ in rows.batches(size, even=True)] == sizes


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_array])
def test_limits_are_those_of_the_rows_that_count(convert):
    X = numbers()
    weight = (X.max(axis=1) < X.max()).astype(float)
    kept = X[weight > 0]
    assert rows_of(convert(X), weight=weight).limits() == (kept.min(), kept.max())


def test_weights_that_underflow_in_training_count_as_zero():
    rows = Rows(numbers(4), torch.device("cpu"), torch.float32, np.array([1, 1e-60, 1, 1e-60]))
    assert rows.visited.tolist() == [0, 2]


def test_dense_arrays_are_used_in_place():
    X = numbers()
    assert np.shares_memory(as_shared_tensor(X).numpy(), X)


def test_a_read_only_memory_map_is_served_without_warning(tmp_path):
    X = numbers()
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch, index, _ = collected(rows_of(mapped), 7, seed=0)
    np.testing.assert_array_equal(batch, X[index])


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_weighted_means_and_variances(convert, weighted):
    X = numbers()
    weight = np.random.default_rng(1).integers(0, 4, 50).astype(float) if weighted else None
    mean, variances = rows_of(convert(X), weight=weight).moments()
    expected = np.average(X, axis=0, weights=weight)
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    spread = np.average(np.square(X - expected), axis=0, weights=weight)
    np.testing.assert_allclose(variances, spread, rtol=1e-12)


def test_moments_keep_their_digits_beside_a_large_offset():
    X = numbers()
    _, variances = rows_of(X + 1e7).moments()
    np.testing.assert_allclose(variances, X.var(axis=0), rtol=1e-8)


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_array])
def test_the_share_of_zeros_counts_rows_by_their_weight(convert):
    X = np.array([[0.0, 1.0], [0.0, 0.0], [2.0, 3.0]])
    assert rows_of(convert(X)).zero_share() == pytest.approx(3 / 6)
    assert rows_of(convert(X), weight=np.array([2.0, 0, 1])).zero_share() == pytest.approx(2 / 6)


# --- Batch-wise application ---


def test_application_batch_by_batch_is_application_to_all():
    X = numbers(300, 4)
    out = apply_batchwise(lambda x: x.square(), rows_of(X))
    np.testing.assert_array_equal(out, np.square(X))


def test_batches_of_predictions_hold_a_bounded_number_of_values():
    assert inference_batch_size(10) == 4096
    assert inference_batch_size(10**9) == 64
    assert inference_batch_size(4096) * 4096 <= 2**22


def test_sums_leave_out_rows_of_weight_zero():
    X = numbers()
    weight = np.arange(50) % 3.0
    X[weight == 0] = np.nan
    total = sum_batchwise(lambda x, w: w @ x, rows_of(X, weight=weight))
    kept = weight > 0
    np.testing.assert_allclose(total, weight[kept] @ X[kept], rtol=1e-12)


# --- Module state ---


def test_state_travels_through_arrays_even_read_only_ones():
    module = nn.Sequential(MLP((3, 5, 2)), nn.BatchNorm1d(2)).eval()
    arrays = state_to_numpy(module)
    for value in arrays.values():
        value.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = build_on_meta(lambda: nn.Sequential(MLP((3, 5, 2)), nn.BatchNorm1d(2)))
        copy = load_state(copy, arrays).eval()
    x = torch.rand(4, 3)
    assert torch.equal(copy(x), module(x))


def test_state_is_a_copy_in_both_directions():
    module = MLP((3, 2))
    arrays = state_to_numpy(module)
    copy = load_state(build_on_meta(lambda: MLP((3, 2))), arrays)
    before = {name: value.copy() for name, value in arrays.items()}
    with torch.no_grad():
        for parameter in (*module.parameters(), *copy.parameters()):
            parameter.add_(1)
    for name, value in before.items():
        np.testing.assert_array_equal(arrays[name], value)
