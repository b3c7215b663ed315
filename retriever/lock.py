"""Who works in a folder. A lock file names the process: of two starts of one command, one runs and the other is refused
by name.

A lock whose process is gone is taken over: at once on the machine where it ran, where a process that has its number
since is told by its start, and elsewhere a minute after its last heartbeat.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from retriever.errors import REFUSED, RefusedError
from retriever.files import alone, make_folder

LOCK = ".lock"  # in a folder that is worked in
_BEAT_S, _STALE_S, _POLL_S = 10.0, 60.0, 0.2
_PROC, _UUID = Path("/proc"), 36  # characters


class LockedError(RefusedError):
    """Another process works there; the message names it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str  # its own number; this, the next and `started` are empty where they are not known
    boot: str  # when it was started, and a container's own numbering of processes
    pid: int
    started: str  # in ticks of that boot
    since: float  # seconds since 1970: when it took the lock

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"


_held: dict[Path, Holder] = {}  # by this process


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made where there is none, and removed at the end if it holds nothing. Raises
    LockedError.
    """
    new = not folder.exists()
    make_folder(folder)
    try:
        with locked(folder / LOCK, str(folder)):
            yield
    finally:
        if new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, whose folder is there, while `what` is worked on.

    Raises LockedError where another process holds it; with `wait` it says so and waits for that one to end.
    """
    here = _this_process()
    waiting = False
    while (holder := _take(path, here)) is not None:
        if not wait:
            raise LockedError(f"{what} is in use by {holder}: wait until it ends, end it, or choose another folder")
        if not waiting:
            print(f"{what} is built by {holder}: waiting for it", flush=True)
        waiting = True
        time.sleep(_POLL_S)
    _held[path] = here
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, what, here, done), name="heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        del _held[path]
        _release(path, here)


def release_all() -> None:
    """Gives up every lock of this process, which is about to end without leaving its `with` blocks."""
    for path, here in list(_held.items()):
        _release(path, here)


def _take(path: Path, here: Holder) -> Holder | None:
    """Writes `here` into the lock file unless a process holds it, which is returned."""
    with alone(path) as file:
        holder = _read(file)
        if holder is not None and not _is_stale(holder, file, path.parent):
            return holder
        file.truncate(0)
        file.seek(0)
        file.write(json.dumps(asdict(here)).encode())
    return None


def _release(path: Path, here: Holder) -> None:
    if path.exists():
        with alone(path) as file:
            if _read(file) == here:
                path.unlink()


def _beat(path: Path, what: str, here: Holder, done: threading.Event) -> None:
    """Renews the lock's time. A process that was held up so long that another has the lock by now ends, for it must
    write no more.
    """
    while not done.wait(_BEAT_S):
        try:
            with path.open("rb") as file:
                holder = _read(file)
                if holder == here:
                    os.utime(path)
        except OSError:  # a network file system that is away, or a folder that was removed: whatever needs it says so
            continue
        if holder != here:
            print(
                f"error: {what} was taken over by {holder} while this process was held up", file=sys.stderr, flush=True
            )
            os._exit(REFUSED)


def _read(file: BinaryIO) -> Holder | None:
    """The holder, or None where there is none: a killed process or a power cut can leave a file without content."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _is_stale(holder: Holder, file: BinaryIO, folder: Path) -> bool:
    here = _this_process()
    if holder.boot and holder.boot == here.boot:
        return not _runs(holder)
    if (
        holder.machine
        and (holder.host, holder.machine) == (here.host, here.machine)
        and holder.boot[:_UUID] != here.boot[:_UUID]
    ):
        return True  # it was started anew since
    with tempfile.TemporaryFile(dir=folder) as now:  # by the clock of the file system, which all machines share
        return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime > _STALE_S


def _runs(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another person's, whose start may be hidden
        return _started(holder.pid) in (holder.started, "")
    return _started(holder.pid) == holder.started


def _this_process() -> Holder:
    boot, machine = _PROC / "sys/kernel/random/boot_id", Path("/etc/machine-id")
    numbered = f"{boot.read_text().strip()} {os.readlink(_PROC / 'self/ns/pid')}" if boot.exists() else ""
    known = machine.read_text().strip() if machine.exists() else ""
    return Holder(os.uname().nodename, known, numbered, os.getpid(), _started(os.getpid()), time.time())


def _started(pid: int) -> str:
    """When a process of this machine started; empty where that is not to be seen, or it only waits for its parent to
    note its end.
    """
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]
