"""What a benchmark asserts of its figures, and whether they bear it out."""

import math
from dataclasses import dataclass

from tables import METRICS, moments


@dataclass(frozen=True)
class Claim:
    """A figure that must lie between bounds, or beside other methods on the same rows.

    Attributes
    ----------
    table, dataset, method : str
    low, high : float
        Bounds of the mean over seeds.
    above, below : tuple of str
        Methods whose mean it must reach at least, or at most.
    slack : float
        Amount by which the mean may stay below those of ``above``.
    metric : str
        A column of the runs, or of their details.
    target : float or None
        If given, the figure is the distance of the mean from it.
    exceptions : int or None
        If given, the bounds hold for every seed but this number of them, not for the mean.
    quick : bool
        Whether the few seeds of a quick run suffice to judge the claim.
    """

    table: str
    dataset: str
    method: str
    low: float = -math.inf
    high: float = math.inf
    above: tuple = ()
    below: tuple = ()
    slack: float = 0.0
    metric: str = "ari"
    target: float | None = None
    exceptions: int | None = None
    quick: bool = True

    def verdict(self, groups):
        """A row for the file of verdicts; ``groups`` are those of `tables.latest_groups`."""
        ours = self._figure(groups, self.method)
        above = [self._figure(groups, name) for name in self.above]
        below = [self._figure(groups, name) for name in self.below]
        if None in (ours, *above, *below):
            result = "not run"
        else:
            least = max([self.low, *(other - self.slack for other in above)])
            result = "holds" if least <= ours <= min([self.high, *below]) else "FAILS"
        return {
            "table": self.table,
            "dataset": self.dataset,
            "method": self.method,
            "metric": self.metric + (f" from {self.target:g}" if self.target is not None else ""),
            "value": "" if ours is None else ours,
            "required": self._required(above, below),
            "verdict": result,
        }

    def _figure(self, groups, method):
        group = groups.get((self.table, self.dataset, method), ())
        values = sorted(float(row[self.metric]) for row in group if row.get(self.metric))
        if not values:
            return None
        if self.exceptions is None:
            mean = float(moments(values)[0])
            return mean if self.target is None else round(abs(mean - self.target), 4)
        worst_first = values if self.low > -math.inf else values[::-1]
        return worst_first[min(self.exceptions, len(values) - 1)]

    def _required(self, above, below):
        parts = [f">= {self.low:g}"] if self.low > -math.inf else []
        parts += [f"<= {self.high:g}"] if self.high < math.inf else []
        less = f" - {self.slack:g}" if self.slack else ""
        parts += [f">= {name} ({v}){less}" for name, v in zip(self.above, above, strict=True)]
        parts += [f"<= {name} ({v})" for name, v in zip(self.below, below, strict=True)]
        text = " and ".join(parts)
        if self.exceptions is None:
            return text
        return text + (f" but for {self.exceptions} seed" if self.exceptions else " for every seed")


def show_verdicts(verdicts):
    print("\nClaims")
    for row in verdicts:
        metric = row["metric"].upper() if row["metric"] in METRICS else row["metric"]
        print(
            f"    {row['verdict']:<9}Table {row['table']}, {row['dataset']}, {row['method']}: "
            f"{metric} {row['value']} {row['required']}"
        )
