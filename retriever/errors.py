"""The errors that a command tells in one line, and the exit status that each ends it with."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

RESUMES = "the same command goes on from the last checkpoint, if there is one yet (train.save_every)"
REFUSED, LOST, INTERRUPTED, PIPE_CLOSED, TERMINATED = 2, 3, 130, 141, 143  # exit statuses


class RefusedError(ValueError):
    """Settings, data or files that cannot be used. The message names what was received, what is expected and where to
    change it.
    """


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: what rank `rank` did, as rank `by` found it, and every rank's exit status."""

    rank: int
    by: int
    what: str
    status: int = LOST


class RankError(RuntimeError):
    """The run ends because of a rank. `speaks`: this rank should say so, being the first of its node, the lost one or
    its finder.
    """

    def __init__(self, verdict: Verdict, rank: int) -> None:
        lost = verdict.status == LOST
        super().__init__(f"{verdict.what}. The same command goes on from the last checkpoint" if lost else verdict.what)
        self.verdict = verdict
        self.speaks = os.environ.get("LOCAL_RANK", "0") == "0" or (lost and rank in (verdict.by, verdict.rank))


class Stopped(Exception):
    """A run that a signal stopped after saving step `step`, or 0 before its first; `status` is the exit status."""

    def __init__(self, number: int, step: int) -> None:
        saved = f"stopped after step {step:,}, which is saved. The same command goes on from there"
        before = "stopped before the end of step 1: there was nothing to save. The same command starts again"
        super().__init__(f"{signal.Signals(number).name}: {saved if step else before}")
        self.status = 128 + number
