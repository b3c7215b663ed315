"""Corpora, queries and judgments of a retrieval collection: BEIR, MS MARCO, TREC and Tevatron files, and where they stand in a folder."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from retriever.data.files import KINDS, FileTable, Table, kind_of, read_lines, stem_of
from retriever.data.records import DataError, Passage, Record

PASSAGE_IDS = ("_id", "docid", "pid", "id")
PASSAGE_TEXTS = ("text", "contents", "passage")
QUERY_IDS = ("_id", "query_id", "qid", "id")
QUERY_TEXTS = ("text", "query_text", "query")
SPLITS = ("train", "dev", "test", "validation", "valid", "val", "eval")
_TRACKS = dict.fromkeys(("2019qrels", "2020qrels", "dl19", "dl20"), "test")  # TREC's judgments of MS MARCO passages, by their file names
_CORPUS_STEMS = ("corpus", "collection")
_QUERY_STEMS = ("queries", "topics")
_GRADE_NAMES = ("score", "grade", "relevance", "rel", "label")
_HEADER_NAMES = {*PASSAGE_IDS, *PASSAGE_TEXTS, *QUERY_IDS, *QUERY_TEXTS, "title"}


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Passages of a corpus file, or of a folder that holds one (corpus.* or collection.*, or a folder of that name).

    JSONL and Parquet with an id (`_id`, `docid`, `pid`, `id`), `text` and perhaps `title`; TSV of id, text or id, title, text,
    or with a header; DPR's, of id, text, title, has its fields in quotation marks. Raises DataError naming file, line and field.
    """
    for table in corpus_tables(Path(path)):
        yield from passages_of(table)


def read_queries(path: str | Path, split: str | None = None) -> Iterator[tuple[str, str]]:
    """(query id, text) from a file (JSONL, Parquet, or TSV of id, text), or from a folder's queries.<split>.* or queries.*.

    Raises DataError naming file, line and field.
    """
    for table in query_tables(Path(path), split):
        yield from queries_of(table)


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Judgments {query id: {passage id: grade}} as they stand in the file, negative grades included.

    Reads BEIR's three columns with a header, TREC's and MS MARCO's `qid 0 pid grade` (any second column; tabs or spaces),
    and Parquet with BEIR's columns. Raises DataError for a malformed line and for two different grades of one pair.
    """
    path = Path(path)
    if kind_of(path) in (".parquet", ".jsonl"):
        return qrels_of(FileTable(path))
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = line.split("\t") if "\t" in line else line.split()
        if len(row) not in (3, 4):
            raise DataError(f"expected 'qid 0 pid grade' or 'qid pid grade', received {line[:60]!r}", path, number)
        try:
            grade = int(row[-1])
        except ValueError as error:
            if number == 1 and row[-1].strip().lower() in _GRADE_NAMES:
                continue
            raise DataError(f"field 'grade': expected a whole number, received {row[-1]!r}", path, number) from error
        _judge(qrels, row[0], row[-2], grade, Record({}, str(path), number))
    return qrels


def qrels_of(table: Table) -> dict[str, dict[str, int]]:
    """Judgments from records with `query-id`, `corpus-id` and `score`."""
    qrels: dict[str, dict[str, int]] = {}
    for record in table.records():
        score = record.values.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not float(score).is_integer():
            raise record.error("score", "a whole number", score)
        _judge(qrels, record.identifier("query-id"), record.identifier("corpus-id"), int(score), record)
    return qrels


def passages_of(table: Table) -> Iterator[Passage]:
    """The passages of one corpus table."""
    for record in table.records():
        yield Passage(record.identifier(*PASSAGE_IDS), record.text(*PASSAGE_TEXTS), record.optional_text("title"))


def queries_of(table: Table) -> Iterator[tuple[str, str]]:
    """The (id, text) pairs of one query table."""
    for record in table.records():
        yield record.identifier(*QUERY_IDS), record.text(*QUERY_TEXTS)


def query_texts(tables: Iterable[Table], wanted: Container[str] | None = None) -> dict[str, str]:
    """Query id -> text, of all queries or of those in `wanted`, in the tables' order. Raises DataError for an id of two texts."""
    found: dict[str, str] = {}
    for table in tables:
        for query_id, text in queries_of(table):
            if (wanted is None or query_id in wanted) and found.setdefault(query_id, text) != text:
                raise DataError(f"query id {query_id!r} stands for two texts, the second {text[:60]!r}", table.label)
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
    """The judgments of one split: `qrels/<split>.*` (BEIR) or `qrels.<split>.*` (MS MARCO). Raises DataError listing what is there."""
    found = data_files(folder / "qrels", split) or data_files(folder, f"qrels.{split}")
    if len(found) == 1:
        return found[0]
    there = ", ".join(f.relative_to(folder).as_posix() for f in found or [*data_files(folder / "qrels"), *data_files(folder, "qrels")])
    raise DataError(f"expected one file qrels/{split}.tsv or qrels.{split}.tsv, found {there or 'no qrels'}", folder)


def split_of(path: Path) -> str | None:
    """The split that a file's name speaks of: `train` for qidpidtriples.train.full.2.tsv; None where it speaks of none."""
    words = stem_of(path).lower().replace("-", ".").replace("_", ".").split(".")
    return next((_TRACKS.get(word, word) for word in words if word in SPLITS or word in _TRACKS), None)


def _judge(qrels: dict[str, dict[str, int]], query: str, passage: str, grade: int, record: Record) -> None:
    judged = qrels.setdefault(query, {})
    if judged.setdefault(passage, grade) != grade:
        message = f"query {query!r}, passage {passage!r}: grade {grade}, but {judged[passage]} before"
        raise DataError(message, record.file, record.line, record.unit)


def _id_table(path: Path, layouts: Sequence[tuple[str, ...]]) -> Table:
    """A file of texts with ids; for a TSV without a header, the layout that has as many columns as its first line."""
    if kind_of(path) not in (".tsv", ".txt"):
        return FileTable(path)
    row = next((line for _, line in read_lines(FileTable(path).path)), "").split("\t")
    if len(row) > 1 and all(name in _HEADER_NAMES for name in row):
        return FileTable(path, quoted=row == ["id", "text", "title"])  # DPR's psgs_w100.tsv
    return FileTable(path, next((names for names in layouts if len(names) == len(row)), layouts[0]))


def _find(folder: Path, stems: Sequence[str], what: str) -> list[Path]:
    for stem in stems:
        files = data_files(folder, stem)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"expected one {what} file, found {names}; name the file itself (data.train.<n>.{what}, or the path)", folder)
        if files := files or data_files(folder / stem):
            return files
    raise DataError(f"expected a {what} file ({' or '.join(f'{stem}.*' for stem in stems)})", folder)


def data_files(folder: Path, stem: str | None = None) -> list[Path]:
    """Data files of a folder by name; with `stem`, those so named, else those whose name goes on after it (`queries.dev.small`)."""
    if not folder.is_dir():
        return []
    files = sorted(f for f in folder.iterdir() if f.is_file() and kind_of(f) in KINDS)
    if stem is None:
        return files
    return [f for f in files if stem_of(f) == stem] or [f for f in files if stem_of(f).startswith(f"{stem}.")]
