"""Valid small files with random changes, read by everything that reads such files.

A finding is an error that no command tells in one line, a read that takes too long, or one that takes too much memory.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture.page import Row

_HANGS_S, _MEMORY_MIB = 20, 1024
_TOKENS = (
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\n",
        b"\r\n",
        b"\t",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1",
        b"0",
        b"1_0",
        b"9" * 5000,
        b"[" * 5000,
        b"\\ud800",
        b'""',
        b"{}",
    ),
    *(
        b"../../x",
        b"/etc/passwd",
        b"&a [*a, *a]",
        b"!!python/object:x {}",
        b"${a}",
        b"<<: *a",
        b" " * 70000,
        b"18446744073709551616",
    ),
)


@dataclass(frozen=True)
class Target:
    """A reader of one file in a folder that `make` fills."""

    name: str
    files: tuple[str, ...]  # patterns; one file is changed at a time
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def fuzz(root: Path, *, seconds: float, seed: int) -> Iterator[Row]:
    """A row for each reader, which gets its share of `seconds` of processor time."""
    from tests.torture.readers import TARGETS

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.torture.readers"])
    for number, target in enumerate(TARGETS):
        folder = root / f"fuzz-{number}"
        folder.mkdir(parents=True)
        process = context.Process(target=_work, args=(number, folder, seconds / len(TARGETS), seed))
        process.start()
        process.join()
        yield _judge(target, folder, process.exitcode)


def _judge(target: Target, folder: Path, status: int | None) -> Row:
    results = folder / "results.json"
    if not results.exists():
        return Row(target.name, 0, "", [f"the reader's process ended with status {status}; its input is in {folder}"])
    found: dict[str, Any] = json.loads(results.read_text())
    seen = (
        f"{found['read']:,} read, {found['refused']:,} refused in one line; {found['seconds']:.0f} s of processor time"
    )
    return Row(target.name, found["read"] + found["refused"], seen, [*found["findings"].values()])


def _work(number: int, folder: Path, seconds: float, seed: int) -> None:
    from tests.torture.readers import TARGETS

    target, draw = TARGETS[number], random.Random(f"{seed} {number}")
    whole, work = folder / "whole", folder / "work"
    whole.mkdir()
    target.make(whole)
    target.read(whole)  # it is valid
    found: dict[str, Any] = {"read": 0, "refused": 0, "findings": {}}
    signal.signal(signal.SIGALRM, _too_long)
    started = time.process_time()
    while time.process_time() - started < seconds:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        file = draw.choice(sorted(work.glob(draw.choice(target.files))))
        file.write_bytes(_changed(file.read_bytes(), draw))
        _read(target, work, file, found)
    found["seconds"] = time.process_time() - started
    (folder / "results.json").write_text(json.dumps(found))


def _read(target: Target, work: Path, file: Path, found: dict[str, Any]) -> None:
    from retriever.errors import told

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(_HANGS_S)
    try:
        target.read(work)
        found["read"] += 1
    except BaseException as error:
        signal.alarm(0)
        status, line = told(error, "", "")
        found["refused"] += 1
        if not status or "\n" in line.strip():
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}"
            _keep(work, file, found, where, f"{str(error)[:200]!r}")
    finally:
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > _MEMORY_MIB << 10:
        _keep(work, file, found, "memory", f"{grown >> 10} MiB")


def _keep(work: Path, file: Path, found: dict[str, Any], where: str, what: str) -> None:
    """Records the first finding of each place, with its input."""
    if where not in found["findings"]:
        saved = work.with_name(f"finding-{len(found['findings'])}")
        shutil.copytree(work, saved)
        found["findings"][where] = f"{file.name}: {where}: {what}; {saved}"


def _too_long(*_: object) -> None:
    raise _Hang


class _Hang(BaseException):
    """A read that takes too long."""


def _changed(content: bytes, draw: random.Random) -> bytes:
    """A few random changes of a file."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 64)))
        match draw.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                data[at:end] = draw.choice(_TOKENS)
            case 2:
                data[at:at] = draw.choice(_TOKENS)
            case 3:
                del data[at:end]
            case 4:
                start = draw.randrange(len(data) + 1)
                data[at:at] = data[start : start + draw.choice((1, 16, 256))]
            case _:
                del data[at:]
    return bytes(data)
