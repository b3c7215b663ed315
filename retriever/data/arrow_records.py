"""Records from Arrow's columns: Parquet files and the batches of Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retriever.data.delimited import check_columns
from retriever.data.records import DataError, Record

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
    """The rows of record batches, numbered from 1. Raises DataError where one of them cannot be had: `what` it was
    expected from.
    """
    import pyarrow as pa

    row = 0
    try:
        for batch in batches:
            for values in _rows(batch, label, row):
                row += 1
                yield Record(values, label, row, "row")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"expected {what} that is whole: {first_line(error)}", label, row + 1, "row") from error


def _rows(batch: Any, label: str, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        row, name, place = next(_undecodable(batch))
        raise DataError(
            f"field {name!r}: expected UTF-8 text, received {place}", label, before + row + 1, "row"
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
    """What an error says, on one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
