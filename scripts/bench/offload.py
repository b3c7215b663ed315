"""The loss over representations in host memory (`batch.offload`): time, memory and error, beside those of resident ones.

    python -m scripts.bench.offload --output docs/bench/offload.json

One GPU; on a CPU it runs without figures of memory and copies. Forward + backward of `ContrastiveObjective`, as training calls it. What is
wrong is not timed: neither what is off from float64 at a small batch, nor offloaded gradients that are off from the resident ones at the
size itself. Times are medians of single calls, the host's work included, after one that page-locks memory.
`scripts.bench.offload_report` makes the page.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kernels.infonce.exclusions import Pairs
from kernels.infonce.reference import rounded
from retriever.config import LossConfig
from retriever.data.batch import KnownPairs, Targets
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS, host_bytes
from retriever.parallel.host import host_rows
from retriever.parallel.world import World
from scripts.bench.loss import case_of, errors, matmul_tflops, median_ms, peak_extra_mb, reference
from scripts.bench.loss_methods import Problem
from scripts.bench.offload_report import COPY_CASE, METHOD, RATE_CASE, markdown
from scripts.bench.ranks import now
from scripts.bench.ring import Bench
from scripts.bench.ring_methods import Shard
from scripts.bench.tables import Table

Result = tuple[Tensor, Tensor, Tensor]  # loss, dqueries, dpassages
_TEMPERATURE = 0.02
_PRECISION: Final = "bf16"
_WRONG = 0.02  # a gradient further off than this is more than rounding
_COPIED_BYTES = 2**28
_PACKAGES = ("torch", "triton")


@dataclass(frozen=True)
class Placed:
    """A batch of `b` pairs whose rows are where the loss is to find them: on the GPU, or in page-locked host memory."""

    queries: Tensor  # [b, D] float32
    passages: Tensor  # [b, D]
    block_rows: int | None  # None: resident

    @staticmethod
    def of(shard: Shard, block_rows: int | None) -> Placed:
        """The rows of `shard`, their values rounded to bf16, as training holds them."""
        device = shard.world.device

        def place(rows: Tensor) -> Tensor:
            return rows.float() if block_rows is None else host_rows(rows.shape, torch.float32, device).copy_(rows)

        return Placed(place(shard.queries), place(shard.passages), block_rows)

    def call(self, world: World, workspace_mib: int) -> Callable[[], Result]:
        """The objective's forward and backward over the batch, known pairs as the loader leaves them: looked up for resident rows."""
        config = LossConfig(temperature=_TEMPERATURE, precision=_PRECISION, workspace_mib=workspace_mib)
        objective = ContrastiveObjective(config, unit=True, block_rows=self.block_rows).to(world.device)
        b = len(self.queries)
        ids, none = torch.arange(b), torch.empty(0, dtype=torch.int64)
        known = KnownPairs(Pairs(none, none), (b,)) if self.block_rows is None else None
        return partial(objective, self.queries, self.passages, Targets(ids, ids, torch.arange(b + 1), ids, b, known_pairs=known), world)

    def resident_mb(self) -> float:
        """MiB of the rows on the GPU."""
        return 0.0 if self.block_rows is not None else (self.queries.nbytes + self.passages.nbytes) / 2**20

    def round_on_host(self, device: torch.device) -> None:
        """The passes over host memory that come before the first block."""
        for rows in (self.queries, self.passages):
            host_rows(rows.shape, torch.bfloat16, device).copy_(rounded(rows, _PRECISION))


class OffloadBench:
    """The measurements, and the table they go to."""

    def __init__(self, world: World, table: Table, given: argparse.Namespace) -> None:
        self.world, self.table, self.given = world, table, given
        self.on_gpu = world.device.type == "cuda"

    def add(self, case: str, metric: str, value: float | None, unit: str, note: str = "") -> None:
        """Writes a figure of the loss."""
        self.table.add(case, METHOD, metric, value, unit, note)

    def rates(self) -> None:
        """What the GPU multiplies and what is copied to and from it, page-locked, one direction at a time."""
        self.table.add(RATE_CASE, "floor", "matmul_tflops", matmul_tflops(), "TFLOP/s", "best of five medians, bf16")
        here = host_rows((_COPIED_BYTES,), torch.uint8, self.world.device)
        there = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=self.world.device)
        for metric, target, source in (("to_device_gb_s", there, here), ("to_host_gb_s", here, there)):
            ms = median_ms(partial(target.copy_, source, non_blocking=True), 0.1, 5, 20)
            self.table.add(COPY_CASE, "copy", metric, _COPIED_BYTES / ms / 1e6, "GB/s", "page-locked")

    def is_right(self, block_rows: int | None) -> bool:
        """Checks the loss against float64 at a small batch; over offloaded rows in several blocks, the last one shorter."""
        b, note = self.given.check, ""
        shard, case = self._shard(b), _case(b, block_rows)
        if block_rows is not None:
            block_rows = max(1, min(block_rows, 3 * b // 10))
            note = f"blocks of {block_rows:,} rows"
        found = Placed.of(shard, block_rows).call(self.world, self.given.workspace_mib)()
        truth = reference(Problem(shard.queries, shard.passages, _TEMPERATURE, shard.problem().exclusions))
        return self._agrees(case, ("loss_error", "gradient_error"), found, truth, note)

    def measure(self, b: int, block_rows: int | None, resident: Result | None) -> Result | None:
        """Memory and time at one size; returns loss and gradients of resident rows, against which those of offloaded ones are held."""
        case, results = _case(b, block_rows), list[Result]()
        try:
            placed = Placed.of(self._shard(b), block_rows)
            call = placed.call(self.world, self.given.workspace_mib)
            self._memory(case, placed, lambda: results.append(call()))
        except torch.cuda.OutOfMemoryError:
            self.add(case, "forward_backward_ms", None, "ms", "does not fit on the GPU")
            return None
        result = results.pop()
        differences = ("loss_difference", "gradient_difference")
        if resident is not None and not self._agrees(case, differences, result, resident, "to resident rows"):
            return None
        kept = result if block_rows is None else None
        del result  # page-locked memory that the next call takes again
        times = [self._ms(call) for _ in range(self.given.repeats)]
        spread = f"{len(times)} calls, {min(times):,.4g} to {max(times):,.4g}"
        self.add(case, "forward_backward_ms", statistics.median(times), "ms", spread)
        if block_rows is not None:
            self._parts(case, placed, block_rows)
        return kept

    def _shard(self, b: int) -> Shard:
        return Bench(self.world, None, self.given).shard(b)

    def _agrees(self, case: str, metrics: tuple[str, str], found: Result, expected: Result, note: str) -> bool:
        loss, dqueries, dpassages = (x.to(self.world.device) for x in found)
        both = errors((loss, dqueries, dpassages), expected)
        for metric, value in zip(metrics, both, strict=True):
            self.add(case, metric, value, "relative", note)
        if all(value < _WRONG for value in both):  # NaN is not
            return True
        self.add(case, "forward_backward_ms", None, "ms", "not timed: wrong")
        return False

    def _memory(self, case: str, placed: Placed, call: Callable[[], None]) -> None:
        """Calls once; on a GPU, notes what that adds to the rows, and with them."""
        if not self.on_gpu:
            call()
            return
        extra = peak_extra_mb(call)
        self.add(case, "peak_extra_mb", extra, "MiB")
        self.add(case, "gpu_mb", placed.resident_mb() + extra, "MiB", "with the representations" if placed.resident_mb() else "")
        if placed.block_rows is None:
            return
        numbers = placed.queries.numel() + placed.passages.numel()
        self.add(case, "host_mb", numbers * host_bytes(_PRECISION, dims=False) / 2**20, "MiB", "calculated")

    def _parts(self, case: str, placed: Placed, block_rows: int) -> None:
        """What of the time is the host's, and how long the copies would take by themselves."""
        rounding = [self._ms(partial(placed.round_on_host, self.world.device)) for _ in range(self.given.repeats)]
        self.add(case, "rounding_ms", statistics.median(rounding), "ms", "of it: the host, before the first block")
        inward, outward = (self.table.get(COPY_CASE, "copy", metric) for metric in ("to_device_gb_s", "to_host_gb_s"))
        if inward is None or outward is None:  # not on a GPU
            return
        there, back = copied_bytes(len(placed.queries), placed.queries.shape[1], block_rows)
        self.add(case, "copies_ms", (there / inward + back / outward) / 1e6, "ms", f"calculated, {(there + back) / 1e9:,.1f} GB")

    def _ms(self, call: Callable[[], object]) -> float:
        started = now(self.world)
        call()
        return 1e3 * (now(self.world) - started)


def copied_bytes(b: int, dim: int, block_rows: int) -> tuple[int, int]:
    """What a call over `b` pairs copies to the GPU, and back.

    Rows take 2 bytes a number and sums of gradients 4. Of passages, rows come in both sweeps for every block of queries, their sums for
    every block but the first, and they go back for each; queries' rows come twice, and their sums go back once.
    """
    blocks, numbers = -(-b // block_rows), b * dim
    passages_in, passages_out = (2 + 2) * blocks + 4 * (blocks - 1), 4 * blocks
    return (passages_in + 2 + 2) * numbers, (passages_out + 4) * numbers


def _case(b: int, block_rows: int | None) -> str:
    return case_of(b, "" if block_rows is None else "offload")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.bench.offload`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/offload.json"), help="and .md beside it (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[131072, 262144, 524288], help="pairs")
    parser.add_argument("--check", type=int, default=4096, help="pairs of the comparison with float64 (default: %(default)s)")
    parser.add_argument("--block-rows", type=int, default=BLOCK_ROWS, help="default: training's, %(default)s")
    parser.add_argument("--workspace-mib", type=int, default=1024, help="of the loss (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    world = World(torch.device(given.device))
    table = Table.begin(_PACKAGES)
    table.hardware += f", {torch.get_num_threads()} threads"
    bench = OffloadBench(world, table, given)
    try:
        if bench.on_gpu:
            bench.rates()
        right = [block_rows for block_rows in (None, given.block_rows) if bench.is_right(block_rows)]
        for b in given.sizes:
            resident = None
            for block_rows in right:
                resident = bench.measure(b, block_rows, resident)
                if bench.on_gpu:
                    torch.cuda.empty_cache()
    finally:  # what was measured is kept, whatever happens after it
        table.save(given.output)
        given.output.with_suffix(".md").write_text(markdown(table, given.dim), encoding="utf-8")


if __name__ == "__main__":
    main()
