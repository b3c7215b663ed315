"""Records from one file: JSON lines, a JSON list, CSV, TSV or Parquet, compressed or not, never held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from retriever.data.json_records import is_list, line_records, list_records
from retriever.data.records import DataError, Record
from retriever.data.table_records import csv_records, parquet_records, tsv_records

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


class Table(Protocol):
    """A sequence of records that can be read again and again: a file or a Hugging Face dataset."""

    @property
    def label(self) -> str:
        """The name of the file in messages."""

    def records(self) -> Iterator[Record]:
        """The records, in the order of the file."""

    def digest(self) -> str:
        """A hash of the content."""


@dataclass(frozen=True)
class FileTable:
    """The records of one file."""

    path: Path
    columns: Sequence[str] | None = None  # of a TSV file that has no header
    quoted: bool = False  # a TSV field may stand in quotation marks, those inside it doubled
    separator: str | None = "\t"  # of a TSV file's fields; None: white space

    def __post_init__(self) -> None:
        if not is_file(self.path):
            raise DataError("no such file", self.path)
        if kind_of(self.path) not in KINDS:
            raise DataError(
                f"expected a file ending in {', '.join(KINDS)}, or one of these with .gz or .zst", self.path
            )

    @property
    def label(self) -> str:
        """The file's path."""
        return str(self.path)

    def records(self) -> Iterator[Record]:
        """The file's records. Raises DataError naming the line that cannot be read."""
        kind, path = kind_of(self.path), self.path
        if kind == ".parquet":
            return parquet_records(path)
        if kind == ".csv":
            return csv_records(path)
        if kind in (".tsv", ".txt"):
            return tsv_records(path, self.columns, self.quoted, self.separator)
        return list_records(path) if kind == ".json" and is_list(path) else line_records(path)

    def digest(self) -> str:
        """blake2b of the file's bytes, and whether fields are quoted."""
        try:
            with self.path.open("rb") as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise DataError(f"expected a readable file: {error.strerror}", self.path) from error
        return f"{digest} quoted" if self.quoted else digest


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises DataError for a name that no file can have."""
    return exists(path) and path.is_file()


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. Raises DataError for a name that none can have."""
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"no such file: {getattr(error, 'strerror', None) or error}", str(path)[:200]) from error


def kind_of(path: Path) -> str:
    """The ending that says how to read a file, without `.gz` and `.zst`: `.jsonl` for train.jsonl.gz."""
    return Path(_uncompressed(path)).suffix


def stem_of(path: Path) -> str:
    """The file's name without its endings: `queries.train` for queries.train.tsv.gz."""
    return Path(_uncompressed(path)).stem


def _uncompressed(path: Path) -> str:
    """The file's name without the ending of its compression."""
    return path.name.removesuffix(".gz").removesuffix(".zst")
