"""The page and the plots of `scripts.bench.step`'s tables.

    python -m scripts.bench.step_report docs/bench/step.json [docs/bench/step_million.json …]
        [--curves docs/bench/step_curves.json …] [--note "…"]

Rows of further tables are added to the first one's, whose name the page and the plot take. A peer's row that a run did not come to is shown
as such; a note says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.bench.step_peers import PEERS
from scripts.bench.tables import Row, Table

_STAGES = ("first_pass", "loss", "second_pass", "update")
_COLUMNS = ("case", "method", "pairs/s", "ours is", "tokens/s", "MFU", "peak GiB", "overhead", "graphs", "products", "waited", "")
_FIGURES = (
    *(("tokens_per_s", ",.0f"), ("mfu", ".3f"), ("peak_gib", ".1f"), ("overhead", ".3f")),
    *(("retained", ".0%"), ("products", ".0%"), ("waited", ".2%")),
)


def markdown(tables: Sequence[Table], curves: Sequence[Table] = (), note: str = "", plots: Sequence[str] = ()) -> str:
    """The results as a page; `note` goes in front of the figures, and links to `plots` beside the page."""
    rows = [row for table in tables for row in table.rows]
    found = [_value(table.rows, "8192x8192x8192", "floor", "matmul_tflops") for table in tables]
    rates = [f"{rate:.0f}" for rate in found if rate is not None]
    lines = ["# The whole training step", ""]
    for table in (*tables, *curves):
        lines.append(f"- `{table.command}` at commit {table.commit[:12]}, {table.hardware}; {_versions(table)}.")
    lines += [
        "",
        "BertConfig's defaults with random weights; pairs of MS MARCO's lengths (queries around 9 tokens, passages around 76) from a",
        "token store through the loader's own threads; bf16 autocast, dropout 0.1, AdamW, temperature 0.02. Means over whole steps, waits",
        "included.",
        "MFU: 6 · parameters without embeddings · real tokens over the matmul rate of the same run"
        + (f" ({' and '.join(rates)} TFLOP/s, 8192³ bf16, in the runs' order)." if rates else "."),
        "Overhead: time over the floor's, which encodes every chunk once and pulls given gradients back. Waited: share of the step spent",
        "waiting for data. Every form of ours was checked first: its gradient against fp32, replayed chunks against kept ones, bitwise "
        "(embedding tables aside, whose gradients torch may sum by atomics).",
        *(["", note] if note else []),
        *(["", "Plots: " + ", ".join(f"[{name}]({name})" for name in plots) + "."] if plots else []),
        "",
        *_table_lines(rows),
    ]
    lines += ["", "## Where the time goes, and what was predicted", ""]
    lines += [
        "Milliseconds of the stages of a step of ours, between CUDA events; in parentheses what preflight predicted before step 1.",
        "",
    ]
    lines += ["| case | first pass | loss | 6·b²·d at the matmul rate | second pass | update | peak GiB |", "|---|---|---|---|---|---|---|"]
    for case in dict.fromkeys(row.case for row in rows if row.metric == "first_pass_ms"):
        stages = {name: _with_prediction(rows, case, f"{name}_ms", ",.1f") for name in _STAGES}
        bound = _cell(_value(rows, case, "bigbatch", "loss_bound_ms"), ",.1f")
        peak = _with_prediction(rows, case, "peak_gib", ".1f")
        lines.append(
            f"| {case} | {stages['first_pass']} | {stages['loss']} | {bound} | {stages['second_pass']} | {stages['update']} | {peak} |"
        )
    if curves:
        lines += _curve_lines(curves)
    return "\n".join(lines) + "\n"


def _table_lines(rows: Sequence[Row]) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for case, method in sorted([*_methods(rows), *_missing(rows)], key=lambda key: _queries(key[0])):
        rate, own = _value(rows, case, method, "pairs_per_s"), _value(rows, f"b={_queries(case)}", "bigbatch", "pairs_per_s")
        ratio = own / rate if method in PEERS and own is not None and rate is not None else None
        cells = [_cell(rate, ",.0f"), "" if ratio is None else f"{ratio:.2f}×"]
        cells += [_cell(_value(rows, case, method, metric), style) for metric, style in _FIGURES]
        notes = [row.note for row in rows if (row.case, row.method, row.metric) == (case, method, "pairs_per_s")]
        lines.append("| " + " | ".join([case, method, *cells, "; ".join(dict.fromkeys(notes)) or "not measured"]) + " |")
    return lines


def _missing(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(case, method) of the peers that a run did not come to, at sizes at which it came to one."""
    there = {(row.case, row.method) for row in rows if row.metric == "pairs_per_s"}
    sizes = sorted({_queries(case) for case, method in there if method in PEERS})
    expected = [(f"b={n}" + ",sorted" * by_length, method) for n in sizes for method in PEERS for by_length in (False, True)]
    return [key for key in expected if key not in there]


def _curve_lines(curves: Sequence[Table]) -> list[str]:
    lines = ["", "## Loss curves", ""]
    lines += [
        "The same weights, batches and order, dropout off. Gaps to the padded run; with other chunks only the order of roundings differs.",
        "",
    ]
    lines += ["| on | run | last loss | largest gap | mean gap |", "|---|---|---|---|---|"]
    for table in curves:
        for row in (row for row in table.rows if row.metric == "last_loss"):
            gaps = [_cell(_value(table.rows, row.case, row.method, metric), ".4f") for metric in ("largest_gap", "mean_gap")]
            lines.append(f"| {table.hardware} | {row.method} | {_cell(row.value, '.4f')} | {' | '.join(gaps)} |")
    return lines


def _versions(table: Table) -> str:
    return ", ".join(f"{name} {version}" for name, version in table.versions.items())


def _methods(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(case, method) of every timed or failed row, by batch size, in the order of the run."""
    found = dict.fromkeys((row.case, row.method) for row in rows if row.metric == "pairs_per_s")
    return sorted(found, key=lambda key: _queries(key[0]))


def _queries(case: str) -> int:
    return int(case.split(",")[0].removeprefix("b="))


def _value(rows: Sequence[Row], case: str, method: str, metric: str) -> float | None:
    return next((row.value for row in rows if (row.case, row.method, row.metric) == (case, method, metric)), None)


def _cell(value: float | None, style: str) -> str:
    return "—" if value is None else format(value, style)


def _with_prediction(rows: Sequence[Row], case: str, metric: str, style: str) -> str:
    measured, predicted = (_value(rows, case, "bigbatch", name) for name in (metric, f"predicted_{metric}"))
    return _cell(measured, style) + (f" ({format(predicted, style)})" if predicted is not None else "")


def plot(tables: Sequence[Table], path: Path) -> None:
    """Pairs a second of every method, a panel per batch size."""
    from matplotlib.figure import Figure

    rows = [row for table in tables for row in table.rows]
    timed = [(c, m, v) for c, m in _methods(rows) if (v := _value(rows, c, m, "pairs_per_s")) is not None]
    sizes = sorted({_queries(case) for case, _, _ in timed})
    heights = [sum(_queries(case) == size for case, _, _ in timed) for size in sizes]
    figure = Figure(figsize=(9, 1.2 + 0.34 * sum(heights) + 0.5 * len(sizes)), layout="constrained")
    for size, axes in zip(sizes, figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0], strict=True):
        bars = [(" ".join([m, *c.split(",")[1:]]), v, m) for c, m, v in timed if _queries(c) == size]
        colors = ["#1f5fbf" if m == "bigbatch" else "#7a7a7a" if m == "floor" else "#d08a3a" for _, _, m in bars]
        places = range(len(bars))
        axes.barh(places, [value for _, value, _ in bars], color=colors)
        axes.set_yticks(places, [label for label, _, _ in bars], fontsize=8)
        axes.invert_yaxis()
        for place, (_, value, _) in zip(places, bars, strict=True):
            axes.annotate(f" {value:,.0f}", (value, place), va="center", fontsize=8)
        axes.set_title(f"batch {size:,}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    figure.supxlabel("pairs a second", fontsize=9)
    figure.suptitle(f"One training step, {tables[0].hardware}", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_curves(curves: Table, path: Path) -> None:
    """The losses, and each run's difference to the first."""
    from matplotlib.figure import Figure

    names = [row.method for row in curves.rows if row.metric == "last_loss"]
    losses = {name: [row.value or 0.0 for row in curves.rows if row.metric == "loss" and row.method == name] for name in names}
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        left.plot(losses[name], lw=1.1, label=name)
        right.plot([value - first for value, first in zip(losses[name], losses[names[0]], strict=True)], lw=1.1)
    left.set(xlabel="step", ylabel="loss, nats", yscale="log")
    right.set(xlabel="step", ylabel=f"loss minus that of {names[0]}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.bench.step_report`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--curves", type=Path, nargs="*", default=[])
    parser.add_argument("--note", default="", help="a sentence or two in front of the figures, such as what was left out")
    args = parser.parse_args(arguments)
    tables = [Table.load(path) for path in args.tables]
    curves = [Table.load(path) for path in args.curves]
    plots = [path.with_suffix(".png") for path in (args.tables[0], *args.curves)]
    args.tables[0].with_suffix(".md").write_text(markdown(tables, curves, args.note, [path.name for path in plots]))
    plot(tables, plots[0])
    for table, path in zip(curves, plots[1:], strict=True):
        plot_curves(table, path)


if __name__ == "__main__":
    main()
