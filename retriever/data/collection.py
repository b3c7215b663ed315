"""Corpora, queries and judgments of a retrieval collection: BEIR, MS MARCO, TREC and Tevatron files, and where they
stand in a folder.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from retriever.data.files import KINDS, FileTable, Table, is_file, kind_of, stem_of
from retriever.data.lines import read_lines
from retriever.data.records import DataError, Passage, Record, is_blank
from retriever.wording import counted

PASSAGE_IDS = ("_id", "docid", "pid", "id")
PASSAGE_TEXTS = ("text", "contents", "passage")
QUERY_IDS = ("_id", "query_id", "qid", "id")
QUERY_TEXTS = ("text", "query_text", "query")
SPLITS = ("train", "dev", "test", "validation", "valid", "val", "eval")
_TRACKS = dict.fromkeys(
    ("2019qrels", "2020qrels", "dl19", "dl20"), "test"
)  # TREC's judgments of MS MARCO passages, by their file names
_IDS_AT_ONCE = 1 << 16
_CORPUS_STEMS = ("corpus", "collection")
_QUERY_STEMS = ("queries", "topics")
_QUERY_COLUMNS = ("query-id", "query_id", "qid", "query", "topic")
_PASSAGE_COLUMNS = ("corpus-id", "corpus_id", "docid", "doc-id", "doc_id", "docno", "pid", "passage_id", "document_id")
_GRADE_NAMES = ("score", "grade", "relevance", "rel", "label")


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Passages of a corpus file, or of a folder that holds one (corpus.* or collection.*, or a folder of that name).

    JSONL and Parquet with an id (`_id`, `docid`, `pid`, `id`), `text` and perhaps `title`; TSV of id, text or id,
    title, text, or with a header; DPR's, of id, text, title, has its fields in quotation marks. Raises DataError naming
    file, line and field.
    """
    for table in corpus_tables(Path(path)):
        yield from passages_of(table)


def read_queries(path: str | Path, split: str | None = None) -> Iterator[tuple[str, str]]:
    """(query id, text) from a file (JSONL, Parquet, or TSV of id, text), or from a folder's queries.<split>.* or
    queries.*.

    Raises DataError naming file, line and field.
    """
    for table in query_tables(Path(path), split):
        for record in table.records():
            yield record.identifier(*QUERY_IDS), record.text(*QUERY_TEXTS)


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
    qrels: dict[str, dict[str, int]] = {}
    columns: tuple[int, int, int] | None = None  # of query, passage and grade
    widths: tuple[int, ...] = (3, 4)
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = line.split("\t") if "\t" in line else line.split()
        if columns is None:
            columns = _qrels_header(row)
            if columns is not None:
                widths = (len(row),)
                continue
            columns = (0, -2, -1)
        if len(row) not in widths:
            expected = (
                "'qid 0 pid grade' or 'qid pid grade'" if len(widths) > 1 else f"{widths[0]} columns as in the header"
            )
            raise DataError(f"expected {expected}, received {line[:60]!r}", path, number)
        record = Record(
            dict(zip(("query-id", "corpus-id", "score"), (row[i] for i in columns), strict=True)), str(path), number
        )
        _judge(qrels, record)
    return _not_empty(qrels, str(path))


def qrels_of(table: Table) -> dict[str, dict[str, int]]:
    """Judgments from records with `query-id`, `corpus-id` and `score`, or these by other usual names."""
    qrels: dict[str, dict[str, int]] = {}
    for record in table.records():
        _judge(qrels, record)
    return _not_empty(qrels, table.label)


def passages_of(table: Table) -> Iterator[Passage]:
    """The passages of one corpus table."""
    for record in table.records():
        yield Passage(record.identifier(*PASSAGE_IDS), record.text(*PASSAGE_TEXTS), record.optional_text("title"))


def check_corpus(tables: Iterable[Table]) -> str | None:
    """Reads a corpus once for what a search could not use; in memory are 8 bytes a passage. Returns a note on blank
    passages, if any.

    Raises DataError where an id stands twice or holds white space, which a run file separates its fields by, and at a
    malformed record.
    """
    tables, hashes, blank = list(tables), array("q"), 0
    for table in tables:
        for record in table.records():
            hashes.append(hash(record.word(*PASSAGE_IDS)))
            blank += is_blank(record.text(*PASSAGE_TEXTS)) and is_blank(record.optional_text("title"))
    if not hashes:
        raise DataError("expected passages, found none", ", ".join(table.label for table in tables))
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    if twice := set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()):
        _refuse_repeated(tables, twice)
    return f"{counted(blank, 'passage')} without a text and a title, encoded as blank texts" if blank else None


def once(texts: Iterable[tuple[str, str]], path: Path) -> Iterator[tuple[str, str]]:
    """The (id, text) pairs. Raises DataError where an id comes twice, at the latest _IDS_AT_ONCE texts later; holds 8
    bytes a text.
    """
    seen, stream = np.empty(0, np.int64), iter(texts)
    while pairs := list(islice(stream, _IDS_AT_ONCE)):
        hashes = [hash(text_id) for text_id, _ in pairs]
        seen = np.sort(np.concatenate([seen, np.array(hashes, np.int64)]), kind="stable")
        if twice := set(seen[1:][seen[1:] == seen[:-1]].tolist()):
            repeated = next(text_id for (text_id, _), found in zip(pairs, hashes, strict=True) if found in twice)
            raise DataError(f"field 'id': expected an id once, received {repeated!r} again", path)
        yield from pairs


def _refuse_repeated(tables: Iterable[Table], hashes: Container[int]) -> None:
    seen: dict[str, Record] = {}
    for record in (record for table in tables for record in table.records()):
        passage_id = record.identifier(*PASSAGE_IDS)
        if hash(passage_id) in hashes and (first := seen.setdefault(passage_id, record)) is not record:
            same = first.text(*PASSAGE_TEXTS) == record.text(*PASSAGE_TEXTS)
            before = f"{first.unit} {first.line}" + (f" of {first.file}" if first.file != record.file else "")
            raise record.error(
                record.name_of(PASSAGE_IDS),
                f"an id once; {before} has it, {'' if same else 'with another text'}".strip(" ,"),
                passage_id,
            )


def query_texts(
    tables: Iterable[Table], wanted: Container[str] | None = None, *, for_run: bool = False
) -> dict[str, str]:
    """Query id -> text in the tables' order, of those in `wanted`, or of all that have a text. `for_run`: their ids go
    into a run file.

    Raises DataError for an id of two texts, a wanted query whose text is blank, and an id that a run file cannot hold.
    """
    found: dict[str, str] = {}
    for record in (record for table in tables for record in table.records()):
        query_id = record.identifier(*QUERY_IDS)
        if wanted is not None and query_id not in wanted:
            continue
        if for_run:
            record.word(*QUERY_IDS)
        text = record.text(*QUERY_TEXTS, empty=wanted is None)
        if not is_blank(text) and found.setdefault(query_id, text) != text:
            message = f"query id {query_id!r} stands for two texts, the second {text[:60]!r}"
            raise DataError(message, record.file, record.line, record.unit)
    return found


def corpus_tables(path: Path) -> list[Table]:
    """The corpus file `path`, or the corpus that stands in folder `path`; more than one table where it is sharded."""
    files = _find(path, _CORPUS_STEMS, "corpus") if path.is_dir() else [path]
    return [_id_table(file, (("id", "text"), ("id", "title", "text"))) for file in files]


def query_tables(path: Path, split: str | None = None) -> list[Table]:
    """The queries file `path`, or the one in folder `path`: queries.*, or queries.<split>.* where `split` is given."""
    if path.is_dir():
        stems = [stem for base in _QUERY_STEMS for stem in ([f"{base}.{split}", base] if split else [base])]
        files = _find(path, stems, "queries")
    else:
        files = [path]
    return [_id_table(file, (("id", "text"),)) for file in files]


def find_qrels(folder: Path, split: str) -> Path:
    """The judgments of one split: `qrels/<split>.*` (BEIR) or `qrels.<split>.*` (MS MARCO). Raises DataError listing
    what is there.
    """
    found = data_files(folder / "qrels", split) or data_files(folder, f"qrels.{split}")
    if len(found) == 1:
        return found[0]
    there = ", ".join(
        f.relative_to(folder).as_posix() for f in found or [*data_files(folder / "qrels"), *data_files(folder, "qrels")]
    )
    raise DataError(f"expected one file qrels/{split}.tsv or qrels.{split}.tsv, found {there or 'no qrels'}", folder)


def split_of(path: Path) -> str | None:
    """The split that a file's name speaks of: `train` for qidpidtriples.train.full.2.tsv; None where it speaks of
    none.
    """
    words = stem_of(path).lower().replace("-", ".").replace("_", ".").split(".")
    return next((_TRACKS.get(word, word) for word in words if word in SPLITS or word in _TRACKS), None)


def _judge(qrels: dict[str, dict[str, int]], record: Record) -> None:
    query, passage = record.identifier(*_QUERY_COLUMNS), record.identifier(*_PASSAGE_COLUMNS)
    grade = record.whole_number(*_GRADE_NAMES)
    judged = qrels.setdefault(query, {})
    if judged.setdefault(passage, grade) != grade:
        message = f"query {query!r}, passage {passage!r}: grade {grade}, but {judged[passage]} before"
        raise DataError(message, record.file, record.line, record.unit)


def _qrels_header(row: Sequence[str]) -> tuple[int, int, int] | None:
    """Where the columns of query, passage and grade are, if the row names all three."""
    names = [name.strip().lower() for name in row]
    found = [
        next((names.index(name) for name in known if name in names), None)
        for known in (_QUERY_COLUMNS, _PASSAGE_COLUMNS, _GRADE_NAMES)
    ]
    query, passage, grade = found
    return None if query is None or passage is None or grade is None else (query, passage, grade)


def _not_empty(qrels: dict[str, dict[str, int]], label: str) -> dict[str, dict[str, int]]:
    if not qrels:
        raise DataError("expected judgments ('qid 0 pid grade' or 'qid pid grade' a line), found none", label)
    return qrels


def _id_table(path: Path, layouts: Sequence[tuple[str, ...]]) -> Table:
    """A file of texts with ids; for a TSV without a header, the layout that has as many columns as its first line."""
    if kind_of(path) not in (".tsv", ".txt"):
        return FileTable(path)
    row = next((line for _, line in read_lines(FileTable(path).path)), "").split("\t")
    if {*PASSAGE_IDS, *QUERY_IDS} & set(row) and {*PASSAGE_TEXTS, *QUERY_TEXTS} & set(row):
        return FileTable(path, quoted=row == ["id", "text", "title"])  # DPR's psgs_w100.tsv
    return FileTable(path, next((names for names in layouts if len(names) == len(row)), layouts[0]))


def _find(folder: Path, stems: Sequence[str], what: str) -> list[Path]:
    for stem in stems:
        files = data_files(folder, stem)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(
                f"expected one {what} file, found {names}; name the file itself (data.train.<n>.{what}, or the path)",
                folder,
            )
        if files := files or data_files(folder / stem):
            return files
    raise DataError(f"expected a {what} file ({' or '.join(f'{stem}.*' for stem in stems)})", folder)


def data_files(folder: Path, stem: str | None = None) -> list[Path]:
    """Data files of a folder by name; with `stem`, those so named, else those whose name goes on after it
    (`queries.dev.small`).
    """
    if not folder.is_dir():
        return []
    files = sorted(f for f in folder.iterdir() if f.is_file() and kind_of(f) in KINDS)
    if stem is None:
        return files
    return [f for f in files if stem_of(f) == stem] or [f for f in files if stem_of(f).startswith(f"{stem}.")]
