"""Docstrings: numpydoc for what is public, no drift from signatures anywhere, examples that run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from numpydoc.docscrape import ClassDoc, FunctionDoc
from numpydoc.validate import validate

import deepmix

MODULES = [
    "deepmix",
    *sorted(info.name for info in pkgutil.walk_packages(deepmix.__path__, prefix="deepmix.")),
]

# numpydoc's checks that guard facts; its checks of style are left to the reader.
REQUIRED = {
    "GL08": "no docstring",
    "PR01": "parameters not documented",
    "PR02": "unknown parameters",
    "PR03": "parameters in another order",
    "PR04": "parameter without type",
    "PR07": "parameter without description",
    "RT01": "no Returns section",
    "SS01": "no summary",
    "YD01": "no Yields section",
}


def own(module, public_only):
    """Functions and classes that a module defines, by dotted name."""
    names = getattr(module, "__all__", None) if public_only else None
    for name, thing in vars(module).items():
        if name.startswith("_") or (names is not None and name not in names):
            continue
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and (
            thing.__module__ == module.__name__
        ):
            yield f"{module.__name__}.{name}", thing


def public_things():
    """What deepmix.__all__ names, and what modules with an __all__ of their own define."""
    things = {}
    for name in deepmix.__all__:
        thing = getattr(deepmix, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            things[f"{thing.__module__}.{thing.__qualname__}"] = thing
    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "__all__") and not any(part.startswith("_") for part in name.split(".")):
            things.update(own(module, public_only=True))
    return things


def methods_of(classes):
    """Public methods that deepmix writes, once each, wherever in the bases they stand."""
    found = {}
    for cls in classes:
        for base in cls.__mro__:
            if not base.__module__.startswith("deepmix"):
                continue
            for name, member in vars(base).items():
                if not name.startswith("_") and inspect.isfunction(member):
                    found[f"{base.__module__}.{base.__qualname__}.{name}"] = member
    return found


PUBLIC = public_things()
CLASSES = [thing for thing in PUBLIC.values() if inspect.isclass(thing)]
METHODS = methods_of(CLASSES)
WRITTEN = {name: thing for m in MODULES for name, thing in own(importlib.import_module(m), False)}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_docstrings_are_complete(name):
    errors = [(code, text) for code, text in validate(name)["errors"] if code in REQUIRED]
    assert errors == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_docstrings_have_an_example(name):
    thing = PUBLIC[name]
    doc = ClassDoc(thing) if inspect.isclass(thing) else FunctionDoc(thing)
    assert doc["Examples"], f"{name} has no Examples section"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_public_methods_say_what_they_do(name):
    assert inspect.getdoc(METHODS[name]), f"{name} has no docstring"


# What a user calls; the engine, networks and formulas say their types in docstrings alone.
TYPED_MODULES = tuple(
    f"deepmix.{name}"
    for name in ("base", "center_mixture", "datasets", "metrics", "mixture", "plotting")
)
TYPED = {
    name: thing
    for name, thing in {**PUBLIC, **METHODS}.items()
    if inspect.isfunction(thing) and name.startswith(TYPED_MODULES)
}


@pytest.mark.parametrize("name", sorted(TYPED))
def test_public_signatures_carry_types(name):
    signature = inspect.signature(TYPED[name])
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert set(bare) <= {"self"}
    assert signature.return_annotation is not signature.empty


def documented(thing):
    doc = FunctionDoc(thing) if inspect.isfunction(thing) else ClassDoc(thing)
    names = (name for parameter in doc["Parameters"] for name in parameter.name.split(","))
    return [name.strip().lstrip("*") for name in names]


# Private helpers and pure formulas need no Parameters section; one that is there must be true.
SECTIONS = {name: t for name, t in {**WRITTEN, **METHODS}.items() if documented(t)}


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_parameter_sections_follow_the_signature(name):
    signature = inspect.signature(SECTIONS[name]).parameters
    assert documented(SECTIONS[name]) == [p for p in signature if p != "self"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, optionflags=flags)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see above"
