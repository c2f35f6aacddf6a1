"""Data and sample weights of every kind, dtype, layout and container.

`Data` and `Weights` are recipes: short, printable, and each gives the same values whenever it is
made.
"""

import copy
import mmap
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import polars as pl
import scipy.sparse as sp
import torch

# --- Values ----------------------------------------------------------------------------


def blobs(rng, n, d):
    return rng.normal(size=(n, d)) + 8 * rng.integers(0, 3, size=(n, 1))


def duplicates(rng, n, d):
    return rng.normal(size=(3, d))[rng.integers(0, 3, size=n)]


def outlier(rng, n, d):
    X = rng.normal(size=(n, d))
    X[rng.integers(n), rng.integers(d)] = 10.0 ** rng.integers(2, 15)
    return X


def collinear(rng, n, d):
    return rng.normal(size=(n, 1)) * rng.normal(size=d)


def constant_columns(rng, n, d):
    return np.where(rng.random(d) < 0.5, rng.normal(size=d), rng.normal(size=(n, d)))


def unlike_columns(rng, n, d):
    return rng.normal(size=(n, d)) * 10.0 ** rng.integers(-12, 13, size=d)


def counts(rng, n, d):
    return rng.poisson(2.0, size=(n, d)).astype(float)


KINDS = {
    "blobs": blobs,
    "normal": lambda rng, n, d: rng.normal(size=(n, d)),
    "constant": lambda rng, n, d: np.full((n, d), rng.normal()),
    "constant columns": constant_columns,
    "collinear": collinear,
    "unlike columns": unlike_columns,
    "duplicates": duplicates,
    "outlier": outlier,
    "counts": counts,
    "binary": lambda rng, n, d: rng.integers(0, 2, size=(n, d)).astype(float),
    "sparse counts": lambda rng, n, d: counts(rng, n, d) * (rng.random((n, d)) < 0.2),
    "zeros": lambda rng, n, d: np.zeros((n, d)),
    "heavy tails": lambda rng, n, d: rng.standard_cauchy(size=(n, d)),
}
BLEMISHES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}

# --- Dtypes ----------------------------------------------------------------------------

FLOATS = ("float64", "float32", "float16", "longdouble", ">f8", ">f4", "object")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", ">i4", "bool")


def cast(X, dtype):
    """Values as ``dtype``: integers are rounded and clipped to what it holds."""
    if dtype == "bool":
        return X > 0
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        # Half of the range: the largest integers of 64 bits are no float64.
        return np.clip(np.round(X), limits.min // 2, limits.max // 2).astype(dtype)
    with np.errstate(over="ignore"):
        return X.astype(dtype)


# --- Layouts in memory -----------------------------------------------------------------


def every_other_row(X):
    return np.repeat(X, 2, axis=0)[::2]


def every_other_column(X):
    return np.repeat(X, 2, axis=1)[:, ::2]


def unaligned(X):
    """The same numbers one byte away from where the processor would have them."""
    if X.dtype == object:
        return X
    room = np.empty(X.nbytes + 1, dtype=np.uint8)
    moved = room[1:].view(X.dtype).reshape(X.shape)
    moved[...] = X
    return moved


def read_only(X):
    X = X.copy()
    X.setflags(write=False)
    return X


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "rows reversed": lambda X: X[::-1].copy()[::-1],
    "columns reversed": lambda X: X[:, ::-1].copy()[:, ::-1],
    "every other row": every_other_row,
    "every other column": every_other_column,
    "unaligned": unaligned,
    "read-only": read_only,
    # All rows are one row in memory.
    "broadcast": lambda X: np.broadcast_to(X[:1], X.shape),
}

# --- Containers ------------------------------------------------------------------------


def plain(X):
    """As a dtype and a layout that SciPy, torch and polars take, too."""
    if X.dtype.kind not in "fiub" or X.dtype.itemsize > 8 or not X.dtype.isnative:
        X = X.astype(np.float64)
    X = X.astype(np.float32) if X.dtype == np.float16 else X
    return X.copy(order="C")  # one row with strange strides is contiguous, too


def long_indices(X):
    X = sp.csr_array(plain(X))
    X.indices, X.indptr = X.indices.astype(np.int64), X.indptr.astype(np.int64)
    return X


def explicit_zeros(X):
    """CSR that stores every value, zeros too."""
    n, d = X.shape
    indices, indptr = np.tile(np.arange(d), n), np.arange(n + 1) * d
    return sp.csr_array((plain(X).ravel(), indices, indptr), shape=(n, d))


def unsorted_indices(X):
    X = sp.csr_array(plain(X)[:, ::-1])
    return sp.csr_array((X.data, X.shape[1] - 1 - X.indices, X.indptr), shape=X.shape)


def repeated_entries(kind):
    """Each value in two halves that are to be added up."""

    def make(X):
        X = sp.coo_array(plain(X).astype(np.float64))
        row, col = (np.concatenate([index, index]) for index in (X.row, X.col))
        halves = np.concatenate([X.data / 2, X.data / 2])
        if kind == "coo":
            return sp.coo_array((halves, (row, col)), shape=X.shape)
        order = np.argsort(row, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=X.shape[0]))])
        return sp.csr_array((halves[order], col[order], indptr), shape=X.shape)

    return make


def frame(X):
    X = X.astype(X.dtype.newbyteorder("=")) if not X.dtype.isnative else X
    return pd.DataFrame(X, columns=[f"x{j}" for j in range(X.shape[1])])


def nullable(X, missing=False):
    values = frame(plain(X)).astype("Float64")
    if missing:
        values.iloc[0, 0] = pd.NA
    return values


def mixed_columns(X):
    values = frame(plain(X).astype(np.float64))
    values.insert(0, "flag", values["x0"] > 0)
    values["small"] = values["x0"].astype(np.float32)
    return values


def masked(X):
    return np.ma.masked_array(X, mask=np.arange(X.size).reshape(X.shape) % 5 == 0)


def mapped(X):
    """A memory map of anonymous memory: no file has to be deleted."""
    if X.dtype == object:
        return X
    room = mmap.mmap(-1, max(1, X.nbytes))
    array = np.frombuffer(room, dtype=X.dtype, count=X.size).reshape(X.shape)
    array[...] = X
    return array


def tensor(X):
    return torch.tensor(plain(X))


CONTAINERS = {
    "array": lambda X: X,
    "matrix": lambda X: np.asmatrix(X),
    "list": lambda X: X.tolist(),
    "list of rows": list,
    "masked array": np.ma.masked_array,
    "masked values": masked,
    "memory map": mapped,
    "pandas": frame,
    "pandas nullable": nullable,
    "pandas NA": lambda X: nullable(X, missing=True),
    "pandas mixed": mixed_columns,
    "polars": lambda X: pl.DataFrame(plain(X), schema=[f"x{j}" for j in range(X.shape[1])]),
    "csr array": lambda X: sp.csr_array(plain(X)),
    "csr matrix": lambda X: sp.csr_matrix(plain(X)),
    "csr int64": long_indices,
    "csr explicit zeros": explicit_zeros,
    "csr unsorted": unsorted_indices,
    "csr repeated": repeated_entries("csr"),
    "csc array": lambda X: sp.csc_array(plain(X)),
    "csc matrix": lambda X: sp.csc_matrix(plain(X)),
    "coo array": lambda X: sp.coo_array(plain(X)),
    "coo repeated": repeated_entries("coo"),
    "lil": lambda X: sp.lil_array(plain(X)),
    "tensor": tensor,
    "tensor transposed": lambda X: tensor(X.T).T,
    "tensor with gradient": lambda X: tensor(X).to(torch.float64).requires_grad_(),
    "tensor bfloat16": lambda X: tensor(X).to(torch.bfloat16),
    "tensor float16": lambda X: tensor(X).to(torch.float16),
    "tensor sparse": lambda X: tensor(signed(X)).to_sparse(),
    "tensor csr": lambda X: torch.sparse_csr_tensor(
        *(torch.tensor(part) for part in csr_parts(X)), size=X.shape
    ),
}


def signed(X):
    """Torch makes no sparse tensor of unsigned integers dense."""
    return X.astype(np.int64) if X.dtype.kind == "u" else X


def csr_parts(X):
    X = sp.csr_array(plain(signed(X)))
    return X.indptr.astype(np.int64), X.indices.astype(np.int64), X.data


# --- Recipes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A recipe of X: values times ``10**exponent`` plus ``offset``, in a container."""

    n: int
    d: int
    kind: str = "blobs"
    exponent: int = 0
    offset: float = 0.0
    blemish: str | None = None
    dtype: str = "float64"
    layout: str = "C"
    container: str = "array"
    seed: int = 0

    def array(self):
        """The values as an ndarray, before they go into the container."""
        rng = np.random.default_rng(self.seed)
        X = KINDS[self.kind](rng, self.n, self.d) * 10.0**self.exponent + self.offset
        if self.blemish is not None:
            X[rng.integers(self.n), rng.integers(self.d)] = BLEMISHES[self.blemish]
        return LAYOUTS[self.layout](cast(X, self.dtype))

    def make(self):
        return CONTAINERS[self.container](self.array())

    def simpler(self):
        """Recipes that are simpler in one respect, the most helpful ones first."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        for name in ("container", "layout", "dtype", "blemish", "offset", "exponent", "kind"):
            if getattr(self, name) != defaults[name]:
                yield replace(self, **{name: defaults[name]})
        yield from (replace(self, n=n) for n in (2, 5, 20) if n < self.n)
        yield from (replace(self, d=d) for d in (1, 2) if d < self.d)


def draw_data(rng):
    """A recipe at random: every second one has an odd container."""
    mostly = lambda usual, others, share: (  # noqa: E731
        usual if rng.random() < share else str(rng.choice(others))
    )
    dtype = mostly("float64", [*FLOATS, *INTEGERS], 0.4)
    exponent = int(rng.integers(-30, 31)) if rng.random() < 0.25 else 0
    if dtype == "float16":
        exponent = int(np.clip(exponent, -2, 2))
    blemish = str(rng.choice(list(BLEMISHES))) if rng.random() < 0.04 else None
    return Data(
        n=int(rng.choice([1, 2, 3, 5, 8, 13, 20, 40, 90], p=[0.06, 0.06, *[0.1] * 4, *[0.16] * 3])),
        d=int(rng.choice([1, 2, 3, 8, 48, 55])),
        kind=mostly("blobs", list(KINDS), 0.2),
        exponent=exponent,
        offset=float(rng.choice([1.0, -1e3, 1e6, 1e10, -1e15, 1e30]))
        if rng.random() < 0.1
        else 0.0,
        blemish=None if dtype in INTEGERS else blemish,
        dtype=dtype,
        layout=mostly("C", list(LAYOUTS), 0.4),
        container=mostly("array", list(CONTAINERS), 0.4),
        seed=int(rng.integers(1000)),
    )


# --- Sample weights --------------------------------------------------------------------


def some_zeros(rng, n):
    return rng.random(n) * (rng.random(n) < 0.6)


def one_negative(rng, n):
    weight = rng.random(n)
    weight[rng.integers(n)] = -1.0
    return weight


WEIGHTS = {
    "ones": lambda rng, n: np.ones(n),
    "random": lambda rng, n: rng.random(n),
    "some zeros": some_zeros,
    "one row": lambda rng, n: np.eye(n)[0],
    "integers": lambda rng, n: rng.integers(1, 5, size=n),
    "thirty decades": lambda rng, n: 10.0 ** rng.uniform(-15, 15, size=n),
    "one heavy row": lambda rng, n: 1 + 1e12 * np.eye(n)[0],
    "reversed": lambda rng, n: rng.random(n)[::-1],
    "every other": lambda rng, n: rng.random(2 * n)[::2],
    "nan": lambda rng, n: np.where(np.arange(n) == 0, np.nan, rng.random(n)),
    "inf": lambda rng, n: np.where(np.arange(n) == 0, np.inf, rng.random(n)),
    "negative": one_negative,
    "zeros": lambda rng, n: np.zeros(n),
    "too many": lambda rng, n: np.ones(n + 1),
    "column": lambda rng, n: rng.random((n, 1)),
}
FAULTY = ("nan", "inf", "negative", "zeros", "too many", "column")
WEIGHT_CONTAINERS = {
    "array": lambda w: w,
    "list": lambda w: w.tolist(),
    "pandas": lambda w: pd.Series(w.ravel()),
    "tensor": lambda w: torch.tensor(w.copy()),
    "float32": lambda w: w.astype(np.float32),
    "read-only": read_only,
}


@dataclass(frozen=True)
class Weights:
    """A recipe of sample weights: values times ``factor``."""

    kind: str
    factor: float = 1.0
    container: str = "array"

    def make(self, n):
        values = WEIGHTS[self.kind](np.random.default_rng(n), n)
        # Times one would copy a reversed view.
        values = values if self.factor == 1 else values * self.factor
        return WEIGHT_CONTAINERS[self.container](values)

    def simpler(self):
        yield from (replace(self, factor=1.0), replace(self, container="array"))


def draw_weights(rng):
    """A recipe at random, or None for no weights, which is as likely."""
    if rng.random() < 0.5:
        return None
    usual = [kind for kind in WEIGHTS if kind not in FAULTY]
    return Weights(
        kind=str(rng.choice(FAULTY if rng.random() < 0.07 else usual)),
        factor=float(10.0 ** rng.integers(-9, 10)) if rng.random() < 0.3 else 1.0,
        container=str(rng.choice(list(WEIGHT_CONTAINERS))) if rng.random() < 0.4 else "array",
    )


# --- What a user's array holds ---------------------------------------------------------


def fingerprint(values):
    """Everything of a container that a fit must not change, to be compared with ``==``."""
    if sp.issparse(values):
        names = ("data", "indices", "indptr", "row", "col", "rows")
        return [fingerprint(getattr(values, name)) for name in names if hasattr(values, name)]
    if isinstance(values, np.ma.MaskedArray):
        return [fingerprint(values.data), fingerprint(np.ma.getmaskarray(values))]
    if isinstance(values, np.ndarray):
        content = repr(values.tolist()) if values.dtype == object else values.tobytes()
        return [content, values.dtype, values.shape, values.strides, values.flags.writeable]
    if isinstance(values, torch.Tensor):
        if values.layout is torch.sparse_csr:
            parts = values.crow_indices(), values.col_indices(), values.values()
        elif values.layout is torch.sparse_coo:
            parts = values._indices(), values._values()
        else:
            content = repr(values.tolist())
            return [content, values.dtype, values.stride(), values.requires_grad, values.grad]
        return [fingerprint(part) for part in parts]
    if isinstance(values, pd.DataFrame):
        return [repr(values.to_dict("list")), list(map(str, values.dtypes)), list(values.columns)]
    if isinstance(values, pd.Series):
        return [values.to_numpy().tobytes(), str(values.dtype)]
    if isinstance(values, pl.DataFrame):
        return [repr(values.to_dict(as_series=False)), values.schema]
    return copy.deepcopy(repr(values))


def one_row(X, i):
    """Row ``i`` of a container, in a container of its kind."""
    if isinstance(X, torch.Tensor) and X.layout is not torch.strided:
        X = X.to_dense()
    if sp.issparse(X):
        X = X.tocsr()
    return X[i : i + 1]
