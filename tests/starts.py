"""Starts of commands in forked processes, which have torch and everything else imported already."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.determinism import make_strict

FORKSERVER = multiprocessing.get_context("forkserver")
# What the commands import, in part late; a process is forked from one that has imported it once.
FORKSERVER.set_forkserver_preload(
    [
        "transformers.models.bert.modeling_bert",
        "eval.beir",
        "eval.commands",
        "eval.search",
        "retriever.encode",
        "retriever.plan.report",
        "retriever.preflight",
        "retriever.run",
        "retriever.train",
        "retriever.verify",
        "scripts.mine_negatives",
        "scripts.mining.mine",
        "tests.distributed.processes",
    ]
)
LIMIT_S = 240.0  # for one start, on a machine that does other things too


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ended:
    """How a start ended: each rank's exit status, negative for a signal, and what all of them said."""

    statuses: list[int]
    said: str

    @property
    def finished(self) -> bool:
        """Whether every rank did."""
        return not any(self.statuses)


@dataclass
class Start:
    """A command that is running on one or several ranks."""

    processes: list[BaseProcess]
    log: Path
    limit: float  # of time.monotonic()

    def until(self, happened: Callable[[], bool]) -> None:
        """Returns once `happened`. Raises AssertionError where a rank ends before."""
        while not happened():
            ended = [process.exitcode for process in self.processes if process.exitcode is not None]
            assert not ended and time.monotonic() < self.limit, f"ended with {ended} before:\n{self.log.read_text()}"
            time.sleep(0.005)

    def says(self, line: str) -> None:
        """Returns once a rank has printed the line. Raises AssertionError where one ends before."""
        self.until(lambda: line in self.log.read_text().splitlines())

    def signal(self, number: int) -> None:
        """Sends a signal to every rank, as a terminal does."""
        for process in self.processes:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, *, together: bool = False) -> Ended:
        """The end of all ranks; with `together`, the first that a SIGKILL ends takes the others with it.

        Raises AssertionError, and ends them, where that takes too long.
        """
        left = list(self.processes)
        while left and (remaining := self.limit - time.monotonic()) > 0:
            multiprocessing.connection.wait([process.sentinel for process in left], remaining)
            if together and any(process.exitcode == -signal.SIGKILL for process in left):
                self.signal(signal.SIGKILL)
            left = [process for process in left if process.exitcode is None]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not left, f"{len(left)} of {len(self.processes)} ranks ran for too long:\n{self.log.read_text()}"
        return Ended([process.exitcode or 0 for process in self.processes], self.log.read_text(errors="replace"))


def nothing() -> None:
    """Does nothing."""


def start(
    folder: Path,
    arguments: Sequence[str],
    *,
    command: str = "retriever.train",
    ranks: int = 1,
    before: Callable[[], object] = nothing,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    limit_s: float = LIMIT_S,
) -> Start:
    """Starts `main` of the module `command` in `folder`, on every rank once the module-level function `before` (or a
    `partial` of one) was called. `log` receives what is printed, by default a file of that name in `folder`.
    """
    log = log or folder / "log"
    for needed in (folder, log.parent):
        needed.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    inherited = {name: os.environ[name] for name in ("BIGBATCH_CACHE",) if name in os.environ}
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        of_rank = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        variables = {**inherited, **of_rank, **(environment or {})}
        job = (command, list(arguments), folder, log, variables, before)
        processes.append(FORKSERVER.Process(target=_run, args=job))
        processes[-1].start()
    return Start(processes, log, time.monotonic() + limit_s)


def run(folder: Path, arguments: Sequence[str], *, command: str = "retriever.train", ranks: int = 1) -> Ended:
    """Starts a command and waits for its end."""
    return start(folder, arguments, command=command, ranks=ranks).wait()


def _run(
    command: str,
    arguments: list[str],
    folder: Path,
    log: Path,
    variables: dict[str, str],
    before: Callable[[], object],
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.chdir(folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    make_strict()
    before()
    status = 1
    try:
        status = importlib.import_module(command).main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status)  # as in tests.distributed.processes
