"""Starts of the training command in forked processes, which have torch and everything else imported already."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.torture import phases
from tests.torture.phases import Kill

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.torture.commands"])
LIMIT_S = 240.0  # for one start, on a machine that does other things too


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


@dataclass(frozen=True)
class Disturbance:
    """What happens to a start: a kill, a fourth step that takes `hold_s` longer, files of `file_bytes` at most."""

    kill: Kill | None = None
    hold_s: float = 0.0
    file_bytes: int | None = None


UNDISTURBED = Disturbance()


def start(
    folder: Path,
    arguments: Sequence[str],
    *,
    command: str = "train",
    ranks: int = 1,
    logs: Path | None = None,
    limit_s: float = LIMIT_S,
    disturbance: Disturbance = UNDISTURBED,
) -> Start:
    """Starts a command of `tests.torture.commands` in `folder`; `logs`, by default it too, holds `log` and `phases`."""
    logs = logs or folder
    for needed in (folder, logs):
        needed.mkdir(parents=True, exist_ok=True)
    log = logs / "log"
    log.write_text("")
    (logs / "phases").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    inherited = {name: os.environ[name] for name in ("BIGBATCH_CACHE",) if name in os.environ}
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        of_rank = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        job = (command, list(arguments), folder, logs, inherited | of_rank, disturbance)
        processes.append(_SERVER.Process(target=_run, args=job))
        processes[-1].start()
    return Start(processes, log, time.monotonic() + limit_s)


def run(folder: Path, arguments: Sequence[str], *, command: str = "train", ranks: int = 1) -> Ended:
    """Starts a command and waits for its end."""
    return start(folder, arguments, command=command, ranks=ranks).wait()


def _run(
    command: str, arguments: list[str], folder: Path, logs: Path, environment: dict[str, str], disturbance: Disturbance
) -> None:
    from tests.determinism import make_strict
    from tests.torture.commands import MAINS

    output = os.open(logs / "log", os.O_WRONLY | os.O_APPEND)
    os.chdir(folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    make_strict()
    kill = disturbance.kill
    mine = kill is not None and kill.rank == int(environment.get("RANK", "0"))
    phases.watch(logs / "phases", kill if mine else None)
    if disturbance.hold_s:
        phases.hold_fourth_step(disturbance.hold_s)
    if disturbance.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.file_bytes, disturbance.file_bytes))
    status = 1
    try:
        status = MAINS[command](arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status)  # as in tests.distributed.processes
