"""What the benchmarks share: times, memory, rates, errors, and ranks that do not communicate."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retriever.parallel.world import Transfer, World
from scripts.bench.tables import Table

Result = tuple[Tensor, Tensor, Tensor]  # mean loss, dqueries, dpassages


class Timing(NamedTuple):
    """The times of several calls. The device is idle before and after each."""

    seconds: list[float]
    peak_gib: float | None  # of the device's memory; None on a CPU


def timed(device: torch.device, call: Callable[[], object], seconds: float = 0.0) -> Timing:
    """Repeats `call` for about `seconds`: at least twice, or once if one call takes longer."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken: list[float] = []
    while not taken or (len(taken) < 2 and taken[0] < seconds) or sum(taken) + taken[-1] < seconds:
        started = _now(device)
        call()
        taken.append(_now(device) - started)
    return Timing(taken, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None)


def median_ms(world: World, call: Callable[[], object], seconds: float, most: int = 30) -> float:
    """The median time of calls queued one after another, after one warm-up call. A call that takes longer than
    `seconds` is timed once.
    """
    call()
    (once,) = timed(world.device, call).seconds
    once = float(world.max(torch.tensor(once, device=world.device)))  # as many calls on every rank
    if once > seconds:
        return 1e3 * once
    moments = [_moment(world.device)]
    for _ in range(max(2, min(most, int(seconds / once)))):
        call()
        moments.append(_moment(world.device))
    _now(world.device)
    pairs = zip(moments, moments[1:], strict=False)
    return statistics.median(a.elapsed_time(b) if world.device.type == "cuda" else 1e3 * (b - a) for a, b in pairs)


def _now(device: torch.device) -> float:
    """Seconds on the clock, once everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _moment(device: torch.device) -> Any:
    """The time at which everything queued so far is done: a CUDA event, or seconds on the clock for a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def free_memory(device: torch.device) -> None:
    """Returns unreferenced memory to a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def peak_extra_mb(call: Callable[[], object]) -> float:
    """Peak GPU memory in MiB that a call adds to what is allocated before it, including cuBLAS's workspaces."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def add_matmul_rate(table: Table, device: torch.device) -> float | None:
    """Adds and returns the TFLOP/s of an 8192³ bf16 product of N(0, 1) matrices, the best of five medians; None on a
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
    loss, *gradients = (float((got - want).norm() / want.norm()) for got, want in zip(found, truth, strict=True))
    return loss, max(gradients) if all(map(math.isfinite, gradients)) else math.nan


class Silent(World):
    """A world whose ranks do not communicate: a local copy of the same size replaces every transfer. All ranks have the
    same number of rows. One process is enough, as any of the ranks.

    A copy's integers are taken for ids, which are distinct over all ranks, unless `distinct` is false.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, *, distinct: bool = True) -> None:
        super().__init__(device)
        self.rank, self.size, self._distinct = rank, size, distinct

    def counts(self, n: int) -> tuple[int, ...]:
        """`n` rows on every rank."""
        return (n,) * self.size

    def begin_gather(self, x: Tensor, counts: Sequence[int]) -> Transfer:
        """This rank's rows, repeated for every rank."""
        distances = [(owner - self.rank) % self.size for owner in range(self.size)]
        return Transfer(x, torch.cat([self._as_of(x, distance) for distance in distances]), [])

    def reduce_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of its own terms."""
        return x.split(list(counts))[self.rank].clone()

    def pass_on(self, x: Tensor, arriving: Tensor, step: int) -> Transfer:
        """Receives what it sends."""
        return Transfer(x, arriving.copy_(self._as_of(x, 1)), [])

    def _all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        return x.clone()

    def _as_of(self, x: Tensor, distance: int) -> Tensor:
        """`x` as the rank at `distance` would hold it."""
        return x if x.is_floating_point() or not self._distinct else x + (distance << 40)
