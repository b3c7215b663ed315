"""What several benchmarks measure with: times, memory, rates, errors, ranks, and ranks that hear nothing of one another."""

from __future__ import annotations

import atexit
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
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
    """The median time of calls queued one after the other, after one that is not counted; of one call where that takes longer."""
    call()
    started = now(world.device)
    call()
    each = float(world.max(torch.tensor(now(world.device) - started, device=world.device)))  # as many calls on every rank
    if each > seconds:
        return 1e3 * each
    moments = Moments(world.device)
    for _ in range(max(2, min(most, int(seconds / each)))):
        call()
        moments.mark()
    return statistics.median(moments.milliseconds())


class Moments:
    """Moments on the device's own time line where it has one; the first is where it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Another one: when everything is done that was queued before."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def milliseconds(self) -> list[float]:
        """Between each and the next."""
        now(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) if self._device.type == "cuda" else 1e3 * (b - a) for a, b in pairs]


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
    """TFLOP/s of an 8192³ bf16 product of N(0, 1) matrices, the best of five medians, which becomes a row; None on a CPU."""
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


@contextmanager
def tf32_products() -> Iterator[None]:
    """Products of fp32 matrices in TF32 meanwhile, on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def joined(module: str, ranks: int, arguments: Sequence[str]) -> World | None:
    """This rank among those that torchrun or accelerate started. Where there are none, starts `module` on `ranks` processes: None."""
    if "RANK" not in os.environ and ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run([*launcher, "-m", module, *arguments], check=True)
        return None
    state = PartialState(cpu=not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)
    return World(state.device, state.process_index, state.num_processes)


class Silent(World):
    """Ranks that hear nothing of one another: local copies of the same size stand in for every transfer. All hold equally many rows."""

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
