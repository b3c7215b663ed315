"""A short form of `make torture`: a few kills and signals of a run of two ranks, a full disk without root, and some
random bytes.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.torture.disks import limited
from tests.torture.fuzz import fuzz
from tests.torture.kills import Runs, kills
from tests.torture.launches import signalled


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torture") / "runs"


def test_two_ranks_that_are_killed_end_with_the_same_bits(root: Path) -> None:
    plan = ("first save", "evaluation", "publish of best")
    rows = list(kills(root, ranks=2, campaigns=1, seed=3, plan=plan))
    assert [row.failures for row in rows] == [[], [], []]
    assert sum(row.count for row in rows) == 3


def test_two_ranks_that_a_signal_stops_end_with_the_same_bits(root: Path) -> None:
    assert signalled(Runs(root), 2, signal.SIGTERM).failures == []


def test_a_file_that_may_not_grow_ends_the_run_in_one_line(root: Path) -> None:
    assert limited(Runs(root)) == []


def test_random_bytes_are_read_or_refused(tmp_path: Path) -> None:
    rows = list(fuzz(tmp_path, seconds=6, seed=1))
    assert [failure for row in rows for failure in row.failures] == []
    assert all(row.count > 0 for row in rows), rows  # a model folder takes seconds on a busy machine
