"""Makes the page of every benchmark from its JSON, and the plot of the losses.

    python -m scripts.bench.report docs/bench/*.json

Page and plot are written beside the JSON. A table has one line for each case and method that has the table's first
figure, or the reason why it has none.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from retriever.command import command, option
from retriever.files import write_text
from scripts.bench.pages import PAGES, Columns, Page
from scripts.bench.tables import Row, Table

MATMUL = ("8192x8192x8192", "floor", "matmul_tflops")
_LEADS = ("forward_backward_ms", "pairs_per_s", "passages_per_s")


Figures = dict[tuple[str, str, str], float]  # (case, method, metric) -> value


def markdown(table: Table) -> str:
    """The page of a table."""
    kind = _kind(table)
    page, rate = PAGES.get(kind, Page(kind.capitalize(), "", {})), table.get(*MATMUL)
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    blocks = [
        f"# {page.title}",
        f"`{table.command}` at commit {table.commit[:12]}, {table.hardware}; {versions}.",
        page.text,
        "" if rate is None else f"Matmul rate: {rate:.0f} TFLOP/s, 8192³ in bf16.",
        table.note,
    ]
    figures = _figures(table)
    for above, columns in page.tables.items():
        if rows := _rows(table, figures, columns):
            blocks += [above, markdown_table(rows)]
    for case in dict.fromkeys(row.case for row in table.rows) if not page.tables else ():
        rows = [[row.method, row.metric, _number(row), row.note] for row in table.rows if row.case == case]
        blocks += [f"## {case}", markdown_table([["method", "figure", "value", ""], *rows])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest))


def _figures(table: Table) -> Figures:
    """All measured figures, and two derived from them: the share of the matmul rate, and how many times as fast the
    best Bigbatch method is.
    """
    found = {(r.case, r.method, r.metric): r.value for r in reversed(table.rows) if r.value is not None}
    rate, dim = table.get(*MATMUL), re.search(r"--dim (\d+)", table.command)
    lead: Figures = {}
    for (case, method, metric), value in found.items():
        if metric == "forward_backward_ms" and rate is not None:
            operations = 8 * _size(case) ** 2 * int(dim[1] if dim else 768)
            lead[case, method, "share"] = operations / value / 1e9 / rate
        if metric in _LEADS and method != "bigbatch":
            ours = [
                other
                for (at, name, what), other in found.items()
                if (name, what, _group(at)) == ("bigbatch", metric, _group(case))
            ]
            if ours:
                lead[case, method, "lead"] = value / min(ours) if metric.endswith("_ms") else max(ours) / value
    return found | lead


def _rows(table: Table, figures: Figures, columns: Columns) -> list[list[str]]:
    """The rows of one table of the page, its head first."""
    first = next(iter(columns))
    keys = dict.fromkeys((row.case, row.method) for row in table.rows if row.metric == first)
    shown = {name: form for name, form in columns.items() if any((*key, name) in figures for key in keys)}
    rows = [["case", "method", *(heading for heading, _ in shown.values()), ""]]
    for key in sorted(keys, key=lambda key: _size(key[0])):
        of_key = [row for row in table.rows if (row.case, row.method) == key and row.metric in columns]
        notes = dict.fromkeys(row.note for row in of_key if row.note)
        rows.append([*key, *(_cell(figures, key, name, form[1]) for name, form in shown.items()), "; ".join(notes)])
    return rows if shown else []


def _cell(figures: Figures, key: tuple[str, str], metric: str, style: str) -> str:
    if (*key, metric) not in figures:
        return "—"
    predicted = figures.get((*key, f"predicted_{metric}"))
    return style.format(figures[*key, metric]) + (f" ({style.format(predicted)})" if predicted is not None else "")


def _group(case: str) -> str:
    """The key of comparable cases: the batch size, or whether texts or ids are encoded."""
    parts = case.split(",")
    return parts[0] if parts[0].startswith("b=") else parts[-1]


def _size(case: str) -> int:
    """The number of pairs in the batch; 0 if the case names none."""
    found = re.match(r"b=(\d+)", case)
    return int(found[1]) if found else 0


def _number(row: Row) -> str:
    return "not measured" if row.value is None else f"{row.value:.4g} {row.unit}".strip()


def _kind(table: Table) -> str:
    """The benchmark that made a table."""
    found = re.search(r"scripts\.bench\.(\w+)", table.command)
    return found[1] if found else "benchmark"


def plot(table: Table, path: Path) -> None:
    """Plots time and memory of the losses against the batch size, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    memory = "mb_per_rank" if _kind(table) == "ring" else "peak_extra_mb"
    for panel, metric, label in zip(
        panels, ("forward_backward_ms", memory), ("forward + backward, ms", "extra memory, MiB"), strict=True
    ):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in table.rows:
            condition = ",".join(part for part in row.case.split(",")[1:] if not part.startswith("W="))
            if row.metric == metric and row.value is not None and "W=1" not in row.case:
                lines.setdefault(f"{row.method} {condition}".strip(), []).append((_size(row.case), row.value))
        for name, points in lines.items():
            ours = name.startswith("bigbatch")
            panel.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                ms=4,
                lw=2.6 if ours else 1.3,
                ls="-" if ours else "--",
                label=name,
            )
        panel.set(xscale="log", yscale="log", xlabel="pairs in the batch", ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    figure.suptitle(f"InfoNCE over in-batch negatives, {table.hardware}")
    figure.savefig(path, dpi=150)


@command(
    "python -m scripts.bench.report",
    __doc__,
    option("tables", type=Path, nargs="+", help="JSON files of the benchmarks"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.report`."""
    for path in args.tables:
        table = Table.load(path)
        write_text(path.with_suffix(".md"), markdown(table))
        if path.stem in ("loss", "ring"):
            plot(table, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
