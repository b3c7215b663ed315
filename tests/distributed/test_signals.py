"""A signal that one rank of two receives, whichever it is, stops both: after the step, or with the last update."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from retriever.errors import Stopped
from retriever.parallel.world import World
from retriever.signals import StopSignals
from tests.distributed.processes import run_cases

GRACE_S, LONG_S = 1.0, 60.0


@dataclass(frozen=True)
class Case:
    """Which rank receives SIGTERM in its fourth step, or in the evaluation behind it, and what the run then saves."""

    receiver: int
    saves: str
    step_s: float = 0.2  # of the fourth
    sharded: bool = False
    evaluates: bool = False


CASES = {
    "other": Case(1, "saved 4"),
    "other, long step": Case(1, "late 3", step_s=LONG_S),
    "first, long step": Case(0, "late 3", step_s=LONG_S),
    "other, evaluation": Case(1, "late 4", evaluates=True),
    "other, in shards": Case(1, "saved 4", step_s=3 * GRACE_S, sharded=True),
}


def _rank(rank: int, name: str, port: int, log: Path) -> None:
    """A rank of a run of 100 steps; it logs what it saves, and ends with the status of the training command."""
    case = CASES[name]
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
    os.environ["LOCAL_RANK"] = str(rank)
    wait = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=wait)
    world, last = World(torch.device("cpu"), rank, 2, sharded=case.sharded), 0

    def save() -> int:
        print("late", last, flush=True)
        return last

    with world.watched(100), StopSignals(world, save, GRACE_S) as stop:
        for step in range(1, 101):
            receives = step == 4 and rank == case.receiver
            if receives and not case.evaluates:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(case.step_s if step == 4 else 0.05)
            world.barrier()
            last = step
            if number := stop.agreed(False)[0]:
                print("saved", last, flush=True)
                sys.stdout.flush()
                os._exit(Stopped(number, last).status)
            if case.evaluates and step == 4:
                with stop.between_steps():
                    if receives:
                        os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(LONG_S)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int | None, str]]]:
    return run_cases(_rank, CASES, 2, tmp_path_factory.mktemp("signals"), limit_s=LONG_S / 2)


@pytest.mark.parametrize("name", CASES)
def test_a_signal_at_either_rank_stops_both(name: str, ended: dict[str, list[tuple[int | None, str]]]) -> None:
    """The first rank alone saves late; a step of an encoder in shards, which it cannot save alone, is waited for."""
    saves = CASES[name].saves
    logged = [(status, said.strip()) for status, said in ended[name]]
    assert logged == [(143, saves), (143, saves if saves.startswith("saved") else "")]
