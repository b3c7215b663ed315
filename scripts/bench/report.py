"""The page of every benchmark, and the plot of losses, from its JSON.

    python -m scripts.bench.report docs/bench/*.json

Page and plot go beside the JSON. A section has a line for each case and method that has its first figure, or the reason
why not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retriever.command import command_parser, option, run
from retriever.files import write_text
from scripts.bench.tables import Row, Table, markdown_table

MATMUL = ("8192x8192x8192", "floor", "matmul_tflops")


@dataclass(frozen=True)
class Section:
    """A table of a page: the metrics that are its columns, each with its heading and format; the first one is what rows
    are chosen by.
    """

    title: str
    text: str
    columns: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """What a benchmark's page says besides its figures."""

    title: str
    text: str
    sections: tuple[Section, ...]


_ERRORS = Section(
    "Error against float64",
    "The larger of dQ's and dP's ‖Δ‖/‖reference‖; the loss's relative error.",
    {"gradient_error": ("gradient", ".1e"), "loss_error": ("loss", ".1e")},
)
_TIME = {"forward_backward_ms": ("ms", ",.2f"), "lead": ("Bigbatch is", ".2f")}
PAGES = {
    "loss": Page(
        "The loss alone",
        "Temperature 0.02, bf16 unit vectors, one positive a query. Times are of forward and backward. Share: of the\n"
        "matmul rate of the same run, counting 8·b²·d operations, of which what fits the workspace takes 6, so that\n"
        "shares may exceed 100%. MiB: what a call adds to its inputs at its peak, gradients and cuBLAS's workspaces\n"
        "included. Bigbatch is so many times as fast as the method.",
        (
            Section(
                "",
                "",
                {
                    **_TIME,
                    "share": ("share", ".0%"),
                    "forward_ms": ("forward, ms", ",.2f"),
                    "peak_extra_mb": ("MiB", ",.0f"),
                },
            ),
            _ERRORS,
        ),
    ),
    "ring": Page(
        "The loss over several GPUs",
        "Temperature 0.02, bf16 unit vectors, one positive a query, b over all ranks. Times are of forward and backward\n"
        "on the slowest rank, MiB what a call adds to its inputs, gradients included. Predicted: by\n"
        "`retriever/parallel/cost.py` at that commit. Exposed: (time − time with local copies in place of transfers) /\n"
        "time.",
        (
            Section(
                "",
                "",
                {
                    **_TIME,
                    "predicted_ms": ("predicted", ",.1f"),
                    "mb_per_rank": ("MiB per rank", ",.0f"),
                    "predicted_mb": ("predicted", ",.0f"),
                    "exposed_share": ("exposed", ".1%"),
                },
            ),
            _ERRORS,
        ),
    ),
    "step": Page(
        "The whole training step",
        "BERT of random weights; pairs of MS MARCO's lengths (queries around 9 tokens, passages around 76) from a token\n"
        "store through the loader's own threads; bf16 autocast, AdamW, temperature 0.02. Ours: means over whole steps,\n"
        "waits included; others: the fastest step. MFU: 6 · parameters without embeddings · real tokens over the matmul\n"
        "rate of the same run. In parentheses: what preflight predicted.\n"
        "The floor encodes every chunk once and pulls given gradients back. Graphs, products: share\n"
        "of the tokens whose chunks keep them. Waited: share of the step spent waiting for data. Bigbatch is so many\n"
        "times as fast as the method, at its best. Every form of ours was checked first: its gradient against fp32,\n"
        "replayed chunks against kept ones, bitwise (embedding tables aside, whose gradients torch may sum by atomics).",
        (
            Section(
                "",
                "",
                {
                    "pairs_per_s": ("pairs/s", ",.0f"),
                    "lead": ("Bigbatch is", ".2f"),
                    "tokens_per_s": ("tokens/s", ",.0f"),
                    "mfu": ("MFU", ".3f"),
                    "peak_gib": ("peak GiB", ".1f"),
                    "retained": ("graphs", ".0%"),
                    "products": ("products", ".0%"),
                    "waited": ("waited", ".2%"),
                },
            ),
        ),
    ),
    "encode": Page(
        "Encoding a corpus",
        "BERT-base, random weights, bf16; passages of 76 tokens on average. From token ids to embeddings in host memory\n"
        "(ids), or from text to shards on disk (text; sentence-transformers: to host memory). Cosine: the worst passage\n"
        "of a sample against the padded fp32 encoder. Padded attention goes without cuDNN, which builds a plan for every\n"
        "new shape.",
        (
            Section(
                "",
                "",
                {
                    "passages_per_s": ("passages/s", ",.0f"),
                    "lead": ("Bigbatch is", ".2f"),
                    "peak_gib": ("peak GiB", ".1f"),
                },
            ),
            Section("Exactness", "", {"cosine_min": ("worst cosine", ".6f")}),
        ),
    ),
}


def markdown(table: Table) -> str:
    """The page of a table."""
    kind = _kind(table)
    page = PAGES.get(kind, Page(kind.capitalize(), "", ()))
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    rate = table.get(*MATMUL)
    lines = [f"# {page.title}", "", f"`{table.command}` at commit {table.commit[:12]}, {table.hardware}; {versions}."]
    for text in (page.text, "" if rate is None else f"Matmul rate: {rate:.0f} TFLOP/s, 8192³ in bf16.", table.note):
        lines += ["", text] if text else []
    for section in page.sections:
        if found := _lines(table, section):
            lines += [
                "",
                *([f"## {section.title}", ""] if section.title else []),
                *([section.text, ""] if section.text else []),
                found,
            ]
    if not page.sections:
        for case in dict.fromkeys(row.case for row in table.rows):
            rows = [[row.method, row.metric, _number(row), row.note] for row in table.rows if row.case == case]
            lines += ["", f"## {case}", "", markdown_table(["method", "figure", "value", ""], rows)]
    return "\n".join(lines) + "\n"


def _lines(table: Table, section: Section) -> str:
    first = next(iter(section.columns))
    keys = sorted(
        dict.fromkeys((row.case, row.method) for row in table.rows if row.metric == first),
        key=lambda key: _size(key[0]),
    )
    shown = {
        metric: form
        for metric, form in section.columns.items()
        if any(_value(table, *key, metric) is not None for key in keys)
    }
    rows = []
    for case, method in keys:
        cells = [_cell(table, case, method, metric, style) for metric, (_, style) in shown.items()]
        notes = dict.fromkeys(
            r.note
            for r in table.rows
            if (r.case, r.method) == (case, method) and r.metric in section.columns and r.note
        )
        rows.append([case, method, *cells, "; ".join(notes)])
    return markdown_table(["case", "method", *(name for name, _ in shown.values()), ""], rows) if shown else ""


def _cell(table: Table, case: str, method: str, metric: str, style: str) -> str:
    value, predicted = _value(table, case, method, metric), table.get(case, method, f"predicted_{metric}")
    if value is None:
        return "—"
    return (
        format(value, style)
        + ("×" if metric == "lead" else "")
        + (f" ({predicted:{style}})" if predicted is not None else "")
    )


def _value(table: Table, case: str, method: str, metric: str) -> float | None:
    """A figure, or one that follows from others: the share of the matmul rate, and how many times as fast the best of
    ours is.
    """
    ms, rate = table.get(case, method, "forward_backward_ms"), table.get(*MATMUL)
    if metric == "share":
        dim = re.search(r"--dim (\d+)", table.command)
        return (
            None if ms is None or rate is None else 8 * _size(case) ** 2 * int(dim[1] if dim else 768) / ms / 1e9 / rate
        )
    if metric != "lead":
        return table.get(case, method, metric)
    others = {"forward_backward_ms": min, "pairs_per_s": max, "passages_per_s": max}
    for name, best in others.items():
        value = table.get(case, method, name)
        ours = [
            r.value
            for r in table.rows
            if r.method == "bigbatch" and r.metric == name and _group(r.case) == _group(case) and r.value
        ]
        if value and ours and method != "bigbatch":
            return value / best(ours) if best is min else best(ours) / value
    return None


def _group(case: str) -> str:
    """What rows have in common that may be compared: the batch, or whether it was encoded from text or ids."""
    parts = case.split(",")
    return parts[0] if parts[0].startswith("b=") else parts[-1]


def _size(case: str) -> int:
    """Pairs in the batch."""
    found = re.match(r"b=(\d+)", case)
    return int(found[1]) if found else 0


def _number(row: Row) -> str:
    return "not measured" if row.value is None else f"{row.value:.4g} {row.unit}".strip()


def _kind(table: Table) -> str:
    """The benchmark that made a table."""
    found = re.search(r"scripts\.bench\.(\w+)", table.command)
    return found[1] if found else "benchmark"


def plot(table: Table, path: Path) -> None:
    """Time and memory of losses against the batch, both axes logarithmic."""
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


def _report(args: argparse.Namespace) -> None:
    for path in args.tables:
        table = Table.load(path)
        write_text(path.with_suffix(".md"), markdown(table))
        if path.stem in ("loss", "ring"):
            plot(table, path.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.bench.report`."""
    tables = option("tables", type=Path, nargs="+", help="JSON files of the benchmarks")
    return run(command_parser("python -m scripts.bench.report", __doc__, tables), arguments, _report)


if __name__ == "__main__":
    sys.exit(main())
