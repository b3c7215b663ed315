"""What format a file or folder is in, by its names and its first record."""

from __future__ import annotations

from pathlib import Path

from retriever.data.collection import SPLITS, data_files, split_of
from retriever.data.files import FileTable, Table, kind_of, stem_of
from retriever.data.lines import read_lines
from retriever.data.readers_by_id import relation_of, triples_by_id
from retriever.data.readers_inline import HEADER_NAMES
from retriever.data.records import DataError, Record

_NOT_EXAMPLES = (
    "corpus",
    "collection",
    "queries",
    "qrels",
    "topics",
    "manifest",
    "source",
    "config",
    "dataset_info",
    "dataset_infos",
)


def detect_format(path: Path, split: str) -> str:
    """The name that data.train.<n>.format would have for `path`. Raises DataError where names and first record do not
    tell.
    """
    if path.is_dir():
        names = {stem_of(file).split(".")[0] for file in data_files(path)} | {
            f.name for f in path.iterdir() if f.is_dir()
        }
        if "qrels" in names and (path / "qrels").is_dir() and "corpus" in names:
            return "beir"
        if any(relation_of(file) for file in data_files(path)):
            return "msmarco"
    elif relation_of(path):
        return "msmarco"
    file = example_files(path, split)[0]
    if kind_of(file) in (".tsv", ".txt"):
        header = next((line for _, line in read_lines(file)), "").split("\t")
        if triples_by_id(file):
            return "msmarco"
        if not HEADER_NAMES & {name.lower() for name in header}:
            expected = "expected a header with anchor and positive, or a file named as MS MARCO's (qrels, triples)"
            raise DataError(
                f"{expected}, received {str(header)[:80]}; name its format in data.train.<n>.format", file, 1
            )
    return detect_record_format(FileTable(file))


def detect_record_format(table: Table) -> str:
    """The format that the fields of a table's first record belong to. Raises DataError for unknown fields."""
    first = next(table.records(), None)
    if first is None:
        raise DataError("expected at least one record, found none", table.label)
    fields = set(first.values)
    if fields & {"positive_passages", "positive_document_ids"}:
        return "tevatron"
    if "positive_ctxs" in fields:
        return "dpr"
    if {"query", "pos"} <= fields:
        return "flagembedding"
    if {"qid", "pos", "neg"} <= fields:
        return "msmarco"
    if {"anchor", "positive"} <= fields:  # whatever is in them: who reads them says what is wrong
        return "columns"
    if len(fields) >= 2 and not fields & {"_id", "docid"} and _holds_texts(first):
        return "columns"
    known = "tevatron, dpr, flagembedding, msmarco hard negatives or text columns"
    raise DataError(
        f"expected a record of {known}, received fields {', '.join(sorted(fields))}", first.file, first.line, first.unit
    )


def example_files(path: Path, split: str) -> list[Path]:
    """`path` itself, or the files of folder `path` (or its `data` folder) that hold examples of `split`.

    Files whose names speak of no split at all are all taken. Raises DataError where none fits or they are of several
    kinds.
    """
    if not path.is_dir():
        return [path]
    files = [
        f
        for f in data_files(path) or data_files(path / "data")
        if stem_of(f).lower().split(".")[0] not in _NOT_EXAMPLES
    ]
    if any(split_of(file) for file in files):
        files = [file for file in files if split_of(file) == split]
    if not files:
        raise DataError(
            f"expected data files of split {split!r} (one of {', '.join(SPLITS)} in a name is its split), found none",
            path,
        )
    if len({kind_of(file) for file in files}) > 1:
        raise DataError(
            f"expected files of one kind, found {', '.join(f.name for f in files)}; name one in data.train.<n>.path",
            path,
        )
    return files


def _holds_texts(record: Record) -> bool:
    values = [value for value in record.values.values() if value is not None]
    return sum(isinstance(value, (str, list)) for value in values) >= 2
