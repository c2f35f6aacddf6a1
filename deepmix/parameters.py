"""How an estimator declares its parameters: one list of annotated fields, in signature order.

`parameters` makes of such a list the ``__init__``, which stores its arguments and does nothing
else, and the constraints by which scikit-learn validates their values in `fit`. The types below
are those that several estimators share; with base.py, this is the file that uses private names of
scikit-learn.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, MISSING, field, make_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from sklearn.base import _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

if TYPE_CHECKING:  # Python 3.10 has it in typing_extensions only, which type checkers know
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**options):
        return lambda decorator: decorator


Class = TypeVar("Class")
Method = TypeVar("Method", bound=Callable)

# --- Types -----------------------------------------------------------------------------

Auto = Literal["auto"]
Count = Annotated[int, Interval(Integral, 1, None, closed="left")]
CountOrZero = Annotated[int, Interval(Integral, 0, None, closed="left")]
Positive = Annotated[float, Interval(Real, 0, None, closed="neither")]
NonNegative = Annotated[float, Interval(Real, 0, None, closed="left")]
Share = Annotated[float, Interval(Real, 0, 1, closed="left")]  # 1 excluded

ArrayLike = Annotated[npt.ArrayLike, "array-like"]
Matrix = npt.ArrayLike | sp.sparray | sp.spmatrix  # rows of features
Layers = Annotated[Sequence[int], "array-like"]  # sizes of hidden layers
Coder = Callable[..., nn.Module]  # makes an encoder or a decoder

Device = str | torch.device
Dtype = Literal["float32", "float64", "auto"]
Precision = Literal["float32", "bfloat16"]
RandomState = Annotated[int | np.random.RandomState | None, "random_state"]
Solver = Literal["adam", "sgd"]
Verbosity = Annotated[int, "verbose"]

# --- Decorator -------------------------------------------------------------------------


def validated(method: Method) -> Method:
    """Decorate a method of an estimator, whose parameters are validated before it runs."""
    return _fit_context(prefer_skip_nested_validation=True)(method)


@dataclass_transform(eq_default=False)
def parameters(cls: type[Class]) -> type[Class]:
    """Decorate an estimator: its annotated fields become its parameters.

    Fields follow the syntax of `dataclasses`: ``name: type = default``, and ``_: KW_ONLY`` before
    those that are passed by name. Unlike there, a class lists all its parameters and inherits
    none, so that the list is the signature; the defaults do not stay as attributes of the class.

    The type says which values are allowed: a type of this module, a ``Literal`` of strings,
    ``bool``, ``Callable``, ``None``, any other class for its instances, ``Annotated[type,
    constraint]`` with a constraint of scikit-learn, or a union of these.

    Parameters
    ----------
    cls : type

    Returns
    -------
    cls : type
        The same class, with an ``__init__`` and ``_parameter_constraints``.

    Raises
    ------
    TypeError
        If the type of a field does not say which values are allowed.

    Examples
    --------
    >>> from dataclasses import KW_ONLY
    >>> from sklearn.base import BaseEstimator
    >>> from deepmix.parameters import Auto, Count, parameters
    >>> @parameters
    ... class Blocks(BaseEstimator):
    ...     n_blocks: Count = 3
    ...     _: KW_ONLY
    ...     batch_size: Count | Auto = "auto"
    >>> Blocks(5, batch_size=100)
    Blocks(batch_size=100, n_blocks=5)
    """
    fields, constraints = [], {}
    for name, hint in inspect.get_annotations(cls, eval_str=True).items():
        if hint is not KW_ONLY:
            constraints[name] = _constraints(hint, f"{cls.__name__}.{name}")
        fields.append((name, hint, field(default=vars(cls).get(name, MISSING))))
        if name in vars(cls):
            delattr(cls, name)
    # A class of its own makes the __init__: a base class adds no fields, and no other method of a
    # dataclass reaches the estimator.
    record = make_dataclass(cls.__qualname__, fields, eq=False, repr=False)
    init = vars(record)["__init__"]
    init.__module__ = cls.__module__
    init.__annotations__ = {}  # the docstring has the types, in words
    cls.__init__ = init  # type: ignore[method-assign]
    cls._parameter_constraints = constraints  # type: ignore[attr-defined]
    return cls


def _constraints(hint, place):
    """Constraints of scikit-learn that a type stands for: a list of alternatives."""
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return [constraint for part in get_args(hint) for constraint in _constraints(part, place)]
    if origin is Annotated:
        return list(hint.__metadata__)
    if origin is Literal:
        return [StrOptions(set(get_args(hint)))]
    if origin in (bool, Callable, NoneType, None):
        return [{bool: "boolean", Callable: callable}.get(origin)]
    if isinstance(origin, type) and origin not in (int, float, object, Any):
        return [origin]
    raise TypeError(
        f"The type of {place} must say which values are allowed; got {hint!r}. Use a type of "
        "deepmix.parameters, such as Count or Positive, or Annotated[type, constraint]."
    )
