"""The errors that a command tells in one line, and the exit status that each ends it with."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
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


class Terminated(BaseException):
    """The process received SIGTERM."""


def told(error: BaseException, resumes: str, lower: str) -> tuple[int, str]:
    """(exit status, message); status 0 where the error is a bug."""
    after = f": {resumes}" if resumes else ""
    match error:
        case Stopped():
            return error.status, str(error)
        case RankError():
            return error.verdict.status, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, f"interrupted{after}"
        case Terminated():
            return TERMINATED, f"terminated{after}"
        case subprocess.CalledProcessError(cmd=command, returncode=status):
            return (
                status if status > 0 else 128 - status,
                f"{shlex.join(map(str, command[:6]))} … ended with status {status}",
            )
        case OSError(filename=str(name), strerror=str(reason)):
            return REFUSED, f"{name}: {reason}"
    if _out_of_memory(error):
        return REFUSED, f"out of memory: lower {lower} ({'. '.join(str(error).split('. ')[:2]) or 'no size given'})"
    return REFUSED if isinstance(error, (RefusedError, FloatingPointError, OSError)) else 0, str(error)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)))


def speaks(error: BaseException) -> bool:
    """What all ranks meet is told once a node; a file or memory that fails one of them, by that one."""
    if isinstance(error, RankError):
        return error.speaks
    return os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, OSError) or _out_of_memory(error)
