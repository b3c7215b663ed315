"""Reads a training source into the files of a pool: its passages row by row, which of them are equal, and its queries.

What stays in memory of a passage is its digest and, of those of a corpus, their id's: 32 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from retriever.data.formats import DataError, Example, Passage, Source, final_text
from retriever.files import replace_file, write_array
from scripts.mining.passages import Passages, PassageWriter, digest, first_equal

PASSAGES, ROWS, QUERIES = "passages.arrow", "rows.npy", "queries.jsonl"


@dataclass
class _Query:
    text: str
    prompt: str | None
    positives: list[int] = field(default_factory=list)  # rows of the file; below 0: -1 - w, w the number of a wanted id


class PoolReader:
    """Reads one source; `write` is called once."""

    def __init__(self, source: Source, title: Literal["join", "drop"], separator: str) -> None:
        self._source, self._title, self._separator = source, title, separator
        self._texts, self._ids = bytearray(), bytearray()  # digests of all final texts, and of the ids of the corpus
        self._wanted: dict[str, int] = {}  # ids of positives that come without their text
        self._queries: dict[str, _Query] = {}

    def write(self, folder: Path) -> list[str]:
        """Writes the pool's files and returns their names. Raises DataError where the source cannot be read or lacks a positive."""
        with replace_file(folder / PASSAGES) as aside, PassageWriter(aside) as passages:
            for passage in self._source.corpus():
                self._add(passage, passages)
                self._ids += digest(passage.id or "")
            for example in self._source.examples():
                self._read(example, passages)
        rows, corpus = len(self._texts) // 16, len(self._ids) // 16
        first = first_equal(self._texts + b"".join(digest(query.text) for query in self._queries.values()))
        distinct = first[:rows] == np.arange(rows)
        numbers = (np.cumsum(distinct) - 1)[first[:rows]]  # of every row
        write_array(folder / ROWS, np.flatnonzero(distinct))
        found = self._look_up(numbers, corpus, Passages(folder / PASSAGES, np.arange(rows)))
        own = [int(numbers[at]) if at < rows else None for at in first[rows:]]
        with replace_file(folder / QUERIES) as aside, aside.open("w", encoding="utf-8") as stream:
            for (query_id, query), same in zip(self._queries.items(), own, strict=True):
                positives = dict.fromkeys(int(numbers[at] if at >= 0 else found[-1 - at]) for at in query.positives)
                stream.write(json.dumps([query_id, query.text, query.prompt, list(positives), same]) + "\n")
        return [PASSAGES, ROWS, QUERIES]

    def _add(self, passage: Passage, passages: PassageWriter) -> int:
        self._texts += digest(final_text(passage, self._title, self._separator))
        return passages.add(passage)

    def _read(self, example: Example, passages: PassageWriter) -> None:
        query = self._queries.setdefault(example.query_id, _Query(example.query, example.prompt))
        if query.text != example.query:
            message = f"query id {example.query_id!r} stands for two texts, the second {example.query[:60]!r}"
            raise DataError(f"source {self._source.name!r}: {message}")
        query.positives += self._places(example.positives, passages)
        for passage in example.negatives:
            if passage.text is not None:
                self._add(passage, passages)

    def _places(self, positives: Iterable[Passage], passages: PassageWriter) -> list[int]:
        return [
            self._add(p, passages) if p.text is not None else -1 - self._wanted.setdefault(str(p.id), len(self._wanted)) for p in positives
        ]

    def _look_up(self, numbers: np.ndarray, corpus: int, passages: Passages) -> np.ndarray:
        """The numbers [wanted] of the passages that were given by id. Raises DataError where an id is missing or stands for two texts."""
        first = first_equal(self._ids + b"".join(map(digest, self._wanted)))
        twice = np.flatnonzero(numbers[:corpus] != numbers[first[:corpus]])
        name = self._source.name
        if len(twice):
            raise DataError(f"source {name!r}: passage id {passages[int(twice[0])].id!r} stands for two texts in the corpus")
        missing = np.flatnonzero(first[corpus:] >= corpus)
        if len(missing):
            at, passage_id = int(missing[0]), list(self._wanted)[missing[0]]
            query_id = next(i for i, query in self._queries.items() if -1 - at in query.positives)
            place = f"passage {passage_id!r}, a positive of query {query_id!r}, is not in its corpus (--corpus names one)"
            raise DataError(f"source {name!r}: {place}")
        return numbers[first[corpus:]]
