"""What several benchmarks measure with: times, memory, rates, errors, and ranks that hear nothing of one another."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from retriever.parallel.world import Transfer, World
from scripts.bench.tables import Table

Result = tuple[Tensor, Tensor, Tensor]  # mean loss, dqueries, dpassages


def now(device: torch.device) -> float:
    """Seconds, after everything that was queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_ms(world: World, call: Callable[[], object], seconds: float = 0.7, most: int = 30) -> float:
    """The median time of calls queued one after the other, after one that is not counted; of one call where that takes
    longer.
    """
    call()
    started = now(world.device)
    call()
    each = float(
        world.max(torch.tensor(now(world.device) - started, device=world.device))
    )  # as many calls on every rank
    if each > seconds:
        return 1e3 * each
    moments = [_moment(world.device)]
    for _ in range(max(2, min(most, int(seconds / each)))):
        call()
        moments.append(_moment(world.device))
    now(world.device)
    pairs = zip(moments, moments[1:], strict=False)
    return statistics.median(a.elapsed_time(b) if world.device.type == "cuda" else 1e3 * (b - a) for a, b in pairs)


def _moment(device: torch.device) -> Any:
    """When everything is done that was queued before: an event on the device's own time line, or seconds of the
    clock.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def free_memory(device: torch.device) -> None:
    """Hands memory that nothing refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(device: torch.device, call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of the calls that together take about `seconds`: at least two, or one where one takes longer."""
    taken: list[float] = []
    while not taken or (len(taken) < 2 and taken[0] < seconds) or sum(taken) + taken[-1] < seconds:
        started = now(device)
        call()
        taken.append(now(device) - started)
    return taken


def peak_gib(device: torch.device) -> float | None:
    """Device memory at its peak since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Forgets the peak of before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_extra_mb(call: Callable[[], object]) -> float:
    """MiB that a call adds to what is allocated on the GPU before it, at its peak, cuBLAS's workspaces included."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def add_matmul_rate(table: Table, device: torch.device) -> float | None:
    """TFLOP/s of an 8192³ bf16 product of N(0, 1) matrices, the best of five medians, which becomes a row; None on a
    CPU.
    """
    if device.type != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = max(2 * 8192**3 / median_ms(World(device), lambda: a @ b, 0.1, 50) / 1e9 for _ in range(5))
    table.add("8192x8192x8192", "floor", "matmul_tflops", rate, "TFLOP/s", "best of five medians, bf16")
    return rate


def errors(result: tuple[Tensor, Tensor | None, Tensor | None], truth: Result) -> tuple[float, float]:
    """(relative loss error, the larger of dQ's and dP's ‖Δ‖/‖reference‖); NaN stays NaN."""
    found = [x.to(truth[0].device).double() for x in result if x is not None]
    loss = float((found[0] - truth[0]).abs() / truth[0])
    both = [float((got - want).norm() / want.norm()) for got, want in zip(found[1:], truth[1:], strict=True)]
    return loss, max(both) if all(math.isfinite(e) for e in both) else math.nan


class Silent(World):
    """Ranks that hear nothing of one another: local copies of the same size stand in for every transfer. All hold
    equally many rows.
    """

    def counts(self, n: int) -> tuple[int, ...]:
        """As many on every rank."""
        return (n,) * self.size

    def begin_gather(self, x: Tensor, counts: Sequence[int]) -> Transfer:
        """Own rows, once for every rank."""
        return Transfer(x, torch.cat([_as_of(x, (owner - self.rank) % self.size) for owner in range(self.size)]), [])

    def reduce_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Own rows of own terms."""
        return x.split(list(counts))[self.rank].clone()

    def pass_on(self, x: Tensor, arriving: Tensor, step: int) -> Transfer:
        """What is sent arrives here."""
        return Transfer(x, arriving.copy_(_as_of(x, 1)), [])

    def _all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        return x.clone()


def _as_of(x: Tensor, distance: int) -> Tensor:
    """Rows as of a rank so far away: whole numbers are ids, which no two ranks share."""
    return x if x.is_floating_point() else x + (distance << 40)
