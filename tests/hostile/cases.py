"""A case: an estimator, its parameters, its data; how one is drawn, and how it is simplified."""

from dataclasses import dataclass, replace

import numpy as np
from common import SMALL

from hostile.data import Data, Weights, draw_data, draw_weights
from hostile.parameters import LENGTHS, Made, draw_parameters

ESTIMATORS = tuple(SMALL)


@dataclass(frozen=True)
class Case:
    """What is fitted to what. The repr makes the case again."""

    cls: type
    parameters: dict
    data: Data
    weights: Weights | None = None

    def __repr__(self):
        parts = [self.cls.__name__, *map(repr, (self.parameters, self.data, self.weights))]
        return f"Case({', '.join(parts)})"

    def estimator(self):
        made = {
            name: value.make() if isinstance(value, Made) else value
            for name, value in self.parameters.items()
        }
        return self.cls(**made)

    def simpler(self):
        """Simpler cases: first by much, then in one respect only."""
        yield replace(self, data=Data(self.data.n, self.data.d), weights=None)
        # The default lengths are no shorter, and without a seed no fit is like another.
        optional = [
            name
            for name in self.parameters
            if name not in (*LENGTHS, "random_state", "clusterer")
            and not name.endswith("layer_sizes")
        ]
        half = len(optional) // 2
        for dropped in (optional[:half], optional[half:], *([name] for name in optional)):
            rest = {key: self.parameters[key] for key in self.parameters if key not in dropped}
            yield replace(self, parameters=rest)
        yield replace(self, parameters={**self.parameters, "random_state": 0})
        if self.weights is not None:
            yield replace(self, weights=None)
            for weights in self.weights.simpler():
                yield replace(self, weights=weights)
        for data in self.data.simpler():
            yield replace(self, data=data)


def draw_case(cls, seed):
    """The case of this estimator that a seed stands for: other data for each estimator."""
    rng = np.random.default_rng([seed, ESTIMATORS.index(cls)])
    data = draw_data(rng)
    weights = draw_weights(rng)
    return Case(cls, draw_parameters(cls, rng, data), data, weights)


def simplest(case, still_fails):
    """Simplify a case as long as ``still_fails(case)``: one change after another."""
    changed = True
    while changed:
        changed = False
        for simpler in case.simpler():
            if simpler != case and still_fails(simpler):
                case, changed = simpler, True
                break
    return case
