"""From runs to tables: means beside the paper's figures, model selection, runtimes, claims."""

import statistics
from dataclasses import dataclass

from common import HERE, read_rows, selected, write_rows

METRICS = ("ari", "nmi", "acc")
# Of the benchmark's name to the file of the paper's figures.
PUBLISHED = {
    "clustering_module": "boubekki_2021",
    "aecm": "boubekki_2021",
    "neural_mixture_em": "tissera_2022",
    "dcan": "lim_2024",
}

# Where a table of ours looks for the paper's figure: the baselines stand in Table 1 only.
FALLBACK = {"5": ("5", "1")}
# Beginnings of the methods' names, in the order of the tables; the last is of every name.
FAMILIES = ("KM", "iGMM", "GMM", "AE+KM", "CM", "AE-CM", "")


def published(name):
    """Figures of the paper of a benchmark: dict of (table, dataset, method) to a row."""
    path = HERE / "published" / f"{PUBLISHED[name]}.csv"
    return {(r["table"], r["dataset"], r["method"]): r for r in read_rows(path)}


def paper_row(paper, table, dataset, method):
    """Of the set that the first word of ``dataset`` names: 'mnist 14x14' is MNIST."""
    dataset = dataset.split()[0]
    candidates = [(name, dataset, method) for name in FALLBACK.get(table, (table,))]
    return next((paper[key] for key in candidates if key in paper), {})


# --- Summary ---------------------------------------------------------------------------


def latest_groups(rows):
    """Rows by (table, dataset, method), of the parameters that were run last."""
    groups = {}
    for row in rows:
        groups.setdefault((row["table"], row["dataset"], row["method"]), []).append(row)
    for key in sorted(groups, key=_reading_order):
        last = groups[key][-1]["parameters"]
        yield key, [row for row in groups[key] if row["parameters"] == last]


def _reading_order(key):
    table, dataset, method = key
    family = next(i for i, name in enumerate(FAMILIES) if method.startswith(name))
    return table, dataset, family, method


def summarize(rows, paper, left_out=()):
    """Mean and standard deviation over seeds beside the paper's: list of dict."""
    return [
        _summary(*key, group, paper_row(paper, *key))
        for key, group in latest_groups(rows)
        if key[0] not in left_out
    ]


def _summary(table, dataset, method, group, theirs):
    done = [row for row in group if row["status"] == "done"]
    row = {"table": table, "dataset": dataset, "method": method, "n_seeds": len(done)}
    for metric in METRICS:
        mean, std = moments([float(r[metric]) for r in done])
        row |= {f"{metric}_mean": mean, f"{metric}_std": std}
        row |= {f"paper_{metric}_{s}": theirs.get(f"{metric}_{s}", "") for s in ("mean", "std")}
    for name in ("epochs", "seconds", "gini"):
        row[name] = moments([float(r[name]) for r in done if r[name]])[0]
    row["converged"] = sum(r["converged"] == "True" for r in done) if done else ""
    row["n_diverged"] = sum(r["status"] == "diverged" for r in group)
    row["note"] = "" if done else group[-1]["status"]
    names = ("n_samples", "n_features", "n_clusters", "device", "threads", "jobs")
    last = (done or group)[-1]
    return row | {n: last[n] for n in (*names, "deepmix", "torch", "sklearn", "parameters")}


def moments(values):
    """Mean and sample standard deviation, as short strings; empty where there is none."""
    mean = f"{statistics.fmean(values):.4g}" if values else ""
    return mean, f"{statistics.stdev(values):.3g}" if len(values) > 1 else ""


def show(summary):
    """Print a summary: ours, and the paper's figure after a bar."""
    print(f"\n{'':33}{'ARI':^21}{'NMI':^21}{'ACC':^21}{'n':>3}{'epochs':>8}{'s':>9}")
    before = None
    for row in summary:
        if (row["table"], row["dataset"]) != before:
            before = row["table"], row["dataset"]
            print(f"Table {row['table']}, {row['dataset']}")
        if row["note"]:
            print(f"    {row['method']:<29}{row['note']}")
            continue
        cells = "".join(f"{_cell(row, metric):<21}" for metric in METRICS)
        print(
            f"    {row['method']:<29}{cells}{row['n_seeds']:>3}{row['epochs']:>8}"
            f"{float(row['seconds']):>9.1f}"
        )


def _cell(row, metric):
    def pair(mean, std):
        return f"{float(mean):.1f}" + (f"±{float(std):.1f}" if std else "")

    ours = pair(row[f"{metric}_mean"], row[f"{metric}_std"])
    theirs = row[f"paper_{metric}_mean"], row[f"paper_{metric}_std"]
    return f"{ours} | {pair(*theirs)}" if theirs[0] else ours


# --- Model selection -------------------------------------------------------------------


def selection(rows, paper, source, table):
    """ARI of the run that each label-free criterion chooses, of the average and of the best.

    Parameters
    ----------
    rows : list of dict
    paper : dict
        See `published`.
    source, table : str
        Table that the runs belong to, table of the paper to compare with.
    """
    found = []
    for (name, dataset, method), group in latest_groups(rows):
        group = [row for row in group if row["status"] == "done" and row["sparsity"]]
        if name != source or len(group) < 2:
            continue
        theirs = paper.get((table, dataset, method), {})
        row = {"table": table, "dataset": dataset, "method": method, "n_seeds": len(group)}
        for criterion in ("sparsity", "inertia", "gini", "loss"):
            row[criterion] = min(group, key=lambda r, c=criterion: float(r[c] or "inf"))["ari"]
        aris = [float(r["ari"]) for r in group]
        row |= {"average": moments(aris)[0], "best": f"{max(aris):.4g}"}
        columns = {"sparsity": "selected", "average": "ari_mean", "best": "best"}
        row |= {f"paper_{ours}": theirs.get(column, "") for ours, column in columns.items()}
        found.append(row)
    return found


def show_selection(rows):
    print("\nARI of the run of lowest ..., and of all; after a bar the paper's")
    print(f"    {'':29}{'L_sp':<14}{'inertia':<9}{'Gini':<9}{'loss':<9}{'average':<14}{'best':<14}")
    for row in rows:
        shown = {}
        for name in ("sparsity", "inertia", "gini", "loss", "average", "best"):
            theirs = row.get(f"paper_{name}")
            shown[name] = f"{float(row[name]):.1f}" + (f" | {float(theirs):.1f}" if theirs else "")
        print(
            f"    {row['dataset']:<16}{row['method']:<13}{shown['sparsity']:<14}"
            f"{shown['inertia']:<9}{shown['gini']:<9}{shown['loss']:<9}"
            f"{shown['average']:<14}{shown['best']:<14}"
        )


# --- Runtimes --------------------------------------------------------------------------


def runtimes(rows, paper, reference):
    """Seconds per epoch as a ratio to those of ``reference``, repeat by repeat."""
    groups = {key: group for key, group in latest_groups(rows) if key[0] == "2"}
    found = []
    for (table, dataset, method), group in groups.items():
        base = {r["seed"]: _per_epoch(r) for r in groups.get((table, dataset, reference), ())}
        ratios = [_per_epoch(r) / base[r["seed"]] for r in group if r["seed"] in base]
        theirs = [paper.get((table, dataset, m), {}).get("seconds") for m in (method, reference)]
        row = {"table": table, "dataset": dataset, "method": method, "n_repeats": len(group)}
        row["seconds_per_epoch"] = f"{statistics.median(map(_per_epoch, group)):.4g}"
        row["ratio"] = f"{statistics.median(ratios):.3g}" if ratios else ""
        row["ratio_range"] = f"{min(ratios):.3g} to {max(ratios):.3g}" if ratios else ""
        row["paper_ratio"] = f"{float(theirs[0]) / float(theirs[1]):.3g}" if all(theirs) else ""
        found.append(row | {name: group[-1][name] for name in ("device", "threads")})
    return found


def _per_epoch(row):
    return float(row["seconds"]) / float(row["epochs"])


def show_runtimes(rows):
    print("\nSeconds per epoch, and as a ratio to the clustering module's; after a bar the paper's")
    for row in rows:
        print(
            f"    {row['dataset']:<16}{row['method']:<13}{row['seconds_per_epoch']:<10}"
            f"{row['ratio']} ({row['ratio_range']}) | {row['paper_ratio']}"
        )


# --- Claims ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A figure that must lie between bounds, or above other methods on the same rows.

    Attributes
    ----------
    table, dataset, method : str
    low, high : float
        Bounds of the mean over seeds.
    above : tuple of str
        Methods whose mean it must reach at least.
    slack : float
        By so much it may stay below them.
    metric : str
        A column of the runs, or of their details.
    exceptions : int or None
        If given, the bounds are for every seed but so many, not for the mean.
    """

    table: str
    dataset: str
    method: str
    low: float = float("-inf")
    high: float = float("inf")
    above: tuple = ()
    slack: float = 0.0
    metric: str = "ari"
    exceptions: int | None = None

    def verdict(self, groups):
        """A row for the file of verdicts; ``groups`` are those of `latest_groups`."""
        ours = self._figure(groups, self.method)
        others = [self._figure(groups, name) for name in self.above]
        if ours is None or None in others:
            result = "not run"
        else:
            holds = max([self.low, *(other - self.slack for other in others)]) <= ours <= self.high
            result = "holds" if holds else "FAILS"
        return {
            "table": self.table,
            "dataset": self.dataset,
            "method": self.method,
            "metric": self.metric,
            "value": "" if ours is None else ours,
            "required": self._required(others),
            "verdict": result,
        }

    def _figure(self, groups, method):
        group = groups.get((self.table, self.dataset, method), ())
        values = sorted(float(row[self.metric]) for row in group if row.get(self.metric))
        if not values:
            return None
        if self.exceptions is None:
            return float(moments(values)[0])
        worst_first = values if self.low > float("-inf") else values[::-1]
        return worst_first[min(self.exceptions, len(values) - 1)]

    def _required(self, others):
        parts = [f">= {self.low:g}"] if self.low > float("-inf") else []
        parts += [f"<= {self.high:g}"] if self.high < float("inf") else []
        less = f" - {self.slack:g}" if self.slack else ""
        parts += [f">= {name} ({v}){less}" for name, v in zip(self.above, others, strict=True)]
        text = " and ".join(parts)
        if self.exceptions is None:
            return text
        return text + (f" but for {self.exceptions} seed" if self.exceptions else " for every seed")


def verdicts_of(claims, groups):
    """Rows of verdicts; a metric that all claims share names the column of its values."""
    rows = [claim.verdict(groups) for claim in claims]
    if len({row["metric"] for row in rows}) > 1:
        return rows
    named = [{row["metric"] if k == "value" else k: v for k, v in row.items()} for row in rows]
    return [{k: v for k, v in row.items() if k != "metric"} for row in named]


def show_verdicts(claims, verdicts):
    print("\nClaims")
    for claim, row in zip(claims, verdicts, strict=True):
        metric = claim.metric.upper() if claim.metric in METRICS else claim.metric
        value = row.get("value", row.get(claim.metric))
        print(
            f"    {row['verdict']:<9}Table {row['table']}, {row['dataset']}, {row['method']}: "
            f"{metric} {value} {row['required']}"
        )


def with_details(rows, path):
    """Runs with the columns of a file of details that has one row for each."""

    def key(row):
        return tuple(row[name] for name in ("table", "dataset", "method", "seed"))

    details = {key(row): row for row in read_rows(path)}
    return [details.get(key(row), {}) | row for row in rows]


def report(name, options, claims, source=None, table=None, reference=None, details=None):
    """Write and print every table that the runs' file allows.

    Parameters
    ----------
    name : str
        Of the benchmark and its files.
    options : Namespace
    claims : sequence of Claim
    source, table : str or None
        See `selection`; without them there is none.
    reference : str or None
        Method that runtimes are relative to.
    details : str or None
        Name of details with metrics of claims.

    Returns
    -------
    int
        Exit code: 1 if ``--check`` was asked for and a claim, among those on what the options
        select, fails or was not run.
    """
    rows, paper = read_rows(options.out / f"{name}_runs.csv"), published(name)
    if not rows:
        print("no runs")
        return 1
    # Where runtimes are a table of their own it is that of the paper's, Table 2.
    summary = summarize(rows, paper, left_out=("2",) if reference else ())
    chosen = selection(rows, paper, source, table) if source else []
    times = runtimes(rows, paper, reference) if reference else []
    claims = selected(claims, options)
    rows = with_details(rows, options.out / f"{name}_{details}.csv") if details else rows
    verdicts = verdicts_of(claims, dict(latest_groups(rows)))
    files = {"": summary, "_selection": chosen, "_runtime": times, "_verdicts": verdicts}
    for suffix, content in files.items():
        if content:
            write_rows(options.out / f"{name}{suffix}.csv", content)
    for content, printer in ((summary, show), (chosen, show_selection), (times, show_runtimes)):
        if content:
            printer(content)
    show_verdicts(claims, verdicts)
    return int(options.check and any(row["verdict"] != "holds" for row in verdicts))
