"""Records from tables of text: CSV and TSV, with the quotation marks that spreadsheets and pandas put around fields."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from retriever.data.lines import read_lines
from retriever.data.records import DataError, Record

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def csv_records(path: Path) -> Iterator[Record]:
    """Rows under a header, separated by commas, or by semicolons where the header has them and no comma."""
    csv.field_size_limit(sys.maxsize)  # a passage may be longer than the module's default of 131,072 characters
    first = next((line for _, line in read_lines(path)), "")
    delimiter = ";" if ";" in first and "," not in first else ","
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is not None:
            check_columns(header, path)
        while header is not None:
            start = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if row:
                yield _row_record(header, row, path, start)
    except csv.Error as error:
        raise DataError(f"expected comma-separated values: {error}", path, reader.line_num) from error


def tsv_records(path: Path, columns: Sequence[str] | None, quoted: bool) -> Iterator[Record]:
    """Rows split at tabs, under `columns` or else under a header.

    Quotation marks in a text are part of it, with two exceptions: where all fields are `quoted` (DPR's passages); and
    under a header, where a whole field is quoted and doubles the marks inside or holds nothing else, as only a table's
    writer does.
    """
    unquoted = _unquoted if quoted else _unquoted_if_doubled if columns is None else None
    for number, line in read_lines(path):
        if columns is None:
            columns = line.split("\t")
            check_columns(columns, path)
        elif line:
            row = line.split("\t")
            yield _row_record(
                columns, [unquoted(field) for field in row] if unquoted and '"' in line else row, path, number
            )


def check_columns(columns: Sequence[str], path: Path) -> None:
    """Raises DataError where two columns have one name."""
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(f"expected columns of different names, received {twice!r} twice: {', '.join(columns)}", path, 1)


def _unquoted(field: str) -> str:
    """The field without its quotation marks, if it is quoted as a whole."""
    return field[1:-1].replace('""', '"') if _QUOTED.fullmatch(field) else field


def _unquoted_if_doubled(field: str) -> str:
    return _unquoted(field) if '""' in field else field


def _row_record(columns: Sequence[str], row: Sequence[str], path: Path, line: int) -> Record:
    if len(row) != len(columns):
        raise DataError(
            f"expected {len(columns)} columns ({', '.join(columns)}), received {len(row)}: {str(row)[:80]}", path, line
        )
    return Record(dict(zip(columns, row, strict=True)), str(path), line)
