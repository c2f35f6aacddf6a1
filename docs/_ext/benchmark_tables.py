"""``.. benchmark-tables:: FOLDER [NAME]``: tables of the CSV files that benchmarks have left.

No figure is typed by hand: the files are read when the pages are built. A benchmark without
results says so, and the build goes on. Rows of single runs (files whose names end as in `RAW`) are
left in their files, and so are the columns of `LEFT_OUT`.
"""

from pathlib import Path

import pandas as pd
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2] / "benchmarks"
RAW = ("_runs", "_curves", "_integrals")
LEFT_OUT = ["parameters", "n_samples", "n_features", "n_clusters", "jobs"]
HEADS = {"n_seeds": "runs", "ari": "ARI", "nmi": "NMI", "acc": "ACC", "sparsity": "L_sp"}

# --- From a file to cells --------------------------------------------------------------


def join_deviations(table):
    """Replace each pair of columns ``NAME_mean`` and ``NAME_std`` by one, ``mean ± std``."""
    joined = {}
    for name in table.columns:
        stem = name.removesuffix("_mean")
        if stem != name and f"{stem}_std" in table:
            pairs = zip(table[name], table[f"{stem}_std"], strict=True)
            joined[stem] = [_pair(mean, std) for mean, std in pairs]
        elif f"{name.removesuffix('_std')}_mean" not in table:
            joined[name] = [_cell(value) for value in table[name]]
    return pd.DataFrame(joined, dtype=object)


def split_constants(table):
    """Take out columns with one value only, and empty ones: table, dict of name to value."""
    if len(table) < 3:
        return table, {}
    constant = {n: table[n].iloc[0] for n in table.columns[1:] if table[n].nunique() == 1}
    table = table.drop(columns=list(constant))
    return table, {name: value for name, value in constant.items() if value}


def _pair(mean, std):
    if pd.isna(mean):
        return ""
    return f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def _cell(value):
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}"


def _head(name):
    name, paper = name.removeprefix("paper_"), name.startswith("paper_")
    return HEADS.get(name, name.replace("_", " ")) + (", paper" if paper else "")


# --- From cells to reStructuredText ----------------------------------------------------


def lines_of_file(path):
    """A file as tables: a summary has one for each table of the paper."""
    where = path.relative_to(ROOT.parent)
    try:
        content = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError):
        return [f"``{where}`` cannot be read.", ""]
    content = content.drop(columns=[name for name in LEFT_OUT if name in content])
    if "table" not in content or "ari_mean" not in content:
        return [f".. rubric:: {_title(path)}", "", *lines_of_table(content, where)]
    lines = []
    for number, part in content.groupby("table", sort=True):
        numbered = str(number).isdigit()
        which = f"Table {number} of the paper" if numbered else str(number)
        lines += [f".. rubric:: {_title(path)}, {which}", ""]
        lines += lines_of_table(part.drop(columns="table"), where)
    return lines


def _title(path):
    quick = " (quick run)" if path.parent.name == "quick" else ""
    words = path.stem.replace("_", " ").capitalize().replace("Aecm", "AECM").replace("Dcan", "DCAN")
    return words.replace("Neural mixture em", "Neural mixture EM") + quick


def lines_of_table(content, where):
    table, constant = split_constants(join_deviations(content))
    facts = "; ".join(f"{_head(name)}: {value}" for name, value in constant.items())
    lines = [f"``{where}``. " + (f"In every row: {facts}." if facts else ""), ""]
    rows, before = table.to_numpy().tolist(), None
    classes = "benchmark"
    if table.columns[0] == "dataset":
        classes += " by-dataset"
        for row in rows:  # the name of a data set once
            row[0], before = ("" if row[0] == before else row[0]), row[0]
    lines += [".. list-table::", "   :header-rows: 1", f"   :class: {classes}", ""]
    for row in [[_head(name) for name in table.columns], *rows]:
        cells = [_escape(cell) for cell in row]
        lines += [f"   {'  -' if i else '* -'} {cell}" for i, cell in enumerate(cells)]
    return [*lines, ""]


def _escape(cell):
    for character in "\\*`|_":
        cell = cell.replace(character, "\\" + character)
    cell = cell.replace("^r", "\\ :sup:`r`").replace("^p", "\\ :sup:`p`")  # KM^r
    return "\\ " + cell


# --- Directive -------------------------------------------------------------------------


class BenchmarkTables(SphinxDirective):
    """Tables of ``benchmarks/FOLDER/results/NAME*.csv``, or of the quick runs beside them."""

    required_arguments = 1
    optional_arguments = 1

    def run(self):
        results = ROOT / self.arguments[0] / "results"
        name = self.arguments[1] if len(self.arguments) > 1 else ""
        self.env.note_reread()
        paths = self._find(results, name) or self._find(results / "quick", name)
        lines = [line for path in paths for line in lines_of_file(path)]
        if not paths:
            where = (results / f"{name}*.csv").relative_to(ROOT.parent)
            lines = [f"*No results yet: there is no* ``{where}``."]
        container = nodes.Element()
        self.state.nested_parse(StringList(lines, "benchmark_tables"), 0, container)
        return container.children

    def _find(self, folder, name):
        return sorted(p for p in folder.glob(f"{name}*.csv") if not p.stem.endswith(RAW))


def setup(app):
    app.add_directive("benchmark-tables", BenchmarkTables)
    return {"parallel_read_safe": True}
