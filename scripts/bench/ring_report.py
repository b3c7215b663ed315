"""The tables and the plot of `docs/bench/ring.json`: python -m scripts.bench.ring_report docs/bench/ring.json"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from retriever.parallel.cost import Machine, Workload, gather_cost, hiding_queries, ring_cost
from scripts.bench.tables import Row, Table

_HEAD = 3  # lines of a table without a row
_ABLATION = {"neither": "dense", "cross-GPU": "bigbatch", "both": "bigbatch"}


def place(row: Row) -> tuple[int, int, str]:
    """(global batch, ranks, condition) of a row's case, such as `b=131072,W=2,ring`."""
    b, ranks, *condition = row.case.split(",")
    return int(b.removeprefix("b=")), int(ranks.removeprefix("W=")), ",".join(condition)


def _figure(table: Table, row: Row, metric: str, form: str = ",.1f") -> str:
    """Another metric of the same case and method, formatted; a dash where there is none."""
    value = table.get(row.case, row.method, metric)
    return "—" if value is None else format(value, form)


def _lines(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(head)
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def _measured(table: Table) -> list[Row]:
    """A row for each timed case of several ranks, without the ablation."""
    timed = [row for row in table.rows if row.metric == "forward_backward_ms"]
    return [row for row in timed if place(row)[1] > 1 and place(row)[2] not in _ABLATION]


def methods(table: Table) -> list[str]:
    """Time, memory and error of every method at every size."""
    sizes = sorted({place(row)[0] for row in _measured(table) if row.value is not None})
    checked = [row for row in table.rows if row.metric == "gradient_error"]  # a method that does not run has a row that says why
    variants = dict.fromkeys((row.method, place(row)[2], place(row)[1]) for row in (*checked, *_measured(table)))
    rows = []
    for method, condition, ranks in variants:
        cells = [f"{method} {condition}".strip()]
        for b in sizes:
            case = f"b={b},W={ranks}" + (f",{condition}" if condition else "")
            ms, mib = (table.get(case, method, metric) for metric in ("forward_backward_ms", "mb_per_rank"))
            cells.append("—" if ms is None else f"{ms:,.1f}" + ("" if mib is None else f" ({mib:,.0f})"))
        errors = {r.metric: r for r in table.rows if r.method == method and r.metric.endswith("_error") and place(r)[2] == condition}
        for metric in ("gradient_error", "loss_error"):
            found = errors.get(metric)
            cells.append("—" if found is None or found.value is None else f"{found.value:.1e}")
        own = [r for r in table.rows if r.method == method and place(r)[2] == condition and r.metric != "with_transfers_ms"]
        notes = [r.note for r in own if r.note not in ("", "one call")]
        rows.append([*cells, "; ".join(dict.fromkeys(notes))])
    return _lines(["method", *(f"b={b:,}" for b in sizes), "gradient error", "loss error", ""], rows)


def model(table: Table) -> list[str]:
    """What the cost model says beside what was measured, and the share of exposed transfers."""
    rows = []
    for row in _measured(table):
        if row.value is None or all(table.get(row.case, row.method, metric) is None for metric in ("predicted_ms", "exposed_share")):
            continue
        b, _, condition = place(row)
        share = _figure(table, row, "exposed_share", ".1%")
        memory = [_figure(table, row, metric, ",.0f") for metric in ("mb_per_rank", "predicted_mb")]
        rows.append([condition, f"{b:,}", f"{row.value:,.1f}", _figure(table, row, "predicted_ms"), *memory, share])
    return _lines(["exchange", "b", "ms", "predicted", "MiB per rank", "predicted", "transfers exposed"], rows)


def ablation(table: Table) -> list[str]:
    """Neither tiling, that over ranks, both."""
    rows = []
    for row in table.rows:
        b, _, condition = place(row)
        if row.metric != "loss" or condition not in _ABLATION or row.value is None:
            continue
        figures = [_figure(table, row, name, form) for name, form in (("forward_backward_ms", ",.1f"), ("mb_per_rank", ",.0f"))]
        rows.append([f"{b:,}", condition, row.note, *figures, f"{row.value:.6f}", _figure(table, row, "loss_difference", ".1e")])
    return _lines(["b", "tiling", "", "ms", "MiB per rank", "loss", "relative difference"], rows)


def _sentences(table: Table) -> list[str]:
    """What the tables do not hold: the rate beside one GPU's, and the single call over the largest batch."""
    found = []
    for row in table.rows:
        b, ranks, condition = place(row)
        if row.metric == "scaling" and row.value is not None:
            found.append(f"{condition}, b={b:,}: {row.value:.1%} of {ranks} times the rate of one of these GPUs by itself.")
        if row.metric == "forward_backward_ms" and row.note == "one call" and row.value is not None:
            mib = _figure(table, row, "mb_per_rank", ",.0f")
            found.append(f"b={b:,} in one call by the {condition}: {row.value / 1000:.1f} s, {mib} MiB per rank.")
    return ["- " + sentence for sentence in found]


def markdown(table: Table, dim: int = 768) -> str:
    """The result as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    lines = [
        "# The loss over several GPUs",
        "",
        f"`{table.command}` at commit {table.commit[:12]}, {table.hardware}; {versions}.",
        "",
        f"d={dim}, temperature 0.02, bf16 unit vectors, one positive a query, b over all ranks. Forward + backward in ms, of the slowest",
        "rank; in parentheses MiB that a call adds to its inputs, gradients included. Error: the larger of dQ's and dP's ‖Δ‖/‖reference‖",
        "against float64 at a small batch.",
        "",
        *methods(table),
        *_section(
            "The cost model",
            "`retriever/parallel/cost.py`, with its defaults at that commit. Exposed: (time − time with local copies in place of\n"
            "transfers) / time.",
            model(table),
        ),
        *_section(
            "Which tiling does what",
            "In fp32, so that losses can be compared; the relative difference is to the first line of each batch.",
            ablation(table),
        ),
        *_sentences(table),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(title: str, text: str, table: list[str]) -> list[str]:
    """A part of the page, left out where its table has no row."""
    return [f"## {title}", "", text, "", *table] if len(table) > _HEAD else []


def forecast(dim: int = 768) -> list[str]:
    """One call of the loss on clusters that nobody has measured, by the cost model with its defaults; one passage a query."""
    rows = []
    for b, ranks in ((2**16, 8), (2**20, 8), (2**20, 64), (2**22, 64), (2**24, 128), (2**24, 1024)):
        work, machine = Workload(b, b, dim, ranks), Machine()
        gather, ring = gather_cost(work, machine), ring_cost(work, machine)
        cells = [f"{cost.total_ms:,.0f} ms, {cost.mib:,.0f} MiB" for cost in (gather, ring)]
        rows.append([f"{b:,}", f"{ranks:,}", *cells, f"{ring.exposed_ms / ring.total_ms:.0%}", f"{hiding_queries(machine, ranks):,}"])
    return _lines(["b", "GPUs", "gather", "ring", "ring's transfers exposed", "hidden from b ="], rows)


def plot(table: Table, path: Path) -> None:
    """Time and memory against the global batch, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    labels = {"forward_backward_ms": "forward + backward, ms", "mb_per_rank": "extra memory per rank, MiB"}
    for (metric, label), panel in zip(labels.items(), panels, strict=True):
        variants: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in _measured(table):
            value = table.get(row.case, row.method, metric)
            if value is not None:
                variants.setdefault((row.method, place(row)[2]), []).append((place(row)[0], value))
        for (method, condition), points in variants.items():
            style = {"lw": 2.6, "ls": "-"} if method == "bigbatch" else {"lw": 1.3, "ls": "--"}
            panel.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, label=f"{method} {condition}".strip(), **style)
        panel.set(xscale="log", yscale="log", xlabel="global batch size (pairs)", ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    figure.suptitle(f"InfoNCE over in-batch negatives of all ranks, {table.hardware}")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, nargs="?", default=Path("docs/bench/ring.json"))
    parser.add_argument("--forecast", action="store_true", help="only print what the cost model says of larger clusters")
    args = parser.parse_args()
    if args.forecast:
        print("\n".join(forecast()))
        return
    table = Table.load(args.table)
    args.table.with_suffix(".md").write_text(markdown(table))
    plot(table, args.table.with_suffix(".png"))


if __name__ == "__main__":
    main()
