"""Reads a training source into the files of a pool: its passages row by row, which of them are equal, and its queries.

What stays in memory of a passage is its digest and, of those of a corpus, their id's: 32 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retriever.data.formats import DataError, Passage, Source
from retriever.data.records import is_blank
from retriever.files import write_array, write_lines
from scripts.mining.passages import Passages, digest, numbered, write_passages

PASSAGES, ROWS, QUERIES = "passages.arrow", "rows.npy", "queries.jsonl"


@dataclass
class _Query:
    text: str
    prompt: str | None
    positives: list[int | str] = field(
        default_factory=list
    )  # rows of the file, and ids of passages that come without their text


class PoolReader:
    """Reads one source; `write` is called once. `final_text` gives the text that a passage is known by."""

    def __init__(self, source: Source, final_text: Callable[[Passage], str]) -> None:
        self._source, self._final_text = source, final_text
        self._texts, self._ids = bytearray(), bytearray()  # digests of all final texts, and of the ids of the corpus
        self._blank: list[int] = []  # rows of passages without a text, which are no positives
        self._wanted: dict[str, str] = {}  # id of a positive that comes without its text -> the first query that has it
        self._queries: dict[str, _Query] = {}

    def write(self, folder: Path) -> list[str]:
        """Writes the pool's files and returns their names. Raises DataError where the source cannot be read or lacks a
        positive.
        """
        write_passages(folder / PASSAGES, self._passages())
        rows = len(self._texts) // 16
        numbers = numbered(self._texts + b"".join(digest(query.text) for query in self._queries.values()))  # [rows + Q]
        _, first = np.unique(numbers[:rows], return_index=True)  # the first row of each number
        write_array(folder / ROWS, first)
        found = self._look_up(numbers, folder / PASSAGES)
        blank = {int(numbers[row]) for row in self._blank}

        def lines() -> Iterator[str]:
            for (query_id, query), same in zip(self._queries.items(), numbers[rows:].tolist(), strict=True):
                places = dict.fromkeys(found[at] if isinstance(at, str) else int(numbers[at]) for at in query.positives)
                positives = [number for number in places if number not in blank]
                yield json.dumps([query_id, query.text, query.prompt, positives, same if same < len(first) else None])

        write_lines(folder / QUERIES, lines())
        return [PASSAGES, ROWS, QUERIES]

    def _passages(self) -> Iterator[Passage]:
        """Every passage of the source, the corpus first; notes them and the queries as they go by."""
        for passage in self._source.corpus():
            self._ids += digest(passage.id or "")
            yield self._noted(passage)
        for example in self._source.examples():
            query = self._queries.setdefault(example.query_id, _Query(example.query, example.prompt))
            if query.text != example.query:
                message = f"query id {example.query_id!r} stands for two texts, the second {example.query[:60]!r}"
                raise DataError(f"source {self._source.name!r}: {message}")
            for passage in example.positives:
                if passage.text is None:
                    self._wanted.setdefault(str(passage.id), example.query_id)
                    query.positives.append(str(passage.id))
                else:
                    query.positives.append(len(self._texts) // 16)
                    yield self._noted(passage)
            yield from (self._noted(passage) for passage in example.negatives if passage.text is not None)

    def _noted(self, passage: Passage) -> Passage:
        text = self._final_text(passage)
        if is_blank(text):
            self._blank.append(len(self._texts) // 16)
        self._texts += digest(text)
        return passage

    def _look_up(self, numbers: np.ndarray, passages: Path) -> dict[str, int]:
        """The numbers of the passages that were given by id. Raises DataError where an id is missing or stands for two
        texts.
        """
        corpus, name = len(self._ids) // 16, self._source.name
        ids = numbered(self._ids + b"".join(map(digest, self._wanted)))  # [corpus + wanted]
        _, first = np.unique(ids[:corpus], return_index=True)  # the first row of each id
        twice = np.flatnonzero(numbers[:corpus] != numbers[first[ids[:corpus]]])
        if len(twice):
            raise DataError(
                f"source {name!r}: passage id {Passages(passages, twice)[0].id!r} stands for two texts in the corpus"
            )
        found = {}
        for (passage_id, query_id), at in zip(self._wanted.items(), ids[corpus:], strict=True):
            if at >= len(first):
                place = f"passage {passage_id!r}, a positive of query {query_id!r}, is not in its corpus (--corpus names one)"
                raise DataError(f"source {name!r}: {place}")
            found[passage_id] = int(numbers[first[at]])
        return found
