"""Decides which files a command may replace: those that an earlier one wrote, by their content."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

from eval.trec import TAG
from retriever.config_tree import ConfigError

_FIRST_LINE_BYTES = 1 << 16


def refuse_foreign(file: Path, ours: Callable[[Path], bool], instead: str = "another file (--output)") -> None:
    """Raises ConfigError if `file` exists and `ours` does not recognise it as written by a command."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; choose {instead}")
    if file.is_symlink() or (file.exists() and not ours(file)):
        raise ConfigError(f"{file} was not written by an evaluation; move it elsewhere, or choose {instead}")


def is_run(file: Path) -> bool:
    """Whether the first line is that of a run as `eval.trec` writes them; an empty file counts too."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            line = stream.readline(_FIRST_LINE_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error):  # not compressed, whatever its name says
        return False
    of_msmarco = line.count(b"\t") == 2 and line.endswith(b"\t1\n")
    return not line or line.split()[-1:] == [TAG.encode()] or of_msmarco


def is_result(*keys: str) -> Callable[[Path], bool]:
    """Whether a file holds a JSON object with these keys."""

    def holds(file: Path) -> bool:
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return holds
