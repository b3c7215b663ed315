"""The page of `docs/bench/offload.json`: python -m scripts.bench.offload_report docs/bench/offload.json"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.bench.tables import Row, Table

METHOD, COPY_CASE, RATE_CASE = "bigbatch", "256 MiB", "8192x8192x8192"


def _place(row: Row) -> tuple[int, str]:
    """(pairs, where their rows are) of a case such as `b=262144,offload`."""
    b, _, condition = row.case.partition(",")
    return int(b.removeprefix("b=")), "offloaded" if condition else "resident"


def _figure(table: Table, row: Row, metric: str, form: str = ",.0f") -> str:
    """Another metric of the same case, formatted; a dash where there is none."""
    value = table.get(row.case, METHOD, metric)
    return "—" if value is None else format(value, form)


def _lines(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def _cost(table: Table, dim: int) -> list[str]:
    """Time and memory of every size."""
    rows = []
    for row in table.rows:
        if row.metric != "forward_backward_ms":
            continue
        b, place = _place(row)
        rate = "—" if row.value is None else f"{8 * b * b * dim / row.value / 1e9:,.0f}"
        memory = [_figure(table, row, metric) for metric in ("peak_extra_mb", "gpu_mb", "host_mb")]
        times = [_figure(table, row, metric, ",.1f") for metric in ("forward_backward_ms", "rounding_ms", "copies_ms")]
        rows.append([f"{b:,}", place, times[0], rate, *memory, *times[1:], row.note])
    places = ("on the GPU, added", "in all", "on the host")
    return _lines(("b", "rows", "ms", "TFLOP/s", *places, "rounding, ms", "copies, ms", ""), rows)


def _errors(table: Table) -> list[str]:
    """How far gradients and losses are from float64, and those of offloaded rows from those of resident ones."""
    rows = []
    for row in table.rows:
        name, _, kind = row.metric.partition("_")
        if name == "gradient":
            b, place = _place(row)
            figures = [_figure(table, row, f"{side}_{kind}", ".1e") for side in ("gradient", "loss")]
            rows.append([f"{b:,}", place, "float64" if kind == "error" else "resident rows", *figures])
    return _lines(("b", "rows", "against", "gradient", "loss"), rows)


def _rates(table: Table) -> list[str]:
    """What this machine copies and multiplies."""
    there, back = (table.get(COPY_CASE, "copy", metric) for metric in ("to_device_gb_s", "to_host_gb_s"))
    product = table.get(RATE_CASE, "floor", "matmul_tflops")
    if there is None or back is None or product is None:
        return []
    copies = f"Page-locked copies of 256 MiB: {there:.1f} GB/s to the GPU, {back:.1f} GB/s from it, one direction at a time."
    return [f"{copies} A product of 8192³ in bf16: {product:.0f} TFLOP/s."]


def markdown(table: Table, dim: int = 768) -> str:
    """The result as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    lines = [
        "# The loss over representations in host memory",
        "",
        f"`{table.command}` at commit {table.commit[:12]}, {table.hardware}; {versions}.",
        "",
        f"d={dim}, temperature 0.02, float32 unit vectors, bf16 tier, one positive a query, one GPU; a workspace of 1,024 MiB, and blocks",
        "of 32,768 offloaded rows, where the command names no others. Forward + backward in ms, known pairs looked up as in training, the",
        "median of single calls; TFLOP/s counting 8·b²·d operations, of which resident rows that fit the workspace take 6. Memory in MiB:",
        "what a call adds on the GPU, gradients included where they are there; this with the representations, where these are; on the",
        "host, calculated, representations and gradients included. Rounding is the host's part before the first block, timed by itself.",
        "Copies are those of a call by themselves, calculated from the rates below: most run beside the work on a block.",
        "",
        *_cost(table, dim),
        "The larger of dQ's and dP's ‖Δ‖/‖reference‖, and the loss's relative error:",
        "",
        *_errors(table),
        *_rates(table),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, nargs="?", default=Path("docs/bench/offload.json"))
    parser.add_argument("--dim", type=int, default=768, help="of the run's vectors (default: %(default)s)")
    args = parser.parse_args()
    args.table.with_suffix(".md").write_text(markdown(Table.load(args.table), args.dim), encoding="utf-8")


if __name__ == "__main__":
    main()
