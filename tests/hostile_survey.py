"""Fit thousands of hostile cases and count what goes wrong, rather than stop at the first fault.

``python tests/hostile_survey.py --n 5000`` fits so many cases to each estimator; ``--estimators
DCAN --first 100 --n 1`` is the case of seed 100 alone, which is printed in full.
"""

import argparse
import collections
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hostile.cases import ESTIMATORS, draw_case, simplest
from hostile.properties import outcome_and_faults


def survey(classes, seeds, seconds=float("inf")):
    """Fit the cases of all seeds: counts, durations and, by kind of fault, the cases that have it.

    Returns
    -------
    outcomes : Counter of (name of the estimator, outcome)
    durations : list of (seconds, Case)
    found : dict of (kind, place) to list of (seed, Case, Fault)
    """
    outcomes, durations = collections.Counter(), []
    found = collections.defaultdict(list)
    end = time.perf_counter() + seconds
    for seed in seeds:
        for cls in classes:
            start = time.perf_counter()
            if start > end:
                return outcomes, durations, found
            case = draw_case(cls, seed)
            outcome, faults = outcome_and_faults(case)
            durations.append((time.perf_counter() - start, seed, case))
            outcomes[cls.__name__, outcome] += 1
            for fault in faults:
                found[fault.key].append((seed, case, fault))
    return outcomes, durations, found


def simplified(case, key):
    """The simplest case found that has a fault of this kind at this place."""
    return simplest(case, lambda other: key in [f.key for f in outcome_and_faults(other)[1]])


def report(outcomes, durations, found, simplify):
    total = sum(seconds for seconds, *_ in durations)
    n = len(durations)
    faulty = len({id(case) for cases in found.values() for _, case, _ in cases})
    print(f"{n} cases in {total:.0f} s, {total / max(n, 1):.3f} s each; {faulty} with a fault")
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"  {name:20} {outcome:8} {count}")
    print("\nFaults:")
    for key, cases in sorted(found.items(), key=lambda item: -len(item[1])):
        names = collections.Counter(case.cls.__name__ for _, case, _ in cases)
        seed, case, fault = cases[0]
        print(f"\n{len(cases):4}x {fault.kind} in {fault.where or 'the result'}")
        print(f"      {', '.join(f'{name} {count}' for name, count in names.most_common())}")
        print(f"      {fault.detail}")
        print(f"      {case.cls.__name__}, seed {seed}", flush=True)
        print(f"      {simplified(case, key) if simplify else case}", flush=True)
    print("\nSlowest:")
    for seconds, seed, case in sorted(durations, key=lambda item: -item[0])[:5]:
        print(f"  {seconds:.2f} s  seed {seed}: {case}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="cases of each estimator")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--simplify", action="store_true", help="simplify one case of each fault")
    parser.add_argument("--estimators", nargs="*", help="names; default all")
    options = parser.parse_args()
    names = options.estimators or [cls.__name__ for cls in ESTIMATORS]
    classes = [cls for cls in ESTIMATORS if cls.__name__ in names]
    seeds = range(options.first, options.first + options.n)
    report(*survey(classes, seeds, options.seconds), options.simplify)


if __name__ == "__main__":
    main()
