"""Where NumPy meets PyTorch: devices, dtypes, modes, threads, generators, rows and batches.

No function here changes global state: none sets a global seed, and modes and numbers of threads are
restored.
"""

import copy
import ctypes
import math
import os
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from threadpoolctl import ThreadpoolController

TORCH_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}

# Types that torch can gather without a conversion; every other dtype becomes float64 on entry.
NATIVE_DTYPES = (np.float64, np.float32, np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_)

# Numbers that rows gathered for several batches may hold: 256 KiB in float32, which fits a cache.
BLOCK = 2**16

# A step of fewer multiply-adds, some milliseconds of one core, runs on one thread. Threads wait for
# each other after each matrix product, on a busy machine for as long as another process runs.
THREADED_WORK = 2**25

# Memory that a machine is taken to have if it does not say (Windows does not): 64 GiB.
UNKNOWN_MEMORY = 2**36

# Sample weights whose mean lies between these may be counts of rows and are not rescaled.
COUNTS = 1 / 16, 16
# Rows are far if one in FAR_ONE_IN of the rows (at least one) has more than FAR_SHARE of the data's
# scatter; among fewer than FAR_LEAST_ROWS rows none is far.
FAR_ONE_IN, FAR_SHARE, FAR_LEAST_ROWS = 500, 0.75, 50
# X is taken for raw counts if, among COUNTS_ROWS rows, the share COUNTS_ZEROS of the values is
# zero, the others are whole numbers, and the largest is COUNTS_TAIL times their mean (in images it
# is twice their mean).
COUNTS_ROWS, COUNTS_ZEROS, COUNTS_TAIL = 4096, 1 / 3, 20

# --- Devices, dtypes, generators -------------------------------------------------------


def resolve_device(device):
    """Turn the parameter ``device`` into a `torch.device` that can be used here.

    Parameters
    ----------
    device : str or torch.device
        ``'auto'`` takes a CUDA device where there is one, else the CPU.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If torch does not know the device, or if this machine does not have it.
    """
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a device that torch knows. "
            "Use 'auto', 'cpu', 'cuda' or 'cuda:<number>'."
        ) from error
    try:
        # Predictions of float64 data are made in float64, which not every accelerator has; the
        # meta device has nothing to copy.
        trial = torch.ones(1, dtype=torch.float64).to(resolved)
        trial.add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"device={device!r} cannot be used on this machine "
            f"({type(error).__name__} from torch). Use device='auto' or device='cpu'."
        ) from error
    return trial.device  # with its number, where there are several


def make_generator(random_state):
    """Draw a CPU `torch.Generator` from a `numpy.random.RandomState`.

    One generator a fit, on the CPU whatever the device, so that every device sees the same
    initial weights and the same order of rows.
    """
    return torch.Generator().manual_seed(int(random_state.randint(np.iinfo(np.int32).max)))


# --- Modes and threads -----------------------------------------------------------------


@contextmanager
def own_modes():
    """Set aside the modes of torch that surround a call, and bring them back; also a decorator.

    Inside, gradients are recorded, tensors may be trained, nothing is cast, and tensors are made on
    the CPU: whatever ``no_grad``, ``inference_mode``, ``autocast`` or default device the caller is
    in. The default dtype cannot be set for one thread alone: the package names the dtype of each
    tensor that it draws numbers into.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # Only where there is need: under a device context each call of torch costs microseconds.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def physical_memory(device):
    """Bytes of memory of a device; `UNKNOWN_MEMORY` where the system does not say: int."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY
    return pages * size if pages > 0 and size > 0 else UNKNOWN_MEMORY


@contextmanager
def threads_for(work):
    """Run on one thread what is too little for several; leave the user's number for the rest.

    The limit is that of the calling thread alone, so that fits may run in parallel threads.

    Parameters
    ----------
    work : float
        Multiply-adds of one step.
    """
    # Ask torch before the limit is set: a new thread gets its number when it is first asked for.
    if work >= THREADED_WORK or torch.get_num_threads() == 1:
        yield
        return
    set_mkl_threads = _mkl_set_num_threads_local()
    with _openmp().limit(limits=1):
        before = set_mkl_threads(1)
        try:
            yield
        finally:
            set_mkl_threads(before)


@cache
def _openmp():
    """The OpenMP runtimes that torch and scikit-learn have loaded."""
    return ThreadpoolController().select(user_api="openmp")


@cache
def _mkl_set_num_threads_local():
    """MKL's own limit for the calling thread: number -> number before, 0 for none.

    `torch.set_num_threads` gives MKL a number that goes before OpenMP's. Torch carries MKL inside
    its own library where it uses it; elsewhere there is nothing to limit.
    """
    for path in Path(torch.__file__).parent.glob("lib/*torch_cpu.*"):
        try:
            function = ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
        return function
    return lambda number: 0


def state_size(module):
    """Numbers in the parameters and buffers of a module: about its multiply-adds for one row."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


# --- Rows ------------------------------------------------------------------------------


def to_host(X):
    """Bring a torch tensor of any device to the host; leave everything else as it is."""
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach()
    if X.layout is not torch.strided:
        integers = not X.is_floating_point() and not X.is_complex()  # some cannot be made dense
        X = (X.to(torch.int64) if integers else X).to_dense()
    if X.dtype in (torch.bfloat16, torch.float16):
        X = X.float()
    return X.cpu().numpy()


def as_shared_tensor(array):
    """View an array as a tensor on the CPU without copying it, read-only arrays too.

    The package never writes into such a tensor. Torch would warn about the possibility; it is
    given an array that says it may be written to.
    """
    # NumPy calls an array of one row contiguous whatever the stride between rows; torch takes no
    # negative stride, and only multiples of the item size.
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.array(array, order="C")
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


class _Writable:
    """A view of a read-only array as NumPy's array interface describes a writable one."""

    def __init__(self, array):
        self.array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


class Rows:
    """The rows of a data matrix, served as float batches on a device.

    Dense rows are gathered in their own dtype and converted batch by batch: on the CPU the
    user's array is used in place (a memory map stays on disk, uint8 stays uint8). On an
    accelerator they are moved there as a whole if they take at most half of its free memory,
    else gathered on the host. CSR rows stay CSR; only a batch is made dense.

    Parameters
    ----------
    X : ndarray or CSR matrix of shape (n_samples, n_features)
    device : torch.device
    dtype : torch.dtype
        Floating-point type of the batches.
    weight : ndarray of shape (n_samples,) or None
        Sample weights; rows of weight zero are never visited in training.
    """

    def __init__(self, X, device, dtype, weight=None):
        self.n_samples, self.n_features = X.shape
        self.device, self.dtype = device, dtype
        self._sparse = X.tocsr() if sp.issparse(X) else None
        self._dense = None if self._sparse is not None else as_shared_tensor(X)
        if self._dense is not None and _fits(self._dense, device):
            self._dense = self._dense.to(device)
        self.uniform = weight is None
        weight = np.ones(self.n_samples) if weight is None else np.array(weight, order="C")
        self.weight = torch.tensor(weight, dtype=dtype, device=device)
        self._weigh()
        self.width = self.n_features
        self._moments = None

    def _weigh(self):
        # Read after their conversion to dtype: a weight that underflows counts as zero.
        self.visited = self.weight.cpu().nonzero().squeeze(1)
        # The sum of the converted weights, by which sums over rows are divided.
        self.total_weight = float(self.weight.cpu().double().sum())

    def __len__(self):
        return self.n_samples

    def through(self, network):
        """The same rows with inference batches for a network of ``network.width`` numbers a row."""
        rows = copy.copy(self)
        rows.width = network.width
        return rows

    @property
    def inference_batch_size(self):
        """Rows in a batch without gradients, of which each becomes ``width`` numbers at most."""
        return inference_batch_size(self.width)

    def take(self, index):
        """Gather rows: ``index`` of shape (B,) -> float batch of shape (B, n_features)."""
        if self._sparse is not None:
            batch = torch.from_numpy(self._sparse[index.cpu().numpy()].toarray())
        else:
            batch = self._dense.index_select(0, index.to(self._dense.device))
        return batch.to(self.device, self.dtype)

    def batches(self, batch_size, generator=None, prepare=None, even=False):
        """Yield ``(batch, index, weight)``, on the device, over the rows of positive weight.

        With a generator the rows come in a fresh random order; one batch that holds all rows
        keeps their order, since it would not change any sum. ``prepare`` maps rows to rows, each
        by itself; small batches are cut from one preparation. ``even`` is for `batch_sizes`.
        """
        order, sizes = self.visited, self.batch_sizes(batch_size, even)
        if generator is not None and len(sizes) > 1:
            order = order[torch.randperm(len(order), generator=generator)]
        order = order.to(self.device)  # once an epoch, not once a batch
        # Small batches are cut from one gathering: the call costs more than the copy.
        in_block = max(1, BLOCK // (batch_size * self.n_features))
        start = 0
        for first in range(0, len(sizes), in_block):
            parts = sizes[first : first + in_block]
            block = order[start : start + sum(parts)]
            start += len(block)
            weight = self.weight[: len(block)] if self.uniform else self.weight[block]
            gathered = self.take(block)
            if prepare is not None:
                with torch.no_grad():
                    gathered = prepare(gathered)
            yield from zip(
                gathered.split(parts), block.split(parts), weight.split(parts), strict=True
            )

    def batch_sizes(self, batch_size, even=False):
        """Numbers of rows in the batches of an epoch: list of int.

        The last batch may be short; a single row left over joins the batch before it, since batch
        normalisation has no variance of one row. ``even`` deals the rows out evenly instead.
        """
        whole, rest = divmod(len(self.visited), batch_size)
        if even:
            n_batches = whole + (rest > 0)
            if batch_size > 1:  # each of two rows or more
                n_batches = max(1, min(n_batches, len(self.visited) // 2))
            size, longer = divmod(len(self.visited), n_batches)
            return [size + 1] * longer + [size] * (n_batches - longer)
        sizes = [batch_size] * whole
        if rest == 1 and whole:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes

    def moments(self):
        """Weighted mean and variance of each feature: two tensors (n_features,), float64.

        Two passes, batch by batch: data with a large offset lose no digits, and no copy of
        the data is made.
        """
        if self._moments is None:
            rows = self.visited.split(inference_batch_size(self.n_features))
            mean = sum(self._weighted(index, None) for index in rows) / self.total_weight
            spread = sum(self._weighted(index, mean) for index in rows)
            self._moments = mean, spread / self.total_weight
        return self._moments

    def far_rows(self):
        """Rows so far from all others that they alone would decide the scaling of the data.

        One pass over the rows, after those of `moments`.

        They are one in `FAR_ONE_IN` of the rows at most, and have more than `FAR_SHARE` of the
        scatter about the mean, in the units of the data or with each feature in units of its
        deviation: missing values that are written as -9999, for example.

        Returns
        -------
        index : Tensor of int64 of shape (n_far,)
        share : float
            Their share of the scatter.
        """
        none, n_rows = self.visited[:0], len(self.visited)
        mean, variance = self.moments()
        if n_rows < FAR_LEAST_ROWS or not variance.any():
            return none, 0.0
        unit = torch.where(variance > 0, variance, 1.0)
        squares = []
        for index in self.visited.split(inference_batch_size(self.n_features)):
            square = (self.take(index).to("cpu", torch.float64) - mean).square()
            square = torch.stack([square.sum(dim=1), (square / unit).sum(dim=1)])
            squares.append(square * self.weight[index].to("cpu", torch.float64))
        squares = torch.cat(squares, dim=1)
        largest, position = squares.topk(max(1, n_rows // FAR_ONE_IN), dim=1)
        share = largest.sum(dim=1) / squares.sum(dim=1)
        units = int(share.argmax())
        if not share[units] > FAR_SHARE:
            return none, 0.0
        # Only those of the largest are far that exceed the mean scatter of the others by far.
        rest = (squares[units].sum() - largest[units].sum()) / (n_rows - len(largest[units]))
        far = largest[units] > n_rows * FAR_SHARE / len(largest[units]) * rest
        chosen = self.visited[position[units][far].sort().values]
        weight = float(self.weight[chosen].cpu().double().sum())
        if weight > max(1, n_rows // FAR_ONE_IN) * self.total_weight / n_rows:
            return none, 0.0  # a row that counts many times is a cluster
        return chosen, float(largest[units][far].sum() / squares[units].sum())

    def leave_out(self, index):
        """Set the weight of these rows to zero: they are not visited in training."""
        self.weight[index.to(self.weight.device)] = 0.0
        self.uniform, self._moments = False, None
        self._weigh()

    def look_like_counts(self):
        """Whether the values are whole numbers, many of them zero and a few very large."""
        some = self.visited[:: -(-len(self.visited) // COUNTS_ROWS)]
        total = torch.zeros(2, dtype=torch.float64)  # non-zero values: their number and sum
        largest, n_values = 0.0, 0
        for index in some.split(min(256, inference_batch_size(self.n_features))):
            batch = self.take(index)
            if (batch < 0).any() or (batch != batch.round()).any():
                return False
            total += torch.stack([batch.count_nonzero(), batch.sum()]).cpu()
            largest, n_values = max(largest, float(batch.max())), n_values + batch.numel()
        n_nonzero, mass = total.tolist()
        many_zeros = n_nonzero <= (1 - COUNTS_ZEROS) * n_values
        return many_zeros and largest * n_nonzero > COUNTS_TAIL * mass

    def are_finite(self):
        """Whether the values are finite as they were given, before they become ``dtype``."""
        if self._sparse is not None:
            return bool(np.isfinite(self._sparse.data).all())
        parts = self._dense.split(inference_batch_size(self.n_features))
        return all(bool(part.isfinite().all()) for part in parts)

    def limits(self):
        """Smallest and largest value among the rows of positive weight: float, float."""
        parts = self.visited.split(inference_batch_size(self.n_features))
        ends = [self.take(index).aminmax() for index in parts]
        return min(float(end.min) for end in ends), max(float(end.max) for end in ends)

    def zero_share(self):
        """Weighted share of values that are exactly zero: float."""

        def zeros(batch, weight):
            return (weight @ (batch == 0).to(weight).mean(dim=1)).cpu()

        return float(sum_batchwise(zeros, self)) / self.total_weight

    def _weighted(self, index, centre):
        # Summed in float64 on the CPU: not every accelerator has float64.
        batch = self.take(index).to("cpu", torch.float64)
        weight = self.weight[index].to("cpu", torch.float64)
        values = batch if centre is None else (batch - centre).square()
        return weight @ values


def refuse_bad_weights(weight):
    """Raise ValueError for sample weights that are negative, or all zero."""
    if np.any(weight < 0):
        raise ValueError(
            f"Negative values in sample_weight: the smallest is {weight.min():g}. Weights "
            "count rows and must be >= 0."
        )
    if not np.any(weight):
        raise ValueError(
            "Sample weights must contain at least one non-zero number: all of them are zero. "
            "Drop sample_weight or give some row a positive weight."
        )


def relative_weights(weight):
    """Scale sample weights of which only the ratios count, so that their mean is near one.

    Equal weights become None. Others stay if their mean could be one of counts of rows, so that a
    row of weight two counts as two rows; if not, they are multiplied by the power of two, which
    changes no digit, that brings their mean to between one and two.

    Parameters
    ----------
    weight : ndarray of shape (n_samples,)

    Returns
    -------
    ndarray of shape (n_samples,) or None
        None if all are equal.
    """
    positive = weight[weight > 0]
    if len(positive) == len(weight) and positive.min() == positive.max():
        return None
    if positive.min() == positive.max():
        return (weight > 0).astype(np.float64)
    mean = float(np.mean(positive))
    if COUNTS[0] <= mean <= COUNTS[1]:
        return weight
    return np.ldexp(weight, 1 - math.frexp(mean)[1])


def _fits(tensor, device):
    if device.type != "cuda":
        return device.type == "cpu" or tensor.nbytes < 2**30
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.nbytes <= free // 2


# --- Batch-wise application ------------------------------------------------------------


def inference_batch_size(n_features, budget=2**22):
    """Rows in a batch of predictions, so that a batch holds about ``budget`` numbers."""
    return max(64, min(4096, budget // max(1, n_features)))


def apply_batchwise(function, rows, index=None):
    """Apply ``function`` to all rows, or to some, batch by batch, without gradients.

    Parameters
    ----------
    function : callable
        Takes a batch of shape (B, n_features), returns a tensor whose first axis has length B.
    rows : Rows
    index : Tensor of int64 of shape (n_chosen,) or None
        None takes all rows, in order.

    Returns
    -------
    ndarray
        Results in the dtype of ``rows``, first axis of length ``n_samples`` or ``n_chosen``.
    """
    index = torch.arange(rows.n_samples) if index is None else index
    out, start = None, 0
    with torch.inference_mode():
        for chosen in index.split(rows.inference_batch_size):
            part = function(rows.take(chosen)).cpu().numpy()
            if out is None:
                out = np.empty((len(index), *part.shape[1:]), dtype=part.dtype)
            out[start : start + len(part)] = part
            start += len(part)
    return out


def gather_batchwise(function, rows):
    """Apply ``function`` to all rows, without gradients: a tensor on the device of the rows."""
    with torch.no_grad():
        parts = torch.arange(rows.n_samples).split(rows.inference_batch_size)
        return torch.cat([function(rows.take(part)) for part in parts])


def full_precision(device):
    """A context in which autocast is off: losses are computed in the dtype of the data."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # saves the cost of autocast at each small step
    return torch.autocast(device.type, enabled=False)


def sum_batchwise(function, rows):
    """Sum ``function(batch, weight)`` over all rows of positive weight, without gradients."""
    with torch.inference_mode():
        batches = rows.batches(rows.inference_batch_size)
        return sum(function(batch, weight) for batch, _, weight in batches)


# --- Module state ----------------------------------------------------------------------


def state_to_numpy(module):
    """Parameters and buffers of a module as a dict of arrays that own their memory."""
    return {
        name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()
    }


def load_state(module, arrays):
    """Fill a module (built on the meta device) with copies of ``arrays``.

    Raises
    ------
    ValueError
        If ``arrays`` are not those of this module.
    """
    try:
        # torch.tensor copies: arrays that come from a memory-mapped pickle are read-only.
        state = {name: torch.tensor(np.asarray(value)) for name, value in arrays.items()}
        module.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            "The fitted arrays of this estimator are not those of its network: it was changed, or "
            f"written by another version of deepmix. Fit it again. ({error})"
        ) from error
    return module
