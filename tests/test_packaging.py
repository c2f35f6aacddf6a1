"""One owner for each fact, a whole wheel, the import contracts, and a light import."""

import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import deepmix

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deepmix"

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


def modules(folder=PACKAGE):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def run(*command, cwd):
    """Run Python in a folder that goes before the installed package."""
    env = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture
def source(tmp_path):
    """A copy of what the build and the contracts read."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(PACKAGE, tmp_path / "deepmix", ignore=ignored)
    for name in ("pyproject.toml", "setup.cfg", "README.rst", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


# --- Configuration ---


def test_setup_cfg_holds_the_import_contracts_and_nothing_else():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config.sections()
    assert [name for name in config.sections() if not name.startswith("importlinter")] == []


def test_each_tool_section_is_read_by_a_tool_in_use():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]) == {"coverage", "mypy", "pytest", "ruff", "setuptools"}


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    described = re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE)
    assert sorted(targets) == sorted(described)


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        re.match(r"[\w-]+", requirement)[0]
        for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]
    }
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    # tomli is for Python 3.10 alone and has no dependencies of its own.
    assert wanted - {"deepmix", "tomli"} <= set(pinned)


def test_citation_names_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {deepmix.__version__}\n" in citation


# --- Wheel ---


def test_wheel_holds_every_module(source):
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    result = run("-W", "ignore", "-c", build, cwd=source)
    assert result.returncode == 0, result.stderr
    (path,) = (source / "out").glob("deepmix-*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        headers = Parser().parsestr(wheel.read(metadata).decode())
    assert {path.relative_to(ROOT).as_posix() for path in modules()} <= names
    assert "deepmix/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks"))]
    assert headers["Version"] == deepmix.__version__
    assert headers["License-Expression"] == "BSD-3-Clause"


# --- Import contracts ---


def lint_imports(cwd):
    main = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run("-c", main, "--no-cache", "--no-logo", cwd=cwd)


def test_import_contracts_hold(source):
    result = lint_imports(source)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "imported", "contract"),
    [
        ("_torch.py", "deepmix.training", "Imports point down only"),
        ("networks.py", "deepmix.training", "Imports point down only"),
        ("training.py", "deepmix.base", "Imports point down only"),
        ("base.py", "deepmix.mixture", "Imports point down only"),
        ("mixture/dcan/dcan.py", "deepmix.metrics", "Imports point down only"),
        ("unplaced.py", "deepmix.base", "Imports point down only"),
        ("mixture/dcan/losses.py", "deepmix.mixture.deep_dpm", "A paper is a folder"),
        ("mixture/dcan/losses.py", "deepmix.mixture.dcan.network", "In a paper's folder"),
        ("mixture/dcan/dcan.py", "deepmix.plotting", "Estimators never import"),
        ("mixture/dcan/dcan.py", "deepmix.datasets", "Estimators never import"),
        ("base.py", "matplotlib.pyplot", "Estimators never import"),
    ],
)
def test_import_contracts_catch(source, module, imported, contract):
    with (source / "deepmix" / module).open("a") as file:
        file.write(f"\n\ndef _violation():\n    import {imported}\n")
    result = lint_imports(source)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"^{contract}.* BROKEN", result.stdout, re.MULTILINE), result.stdout


def private_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sklearn"):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if alias.name.startswith("sklearn")]
        else:
            continue
        yield from (name for name in dotted if re.search(r"\._[a-z]", name))


def test_only_base_and_parameters_use_private_names_of_scikit_learn():
    users = {path.relative_to(PACKAGE).as_posix() for path in modules() if [*private_imports(path)]}
    assert users <= {"base.py", "parameters.py"}


# --- Import ---


def test_public_names_are_importable():
    assert sorted(set(deepmix.__all__)) == sorted(deepmix.__all__)
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(name)
        missing = [
            public for public in getattr(module, "__all__", []) if not hasattr(module, public)
        ]
        assert missing == [], name


def test_import_is_light_and_leaves_global_state_alone():
    """What scikit-learn and torch load themselves does not count."""
    heavy = {"matplotlib", "pandas", "PIL", "polars", "pytest", "rich", "sphinx"}
    code = (
        "import sys, numpy, sklearn.cluster, sklearn.mixture, torch\n"
        "def state():\n"
        "    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),"
        " torch.get_num_threads(), torch.get_default_dtype())\n"
        "before, modules = state(), set(sys.modules)\n"
        "import deepmix\n"
        "assert state() == before\n"
        "print(*(set(sys.modules) - modules))"
    )
    result = run("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert heavy & set(result.stdout.split()) == set()
