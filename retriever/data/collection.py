"""Corpora, queries and judgments of a retrieval collection: BEIR, MS MARCO, TREC and Tevatron files."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from retriever.data.files import FileTable, Table, is_file, kind_of
from retriever.data.folders import find_texts
from retriever.data.lines import read_lines
from retriever.data.records import DataError, Passage, Record, is_blank
from retriever.wording import counted

PASSAGE_IDS = ("_id", "docid", "pid", "id")
PASSAGE_TEXTS = ("text", "contents", "passage")
QUERY_IDS = ("_id", "query_id", "qid", "id")
QUERY_TEXTS = ("text", "query_text", "query")
_IDS_AT_ONCE = 1 << 16
_QUERY_COLUMNS = ("query-id", "query_id", "qid", "query", "topic")
_PASSAGE_COLUMNS = ("corpus-id", "corpus_id", "docid", "doc-id", "doc_id", "docno", "pid", "passage_id", "document_id")
_GRADE_NAMES = ("score", "grade", "relevance", "rel", "label")


def corpus_tables(path: Path) -> list[Table]:
    """The corpus file `path`, or the corpus in folder `path` (corpus.* or collection.*, or a folder of that name).

    More than one table where it is sharded.
    """
    files = find_texts(path, ("corpus", "collection"), "corpus") if path.is_dir() else [path]
    return [_id_table(file, (("id", "text"), ("id", "title", "text"))) for file in files]


def query_tables(path: Path, split: str | None = None) -> list[Table]:
    """The queries file `path`, or the one in folder `path`: queries.<split>.* if there is a `split`, else queries.*."""
    files = [path]
    if path.is_dir():
        bases = ("queries", "topics")
        stems = [stem for base in bases for stem in ([f"{base}.{split}", base] if split else [base])]
        files = find_texts(path, stems, "queries")
    return [_id_table(file, (("id", "text"),)) for file in files]


def _id_table(path: Path, layouts: Sequence[tuple[str, ...]]) -> Table:
    """A file of texts with ids; for a TSV without a header, the layout that has as many columns as its first line."""
    table = FileTable(path)
    if kind_of(path) not in (".tsv", ".txt"):
        return table
    row = next((line for _, line in read_lines(path)), "").split("\t")
    if {*PASSAGE_IDS, *QUERY_IDS} & set(row) and {*PASSAGE_TEXTS, *QUERY_TEXTS} & set(row):
        return FileTable(path, quoted=row == ["id", "text", "title"])  # DPR's psgs_w100.tsv
    return FileTable(path, next((names for names in layouts if len(names) == len(row)), layouts[0]))


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Passages of a corpus file, or of a folder that holds one (`corpus_tables`).

    JSONL and Parquet with an id (`_id`, `docid`, `pid`, `id`), `text` and perhaps `title`; TSV of id, text or id,
    title, text, or with a header; DPR's, of id, text, title, has its fields in quotation marks. Raises DataError naming
    file, line and field.
    """
    return chain.from_iterable(map(passages_of, corpus_tables(Path(path))))


def passages_of(table: Table) -> Iterator[Passage]:
    """The passages of one corpus table."""
    for record in table.records():
        yield Passage(record.identifier(*PASSAGE_IDS), record.text(*PASSAGE_TEXTS), record.optional_text("title"))


def read_queries(path: str | Path, split: str | None = None) -> Iterator[tuple[str, str]]:
    """(query id, text) from a file (JSONL, Parquet, or TSV of id, text) or from a folder (`query_tables`).

    Raises DataError naming file, line and field.
    """
    for record in _records(query_tables(Path(path), split)):
        yield record.identifier(*QUERY_IDS), record.text(*QUERY_TEXTS)


def query_texts(
    tables: Iterable[Table], wanted: Container[str] | None = None, *, for_run: bool = False
) -> dict[str, str]:
    """Query id -> text in the tables' order, for the queries in `wanted` or for all that have a text.

    `for_run`: the ids are written into a run file.

    Raises DataError for an id of two texts, a wanted query whose text is blank, and an id that a run file cannot hold.
    """
    found: dict[str, str] = {}
    for record in _records(tables):
        query_id = record.identifier(*QUERY_IDS)
        if wanted is not None and query_id not in wanted:
            continue
        if for_run:
            record.word(*QUERY_IDS)
        text = record.text(*QUERY_TEXTS, empty=wanted is None)
        if not is_blank(text) and found.setdefault(query_id, text) != text:
            raise record.refusal(f"query id {query_id!r} stands for two texts, the second {text[:60]!r}")
    return found


def check_corpus(tables: Sequence[Table]) -> str | None:
    """Checks that a search can use a corpus, in 8 bytes a passage. Returns a note on blank passages, if any.

    Raises DataError where an id stands twice or holds white space, which a run file separates its fields by, and at a
    malformed record.
    """
    hashes, blank = array("q"), 0
    for record in _records(tables):
        hashes.append(hash(record.word(*PASSAGE_IDS)))
        blank += is_blank(record.text(*PASSAGE_TEXTS)) and is_blank(record.optional_text("title"))
    if not hashes:
        raise DataError("expected passages, found none", ", ".join(table.label for table in tables))
    if twice := _repeated(np.sort(np.frombuffer(hashes, np.int64))):
        _refuse_repeated(tables, twice)
    return f"{counted(blank, 'passage')} without a text and a title, encoded as blank texts" if blank else None


def once(texts: Iterable[tuple[str, str]], path: Path) -> Iterator[tuple[str, str]]:
    """The (id, text) pairs. Raises DataError soon after an id comes a second time. Takes 8 bytes a text."""
    seen, stream = np.empty(0, np.int64), iter(texts)
    while pairs := list(islice(stream, _IDS_AT_ONCE)):
        hashes = [hash(text_id) for text_id, _ in pairs]
        seen = np.sort(np.concatenate([seen, np.array(hashes, np.int64)]), kind="stable")
        if twice := _repeated(seen):
            repeated = next(text_id for (text_id, _), found in zip(pairs, hashes, strict=True) if found in twice)
            raise DataError(f"field 'id': expected an id once, received {repeated!r} again", path)
        yield from pairs


def _repeated(ordered: np.ndarray) -> set[int]:
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _refuse_repeated(tables: Iterable[Table], hashes: Container[int]) -> None:
    seen: dict[str, Record] = {}
    for record in _records(tables):
        name, passage_id = record.first_of(PASSAGE_IDS)[0], record.identifier(*PASSAGE_IDS)
        if hash(passage_id) in hashes and (first := seen.setdefault(passage_id, record)) is not record:
            before = f"{first.unit} {first.line}" + (f" of {first.file}" if first.file != record.file else "")
            same = first.text(*PASSAGE_TEXTS) == record.text(*PASSAGE_TEXTS)
            raise record.error(name, f"an id once; {before} has it{'' if same else ', with another text'}", passage_id)


def _records(tables: Iterable[Table]) -> Iterator[Record]:
    return chain.from_iterable(table.records() for table in tables)


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Judgments {query id: {passage id: grade}} as they stand in the file, negative grades included.

    Reads BEIR's three columns with a header, which may name them in any order; TREC's and MS MARCO's `qid 0 pid grade`
    (any second column; tabs or spaces); and Parquet, JSON and CSV with BEIR's columns. Raises DataError for a malformed
    line, for two different grades of one pair, and where there are no judgments.
    """
    path = Path(path)
    if kind_of(path) in (".parquet", ".jsonl", ".json", ".csv"):
        return qrels_of(FileTable(path))
    if not is_file(path):
        raise DataError("no such file; expected judgments", path)
    return _judgments(_qrels_lines(path), str(path))


def qrels_of(table: Table) -> dict[str, dict[str, int]]:
    """Judgments from records with `query-id`, `corpus-id` and `score`, or these by other usual names."""
    return _judgments(table.records(), table.label)


def _judgments(records: Iterable[Record], label: str) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for record in records:
        query, passage = record.identifier(*_QUERY_COLUMNS), record.identifier(*_PASSAGE_COLUMNS)
        grade, judged = record.whole_number(*_GRADE_NAMES), qrels.setdefault(query, {})
        if judged.setdefault(passage, grade) != grade:
            before = f"grade {grade}, but {judged[passage]} before"
            raise record.refusal(f"query {query!r}, passage {passage!r}: {before}")
    if not qrels:
        raise DataError("expected judgments ('qid 0 pid grade' or 'qid pid grade' a line), found none", label)
    return qrels


def _qrels_lines(path: Path) -> Iterator[Record]:
    """The judgments of a text file, one a line."""
    columns, widths, expected = (0, -2, -1), {3, 4}, "'qid 0 pid grade' or 'qid pid grade'"
    is_first = True
    for number, line in read_lines(path):
        row = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            continue
        if is_first and (header := _qrels_header(row)):
            columns, widths, expected = header, {len(row)}, f"{len(row)} columns as in the header"
        elif len(row) not in widths:
            raise DataError(f"expected {expected}, received {line[:60]!r}", path, number)
        else:
            judgment = zip(("query-id", "corpus-id", "score"), (row[i] for i in columns), strict=True)
            yield Record(dict(judgment), str(path), number)
        is_first = False


def _qrels_header(row: Sequence[str]) -> tuple[int, int, int] | None:
    """The columns of query, passage and grade, if the header names all three."""
    names = [name.strip().lower() for name in row]
    query, passage, grade = (
        next((names.index(name) for name in known if name in names), None)
        for known in (_QUERY_COLUMNS, _PASSAGE_COLUMNS, _GRADE_NAMES)
    )
    return None if query is None or passage is None or grade is None else (query, passage, grade)
