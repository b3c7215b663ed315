"""A lock file in a folder names the process that works there. A second process is refused with that name.

A process takes over a lock whose holder is gone. On the holder's machine it does so at once: it compares the start time
of the process of that number with the holder's, since numbers are used again. On another machine it does so when the
holder's last heartbeat is a minute old.
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
from retriever.screen import say

LOCK = ".lock"  # the name of a folder's lock file
_BEAT_S, _STALE_S, _POLL_S = 10.0, 60.0, 0.2
_PROC = Path("/proc")
_UUID_LENGTH = 36  # characters


class LockedError(RefusedError):
    """Another process holds the lock; the message names it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str  # /etc/machine-id; this, `boot` and `started` are empty where the system does not tell
    boot: str  # the id of the machine's boot, and of the process's PID namespace
    pid: int
    started: str  # when the process started, in ticks since that boot
    since: float  # when it took the lock, in seconds since 1970

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"


_held: dict[Path, Holder] = {}  # by this process


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder; makes the folder if it is missing, and removes it again if it is left empty.

    Raises LockedError if another process holds the lock.
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
    """Holds the lock file `path`, in an existing folder, which protects `what`.

    If another process holds it, raises LockedError; with `wait`, says so and waits until that process ends.
    """
    here = _this_process()
    waiting = False
    while (holder := _take(path, here)) is not None:
        if not wait:
            raise LockedError(f"{what} is in use by {holder}: wait until it ends, end it, or choose another folder")
        if not waiting:
            say(f"{what} is built by {holder}: waiting for it")
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
    """Gives up every lock of this process, which is about to end by `os._exit`."""
    for path, here in list(_held.items()):
        _release(path, here)


def _take(path: Path, here: Holder) -> Holder | None:
    """Writes `here` into the lock file, or returns the process that holds it."""
    with alone(path) as file:
        holder = _read(file)
        if holder is not None and not _is_stale(holder, file, path.parent):
            return holder
        file.truncate(0)
        file.seek(0)
        file.write(json.dumps(asdict(here)).encode())
    return None


def _release(path: Path, here: Holder) -> None:
    with suppress(FileNotFoundError), alone(path) as file:  # a person may have removed the folder
        if _read(file) in (here, None):
            path.unlink()


def _beat(path: Path, what: str, here: Holder, done: threading.Event) -> None:
    """Renews the lock's time every few seconds.

    If this process was suspended so long that another one took the lock, it must not write any more: it exits.
    """
    while not done.wait(_BEAT_S):
        try:
            with path.open("rb") as file:
                holder = _read(file)
                if holder == here:
                    os.utime(path)
        except OSError:  # the file system is away or the folder was removed: the next write there fails and says so
            continue
        if holder not in (here, None):  # None: another process is writing its name
            error = f"error: {what} was taken over by {holder} while this process was suspended"
            print(error, file=sys.stderr, flush=True)
            os._exit(REFUSED)


def _read(file: BinaryIO) -> Holder | None:
    """The holder, or None if the file names none: a kill or a power cut can leave it empty."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _is_stale(holder: Holder, file: BinaryIO, folder: Path) -> bool:
    here = _this_process()
    if holder.boot and holder.boot == here.boot:
        return not _runs(holder)
    same_machine = holder.machine and (holder.host, holder.machine) == (here.host, here.machine)
    if same_machine and holder.boot[:_UUID_LENGTH] != here.boot[:_UUID_LENGTH]:
        return True  # the machine was rebooted
    with tempfile.TemporaryFile(dir=folder) as now:  # by the file system's clock, which all machines share
        return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime > _STALE_S


def _runs(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process, whose start time may be hidden
        return _started(holder.pid) in (holder.started, "")
    return _started(holder.pid) == holder.started


def _this_process() -> Holder:
    boot, machine = _PROC / "sys/kernel/random/boot_id", Path("/etc/machine-id")
    numbered = f"{boot.read_text().strip()} {os.readlink(_PROC / 'self/ns/pid')}" if boot.exists() else ""
    known = machine.read_text().strip() if machine.exists() else ""
    return Holder(os.uname().nodename, known, numbered, os.getpid(), _started(os.getpid()), time.time())


def _started(pid: int) -> str:
    """When a process of this machine started; empty if that is hidden, or the process is a zombie."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]
