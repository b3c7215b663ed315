"""A rank that is killed, stops, fails or hangs ends the run on every rank within the time that was set, and is
named.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from retriever.errors import LOST, RankError, Verdict
from retriever.parallel.watch import Watch
from retriever.parallel.world import World
from tests.distributed.processes import run_cases

RANKS, TIMEOUT_S = 3, 12.0
COLLECTIVES_WAIT_S = 300  # of torch's own: what ends a rank sooner is the watch


def _fail(rank: int) -> None:
    raise ValueError(f"no luck on {rank}\nsecond line")


def _interrupt(rank: int) -> None:
    raise KeyboardInterrupt


def _signal(number: int) -> Callable[[int], None]:
    return lambda rank: os.kill(os.getpid(), number)


# What a rank does in the fourth of its collectives, which rank, and the others' exit status and message.
CASES: dict[str, tuple[Callable[[int], None], int, int, str]] = {
    "exits": (lambda rank: os._exit(7), 1, LOST, "rank 1 ended without a word"),
    "killed": (_signal(signal.SIGKILL), 2, LOST, "rank 2 ended without a word"),
    "first killed": (_signal(signal.SIGKILL), 0, LOST, "rank 0 or its launcher"),
    "stopped": (_signal(signal.SIGSTOP), 1, LOST, r"rank 1 gives no sign of life since \d+ s.*run.timeout_s=12"),
    "hangs": (lambda rank: time.sleep(120), 2, LOST, r"rank 2 hangs, .* waited for it for \d+ s \(run.timeout_s=12\)"),
    "first hangs": (
        lambda rank: time.sleep(120),
        0,
        LOST,
        r"rank 0 hangs, .* waited for it for \d+ s \(run.timeout_s=12\)",
    ),
    "fails": (_fail, 2, LOST, "rank 2 ended with ValueError: no luck on 2. "),
    "interrupted": (_interrupt, 1, 130, ""),
    "ends well": (lambda rank: None, 1, 0, ""),
}


def _finish_writing() -> None:
    time.sleep(0.5)
    print("written", file=sys.stderr, flush=True)


def _rank(rank: int, case: str, port: int, log: Path) -> None:
    """A rank of a run: what it says is in the log, its exit status is that of the training command."""
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    wait = timedelta(seconds=COLLECTIVES_WAIT_S)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=wait)
    world = World(torch.device("cpu"), rank, RANKS)
    try:
        with world.watched(TIMEOUT_S):
            assert world.watch is not None
            world.watch.before_leaving = _finish_writing
            for number in range(6):
                if number == 3 and rank == CASES[case][1]:
                    CASES[case][0](rank)
                assert world.sum(torch.ones(1)) == RANKS
    except RankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.verdict.status)
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int | None, str]]]:
    return run_cases(_rank, CASES, RANKS, tmp_path_factory.mktemp("watch"), limit_s=200, endless=("stopped", 1))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_ends_and_names_the_one_that_is_lost(
    case: str, ended: dict[str, list[tuple[int | None, str]]]
) -> None:
    _, culprit, status, message = CASES[case]
    others = [(found, said) for rank, (found, said) in enumerate(ended[case]) if rank != culprit]
    assert [found for found, _ in others] == [status] * len(others), ended[case]
    if message:
        errors = [said[said.index("error: ") :] for _, said in others if "error: " in said]
        assert errors, ended[case]
        assert all(re.search(message, error) and "goes on from the last checkpoint" in error for error in errors), (
            errors
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("hangs")])
def test_a_rank_that_hangs_says_where(case: str, ended: dict[str, list[tuple[int | None, str]]]) -> None:
    culprit = CASES[case][1]
    status, said = ended[case][culprit]
    assert status == LOST and f"rank {culprit} is here:" in said and "time.sleep(120)" in said


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("hangs")])
def test_what_is_being_written_is_finished_before_a_rank_leaves(
    case: str, ended: dict[str, list[tuple[int | None, str]]]
) -> None:
    """Though its main thread hangs."""
    assert "written" in ended[case][CASES[case][1]][1]


def _two_ranks() -> tuple[Watch, Watch]:
    """Two ranks' watches of which neither beats, as of ranks that ended or are held up."""
    store = dist.HashStore()
    return Watch(store, 0, 2, 0.1), Watch(store, 1, 2, 0.1)


def test_memory_that_runs_out_is_told_as_it_is_and_blames_nobody() -> None:
    """Also where the other ranks stand still, or run out of memory at the same time."""
    first, second = _two_ranks()
    for rank, watch in enumerate((first, second)):
        error = torch.OutOfMemoryError(f"no memory on {rank}")
        assert watch.tell(error) is error
    verdict = second.announce(Verdict(1, 1, "later"))
    assert (verdict.rank, verdict.what) == (0, "rank 0 ended with OutOfMemoryError: no memory on 0")


def test_another_runtime_error_beside_a_rank_that_stands_still_is_its_doing() -> None:
    told = _two_ranks()[0].tell(RuntimeError("connection closed"))
    assert isinstance(told, RankError) and told.verdict.rank == 1
    assert "rank 1 ended without a word, and a collective failed (connection closed)" in str(told)
