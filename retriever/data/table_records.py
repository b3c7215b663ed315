"""Records from tables: CSV, TSV, Parquet and the Arrow batches of Hugging Face `datasets`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retriever.data.lines import LONGEST_RECORD_BYTES, read_lines
from retriever.data.records import DataError, Record

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def csv_records(path: Path) -> Iterator[Record]:
    """Rows under a header, separated by commas, or by semicolons where the header has them and no comma."""
    csv.field_size_limit(LONGEST_RECORD_BYTES)  # a quotation mark that is never closed would take the whole file
    first = next((line for _, line in read_lines(path)), "")
    delimiter = ";" if ";" in first and "," not in first else ","
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        check_columns(header, path)
        start = reader.line_num + 1
        for row in reader:
            if row:
                yield _row_record(header, row, path, start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"expected comma-separated values: {error}", path, reader.line_num) from error


def tsv_records(
    path: Path, columns: Sequence[str] | None, quoted: bool, separator: str | None = "\t"
) -> Iterator[Record]:
    """Rows split at tabs (None: at white space), under `columns` or else under a header.

    Quotation marks in a text are part of it, with two exceptions: where all fields are `quoted` (DPR's passages); and
    under a header, where a whole field is quoted and doubles the marks inside or holds nothing else, as only a table's
    writer does.
    """
    unquotes_doubled = columns is None
    for number, line in read_lines(path):
        row = line.split(separator)
        if columns is None:
            columns = row
            check_columns(columns, path)
        elif line:
            if '"' in line and (quoted or unquotes_doubled):
                row = [_unquoted(field) if quoted or '""' in field else field for field in row]
            yield _row_record(columns, row, path, number)


def check_columns(columns: Sequence[str], path: Path) -> None:
    """Raises DataError where two columns have one name."""
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(f"expected columns of different names, received {twice!r} twice: {', '.join(columns)}", path, 1)


def _unquoted(field: str) -> str:
    """The field without its quotation marks, if it is quoted as a whole."""
    return field[1:-1].replace('""', '"') if _QUOTED.fullmatch(field) else field


def _row_record(columns: Sequence[str], row: Sequence[str], path: Path, line: int) -> Record:
    if len(row) != len(columns):
        expected = f"{len(columns)} columns ({', '.join(columns)})"
        raise DataError(f"expected {expected}, received {len(row)}: {str(row)[:80]}", path, line)
    return Record(dict(zip(columns, row, strict=True)), str(path), line)


BATCH_ROWS = 4096


def parquet_records(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file. Raises DataError naming the row where the file is damaged."""
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, path)
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    return batch_records(batches(), str(path), "a Parquet file")


def batch_records(batches: Iterable[Any], label: str, what: str) -> Iterator[Record]:
    """The rows of record batches, numbered from 1. Raises DataError where a batch cannot be read from `what`."""
    import pyarrow as pa

    row = 0
    try:
        for batch in batches:
            for values in _rows(batch, label, row):
                row += 1
                yield Record(values, label, row, "row")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for a column whose name is not UTF-8
        raise DataError(f"expected {what} that is whole: {first_line(error)}", label, row + 1, "row") from error


def _rows(batch: Any, label: str, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        row, name, wrong = next(_undecodable(batch))
        raise DataError(
            f"field {name!r}: expected UTF-8 text, received {wrong}", label, before + row + 1, "row"
        ) from error


def _undecodable(batch: Any) -> Iterator[tuple[int, str, str]]:
    """(row, column, what is wrong) of every value that is no UTF-8."""
    for row in range(len(batch)):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column[row].as_py()
            except UnicodeDecodeError as error:
                yield row, name, f"byte {error.object[error.start]:#x} at {error.start}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
