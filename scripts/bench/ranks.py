"""Measuring over several ranks: starting them, timing the slowest, and ranks that hear nothing of one another."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from retriever.parallel.world import Transfer, World

_TIMEOUT = timedelta(seconds=600)


def on_every_rank(function: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Calls `function(world, *arguments)` on this rank where torchrun started it, else on `ranks` new processes."""
    if "RANK" in os.environ:
        _join(function, arguments)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_start, (ranks, port, function, arguments), nprocs=ranks)


def _start(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    _join(function, arguments)


def _join(function: Callable[..., None], arguments: Sequence[Any]) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=_TIMEOUT)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    function(World(device, rank, size), *arguments)
    dist.destroy_process_group()


def now(world: World) -> float:
    """Seconds, after everything that was queued here."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(world: World, call: Callable[[], object], seconds: float = 1.0, most: int = 20, warm: bool = False) -> float:
    """The median time of calls queued one after the other, on this rank; as many calls on every rank. `warm`: it has been called before."""
    if not warm:
        call()
    started = now(world)
    call()
    each = float(world.max(torch.tensor(now(world) - started, device=world.device)))
    if each > seconds:
        return 1e3 * each
    n = min(most, int(seconds / each))
    if world.device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(n):
            call()
            marks.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))


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
