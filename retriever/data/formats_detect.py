"""Detects the format of a file or folder by names and the first record."""

from __future__ import annotations

from pathlib import Path

from retriever.data.files import FileTable, Table, kind_of, stem_of
from retriever.data.folders import data_files, example_files
from retriever.data.formats_by_id import relation_of, triples_by_id
from retriever.data.formats_inline import HEADER_NAMES
from retriever.data.lines import read_lines
from retriever.data.records import DataError

# The fields of each format's records. The first format that has all of its fields is the one.
_FIELDS = (
    ("tevatron", {"positive_passages"}),
    ("tevatron", {"positive_document_ids"}),
    ("dpr", {"positive_ctxs"}),
    ("flagembedding", {"query", "pos"}),
    ("msmarco", {"qid", "pos", "neg"}),
    ("columns", {"anchor", "positive"}),
)


def detect_format(path: Path, split: str) -> str:
    """The data.train.<n>.format of `path`. Raises DataError where neither the names nor the first record tell it."""
    files = data_files(path) if path.is_dir() else [path]
    if (path / "qrels").is_dir() and (
        (path / "corpus").is_dir() or any(stem_of(file).split(".")[0] == "corpus" for file in files)
    ):
        return "beir"
    if any(map(relation_of, files)):
        return "msmarco"
    file = example_files(path, split)[0]
    if kind_of(file) in (".tsv", ".txt"):
        if triples_by_id(file):
            return "msmarco"
        header = next((line for _, line in read_lines(file)), "").split("\t")
        if not HEADER_NAMES & set(map(str.lower, header)):
            expected = "a header with anchor and positive, or a file named as MS MARCO's (qrels, triples)"
            hint = "name its format in data.train.<n>.format"
            raise DataError(f"expected {expected}, received {str(header)[:80]}; {hint}", file, 1)
    return detect_record_format(FileTable(file))


def detect_record_format(table: Table) -> str:
    """The format that the fields of a table's first record belong to. Raises DataError for unknown fields."""
    first = next(table.records(), None)
    if first is None:
        raise DataError("expected at least one record, found none", table.label)
    fields = set(first.values)
    if found := next((name for name, needed in _FIELDS if needed <= fields), None):
        return found
    texts = [value for value in first.values.values() if isinstance(value, (str, list))]
    if len(texts) >= 2 and not fields & {"_id", "docid"}:
        return "columns"
    known = "tevatron, dpr, flagembedding, msmarco hard negatives or text columns (single texts: format: texts)"
    raise first.refusal(f"expected a record of {known}, received fields {', '.join(sorted(fields))}")
