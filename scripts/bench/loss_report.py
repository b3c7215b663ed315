"""The table and the plot of `docs/bench/loss.json`: python -m scripts.bench.loss_report docs/bench/loss.json"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.bench.tables import Table

_SIZES = (16384, 65536, 131072)


def _variants(table: Table) -> list[tuple[str, str]]:
    """(method, condition) of every timed or failed variant, in the order of the run."""
    found: dict[tuple[str, str], None] = {}
    for row in table.rows:
        if (
            row.metric in ("forward_backward_ms", "gradient_error")
            and row.method != "floor"
            and ",t=" not in row.case
            and row.case != "b=1048576"
        ):
            found[row.method, ",".join(row.case.split(",")[1:])] = None
    return list(found)


def _case(b: int, condition: str) -> str:
    return f"b={b}" + (f",{condition}" if condition else "")


def markdown(table: Table, dim: int = 768) -> str:
    """The result as a page."""
    rate = table.get("8192x8192x8192", "floor", "matmul_tflops") or float("nan")
    lines = [
        "# The loss alone",
        "",
        f"`{table.command}` at commit {table.commit[:12]}, {table.hardware}; "
        + ", ".join(f"{name} {version}" for name, version in table.versions.items())
        + ".",
        "",
        f"d={dim}, temperature 0.02, bf16 unit vectors, one positive a query. Forward + backward in ms; in parentheses the share of the",
        f"matmul rate of the same run ({rate:.0f} TFLOP/s, 8192³ bf16) counting 8·b²·d operations, of which",
        "what fits the workspace takes 6: shares may exceed 100%. Calls are queued one after the other.",
        "MiB: what a call adds to its inputs at its peak, gradients and cuBLAS workspaces included. Error: the larger of dQ's and dP's",
        "‖Δ‖/‖reference‖ against float64 at b=4,096.",
        "",
        "| method | "
        + " | ".join(f"b={b:,}" for b in _SIZES)
        + " | forward alone, b=65,536 | MiB, b=65,536 | gradient error | loss error | |",
        "|---|" + "---|" * (len(_SIZES) + 5),
    ]
    for method, condition in _variants(table):
        cells = [f"{method} {condition}".strip()]
        for b in _SIZES:
            ms = table.get(_case(b, condition), method, "forward_backward_ms")
            cells.append("—" if ms is None else f"{ms:.2f} ({8 * b * b * dim / ms / 1e9 / rate:.0%})")
        forward = table.get(_case(65536, condition), method, "forward_ms")
        cells.append("—" if forward is None else f"{forward:.2f} ({2 * 65536**2 * dim / forward / 1e9 / rate:.0%} of 2·b²·d)")
        mib = table.get(_case(65536, condition), method, "peak_extra_mb")
        cells.append("—" if mib is None else f"{mib:,.0f}")
        for metric in ("gradient_error", "loss_error"):
            error = table.get(_case(4096, condition), method, metric)
            cells.append("—" if error is None else f"{error:.1e}")
        notes = [r.note for r in table.rows if r.method == method and r.case in {_case(b, condition) for b in (4096, *_SIZES)} and r.note]
        lines.append("| " + " | ".join([*cells, "; ".join(dict.fromkeys(notes))]) + " |")
    million = table.get("b=1048576", "bigbatch", "forward_backward_ms")
    if million is not None:
        mib = table.get("b=1048576", "bigbatch", "peak_extra_mb")
        lines += ["", f"b=1,048,576 on one GPU in one call: {million / 1000:.2f} s, {mib:,.0f} MiB (6,144 of them the fp32 gradients)."]
    lines += [
        "",
        "## Error against float64",
        "",
        "| b | temperature | embeddings | tier | gradient error | loss error | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        if row.metric == "gradient_error" and ",t=" in row.case:
            size, temperature, kind, tier = row.case.split(",")
            loss_error = table.get(row.case, row.method, "loss_error")
            lines.append(f"| {int(size[2:]):,} | {temperature[2:]} | {kind} | {tier} | {row.value:.1e} | {loss_error:.1e} | {row.note} |")
    return "\n".join(lines) + "\n"


def plot(table: Table, path: Path) -> None:
    """Time and memory against the batch size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for metric, panel, label in zip(
        ("forward_backward_ms", "peak_extra_mb"), panels, ("forward + backward, ms", "extra memory, MiB"), strict=True
    ):
        for method, condition in _variants(table):
            if method == "bigbatch" and condition in ("symmetric", "known=1", "high"):
                continue
            points = [
                (int(r.case.split(",")[0][2:]), r.value)
                for r in table.rows
                if r.method == method
                and r.metric == metric
                and r.value is not None
                and r.case == _case(int(r.case.split(",")[0][2:]), condition)
            ]
            points = [point for point in points if point[0] < 2**20]
            if points:
                ours = method == "bigbatch"
                panel.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, lw=2.6 if ours else 1.3, ls="-" if ours else "--",
                           label=f"{method} {condition}".strip(), zorder=3 if ours else 2)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="batch size (pairs)", ylabel=label)
        panel.set_xticks([16384, 32768, 65536, 131072], ["16k", "32k", "64k", "128k"], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    figure.suptitle(f"InfoNCE over in-batch negatives, d=768, {table.hardware}")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    args = parser.parse_args()
    table = Table.load(args.table)
    args.table.with_suffix(".md").write_text(markdown(table))
    plot(table, args.table.with_suffix(".png"))


if __name__ == "__main__":
    main()
