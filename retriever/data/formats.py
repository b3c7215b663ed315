"""Training data of any format as one stream of examples and one of passages.

`open_source` finds out what a path or Hugging Face name holds; `Source` is what the token store reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from retriever.config import SourceConfig
from retriever.data import hub_tables, readers_by_id, readers_inline
from retriever.data.collection import (
    corpus_tables,
    find_qrels,
    passages_of,
    qrels_of,
    query_tables,
    query_texts,
    read_corpus,
    read_qrels,
    read_queries,
    split_of,
)
from retriever.data.detect import detect_format, detect_record_format, example_files
from retriever.data.files import FileTable, Table, exists
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
        whole = ":" not in config.name  # name:subset is one table
        if config.format == "beir" or (
            config.format == "auto" and whole and hub_tables.is_collection(config.name, config.revision)
        ):
            corpus, queries, judgments = hub_tables.collection_tables(config.name, config.revision, config.split)
            own_corpus, own_queries = (
                _side_tables(config.corpus, config, corpus_tables),
                _side_tables(config.queries, config, query_tables),
            )
            return _judged(config, own_corpus or [corpus], own_queries or [queries], judgments)
        return _inline(config, [hub_tables.named_table(config.name, config.revision, config.split)])
    path = _path_of(config)
    if hub_tables.is_saved_dataset(path):
        return _inline(config, [hub_tables.saved_table(path, config.split)])
    kind = config.format if config.format != "auto" else detect_format(path, config.split)
    if kind == "beir":
        texts = (
            corpus_tables(_expanded(config.corpus, path)),
            query_tables(_expanded(config.queries, path), config.split),
        )
        return _judged(config, *texts, FileTable(find_qrels(path, config.split)))
    if kind == "msmarco":
        return _msmarco(config, path)
    return _inline(config, [FileTable(file) for file in example_files(path, config.split)], kind)


def _path_of(config: SourceConfig) -> Path:
    path = Path(config.path or "").expanduser()
    if not exists(path):
        raise DataError("no such file or folder (data.train.<n>.path)", path)
    return path


def _expanded(configured: str | None, otherwise: Path) -> Path:
    return otherwise if configured is None else Path(configured).expanduser()


def _name_of(config: SourceConfig) -> str:
    return config.name or Path(config.path or "").resolve().name


def _judged(config: SourceConfig, corpus: Sequence[Table], queries: Sequence[Table], judgments: Table) -> Source:
    """BEIR: every judged query of the split."""

    def examples() -> Iterator[Example]:
        qrels = read_qrels(judgments.path) if isinstance(judgments, FileTable) else qrels_of(judgments)
        return readers_by_id.judged_examples(qrels, query_texts(queries), judgments.label)

    return Source(_name_of(config), "beir", (judgments, *queries, *corpus), tuple(corpus), examples, config.limit)


def _msmarco(config: SourceConfig, path: Path) -> Source:
    """MS MARCO: judgments, triples and hard negatives; collection and queries stand beside them or where the config
    says.
    """
    folder = path if path.is_dir() else path.parent
    files = readers_by_id.relation_files(path, config.split)
    corpus: list[Table] = []
    queries: list[Table] = []
    if readers_by_id.needs_corpus(files):
        split = (split_of(path) if path.is_file() else None) or config.split
        corpus, queries = (
            corpus_tables(_expanded(config.corpus, folder)),
            query_tables(_expanded(config.queries, folder), split),
        )

    def examples() -> Iterator[Example]:
        return readers_by_id.msmarco_examples(files, query_texts(queries))

    tables = (*(FileTable(file) for file in files), *queries, *corpus)
    return Source(_name_of(config), "msmarco", tables, tuple(corpus), examples, config.limit)


def _inline(config: SourceConfig, tables: Sequence[Table], kind: str | None = None) -> Source:
    """Records that carry their query: Tevatron, DPR, FlagEmbedding, columns. Passages may be ids, with a corpus to look
    them up in.
    """
    kind = kind or (config.format if config.format != "auto" else detect_record_format(tables[0]))
    if kind not in ("columns", *_INLINE):
        raise DataError(
            f"format {kind!r} is read from its own files or folder; here are records of one table", tables[0].label
        )
    corpus, queries = _side_corpus(config, tables[0], kind), _side_tables(config.queries, config, query_tables)

    def records() -> Iterator[Record]:
        return chain.from_iterable(table.records() for table in tables)

    def examples() -> Iterator[Example]:
        if kind == "columns":
            return readers_inline.column_examples(
                records(), config.columns, query_texts(queries) if queries else None, by_id=bool(corpus)
            )
        return _INLINE[kind](records())

    return Source(
        _name_of(config), kind, (*tables, *queries, *corpus), tuple(corpus), examples, config.limit, config.columns
    )


_INLINE: dict[str, Callable[[Iterator[Record]], Iterator[Example]]] = {
    "tevatron": readers_inline.tevatron_examples,
    "dpr": readers_inline.dpr_examples,
    "flagembedding": readers_inline.flagembedding_examples,
}


def _side_corpus(config: SourceConfig, table: Table, kind: str) -> list[Table]:
    """The corpus that passage ids are looked up in: the configured one, or, for Tevatron's version 2, the one in the
    same folder.
    """
    if config.corpus is not None or kind != "tevatron" or config.path is None:
        return _side_tables(config.corpus, config, corpus_tables)
    first = next(table.records(), None)
    path = _path_of(config)
    by_id = first is not None and "positive_document_ids" in first.values
    return corpus_tables(path if path.is_dir() else path.parent) if by_id else []


def _side_tables(value: str | None, config: SourceConfig, at_path: Callable[[Path], list[Table]]) -> list[Table]:
    """Tables of a corpus or queries file or folder; beside a Hugging Face name, of a file or of another such name."""
    if value is None:
        return []
    path = Path(value).expanduser()
    if config.name is not None and not path.is_file():
        return [hub_tables.named_table(value)]
    return at_path(path)
