"""The one runner of the papers' benchmarks: options, runs, tables, claims.

A file of a benchmark says its sets, its methods and its claims, and ends with a `Benchmark`.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from claims import show_verdicts
from records import read_rows, write_rows
from runs import Run, complete, read_runs, states, with_details
from tables import latest_groups, show, summarize

HERE = Path(__file__).parent
# What is printed about rows of the runs' file that are not results of the present runs.
AGES = {
    "undated": "of unknown age: they do not say which parameters made them, and are kept",
    "stale": "stale, of other parameters than the present ones: without --no-runs they run again",
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of a paper.

    Attributes
    ----------
    name : str
        Name of the benchmark's file and of its files of results.
    description : str
        Text whose first line is shown by ``--help``.
    paper : str
        Name of the file of published figures.
    plan : callable
        ``plan(options) -> runs``.
    claims : tuple of Claim
    add_options : callable or None
        ``add_options(add)`` adds options with the parser's ``add_argument``.
    budgets : tuple of str
        Choices of ``--budget``; by default it is 'cpu', in a quick run 'quick'.
    details : str or None
        Name of details whose columns belong to the runs.
    prepare : callable or None
        ``prepare(rows) -> rows``, before anything is made of the runs.
    summary : dict
        Arguments of `tables.summarize`.
    separate : tuple of str
        Tables that the summary leaves to ``tables``.
    tables : dict
        Further tables: suffix of the file to ``function(rows, paper) -> rows``.
    """

    name: str
    description: str
    paper: str
    plan: Callable
    claims: tuple
    add_options: Callable | None = None
    budgets: tuple = ()
    details: str | None = None
    prepare: Callable | None = None
    summary: dict = field(default_factory=dict)
    separate: tuple = ()
    tables: dict = field(default_factory=dict)

    def main(self, arguments=None):
        """Do what the options say; the exit code, 1 if ``--check`` finds a claim that fails."""
        options = self.parse(arguments)
        runs = selected(self.plan(options), options)
        path = options.out / f"{self.name}_runs.csv"
        if not options.no_runs:
            complete(runs, path, options)
        return self.report(runs, options)

    def parse(self, arguments=None):
        """Options of the command line, or of a list of str."""
        parser = argparse.ArgumentParser(description=self.description.split("\n")[0])
        add = parser.add_argument
        add("--quick", action="store_true", help="small sets, few seeds and epochs: minutes")
        add("--data", default=os.environ.get("DEEPMIX_DATA"), help="folder of data sets")
        add("--datasets", nargs="+", metavar="NAME", help="only these")
        add("--methods", nargs="+", metavar="NAME", help="only these")
        add("--only-table", nargs="+", metavar="N", help="only these tables of the paper")
        add("--seeds", type=int, help="runs of each method")
        add("--jobs", type=int, default=1, help="runs at a time")
        add("--threads", type=int, default=1, help="threads of a run")
        add("--device", default="auto", help="of deepmix's estimators")
        add("--out", type=Path, default=HERE / "results", help="folder of results")
        add("--check", action="store_true", help="exit 1 unless every claim holds")
        add("--no-runs", action="store_true", help="only summarise the rows that are there")
        if self.budgets:
            add("--budget", choices=self.budgets, help="what is spent (default: cpu, or quick)")
        if self.add_options is not None:
            self.add_options(add)
        options = parser.parse_args(arguments)
        if self.budgets and options.budget is None:
            options.budget = "quick" if options.quick else "cpu"
        if options.quick and options.out == HERE / "results":
            options.out /= "quick"
        return options

    def report(self, runs, options):
        """Write and print every table that the runs' file allows; the exit code."""
        rows = read_runs(options.out / f"{self.name}_runs.csv")
        if not rows:
            print("no runs")
            return 1
        age = Counter(states(rows, runs))
        if self.details:
            rows = with_details(rows, options.out / f"{self.name}_{self.details}.csv")
        rows = rows if self.prepare is None else self.prepare(rows)
        paper = published(self.paper)
        summed = [row for row in rows if row["table"] not in self.separate]
        tables = {"": summarize(summed, paper, **self.summary)}
        tables |= {f"_{name}": make(rows, paper) for name, make in self.tables.items()}
        for suffix, content in tables.items():
            if content:
                write_rows(options.out / f"{self.name}{suffix}.csv", content)
            if content and not suffix.endswith("_runs"):
                show(self.name + suffix.replace("_", ", ", 1), content)
        for state, meaning in AGES.items():
            if age[state]:
                print(f"\n{age[state]} rows are {meaning}")
        groups = dict(latest_groups(rows))
        verdicts = [claim.verdict(groups) for claim in self.asked(runs, options)]
        if verdicts:
            write_rows(options.out / f"{self.name}_verdicts.csv", verdicts)
        show_verdicts(verdicts)
        return int(options.check and any(row["verdict"] != "holds" for row in verdicts))

    def asked(self, runs, options):
        """Claims about methods that the options run, on the sets where they run them."""
        planned = {(run.table, run.dataset, run.method) for run in runs}
        return [
            claim
            for claim in self.claims
            if (claim.table, claim.dataset, claim.method) in planned
            and (claim.quick or not options.quick)
        ]


def published(paper):
    """Figures of a paper: dict of (table, dataset, method) to a row."""
    rows = read_rows(HERE / "published" / f"{paper}.csv")
    return {(r["table"], r["dataset"], r["method"]): r for r in rows}


def selected(runs, options):
    """The runs that the options ask for."""
    asked = {
        "dataset": options.datasets,
        "method": options.methods,
        "table": options.only_table,
    }
    asked = {name: choice for name, choice in asked.items() if choice is not None}
    return [run for run in runs if all(getattr(run, n) in asked[n] for n in asked)]


def runs_of(table, dataset, methods, n_seeds, **about):
    """Runs of each method by each seed, and one of each that only says why there is none.

    Parameters
    ----------
    table, dataset : str
    methods : dict of str to BaseEstimator or str
    n_seeds : int
    **about
        Further attributes of `Run`.
    """
    return [
        Run(table, dataset, method, seed, estimator, **about)
        for method, estimator in methods.items()
        for seed in range(1 if isinstance(estimator, str) else n_seeds)
    ]
