"""Every fit works or is refused in words: a property test over parameters, data and weights.

The cases are drawn, made and judged by `hostile`, in the folder of that name. To look at one that
fails, or to count the faults of thousands: ``python tests/hostile_survey.py --help``.
"""

import pytest
from hostile.cases import ESTIMATORS, draw_case
from hostile.properties import outcome_and_faults
from hypothesis import HealthCheck, Phase, given, settings, strategies

# A case is its seed, so that a smaller seed is no simpler case: hypothesis need not look for one.
hostile = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
seeds = given(seed=strategies.integers(0, 2**32 - 1))
estimators = pytest.mark.parametrize("cls", ESTIMATORS, ids=lambda cls: cls.__name__)


def assert_no_fault(cls, seed):
    case = draw_case(cls, seed)
    _, faults = outcome_and_faults(case)
    found = [f"{fault.kind} ({fault.where}) {fault.detail}" for fault in faults]
    assert not faults, "\n".join([f"seed {seed}: {case}", *found])


# Each case is two fits, of an estimator and of its clone.
@estimators
@settings(hostile, max_examples=12)
@seeds
def test_a_hostile_fit_works_or_is_refused_in_words(cls, seed):
    assert_no_fault(cls, seed)


@pytest.mark.slow
@estimators
@settings(hostile, max_examples=900)
@seeds
def test_many_hostile_fits_work_or_are_refused_in_words(cls, seed):
    assert_no_fault(cls, seed)
