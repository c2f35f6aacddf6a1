"""The decorator that makes parameters of annotated fields, and what it makes of the estimators."""

import inspect
import pickle
from collections.abc import Callable
from dataclasses import KW_ONLY
from numbers import Real
from typing import Annotated, Any, Literal

import pytest
from sklearn.base import BaseEstimator, clone

import deepmix
from deepmix.parameters import (
    Auto,
    Count,
    CountOrZero,
    Interval,
    Layers,
    NonNegative,
    Positive,
    RandomState,
    Share,
    parameters,
    validated,
)

ESTIMATORS = [
    cls
    for cls in map(vars(deepmix).get, deepmix.__all__)
    if inspect.isclass(cls) and issubclass(cls, BaseEstimator)
]


@parameters
class Base(BaseEstimator):
    n_clusters: Count = 8
    _: KW_ONLY
    tol: NonNegative = 1e-3
    warm_start: bool = False

    @validated
    def fit(self, X=None):
        return self


@parameters
class Model(Base):
    """All kinds of types."""

    n_clusters: Count = 3
    init: Literal["k-means", "random"] | Callable = "random"
    _: KW_ONLY
    layers: Layers = (32, 16)
    max_iter: CountOrZero | Auto = "auto"
    step: Positive | None = None
    momentum: Share = 0.9
    low: Annotated[float, Interval(Real, -1, 1, closed="both")] = 0.0
    table: dict[str, int] | None = None
    random_state: RandomState = None
    tol: NonNegative = 0.0


# --- Signature ---


def test_the_signature_is_the_list_whatever_a_base_class_declares():
    expected = (
        "(n_clusters=3, init='random', *, layers=(32, 16), max_iter='auto', step=None, "
        "momentum=0.9, low=0.0, table=None, random_state=None, tol=0.0)"
    )
    assert str(inspect.signature(Model)) == expected
    assert str(inspect.signature(Model.__init__)) == expected.replace("(", "(self, ", 1)
    assert list(Model._parameter_constraints) == list(inspect.signature(Model).parameters)


def test_parameters_after_the_mark_are_passed_by_name():
    assert Model(5, "k-means").init == "k-means"
    with pytest.raises(TypeError, match=r"Model.__init__\(\) takes from 1 to 3 positional"):
        Model(5, "k-means", (8,))
    with pytest.raises(TypeError, match="unexpected keyword argument 'warm_start'"):
        Model(warm_start=True)


def test_init_stores_its_arguments_as_they_are_and_nothing_else():
    layers = [8]
    model = Model(5, layers=layers)
    assert model.layers is layers
    assert list(vars(model)) == list(inspect.signature(Model).parameters)


def test_defaults_are_no_attributes_of_the_class():
    assert not hasattr(Model, "n_clusters")


def test_a_parameter_without_default_has_to_be_given():
    @parameters
    class Wrapper(BaseEstimator):
        model: Base
        n_clusters: Count = 8

    assert Wrapper(Base()).n_clusters == 8
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        Wrapper()


# --- Validation ---


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "n_clusters": [1, 10],
        "init": ["k-means", "random", len],
        "layers": [(), [3, 4]],
        "max_iter": [0, "auto"],
        "step": [1e-9, 3, None],
        "momentum": [0, 0.99],
        "low": [-1, 1],
        "table": [{}, None],
        "random_state": [None, 0],
        "tol": [0, 1e-3],
    }.items(),
)
def test_allowed_values_pass(name, values):
    for value in values:
        Model(**{name: value}).fit()


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "n_clusters": [0, 1.0, "auto", None],
        "init": ["pca", None, 3],
        "layers": [3, None],
        "max_iter": [-1, 2.0, "all", None],
        "step": [0, -1, "auto"],
        "momentum": [-0.1, 1.0, None],
        "low": [-1.1, 1.1],
        "table": [[], "dict"],
        "random_state": [-1, "seed"],
        "tol": [-1, None],
    }.items(),
)
def test_other_values_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"The '{name}' parameter of Model must be"):
            Model(**{name: value}).fit()


def test_a_flag_is_no_number():
    with pytest.raises(ValueError, match="The 'warm_start' parameter of Base must be"):
        Base(warm_start=2).fit()


@pytest.mark.parametrize("hint", [int, float, Any, float | None, "float"])
def test_a_type_that_does_not_say_which_values_are_allowed_is_refused(hint):
    namespace = {"__annotations__": {"gain": hint}, "gain": 1.0}
    with pytest.raises(TypeError, match=r"type of Loose.gain must say which values are allowed"):
        parameters(type("Loose", (BaseEstimator,), namespace))


# --- Conventions of scikit-learn ---


def test_scikit_learn_finds_the_parameters():
    model = Model(5, max_iter=10)
    assert clone(model).get_params() == model.get_params()
    assert repr(model) == "Model(max_iter=10, n_clusters=5)"
    assert pickle.loads(pickle.dumps(model)).get_params() == model.get_params()
    assert model.set_params(tol=0.5).tol == 0.5
    with pytest.raises(ValueError, match="Invalid parameter 'warm_start'"):
        model.set_params(warm_start=True)


def test_a_subclass_without_a_list_inherits_all():
    class Child(Model):
        pass

    assert Child(4).get_params() == Model(4).get_params()
    with pytest.raises(ValueError, match="The 'n_clusters' parameter of Child must be"):
        Child(0).fit()


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_each_parameter_of_an_estimator_has_a_constraint(cls):
    assert list(cls._parameter_constraints) == list(inspect.signature(cls).parameters)
