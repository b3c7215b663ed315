"""The common form of all data formats: passages, examples, and records that name the place of a wrong field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retriever.errors import RefusedError
from retriever.wording import counted

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
    """Data that cannot be read as asked. The message, in one line, begins with the file and the line (or row)."""

    def __init__(
        self, message: str, file: str | Path | None = None, line: int | None = None, unit: str = "line"
    ) -> None:
        place = "" if file is None else str(file)
        if line is not None:
            place += f", {unit} {line}"
        told = f"{place}: {message}" if place else message
        super().__init__(" ".join(told.splitlines()))  # it may quote names that hold line breaks


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
    """A sentence with the number of texts over LONGEST_TEXT that this process has cut; None if there were none."""
    if not _SHORTENED:
        return None
    file, line, field = min(_SHORTENED)
    texts = f"{counted(len(_SHORTENED), 'text')} of more than {LONGEST_TEXT:,} characters"
    return f"{texts} cut in the middle to that length; the first: {file}, {line}, field {field!r}"


def shown(value: Any) -> str:
    """A value as messages show it, at most 80 characters."""
    try:
        text = repr(value[:100] if isinstance(value, str) else value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it is in a file. The accessors check a value or raise a DataError naming the field."""

    values: Mapping[str, Any]
    file: str
    line: int
    unit: str = "line"
    within: str = ""  # the field this record is a part of, e.g. positive_passages[2]

    def error(self, field: str, expected: str, received: Any) -> DataError:
        """A DataError: `file, line n: field f: expected ..., received ...`."""
        return self.refusal(f"field {self._full_name(field)!r}: expected {expected}, received {shown(received)}")

    def refusal(self, message: str) -> DataError:
        """A DataError that begins with the place of this record."""
        return DataError(message, self.file, self.line, self.unit)

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def text(self, *names: str, empty: bool = True) -> str:
        """The text under the first of `names` that is there."""
        name, value = self.first_of(names)
        text = self._as_text(name, value)
        if not empty and is_blank(text):
            raise self.error(name, "text that is not blank", value)
        return text

    def identifier(self, *names: str) -> str:
        """The id under the first of `names` that is there: text or a whole number."""
        return self._as_identifier(*self.first_of(names))

    def word(self, *names: str) -> str:
        """An id as `identifier`, without white space, which separates the fields of a run file."""
        value = self.identifier(*names)
        if value.split() != [value]:
            expected = "an id without white space, which separates the fields of a run file"
            raise self.error(self.first_of(names)[0], expected, value)
        return value

    def whole_number(self, *names: str) -> int:
        """The whole number of at most 9 digits under the first of `names` that is there, or the text of one."""
        name, value = self.first_of(names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not _WHOLE_NUMBER.fullmatch(str(value)):
            raise self.error(name, "a whole number of at most 9 digits", value)
        return int(value)

    def optional_text(self, name: str) -> str:
        """The text under `name`, or "" where it is missing or null."""
        return self.text(name) if self.has(name) else ""

    def texts(self, name: str, *, required: bool = False) -> list[str]:
        """A list of texts. A missing field is an empty list, unless it is `required`."""
        values = self._list(name, "a list of texts" if required else None)
        return [self._as_text(f"{name}[{i}]", value) for i, value in enumerate(values)]

    def identifiers(self, name: str) -> list[str]:
        """A list of ids; a missing field is an empty list."""
        return [self._as_identifier(f"{name}[{i}]", value) for i, value in enumerate(self._list(name))]

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers; a missing or empty list is an empty tuple."""
        values = self._list(name)
        for i, value in enumerate(values):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not abs(value) <= _FLOAT32_MAX:  # NaN is not either
                raise self.error(f"{name}[{i}]", "a finite number", value)
        if values and len(values) != count:
            raise self.error(name, f"{count} numbers, one for each passage", values)
        return tuple(map(float, values))

    def children(self, name: str, *, required: bool = False) -> Iterator[Record]:
        """The records of a list of passages. A missing field has none, unless it is `required`."""
        for i, value in enumerate(self._list(name, "a list of passages" if required else None)):
            if not isinstance(value, Mapping):
                raise self.error(f"{name}[{i}]", "a mapping with the passage's text", value)
            yield Record(value, self.file, self.line, self.unit, f"{name}[{i}]")

    def first_of(self, names: Sequence[str]) -> tuple[str, Any]:
        """The first of `names` whose field is not null, else the first whose field is there, and the field's value.

        Raises DataError where there is none.
        """
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        there = next((name for name in names if name in self.values), None)
        if there is None:
            place, expected = f" in {self.within}" if self.within else "", " or ".join(map(repr, names))
            received = ", ".join(map(str, self.values))
            message = f"field {names[0]!r} is missing{place}: expected {expected}, received fields {received}"
            raise self.refusal(message)
        return there, None

    def _as_identifier(self, field: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self.error(field, "an id (text or a whole number)", value)
        return self._unicode(field, str(value))

    def _as_text(self, field: str, value: Any) -> str:
        """The text. Of one longer than LONGEST_TEXT the beginning and the end: tokenizers truncate on either side."""
        if not isinstance(value, str):
            raise self.error(field, "text", value)
        if len(value) > LONGEST_TEXT:
            _SHORTENED.add((self.file, self.line, self._full_name(field)))
            value = value[: LONGEST_TEXT // 2] + value[-LONGEST_TEXT // 2 :]
        return self._unicode(field, value)

    def _unicode(self, field: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half a character, as JSON's \ud83d: no tokenizer takes it
            raise self.error(field, f"Unicode text without the lone surrogate at {error.start}", value) from error
        return value

    def _list(self, name: str, required: str | None = None) -> list[Any]:
        """The list under `name`, empty where it is missing or null, unless `required` says what is expected."""
        value = self.values.get(name)
        if value is None and required is None:
            return []
        if not isinstance(value, list):
            self.first_of([name])  # raises where the field is missing
            raise self.error(name, required if value is None and required else "a list", value)
        return value

    def _full_name(self, field: str) -> str:
        return f"{self.within}.{field}" if self.within else field
