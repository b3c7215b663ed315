"""Checksums of an artefact's files, in `checksums.json` in its folder. It is written before the artefact's manifest.

The checksum is XXH3 of 64 bits, which is as fast as memory is read (`datasets` brings it; CRC-32 and BLAKE2b take 5 and
10 times as long). It finds errors of disks, copies and memory, not changes on purpose. Each machine remembers the size
and modification time of the files that it verified, in `~/.cache/bigbatch` or $BIGBATCH_CACHE, and reads a large file
again only if they changed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from retriever.files import alone, make_folder, read_object, write_json
from retriever.screen import say

CHECKSUMS = "checksums.json"
_ALGORITHM = "xxh3_64"
_READ_BYTES, _READERS = 1 << 20, 4
_FORGOTTEN_AFTER_S = 90 * 24 * 3600
_STARTED = time.time()


def own_cache() -> Path:
    """The folder for what one user needs again: $BIGBATCH_CACHE, or `~/.cache/bigbatch`."""
    return Path(os.environ.get("BIGBATCH_CACHE") or "~/.cache/bigbatch").expanduser()


def checksum(file: Path) -> str:
    """XXH3 of a file's content, in 16 hexadecimal digits."""
    found, buffer = xxhash.xxh3_64(), memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def write_checksums(folder: Path, names: Iterable[str] | None = None, *, remembered: bool = False) -> None:
    """Records the checksums of the files `names` of `folder`; by default of all its files, those of sub-folders too.

    With `remembered`, they count as verified on this machine. The folder must have its final name then.
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
    """The missing or changed files of `folder`, and what is wrong with each.

    By default a file is not read again if this machine verified it before and its size and time did not change. With
    `again` that holds only for files verified since this process started (by another rank, for example), and with
    `remembered=False` every file is read. If an earlier version wrote the folder, it has no checksums: prints a notice
    and returns nothing.
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


def unfinish(folder: Path, manifest: str, *, goes_on: bool) -> None:
    """Removes the manifest and the checksums of a folder that is worked on again, and, where the same work goes on,
    the files that are damaged, so that they are made again.
    """
    if goes_on and (folder / CHECKSUMS).exists():
        for name in damaged(folder):
            (folder / name).unlink(missing_ok=True)
    for name in (manifest, CHECKSUMS):
        (folder / name).unlink(missing_ok=True)


def _recorded(folder: Path) -> dict[str, str] | None:
    """File -> checksum; None if the folder has no checksums. Raises ValueError if they cannot be used."""
    if (written := read_object(folder / CHECKSUMS)) is None:
        return None
    files = written.get("files")
    if not isinstance(files, dict) or written.get("algorithm") != _ALGORITHM:
        raise ValueError(f"expected a JSON object of {_ALGORITHM} checksums by file")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            raise ValueError(f"it names {name!r}, which is no file of its folder")
    return files


@cache
def _tell_once(note: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"note: {note}")


@contextmanager
def _memory(folder: Path, wanted: bool) -> Iterator[dict[str, Any]]:
    """File -> size, modification time, checksum and when this machine read it. One process at a time holds it.

    Nothing is remembered, after a notice, if the cache cannot be written.
    """
    with ExitStack() as stack:
        before: dict[str, Any] = {}
        file = None
        try:
            file = stack.enter_context(alone(_memory_of(folder))) if wanted else None
            before = json.loads(file.read()) if file is not None else {}
        except OSError as error:
            _tell_once(f"cannot remember which files were verified ({error}): set BIGBATCH_CACHE to a writable folder")
        except ValueError:
            pass  # empty, or left by a kill: everything is read again
        known = dict(before)
        yield known
        if file is not None and known != before:
            file.truncate(0)
            file.seek(0)
            file.write(json.dumps(known).encode())


def _memory_of(folder: Path) -> Path:
    """The file that remembers what was verified of `folder`; removes those that were not used for long."""
    memories = own_cache() / "verified" / os.uname().nodename
    make_folder(memories)
    for memory in memories.iterdir():
        with suppress(FileNotFoundError):  # another process removed it
            if time.time() - memory.stat().st_mtime > _FORGOTTEN_AFTER_S:
                memory.unlink()
    return memories / f"{xxhash.xxh3_64_hexdigest(os.fsencode(folder.resolve()))}.json"
