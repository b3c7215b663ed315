"""Records from JSON, strictly: an object names a key once, a list separates its objects by commas and ends the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retriever.data.lines import LONGEST_RECORD_BYTES, read_lines, read_pieces
from retriever.data.records import DataError, Record, shown

_SPACE = re.compile(r"[ \t\r\n]*")
_CUT_OFF = 64  # characters before the end of a piece within which an error may be the piece's end


class JsonError(ValueError):
    """JSON that cannot be read. `position`: in characters, None if unknown. `cut_off`: the text may be incomplete."""

    def __init__(self, message: str, position: int | None = None, cut_off: bool = False) -> None:
        super().__init__(message)
        self.position, self.cut_off = position, cut_off


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise JsonError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and the position after it.

    Raises JsonError for malformed JSON, a key that stands twice in one object, deep nesting and endless numbers.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text) - _CUT_OFF or error.msg.startswith("Unterminated string")
        raise JsonError(error.msg, error.pos, cut_off) from error
    except RecursionError as error:
        raise JsonError("values nested too deeply") from error
    except JsonError:
        raise
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise JsonError("a number of too many digits") from error


def loads(text: str) -> Any:
    """The one JSON value that `text` holds. Raises JsonError as `decode`, and for anything after the value."""
    value, end = decode(text, _skip_space(text, 0))
    if (end := _skip_space(text, end)) != len(text):
        raise JsonError(f"Extra data {text[end : end + 20]!r}", end)
    return value


def line_records(path: Path) -> Iterator[Record]:
    """The objects of a file that holds one a line. Raises DataError naming the line that cannot be read."""
    for number, line in read_lines(path):
        if not line or line.isspace():
            continue
        try:
            value = loads(line)
        except JsonError as error:
            place = f" at column {error.position + 1}" if error.position is not None else ""
            message = f"expected one JSON object on a line: {error}{place}; received {line[:60]!r}"
            raise DataError(message, path, number) from error
        yield _record(value, path, number)


def is_list(path: Path) -> bool:
    """Whether the first character of the file, white space aside, begins a list."""
    return next((piece.lstrip()[0] for piece in read_pieces(path) if piece.strip()), "") == "["


def list_records(path: Path) -> Iterator[Record]:
    """The objects of the JSON list that a file holds. The file may be of many GB: a window moves over it.

    Raises DataError naming the line that cannot be read.
    """
    window = _Window(path)
    window.skip_space()
    window.expect("[", "a JSON list of objects")
    is_first = True
    while window.skip_space() != "]":
        if not is_first:
            window.expect(",", "a comma or the end of the list after an object")
            window.skip_space()
        yield window.record()
        is_first = False
    window.expect("]", "the end of the list")
    if window.skip_space():
        raise window.error("the end of the file after the list")


class _Window:
    """A part of a file's text, and the position in it that is read next."""

    def __init__(self, path: Path) -> None:
        self._path, self._pieces = path, read_pieces(path)
        self._text, self._at = "", 0
        self._line = 1  # of `_at`

    def skip_space(self) -> str:
        """Moves to the next character that is not white space and returns it, "" at the file's end."""
        while True:
            self._move(_skip_space(self._text, self._at))
            if self._at < len(self._text) or not self._extend():
                return self._text[self._at : self._at + 1]

    def expect(self, character: str, expected: str) -> None:
        """Moves past `character`. Raises DataError where another one stands here."""
        if self._text[self._at : self._at + 1] != character:
            raise self.error(expected)
        self._at += 1

    def record(self) -> Record:
        """Moves past the object that begins here and returns it."""
        line = self._line
        while True:
            size = len(self._text) - self._at
            try:
                value, end = decode(self._text, self._at)
            except JsonError as error:
                if error.cut_off and size > LONGEST_RECORD_BYTES:
                    raise self.error(f"an object of at most {LONGEST_RECORD_BYTES:,} characters") from error
                if error.cut_off and self._extend(at_least=size):
                    continue
                line += self._text.count("\n", self._at, error.position or self._at)
                raise DataError(f"expected a JSON list of objects: {error}", self._path, line) from error
            self._move(end)
            return _record(value, self._path, line)

    def error(self, expected: str) -> DataError:
        """A DataError at this position."""
        received = self._text[self._at : self._at + 60]
        return DataError(
            f"expected {expected}, received {received!r}" if received else f"expected {expected}",
            self._path,
            self._line,
        )

    def _move(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _extend(self, at_least: int = 1) -> bool:
        """Drops what was read and appends at least so many characters; returns whether there were any."""
        parts, added = [self._text[self._at :]], 0
        while added < at_least and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            added += len(piece)
        self._text, self._at = "".join(parts), 0
        return added > 0


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _record(value: Any, path: Path, line: int) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, received {shown(value)}", path, line)
    return Record(value, str(path), line)
