"""Checksums of an artefact's files: `checksums.json` in its folder, written before whatever says that the artefact is
finished.

XXH3 of 64 bits, which is as fast as memory is read (`datasets` brings it; CRC-32 and BLAKE2b take 5 and 10 times as
long). It finds what disks, copies and memory do to bits, not what a person changes on purpose. Large artefacts are read
through only where a file changed since this machine last did so: what it read is kept in `~/.cache/bigbatch`, or
$BIGBATCH_CACHE, by size and time of change.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from retriever.files import alone, make_folder, write_json

CHECKSUMS = "checksums.json"
_ALGORITHM = "xxh3_64"
_READ_BYTES, _READERS = 1 << 20, 4
_FORGOTTEN_AFTER_S = 90 * 24 * 3600
_STARTED = time.time()


def checksum(file: Path) -> str:
    """Of a file's content, 16 hexadecimal digits."""
    found, buffer = xxhash.xxh3_64(), memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def write_checksums(folder: Path, names: Iterable[str] | None = None, *, remembered: bool = False) -> None:
    """Records the checksums of the files `names` of `folder`; by default of all that it holds, folders in it included.

    `remembered`: this machine need not read them again to verify them; the folder keeps its name.
    """
    every = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    listed = sorted(every if names is None else names)
    with _memory(folder, remembered) as known, ThreadPoolExecutor(_READERS) as threads:
        found = dict(zip(listed, threads.map(checksum, (folder / name for name in listed)), strict=True))
        known |= {name: [*_seen(folder / name, value), time.time()] for name, value in found.items()}
    write_json(folder / CHECKSUMS, {"algorithm": _ALGORITHM, "files": found})


def _seen(file: Path, value: str) -> list[Any]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, value]


def damaged(folder: Path, *, remembered: bool = True, again: bool = False) -> dict[str, str]:
    """The files of `folder` that are not as they were written, and what is wrong with each; those that are missing too.

    Empty, after a notice, where the folder is of an earlier version and has no checksums. What this machine read before
    is not read again where it did not change; with `again`, only where it was read since this process started, by
    another rank say. With `remembered=False` everything is read.
    """
    try:
        expected = _recorded(folder)
    except ValueError as error:
        return {CHECKSUMS: f"is damaged ({error})"}
    if expected is None:
        _tell_once(f"{folder} is of an earlier version and has no checksums: its files are not verified")
        return {}

    def problem(name: str, known: dict[str, Any]) -> str | None:
        try:
            seen = _seen(folder / name, expected[name])
            *before, read_at = known.get(name, [0.0])
            if before == seen and (read_at > _STARTED or not again):
                return None
            found = checksum(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        if found != expected[name]:
            known.pop(name, None)
            return f"is damaged (its checksum is {found}; {expected[name]} was written)"
        known[name] = [*seen, time.time()]
        return None

    with _memory(folder, remembered) as known, ThreadPoolExecutor(_READERS) as threads:
        problems = threads.map(lambda name: problem(name, known), expected)
        return {name: found for name, found in zip(expected, problems, strict=True) if found is not None}


def _recorded(folder: Path) -> dict[str, str] | None:
    """File -> checksum; None where there are none. Raises ValueError where they cannot be used."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    files = written.get("files") if isinstance(written, dict) else None
    if not isinstance(files, dict) or written.get("algorithm") != _ALGORITHM:
        raise ValueError(f"expected a JSON object of {_ALGORITHM} checksums by file")
    if outside := next((name for name in files if Path(name).is_absolute() or ".." in Path(name).parts), None):
        raise ValueError(f"it names {outside}, which is outside its folder")
    return files


@cache
def _tell_once(note: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {note}", flush=True)


@contextmanager
def _memory(folder: Path, wanted: bool) -> Iterator[dict[str, Any]]:
    """File -> size, time of change, checksum and time when this machine last read it; of several processes one at a
    time reads.
    """
    with ExitStack() as stack:
        file = stack.enter_context(_opened(folder)) if wanted else None
        try:
            before = json.loads(file.read()) if file is not None else {}
        except ValueError:  # empty, or left by a kill: everything is read again
            before = {}
        known = dict(before)
        yield known
        if file is not None and known != before:
            file.truncate(0)
            file.seek(0)
            file.write(json.dumps(known).encode())


@contextmanager
def _opened(folder: Path) -> Iterator[BinaryIO | None]:
    everyone = (
        Path(os.environ.get("BIGBATCH_CACHE") or "~/.cache/bigbatch").expanduser() / "verified" / os.uname().nodename
    )
    with ExitStack() as stack:
        try:
            make_folder(everyone)
            for old in everyone.iterdir():
                if time.time() - old.stat().st_mtime > _FORGOTTEN_AFTER_S:
                    old.unlink()
            file = stack.enter_context(
                alone(everyone / f"{xxhash.xxh3_64_hexdigest(os.fsencode(folder.resolve()))}.json")
            )
        except OSError as error:
            _tell_once(
                f"which files were verified cannot be remembered ({error}): set BIGBATCH_CACHE to a folder that can be written"
            )
            file = None
        yield file
