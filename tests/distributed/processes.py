"""Runs a function on several gloo ranks and collects what each returns."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from retriever.parallel.world import World
from tests.determinism import make_strict
from tests.starts import FORKSERVER, free_port


def run_on_ranks(
    function: Callable[[World, Path], Any], world_size: int, folder: Path, *, cuda: bool = False
) -> list[Any]:
    """What `function(world, folder)`, a module-level function that returns plain values, gave on each rank; gloo, or
    NCCL on `cuda`.
    """
    arguments = (function, world_size, free_port(), folder, cuda)
    mp.start_processes(_work, arguments, nprocs=world_size, start_method="forkserver")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def run_cases(
    rank_function: Callable[[int, str, int, Path], None],
    cases: Iterable[str],
    world_size: int,
    folder: Path,
    limit_s: float,
    endless: tuple[str, int] | None = None,
) -> dict[str, list[tuple[int | None, str]]]:
    """Of every case, each rank's exit status and what it logged; all cases run at once.

    `rank_function(rank, case, port, log)` is a rank of a run. Rank and case of `endless` are not waited for.
    """
    running = {}
    for case in cases:
        port = free_port()
        jobs = [(rank, case, port, folder / f"{case}{rank}") for rank in range(world_size)]
        running[case] = [FORKSERVER.Process(target=rank_function, args=job) for job in jobs]
        for process in running[case]:
            process.start()
    deadline, results = time.monotonic() + limit_s, {}
    for case, processes in running.items():
        for rank, process in enumerate(processes):
            process.join(0 if (case, rank) == endless else max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        logs = [(folder / f"{case}{rank}").read_text() for rank in range(world_size)]
        results[case] = list(zip(statuses, logs, strict=True))
    return results


def _work(
    rank: int, function: Callable[[World, Path], Any], world_size: int, port: int, folder: Path, cuda: bool
) -> None:
    make_strict()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic products are refused
        torch.cuda.set_device(device)
    if world_size == 1:
        result = function(World(device), folder)
    else:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        result = function(World(device, rank, world_size), folder)
        dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    # Not the interpreter's ordinary end: after a functional collective (DTensor's are) torch 2.13 keeps gloo's threads,
    # and one that lets go of a tensor while the interpreter ends aborts the process:
    # https://github.com/pytorch/pytorch/issues/190489
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
