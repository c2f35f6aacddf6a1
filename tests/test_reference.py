"""Recorded float64 results: nothing changes by accident."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "reference" / "make_reference.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = load_script()


@pytest.mark.parametrize("name", script.NAMES)
def test_a_recorded_fit_is_repeated(name):
    recorded = json.loads(script.PATH.read_text())[name]
    got = script.record(name)
    assert set(got) == set(recorded)
    for key, value in recorded.items():
        # Another machine's BLAS adds in another order: 1e-16 at first, some 1e-9 after training.
        np.testing.assert_allclose(got[key], value, rtol=1e-6, atol=1e-8, err_msg=key)


def test_every_recorded_fit_has_its_recipe():
    assert set(json.loads(script.PATH.read_text())) == set(script.NAMES)
