"""The loss over several GPUs: time, memory, exposed transfers and error, beside other implementations and the cost model.

    python -m scripts.bench.ring --output docs/bench/ring.json                 # one process for each GPU here
    torchrun --nproc-per-node 2 -m scripts.bench.ring --output docs/bench/ring.json

A method that is wrong is not timed. Times are medians of calls queued one after the other, those of the slowest rank; memory is what a
call adds to its inputs, gradients included, on the rank that needs most. A share of exposed transfers is (time − time of the same work
with local copies in place of transfers) / time, both those of the slowest rank. `scripts.bench.ring_report` makes the
table and the plot from the JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import normalize

from kernels.infonce.api import infonce
from retriever.parallel.cost import Machine, Workload, gather_cost, ring_cost
from retriever.parallel.world import World
from scripts.bench.loss import errors, peak_extra_mb, reference
from scripts.bench.loss_methods import Problem
from scripts.bench.ranks import Silent, median_ms, now, on_every_rank
from scripts.bench.ring_methods import Method, Shard, ablation, methods
from scripts.bench.tables import Table

PARTS = ("methods", "exposed", "model", "ablation", "scaling", "largest")
_WRONG = 0.1  # a gradient further off than this is another function
_PACKAGES = ("torch", "triton", "inf-cl", "memeff")
_TEMPERATURE, _COSINE = 0.02, 0.3
_ROWS_DRAWN = 65_536
_MODELLED = (("gather", 1024), ("ring", 256), ("gather,symmetric", 1024), ("ring,symmetric", 256))  # condition, MiB of workspace


class Bench:
    """The measurements of one rank; rank 0 writes the table."""

    def __init__(self, world: World, table: Table | None, args: argparse.Namespace) -> None:
        self.world, self.table, self.args = world, table, args

    def add(self, case: str, method: str, metric: str, value: float | None, unit: str, note: str = "") -> None:
        """Writes the largest value of all ranks."""
        if value is not None:
            value = float(self.world.max(torch.tensor(value, dtype=torch.float64, device=self.world.device)))
        if self.table is not None:
            self.table.add(case, method, metric, value, unit, note)
            self.table.save(self.args.output)

    def case(self, b: int, condition: str = "") -> str:
        """The name of a case."""
        return f"b={b},W={self.world.size}" + (f",{condition}" if condition else "")

    def shard(self, b: int) -> Shard:
        """This rank's rows of a batch of `b`: random unit queries, passages with a cosine of 0.3 to theirs."""
        device = self.world.device
        generator = torch.Generator(device).manual_seed(self.world.rank)
        sides = [torch.empty(b // self.world.size, self.args.dim, dtype=torch.bfloat16, device=device) for _ in range(2)]
        for queries, passages in zip(*(side.split(_ROWS_DRAWN) for side in sides), strict=True):
            q, noise = (normalize(torch.randn(queries.shape, device=device, generator=generator), dim=1) for _ in range(2))
            queries.copy_(q)
            passages.copy_(normalize(_COSINE * q + math.sqrt(1 - _COSINE**2) * noise, dim=1))
        return Shard(sides[0], sides[1], _TEMPERATURE, self.world)

    def is_right(self, method: Method) -> bool:
        """Checks a method against float64 at a small batch."""
        shard, case = self.shard(self.args.check), self.case(self.args.check, method.condition)
        every = [self.world.gather_rows(side).rows for side in (shard.queries, shard.passages)]
        B = len(shard.queries)
        own = slice(self.world.rank * B, (self.world.rank + 1) * B)
        loss, dqueries, dpassages = reference(Problem(every[0], every[1], _TEMPERATURE, shard.problem().exclusions), method.symmetric)
        try:
            loss_error, gradient_error = errors(method.run(shard), (loss, dqueries[own], dpassages[own]))
        except Exception as error:  # a peer may fail in any way, and the table says how
            self.add(case, method.name, "gradient_error", None, "", f"does not run: {type(error).__name__}: {str(error)[:160]}")
            return False
        self.add(case, method.name, "loss_error", loss_error, "relative", method.note)
        self.add(case, method.name, "gradient_error", gradient_error, "relative", method.note)
        worst = self.world.max(torch.tensor([loss_error, gradient_error], device=self.world.device).nan_to_num(nan=torch.inf)).tolist()
        if right := math.isfinite(worst[0]) and worst[1] < _WRONG:
            return right
        self.add(case, method.name, "forward_backward_ms", None, "ms", "not timed: wrong")
        return False

    def measure(self, method: Method, sizes: Sequence[int]) -> None:
        """Memory and time of a method at every size it is for."""
        for b in sizes:
            if b > method.largest:
                continue
            case, call = self.case(b, method.condition), partial(method.run, self.shard(b))
            on_gpu = self.world.device.type == "cuda"
            if on_gpu:
                self.add(case, method.name, "mb_per_rank", peak_extra_mb(call), "MiB")
            self.add(case, method.name, "forward_backward_ms", median_ms(self.world, call, warm=on_gpu), "ms")
            del call
            if on_gpu:
                torch.cuda.empty_cache()

    def exposed(self, method: Method, b: int) -> None:
        """The share of a call that waits for transfers: the call and the same work without them, by turns."""
        shard = self.shard(b)
        alone = replace(shard, world=Silent(self.world.device, self.world.rank, self.world.size))
        calls = [partial(method.run, shard), partial(method.run, alone)]
        turns = [[median_ms(self.world, call, 0.5) for call in calls] for _ in range(3)]
        medians = [statistics.median(times) for times in zip(*turns, strict=True)]
        # A GPU that is faster than the others waits for them: of one rank's own times that would count as transfers.
        whole, silent = self.world.max(torch.tensor(medians, dtype=torch.float64, device=self.world.device)).tolist()
        case = self.case(b, method.condition)
        self.add(case, method.name, "with_transfers_ms", whole, "ms", "by turns with those without")
        self.add(case, method.name, "without_transfers_ms", silent, "ms")
        self.add(case, method.name, "exposed_share", (whole - silent) / whole, "of the time")

    def predict(self, b: int, condition: str, workspace_mib: int) -> None:
        """What the cost model says of a case."""
        exchange, _, direction = condition.partition(",")
        work = Workload(b, b, self.args.dim, self.world.size, direction == "symmetric", workspace_mib=workspace_mib)
        estimate = (ring_cost if exchange == "ring" else gather_cost)(work, Machine(ranks_per_node=self.world.size))
        self.add(self.case(b, condition), "bigbatch", "predicted_ms", estimate.total_ms, "ms")
        self.add(self.case(b, condition), "bigbatch", "predicted_mb", estimate.mib, "MiB")

    def scaling(self, b: int) -> None:
        """One GPU's rate on the whole batch, and that of all ranks together by either exchange."""
        whole = self.shard(b * self.world.size)
        targets, weights = torch.arange(b, device=self.world.device), torch.full((b,), 1 / b, device=self.world.device)
        by_itself = partial(infonce, whole.queries, whole.passages, targets, 1 / _TEMPERATURE, weights=weights)
        alone = median_ms(self.world, by_itself, 1.5)
        self.add(f"b={b},W=1", "bigbatch", "forward_backward_ms", alone, "ms", "the slowest GPU by itself")
        del whole, by_itself
        for method in methods()[:2]:
            together = median_ms(self.world, partial(method.run, self.shard(b)), 1.5)
            self.add(self.case(b, method.condition), "bigbatch", "scaling", alone / (self.world.size * together), "of W GPUs' rate")

    def largest(self, b: int) -> None:
        """One call over `b` pairs by the ring."""
        ring = methods()[1]
        ring.run(self.shard(self.args.check))  # compiles
        shard = self.shard(b)
        started = now(self.world)
        if self.world.device.type == "cuda":
            self.add(self.case(b, "ring"), "bigbatch", "mb_per_rank", peak_extra_mb(partial(ring.run, shard)), "MiB", "one call")
        else:
            ring.run(shard)
        self.add(self.case(b, "ring"), "bigbatch", "forward_backward_ms", 1e3 * (now(self.world) - started), "ms", "one call")
        self.predict(b, "ring", 256)

    def ablate(self, sizes: Sequence[int]) -> None:
        """Neither tiling, that over ranks alone, both; their losses beside the first one's."""
        for b in sizes:
            shard, losses = self.shard(b), []
            for method in ablation():
                losses.append(float(method.run(shard)[0]))
                self.add(self.case(b, method.condition), method.name, "loss", losses[-1], "nats", method.note)
                self.add(self.case(b, method.condition), method.name, "loss_difference", abs(losses[-1] / losses[0] - 1), "relative")
            del shard
        for method in ablation():
            self.measure(method, sizes)


def measure_all(world: World, table: Table, args: argparse.Namespace) -> None:
    """All parts that were asked for, on this rank."""
    bench = Bench(world, table if world.is_first else None, args)
    if "methods" in args.parts:
        for method in methods():
            if (not args.methods or method.name in args.methods) and bench.is_right(method):
                bench.measure(method, args.sizes)
    if "exposed" in args.parts:
        for method in methods()[:2]:
            for b in args.exposed_sizes:
                bench.exposed(method, b)
    if "model" in args.parts:
        for b in args.sizes:
            for condition, workspace_mib in _MODELLED:
                bench.predict(b, condition, workspace_mib)
    if "ablation" in args.parts:
        bench.ablate(args.ablation_sizes)
    if "scaling" in args.parts:
        bench.scaling(args.scaling_size)
    if "largest" in args.parts:
        bench.largest(args.largest_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/ring.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="*", default=[], help="names; all if absent")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 65536, 131072, 262144, 1048576], help="global batches")
    parser.add_argument("--exposed-sizes", type=int, nargs="+", default=[131072, 262144])
    parser.add_argument("--ablation-sizes", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--scaling-size", type=int, default=262144)
    parser.add_argument("--largest-size", type=int, default=4194304)
    parser.add_argument("--check", type=int, default=4096, help="global batch of the comparison with float64")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    args = parser.parse_args()
    on_every_rank(measure_all, args.ranks, Table.begin(_PACKAGES), args)


if __name__ == "__main__":
    main()
