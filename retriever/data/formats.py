"""Training data of any format as one stream of examples and one of passages.

`open_source` finds out what a path or Hugging Face name holds; `Source` is what the token store reads. A format is a
function that makes examples of records: in formats_inline.py where records carry their texts, in formats_by_id.py where
they name passages by id. formats_detect.py recognises it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from retriever.config import SourceConfig
from retriever.data import hub_tables
from retriever.data.collection import (
    corpus_tables,
    passages_of,
    qrels_of,
    query_tables,
    query_texts,
    read_corpus,
    read_qrels,
    read_queries,
)
from retriever.data.files import FileTable, Table, exists, kind_of
from retriever.data.folders import example_files, find_qrels, split_of
from retriever.data.formats_by_id import judged_examples, msmarco_examples, needs_corpus, relation_files
from retriever.data.formats_detect import detect_format, detect_record_format
from retriever.data.formats_inline import (
    TEXT,
    column_examples,
    dpr_examples,
    flagembedding_examples,
    tevatron_examples,
    text_examples,
)
from retriever.data.records import DataError, Example, Passage, Record, final_text

__all__ = [
    "DataError",
    "Example",
    "Passage",
    "Source",
    "final_text",
    "find_qrels",
    "open_source",
    "read_corpus",
    "read_qrels",
    "read_queries",
]


@dataclass(frozen=True)
class Source:
    """One training source, readable any number of times."""

    name: str
    format: str
    tables: tuple[Table, ...]  # everything that is read, the corpus included
    corpus_tables: tuple[Table, ...]
    read_examples: Callable[[], Iterator[Example]]
    limit: int | None = None
    columns: tuple[str, ...] | None = None

    def examples(self) -> Iterator[Example]:
        """The examples of all queries, or of the first `limit` queries. Raises DataError at a malformed record."""
        kept: set[str] = set()
        for example in self.read_examples():  # judgments and mined negatives of one query may stand far apart
            if self.limit is not None:
                if len(kept) == self.limit and example.query_id not in kept:
                    continue
                kept.add(example.query_id)
            yield example

    def corpus(self) -> Iterator[Passage]:
        """The passages that examples name by id; none where the examples carry their texts."""
        return chain.from_iterable(passages_of(table) for table in self.corpus_tables)

    def fingerprint(self) -> str:
        """A hash of the content of everything that is read and of how it is read."""
        read = [self.format, self.limit, self.columns, [table.digest() for table in self.tables]]
        return hashlib.blake2b(json.dumps(read).encode(), digest_size=16).hexdigest()


def open_source(config: SourceConfig) -> Source:
    """The source that one entry of data.train describes; its records are read when they are asked for.

    Raises DataError where a file is missing or `format: auto` cannot tell what it is.
    """
    if config.name is not None:
        is_whole = ":" not in config.name  # name:subset is one table
        is_guessed = config.format == "auto" and is_whole
        if config.format == "beir" or (is_guessed and hub_tables.is_collection(config.name, config.revision)):
            corpus, queries, judgments = hub_tables.collection_tables(config.name, config.revision, config.split)
            return _judged(
                config, _texts(config, "corpus") or [corpus], _texts(config, "queries") or [queries], judgments
            )
        table = hub_tables.named_table(config.name, config.revision, config.split, streaming=config.streaming)
        return _inline(config, [table])
    path = _path_of(config)
    if hub_tables.is_saved_dataset(path):
        return _inline(config, [hub_tables.saved_table(path, config.split)])
    kind = config.format if config.format != "auto" else detect_format(path, config.split)
    if kind == "beir":
        corpus_and_queries = _texts(config, "corpus", path), _texts(config, "queries", path, config.split)
        return _judged(config, *corpus_and_queries, FileTable(find_qrels(path, config.split)))
    if kind == "msmarco":
        return _msmarco(config, path)
    files = example_files(path, config.split)
    return _inline(config, [_lines(file) if kind == "texts" else FileTable(file) for file in files], kind)


def _lines(file: Path) -> FileTable:
    """The table of a file of texts; a .txt file has no header and a text a line."""
    return FileTable(file, (TEXT,), separator="\n") if kind_of(file) == ".txt" else FileTable(file)


def _path_of(config: SourceConfig) -> Path:
    path = Path(config.path or "").expanduser()
    if not exists(path):
        raise DataError("no such file or folder (data.train.<n>.path)", path)
    return path


def _texts(
    config: SourceConfig, side: Literal["corpus", "queries"], folder: Path | None = None, split: str | None = None
) -> Sequence[Table]:
    """The tables of data.train.<n>.corpus or queries: a file, a folder or, beside a name of the hub, another name.

    Where the setting is null, those in `folder`, if there is one.
    """
    configured = getattr(config, side)
    path = folder if configured is None else Path(configured).expanduser()
    if path is None:
        return []
    if config.name is not None and not path.is_file():
        return [hub_tables.named_table(configured)]
    return corpus_tables(path) if side == "corpus" else query_tables(path, split)


def _judged(config: SourceConfig, corpus: Sequence[Table], queries: Sequence[Table], judgments: Table) -> Source:
    """BEIR: every judged query of the split."""

    def examples() -> Iterator[Example]:
        qrels = read_qrels(judgments.path) if isinstance(judgments, FileTable) else qrels_of(judgments)
        return judged_examples(qrels, query_texts(queries), judgments.label)

    return _source(config, "beir", [judgments, *queries], corpus, examples)


def _msmarco(config: SourceConfig, path: Path) -> Source:
    """MS MARCO: judgments, triples, hard negatives. Collection and queries are beside them or as configured."""
    files = relation_files(path, config.split)
    corpus: Sequence[Table] = []
    queries: Sequence[Table] = []
    if needs_corpus(files):
        folder, split = (path, None) if path.is_dir() else (path.parent, split_of(path))
        corpus, queries = _texts(config, "corpus", folder), _texts(config, "queries", folder, split or config.split)

    def examples() -> Iterator[Example]:
        return msmarco_examples(files, query_texts(queries))

    return _source(config, "msmarco", [*map(FileTable, files), *queries], corpus, examples)


def _inline(config: SourceConfig, tables: Sequence[Table], kind: str | None = None) -> Source:
    """Records that carry their query: Tevatron, DPR, FlagEmbedding, columns, texts. Passages may be ids in a
    corpus.
    """
    kind = kind or (config.format if config.format != "auto" else detect_record_format(tables[0]))
    if kind not in ("columns", "texts", *_READERS):
        message = f"format {kind!r} is read from its own files or folder; here are records of one table"
        raise DataError(message, tables[0].label)
    folder = None
    if kind == "tevatron" and config.path is not None:
        first, path = next(tables[0].records(), None), _path_of(config)
        if first is not None and "positive_document_ids" in first.values:
            folder = path if path.is_dir() else path.parent
    corpus, queries = _texts(config, "corpus", folder), _texts(config, "queries")

    def examples() -> Iterator[Example]:
        records = chain.from_iterable(table.records() for table in tables)
        if kind == "texts":
            return text_examples(records, *(config.columns or ()))
        if kind != "columns":
            return _READERS[kind](records)
        return column_examples(records, config.columns, query_texts(queries) if queries else None, by_id=bool(corpus))

    return _source(config, kind, [*tables, *queries], corpus, examples)


_READERS: dict[str, Callable[[Iterator[Record]], Iterator[Example]]] = {
    "tevatron": tevatron_examples,
    "dpr": dpr_examples,
    "flagembedding": flagembedding_examples,
}


def _source(
    config: SourceConfig,
    kind: str,
    read: Sequence[Table],
    corpus: Sequence[Table],
    examples: Callable[[], Iterator[Example]],
) -> Source:
    name = config.name or Path(config.path or "").resolve().name
    columns = None if kind in ("beir", "msmarco") else config.columns
    return Source(name, kind, (*read, *corpus), tuple(corpus), examples, config.limit, columns)
