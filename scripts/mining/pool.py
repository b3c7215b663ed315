"""The pool of a mining: every distinct text of a training source once, and its queries with their known positives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa

from eval.collections.collection import fingerprint
from retriever.data.formats import DataError, Passage, Source, final_text
from retriever.data.records import is_blank
from retriever.files import replace_file, write_lines
from retriever.parallel.world import World
from scripts.stages import run_stage

_PASSAGES, _QUERIES = "passages.arrow", "queries.jsonl"
_WRITES = (_PASSAGES, _QUERIES, "rows.npy")  # the last one by earlier versions
_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("title", pa.string())])  # as Passage has them
_BATCH_ROWS = 512


@dataclass(frozen=True)
class MinedQuery:
    """A query of the source. Passages are numbers in the pool."""

    id: str
    text: str
    prompt: str | None
    positives: list[int]
    own: int | None  # the passage whose text is the query's


class Pool:
    """The passages [N] that negatives come from, and the queries [Q] that have a positive among them.

    Passages stay in a file in `folder`. They are numbered in the order of the source, the corpus first. Queries are
    held in memory.
    """

    def __init__(
        self, source: Source, title: Literal["join", "drop"], separator: str, folder: Path, world: World
    ) -> None:
        """Reads the source's corpus, if it has one, and then its examples, on the first rank and only once.

        Raises DataError if the source cannot be read, names a passage that its corpus lacks, or has no query with a
        positive.
        """
        self._final_text = partial(final_text, title=title, separator=separator)
        self.fingerprint = fingerprint([source.fingerprint(), title, separator])

        def read(folder: Path) -> list[str]:
            return PoolReader(source, self._final_text).write(folder) if world.is_first else []

        run_stage("read", folder, {"data": self.fingerprint, "passages": "once"}, read, writes=_WRITES, world=world)
        self.passages = Passages(folder / _PASSAGES)
        with (folder / _QUERIES).open(encoding="utf-8") as stream:
            queries = [MinedQuery(*json.loads(line)) for line in stream]
        self.queries = [query for query in queries if query.positives]
        self.left_out = len(queries) - len(self.queries)
        if not self.queries:
            raise DataError(f"source {source.name!r}: none of its queries ({len(queries):,}) has a positive passage")

    def text(self, number: int) -> str:
        """The final text of a passage."""
        return self._final_text(self.passages[number])

    def texts(self) -> Iterator[str]:
        """The final text of every passage."""
        return map(self._final_text, self.passages)


class PoolReader:
    """Reads one source into the files of a pool. Call `write` once. `final_text` gives the text that identifies a
    passage.

    For each passage the digest of its text is held in memory and, for those of a corpus, the digest of its id.
    """

    def __init__(self, source: Source, final_text: Callable[[Passage], str]) -> None:
        self._source, self._final_text = source, final_text
        self._numbers: dict[bytes, int] = {}  # digest of a final text -> its passage
        self._ids: dict[bytes, int] = {}  # digest of an id of the corpus -> its passage
        self._blank: set[int] = set()  # passages without a text, which are no positives
        self._queries: dict[str, MinedQuery] = {}

    def write(self, folder: Path) -> list[str]:
        """Writes the pool's files; returns their names. Raises DataError if the source cannot be read or lacks a
        positive.
        """
        write_passages(folder / _PASSAGES, self._passages())
        queries = (replace(q, own=self._numbers.get(_digest(q.text))) for q in self._queries.values())
        write_lines(folder / _QUERIES, (json.dumps(astuple(query)) for query in queries))
        return [_PASSAGES, _QUERIES]

    def _passages(self) -> Iterator[Passage]:
        """Every passage whose text is new, the corpus first. Collects the queries on the way."""
        for passage in self._source.corpus():
            number, new = self._number(passage)
            if self._ids.setdefault(_digest(passage.id or ""), number) != number:
                raise self._error(f"passage id {passage.id!r} stands for two texts in the corpus")
            if new:
                yield passage
        for example in self._source.examples():
            unseen = MinedQuery(example.query_id, example.query, example.prompt, [], None)
            query = self._queries.setdefault(example.query_id, unseen)
            if query.text != example.query:
                second = f"the second {example.query[:60]!r}"
                raise self._error(f"query id {example.query_id!r} stands for two texts, {second}")
            for passage in example.positives:
                number, new = (
                    self._number(passage) if passage.text is not None else (self._of_id(passage, query), False)
                )
                if number not in self._blank and number not in query.positives:
                    query.positives.append(number)
                if new:
                    yield passage
            for passage in example.negatives:
                if passage.text is not None and self._number(passage)[1]:
                    yield passage

    def _number(self, passage: Passage) -> tuple[int, bool]:
        """The number of the passage's text, and whether it is new."""
        text, new = self._final_text(passage), len(self._numbers)
        number = self._numbers.setdefault(_digest(text), new)
        if number == new and is_blank(text):
            self._blank.add(number)
        return number, number == new

    def _of_id(self, passage: Passage, query: MinedQuery) -> int:
        """The number of the corpus passage that a positive without a text names."""
        number = self._ids.get(_digest(str(passage.id)))
        if number is None:
            place = f"passage {passage.id!r}, a positive of query {query.id!r}"
            raise self._error(f"{place}, is not in its corpus (--corpus names one)")
        return number

    def _error(self, message: str) -> DataError:
        return DataError(f"source {self._source.name!r}: {message}")


def write_passages(path: Path, passages: Iterable[Passage]) -> None:
    """Writes passages to an Arrow file, in memory that does not grow with their number."""
    rows = ({"id": passage.id, "text": passage.text, "title": passage.title} for passage in passages)
    with replace_file(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as arrow:
        while batch := list(islice(rows, _BATCH_ROWS)):
            arrow.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))


class Passages:
    """The passages [N] of a file, read from disk on access."""

    def __init__(self, path: Path) -> None:
        self._columns = pa.ipc.open_file(pa.memory_map(str(path))).read_all().columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, number: int) -> Passage:
        return Passage(*(column[int(number)].as_py() for column in self._columns))

    def __iter__(self) -> Iterator[Passage]:
        return (self[number] for number in range(len(self)))


def _digest(text: str) -> bytes:
    """16 bytes that identify a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
