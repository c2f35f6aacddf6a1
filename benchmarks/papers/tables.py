"""From runs to tables: means beside the paper's figures, model selection, runtimes."""

import statistics

from runs import is_undated

METRICS = ("ari", "nmi", "acc")
# Tables of the paper in which a table here looks for figures: baselines are in Table 1 only.
FALLBACK = {"5": ("5", "1")}
# Beginnings of the methods' names, in the order of the tables; the last one fits every name.
FAMILIES = ("KM", "iGMM", "GMM", "AE+KM", "CM", "AE-CM", "")
# Columns of a summary that are written but not printed: they say where it comes from.
HIDDEN = (
    *("n_samples", "n_features", "n_clusters", "device", "threads", "jobs"),
    *("deepmix", "torch", "sklearn", "parameters"),
)


def paper_row(paper, table, dataset, method):
    """The paper's figures for the set that ``dataset`` begins with ('mnist 14x14'): dict."""
    dataset = dataset.split()[0]
    candidates = [(name, dataset, method) for name in FALLBACK.get(table, (table,))]
    return next((paper[key] for key in candidates if key in paper), {})


# --- Summary ---------------------------------------------------------------------------


def latest_groups(rows):
    """Rows by (table, dataset, method), for each start those that `_latest` leaves."""
    groups = {}
    for row in rows:
        starts = groups.setdefault((row["table"], row["dataset"], row["method"]), {})
        starts.setdefault(row["start"], []).append(row)
    for key in sorted(groups, key=_reading_order):
        yield key, [row for group in groups[key].values() for row in _latest(group)]


def _latest(rows):
    """Rows of the parameters that were run last, and undated ones of seeds that these lack."""
    last = rows[-1]["parameters"]
    undated = {row["seed"]: row for row in rows if is_undated(row)}
    return (undated | {row["seed"]: row for row in rows if row["parameters"] == last}).values()


def _reading_order(key):
    table, dataset, method = key
    family = next(i for i, name in enumerate(FAMILIES) if method.startswith(name))
    stem, _, start = method.partition(" K_init=")
    return table, dataset, family, stem, int(start or 0)


def summarize(
    rows, paper, metrics=METRICS, means=("epochs", "seconds", "gini"), firsts=(), aliases=None
):
    """Mean and standard deviation over seeds beside the paper's: list of dict.

    Parameters
    ----------
    rows : list of dict
        Rows of the runs' file.
    paper : dict
        Figures of the paper: (table, dataset, method) to a row.
    metrics : tuple of str
        Columns with a mean and a deviation, and the paper's.
    means : tuple of str
        Columns with a mean.
    firsts : tuple of str
        Columns of which the value of the first seed is shown.
    aliases : dict or None
        Names of methods in the paper's table, where these differ: dict of str to str.
    """
    summary = []
    for (table, dataset, method), group in latest_groups(rows):
        theirs = paper_row(paper, table, dataset, (aliases or {}).get(method, method))
        done = [row for row in group if row["status"] == "done"]
        row = {"table": table, "dataset": dataset, "method": method, "n_seeds": len(done)}
        for metric in metrics:
            mean, std = moments([float(r[metric]) for r in done])
            row |= {f"{metric}_mean": mean, f"{metric}_std": std}
            row |= {f"paper_{metric}_{s}": theirs.get(f"{metric}_{s}", "") for s in ("mean", "std")}
        row |= {name: moments([float(r[name]) for r in done if r[name]])[0] for name in means}
        row |= {name: done[0].get(name, "") if done else "" for name in firsts}
        ends = [r["converged"] for r in done if r["converged"]]
        row["converged"] = ends.count("True") if ends else ""
        row["n_diverged"] = sum(r["status"] == "diverged" for r in group)
        row["note"] = "" if done else group[-1]["status"]
        last = (done or group)[-1]
        summary.append(row | {name: last[name] for name in HIDDEN})
    return summary


def moments(values):
    """Mean and sample standard deviation, as short strings; empty where there is none."""
    mean = f"{statistics.fmean(values):.4g}" if values else ""
    return mean, f"{statistics.stdev(values):.3g}" if len(values) > 1 else ""


# --- Further tables --------------------------------------------------------------------


def selection(rows, paper, source, table):
    """ARI of the run that each label-free criterion chooses, of the average and of the best.

    Parameters
    ----------
    rows, paper
        See `summarize`.
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


def runtimes(rows, paper, table, reference):
    """Seconds per epoch as a ratio to those of the method ``reference``, repeat by repeat."""
    groups = {key: group for key, group in latest_groups(rows) if key[0] == table}
    found = []
    for (_, dataset, method), group in groups.items():
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


# --- Printing --------------------------------------------------------------------------


def show(title, rows):
    """Print rows as a table, ``mean±deviation | paper's``, one block for each data set."""
    print(f"\n{title}; after a bar the paper's")
    names = [n for n in rows[0] if not n.startswith("paper_") and not n.endswith("_std")]
    names = [n for n in names if n not in HIDDEN and any(r[n] not in ("", 0) for r in rows)]
    body = [[_cell(row, name) for name in names] for row in rows]
    head = [name.removesuffix("_mean") for name in names]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    for cells in (head, *body):
        line = "  ".join(f"{cell:<{n}}" for cell, n in zip(cells, widths, strict=True))
        print("    " + line.rstrip())


def _cell(row, name):
    stem = name.removesuffix("_mean")
    ours = _pair(row, name, f"{stem}_std")
    theirs = _pair(row, f"paper_{name}", f"paper_{stem}_std")
    return f"{ours} | {theirs}" if theirs else ours


def _pair(row, mean, deviation):
    return str(row.get(mean, "")) + (f"±{row[deviation]}" if row.get(deviation) else "")
