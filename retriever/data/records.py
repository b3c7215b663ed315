"""What every format is read into: passages, examples, and records that name the place of a wrong field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retriever.errors import RefusedError

LONGEST_TEXT = 1 << 20  # characters: more tokens than any encoder takes
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # scores are kept as float32
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,9}", re.ASCII)
_SHORTENED: set[tuple[str, int, str]] = set()  # file, line and field of every text that was longer


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage as it stands in a file. `text` None: to be looked up by `id` in the source's corpus."""

    id: str | None
    text: str | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A query with its positives and negatives, any number of each; examples of one `query_id` are merged later.

    Scores (a teacher's, any unit) are empty or as many as the passages they belong to. `prompt` replaces the
    configured query prompt for this query; None keeps the configured one.
    """

    query_id: str
    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()
    prompt: str | None = None


class DataError(RefusedError):
    """Data that cannot be read as asked. The message begins with the file and the line (or row), where known."""

    def __init__(
        self, message: str, file: str | Path | None = None, line: int | None = None, unit: str = "line"
    ) -> None:
        place = ", ".join(
            [*([str(file)] if file is not None else []), *([f"{unit} {line}"] if line is not None else [])]
        )
        super().__init__(f"{place}: {message}" if place else message)
        self.reason = message
        self.file = file
        self.line = line


def final_text(passage: Passage, title: Literal["join", "drop"], separator: str) -> str:
    """The text a passage is known by: title + separator + text under `join`, unless the title is empty; else the text.

    Raises DataError for a passage whose text has not been looked up.
    """
    if passage.text is None:
        raise DataError(f"passage {passage.id!r}: its text has not been looked up in a corpus")
    return f"{passage.title}{separator}{passage.text}" if title == "join" and passage.title else passage.text


def is_blank(text: str) -> bool:
    """Whether the text is empty or white space alone: such a text is no query and no passage to train on."""
    return not text or text.isspace()


def shortened_note() -> str | None:
    """How many texts this process has met that were longer than LONGEST_TEXT, in words; None where there were none."""
    if not _SHORTENED:
        return None
    count = f"{len(_SHORTENED):,} texts" if len(_SHORTENED) > 1 else "1 text"
    file, line, field = min(_SHORTENED)
    return f"{count} of more than {LONGEST_TEXT:,} characters cut in the middle to that length; the first: {file}, {line}, field {field!r}"


def shown(value: Any) -> str:
    """A value as messages show it, at most 80 characters."""
    try:
        text = repr(value[:100] if isinstance(value, str) else value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file with its place; the accessors return a checked value or raise a DataError naming the
    field.
    """

    values: Mapping[str, Any]
    file: str
    line: int
    unit: str = "line"
    within: str = ""  # the field this record is a part of, e.g. positive_passages[2]

    def error(self, field: str, expected: str, received: Any) -> DataError:
        """A DataError: `file, line n: field f: expected ..., received ...`."""
        name = f"{self.within}.{field}" if self.within else field
        return DataError(
            f"field {name!r}: expected {expected}, received {shown(received)}", self.file, self.line, self.unit
        )

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def text(self, *names: str, empty: bool = True) -> str:
        """The text under the first of `names` that is there."""
        value = self._first(names)
        if not isinstance(value, str):
            raise self.error(self.name_of(names), "text", value)
        if not empty and is_blank(value):
            raise self.error(self.name_of(names), "text that is not blank", value)
        if value.isascii() and len(value) <= LONGEST_TEXT:
            return value
        return self._text(self.name_of(names), value)

    def identifier(self, *names: str) -> str:
        """The id under the first of `names` that is there: text or a whole number."""
        value = self._first(names)
        return (
            value
            if type(value) is str and value and value.isascii()
            else self._as_identifier(self.name_of(names), value)
        )

    def word(self, *names: str) -> str:
        """An id as `identifier`, without white space, which separates the fields of a run file."""
        value = self.identifier(*names)
        if len(value.split()) != 1 or value != value.strip():
            raise self.error(
                self.name_of(names), "an id without white space, which separates the fields of a run file", value
            )
        return value

    def whole_number(self, *names: str) -> int:
        """The whole number of at most 9 digits under the first of `names` that is there, or the text of one."""
        value = self._first(names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not _WHOLE_NUMBER.fullmatch(str(value)):
            raise self.error(self.name_of(names), "a whole number of at most 9 digits", value)
        return int(value)

    def optional_text(self, name: str) -> str:
        """The text under `name`, or "" where it is missing or null."""
        return self.text(name) if self.has(name) else ""

    def require(self, name: str, expected: str) -> None:
        """Raises DataError where the field is missing or null."""
        if not self.has(name):
            raise self.error(name, expected, None) if name in self.values else self._missing(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts; a missing field is an empty list."""
        values = self._list(name)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(f"{name}[{i}]", "text", value)
        return [self._text(f"{name}[{i}]", value) for i, value in enumerate(values)]

    def identifiers(self, name: str) -> list[str]:
        """A list of ids; a missing field is an empty list."""
        return [self._as_identifier(f"{name}[{i}]", value) for i, value in enumerate(self._list(name))]

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers; a missing or empty list is an empty tuple."""
        values = self._list(name)
        for i, value in enumerate(values):
            if (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _FLOAT32_MAX
            ):  # NaN is not either
                raise self.error(f"{name}[{i}]", "a finite number", value)
        if values and len(values) != count:
            raise self.error(name, f"{count} numbers, one for each passage", values)
        return tuple(float(value) for value in values)

    def children(self, name: str) -> Iterator[Record]:
        """The records of a list field; a missing field has none."""
        for i, value in enumerate(self._list(name)):
            if not isinstance(value, Mapping):
                raise self.error(f"{name}[{i}]", "a mapping with the passage's text", value)
            yield Record(value, self.file, self.line, self.unit, f"{name}[{i}]")

    def _first(self, names: tuple[str, ...]) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if not any(name in self.values for name in names):
            raise self._missing(*names)
        return None

    def _missing(self, *names: str) -> DataError:
        place = f" in {self.within}" if self.within else ""
        expected, received = " or ".join(map(repr, names)), ", ".join(map(str, self.values))
        return DataError(
            f"field {names[0]!r} is missing{place}: expected {expected}, received fields {received}",
            self.file,
            self.line,
            self.unit,
        )

    def name_of(self, names: tuple[str, ...]) -> str:
        """The first of `names` that is there and not null, else the first that is there, else the first of all."""
        return next(
            (name for name in names if self.has(name)), next((name for name in names if name in self.values), names[0])
        )

    def _as_identifier(self, field: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self.error(field, "an id (text or a whole number)", value)
        return self._unicode(field, str(value))

    def _text(self, field: str, value: str) -> str:
        """The text, checked; of one longer than LONGEST_TEXT its beginning and its end, since tokenizers truncate on
        either side.
        """
        if len(value) > LONGEST_TEXT:
            _SHORTENED.add((self.file, self.line, f"{self.within}.{field}" if self.within else field))
            value = value[: LONGEST_TEXT // 2] + value[-LONGEST_TEXT // 2 :]
        return value if value.isascii() else self._unicode(field, value)

    def _unicode(self, field: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half a character, as JSON's \ud83d: no tokenizer takes it
            raise self.error(field, f"Unicode text without the lone surrogate at {error.start}", value) from error
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(name, "a list", value)
        return value
