"""Examples from files that name passages by id: judgments (BEIR, MS MARCO), MS MARCO triples, mined hard negatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from retriever.data.collection import read_qrels
from retriever.data.files import FileTable, kind_of
from retriever.data.folders import data_files, split_of
from retriever.data.lines import read_lines
from retriever.data.records import DataError, Example, Passage, Record

Queries = Mapping[str, str]
_QRELS, _TRIPLES, _HARD_NEGATIVES = "qrels", "triples", "hard-negatives"


def judged_examples(qrels: Mapping[str, Mapping[str, int]], queries: Queries, label: str) -> Iterator[Example]:
    """One example a judged query: grades above 0 are positives, grade 0 is a judged negative, below 0 is neither.

    Raises DataError for a judged query that has no text.
    """
    for query_id, judged in qrels.items():
        positives = tuple(Passage(id=p) for p, grade in judged.items() if grade > 0)
        negatives = tuple(Passage(id=p) for p, grade in judged.items() if grade == 0)
        yield Example(query_id, _query_text(queries, query_id, label), positives, negatives)


def relation_files(path: Path, split: str) -> list[Path]:
    """The files that relate queries to passages: `path`, or those of `split` in a folder (judgments first).

    Text triples are taken from a folder only where there is nothing else: they carry no ids to merge with the rest.
    """
    if not path.is_dir():
        return [path]
    there = [f for f in data_files(path) if relation_of(f) and split_of(f) in (None, split)]
    by_id = [f for f in there if relation_of(f) != _TRIPLES or triples_by_id(f)]
    found = sorted(by_id or there, key=lambda f: (relation_of(f) != _QRELS, f.name))
    if not found:
        expected = f"qrels.{split}*.tsv, *triples*{split}*.tsv or msmarco-hard-negatives*.jsonl"
        raise DataError(f"expected MS MARCO relations of split {split!r}: {expected}", path)
    return found


def relation_of(path: Path) -> str | None:
    """`qrels`, `triples` or `hard-negatives` by the file's name; None for any other file of a folder."""
    name = path.name.lower()
    if "msmarco" in name and "hard-negatives" in name:  # elsewhere such a name says nothing about the format
        return _HARD_NEGATIVES
    return next((kind for kind in (_QRELS, _TRIPLES) if kind in name and kind_of(path) in (".tsv", ".txt")), None)


def triples_by_id(path: Path) -> bool:
    """Whether a triples file holds ids (three whole numbers on its first line) rather than texts."""
    row = next((line for _, line in read_lines(path)), "").split()
    return len(row) == 3 and all(field.isdecimal() for field in row)


def needs_corpus(files: list[Path]) -> bool:
    """Whether any of the files names passages (and queries) by id."""
    return any(_kind(file) != _TRIPLES or triples_by_id(file) for file in files)


def msmarco_examples(files: list[Path], queries: Queries) -> Iterator[Example]:
    """The examples of all `files`, judgments first. Raises DataError naming file, line and field."""
    for file in files:
        if _kind(file) == _QRELS:
            yield from judged_examples(read_qrels(file), queries, str(file))
        elif _kind(file) == _HARD_NEGATIVES:
            yield from _hard_negative_examples(file, queries)
        else:
            yield from _triples(file, queries)


def _kind(file: Path) -> str:
    return relation_of(file) or (_HARD_NEGATIVES if kind_of(file) in (".jsonl", ".json") else _TRIPLES)


def _triples(file: Path, queries: Queries) -> Iterator[Example]:
    """Lines of a query, a positive and a negative: all three ids, or all three texts."""
    by_id = triples_by_id(file)
    table = FileTable(file, ("query", "positive", "negative"), separator=None if by_id else "\t")
    for record in table.records():
        if by_id:
            query_id = record.identifier("query")
            query = _query_text(queries, query_id, record.file, record.line)
            positive, negative = (Passage(record.identifier(side)) for side in ("positive", "negative"))
        else:
            query_id, query = str(record.line), record.text("query", empty=False)
            positive, negative = (Passage(None, record.text(side)) for side in ("positive", "negative"))
        yield Example(query_id, query, (positive,), (negative,))


def _hard_negative_examples(file: Path, queries: Queries) -> Iterator[Example]:
    """Lines {qid, pos: [pid], neg: {system: [pid]}} (or neg: [pid]); the systems' lists are united."""
    for record in FileTable(file).records():
        query_id, negatives = record.identifier("qid", "query_id"), record.values.get("neg")
        if isinstance(negatives, Mapping):
            systems = Record(negatives, record.file, record.line, record.unit, "neg")
            mined = list(chain.from_iterable(map(systems.identifiers, negatives)))
        else:
            mined = record.identifiers("neg")
        yield Example(
            query_id,
            _query_text(queries, query_id, record.file, record.line),
            positives=tuple(map(Passage, record.identifiers("pos"))),
            negatives=tuple(map(Passage, dict.fromkeys(mined))),
        )


def _query_text(queries: Queries, query_id: str, file: str, line: int | None = None) -> str:
    text = queries.get(query_id)
    if text is None:
        message = f"query id {query_id!r} is not among the {len(queries):,} queries that have a text"
        raise DataError(f"{message}; data.train.<n>.queries names their file", file, line)
    return text
