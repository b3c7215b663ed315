"""Writes files and folders that are complete whenever they have their names, even after a crash or a power cut.

Content is written under another name first (an aside), synced to the disk and renamed; then the folder that holds it is
synced. So nothing that is written or removed later reaches the disk before it. The next writer of the same name
replaces an aside that a crash left; `clean` removes all asides of a folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError

_WRITING, _REMOVING = ".writing-", ".removing-"  # in front of the name of what is written, or no longer wanted


def replace_file(path: Path) -> AbstractContextManager[Path]:
    """Yields the path of an empty file to write; at the end it becomes `path`. After an error `path` is unchanged."""
    return _replace(path, Path.touch)


def replace_folder(path: Path) -> AbstractContextManager[Path]:
    """Yields an empty folder to fill; at the end it replaces `path`. After an error `path` is unchanged.

    The old folder is renamed away before the new one gets its name: a crash between the two leaves no `path`.
    """
    return _replace(path, Path.mkdir)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, values: Any) -> None:
    """Writes indented JSON, as UTF-8."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError as `json_value`, and OSError if the file cannot be read."""
    return json_value(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file. Raises ValueError if the file holds anything else."""
    try:
        found = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {json.dumps(found)[:40]}")
    return found


def json_value(text: str) -> Any:
    """The value that `text` holds as JSON.

    Raises ValueError for malformed JSON, deep nesting, numbers of thousands of digits and halves of Unicode characters.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be written again
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error
    return value


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file in UTF-8, line by line."""
    with replace_file(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes an npy file."""
    with replace_file(path) as aside, aside.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)


def append_text(path: Path, text: str) -> None:
    """Adds `text` to the end of a file. It is durable after `sync`; a power cut before may leave zeros or a part."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Makes what was appended to a file durable."""
    _sync(path)
    _sync(path.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, durably, unless they exist."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def remove(path: Path) -> None:
    """Removes a file or folder, if it exists, by renaming it first: a crash leaves no part of it under its name."""
    doomed = path.with_name(f"{_REMOVING}{path.name}")
    _discard(doomed)
    try:
        _rename(path, doomed)
    except FileNotFoundError:
        return
    _sync(path.parent)
    _discard(doomed)


def clean(folder: Path, name: str = "*") -> None:
    """Removes what killed writers of `name` (a pattern) left in `folder`. No process may be writing it."""
    for leftover in (*folder.glob(f"{_WRITING}{name}"), *folder.glob(f"{_REMOVING}{name}")):
        _discard(leftover)


@contextmanager
def alone(path: Path) -> Iterator[BinaryIO]:
    """Opens a small file to read and overwrite while other processes wait for it; creates it empty if it is missing.

    Its content is not made durable. Raises OSError if `path` is a symbolic link.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # some network file systems have no such locks
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            if _is_named(file, path):  # else another process removed it while this one waited
                yield file
                return


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def before(operation: str, path: Path) -> None:
    """Called before every `sync`, `rename` and `discard` of a path. Tests replace it to simulate power cuts."""


@contextmanager
def _replace(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    make_folder(path.parent)
    aside, doomed = path.with_name(f"{_WRITING}{path.name}"), path.with_name(f"{_REMOVING}{path.name}")
    _discard(aside)
    _discard(doomed)
    create(aside)
    mode = aside.stat().st_mode & 0o666  # a new file's, by the umask; safetensors makes files of 0600
    try:
        with _named(path):
            yield aside
        for written in (*aside.rglob("*"), aside):
            if written.is_file():
                written.chmod(mode)
            _sync(written)
        if aside.is_dir() and path.is_dir():
            _rename(path, doomed)
        _rename(aside, path)
        _sync(path.parent)
    except BaseException:
        _discard(aside)
        if doomed.exists() and not path.exists():
            _rename(doomed, path)
        raise
    _discard(doomed)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what safetensors says of a full disk into the OSError that it is, with the name of what was written."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _rename(path: Path, target: Path) -> None:
    before("rename", path)
    os.replace(path, target)


def _sync(path: Path) -> None:
    before("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    before("discard", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
