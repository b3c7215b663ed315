"""Records from one file: JSON lines, a JSON list, CSV, TSV or Parquet, plain or gzipped, never held whole in memory."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

from retriever.data.records import DataError, Record

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_PIECE_CHARACTERS = 1 << 20
_LONGEST_JSON_CHARACTERS = 1 << 28
_SEPARATORS = re.compile(r"[\s,]*")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


class Table(Protocol):
    """A sequence of records that can be read again and again: a file or a Hugging Face dataset."""

    @property
    def label(self) -> str:
        """What messages call it."""

    def records(self) -> Iterator[Record]:
        """The records, in the order of the file."""

    def digest(self) -> str:
        """A hash of the content."""


class FileTable:
    """The records of one file. `columns` names the columns of a TSV file that has no header."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None, *, quoted: bool = False) -> None:
        """`quoted`: a TSV field may stand in quotation marks, those inside it doubled."""
        if not path.is_file():
            raise DataError("no such file", path)
        if kind_of(path) not in KINDS:
            raise DataError(f"expected a file ending in {', '.join(KINDS)}, or one of these with .gz", path)
        self.path = path
        self.columns = columns
        self.quoted = quoted

    @property
    def label(self) -> str:
        """The file's path."""
        return str(self.path)

    def records(self) -> Iterator[Record]:
        """The file's records. Raises DataError naming the line that cannot be read."""
        kind, path = kind_of(self.path), self.path
        if kind == ".parquet":
            yield from _parquet_records(path)
        elif kind == ".csv":
            yield from _csv_records(path)
        elif kind in (".tsv", ".txt"):
            yield from _tsv_records(path, self.columns, self.quoted)
        elif kind == ".json" and _first_character(path) == "[":
            yield from _json_list_records(path)
        else:
            yield from _json_line_records(path)

    def digest(self) -> str:
        """blake2b of the file's bytes, and whether fields are quoted."""
        with self.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return f"{digest} quoted" if self.quoted else digest


def kind_of(path: Path) -> str:
    """The ending that says how to read a file, `.gz` left out: `.jsonl` for both train.jsonl and train.jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).suffix


def stem_of(path: Path) -> str:
    """The file's name without its endings: `queries.train` for queries.train.tsv.gz."""
    return Path(path.name.removesuffix(".gz")).stem


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, gzipped or not. Only a newline ends a line.

    Raises DataError for a line that is not UTF-8 and for a damaged or truncated gzip file.
    """
    number = 0
    try:
        with _open_bytes(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text, received byte {error.object[error.start]:#x} at {error.start}", path, number) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"expected a complete gzip file: {error}", path, number + 1) from error


def _open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _first_character(path: Path) -> str:
    for _, line in read_lines(path):
        if line.strip():
            return line.strip()[0]
    return ""


def _record(value: Any, path: Path, line: int) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, received {str(value)[:60]!r}", path, line)
    return Record(value, str(path), line)


def _json_line_records(path: Path) -> Iterator[Record]:
    for number, line in read_lines(path):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"expected one JSON object on a line: {error.msg} at column {error.colno}; received {line[:60]!r}"
            raise DataError(message, path, number) from error
        yield _record(value, path, number)


def _json_list_records(path: Path) -> Iterator[Record]:
    """The objects of one JSON list (DPR's files are of many GB), decoded from a window that moves over the file."""
    decoder = json.JSONDecoder()
    line, ended = 1, False
    with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig") as stream:
        try:
            text = stream.read(_PIECE_CHARACTERS)
            at = text.index("[") + 1
            line += text.count("\n", 0, at)
            while True:
                start = _skip_separators(text, at)
                line += text.count("\n", at, start)
                if text[start : start + 1] == "]":
                    return
                try:
                    value, at = decoder.raw_decode(text, start)
                except json.JSONDecodeError as error:
                    if ended or len(text) - start > _LONGEST_JSON_CHARACTERS:
                        raise DataError(f"expected a JSON list of objects: {error.msg}", path, line + error.lineno - 1) from error
                    piece = stream.read(max(_PIECE_CHARACTERS, len(text) - start))
                    text, at, ended = text[start:] + piece, 0, not piece
                    continue
                yield _record(value, path, line)
                line += text.count("\n", start, at)
        except UnicodeDecodeError as error:
            raise DataError(f"expected UTF-8 text after this line: {error.reason}", path, line) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"expected a complete gzip file: {error}", path, line) from error


def _skip_separators(text: str, at: int) -> int:
    match = _SEPARATORS.match(text, at)
    return match.end() if match else at


def _csv_records(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a passage may be longer than the module's default of 131,072 characters
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), strict=True)
    try:
        header = next(reader, None)
        if header is not None:
            _check_columns(header, path)
        while header is not None:
            start = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if row:
                yield _row_record(header, row, path, start)
    except csv.Error as error:
        raise DataError(f"expected comma-separated values: {error}", path, reader.line_num) from error


def _tsv_records(path: Path, columns: Sequence[str] | None, quoted: bool) -> Iterator[Record]:
    """Rows split at tabs; unless they are `quoted`, quotation marks in a text are part of it."""
    for number, line in read_lines(path):
        if columns is None:
            columns = line.split("\t")
            _check_columns(columns, path)
        elif line:
            row = line.split("\t")
            yield _row_record(columns, [_unquoted(field) for field in row] if quoted else row, path, number)


def _unquoted(field: str) -> str:
    """The field without its quotation marks, if it is quoted as a whole."""
    return field[1:-1].replace('""', '"') if _QUOTED.fullmatch(field) else field


def _check_columns(columns: Sequence[str], path: Path) -> None:
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(f"expected columns of different names, received {twice!r} twice: {', '.join(columns)}", path, 1)


def _row_record(columns: Sequence[str], row: Sequence[str], path: Path, line: int) -> Record:
    if len(row) != len(columns):
        raise DataError(f"expected {len(columns)} columns ({', '.join(columns)}), received {len(row)}: {str(row)[:80]}", path, line)
    return Record(dict(zip(columns, row, strict=True)), str(path), line)


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    row += 1
                    yield Record(values, str(path), row, "row")
    except pa.ArrowException as error:
        raise DataError(f"expected a Parquet file: {error}", path, row + 1, "row") from error
