"""What is mined: all passages of a training source, each distinct final text once, and its queries with what they know as positive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from eval.collection import fingerprint
from retriever.data.formats import DataError, Example, Passage, Source, final_text


@dataclass
class MinedQuery:
    """One query of the source. Passages are numbers in the pool."""

    id: str
    text: str
    prompt: str | None
    positives: list[int] = field(default_factory=list)


class Pool:
    """The passages [N] that negatives are taken from, and the queries [Q] that have a positive among them.

    Reads the corpus of the source, if it has one, then its examples, whose own passages join the pool. Texts are held in memory.
    Raises DataError where the source cannot be read or names a passage that its corpus lacks.
    """

    def __init__(self, source: Source, title: Literal["join", "drop"], separator: str) -> None:
        self._title, self._separator = title, separator
        self._numbers: dict[str, int] = {}  # final text -> number
        self._by_id: dict[str, int] = {}
        self.passages: list[Passage] = []
        self.texts: list[str] = []
        for passage in source.corpus():
            number = self._add(passage)
            if passage.id is not None and self._by_id.setdefault(passage.id, number) != number:
                raise DataError(f"source {source.name!r}: passage id {passage.id!r} stands for two texts in the corpus")
        merged: dict[str, MinedQuery] = {}
        for example in source.examples():
            self._read(example, merged, source.name)
        self.queries = [query for query in merged.values() if query.positives]
        self.left_out = len(merged) - len(self.queries)
        if not self.queries:
            raise DataError(f"source {source.name!r}: none of its {len(merged):,} queries has a positive passage")
        self.fingerprint = fingerprint([source.fingerprint(), title, separator])

    def known(self, query: MinedQuery) -> set[int]:
        """The passages that are no negatives of a query: its positives, and the one whose text is its own."""
        own = self._numbers.get(query.text)
        return {*query.positives, *([] if own is None else [own])}

    def numbered_texts(self) -> Iterator[tuple[str, str]]:
        """(number, final text) of every passage, the numbers as ids."""
        return ((str(number), text) for number, text in enumerate(self.texts))

    def numbered_queries(self) -> Iterator[tuple[str, str]]:
        """(row, text) of every query, the rows as ids."""
        return ((str(row), query.text) for row, query in enumerate(self.queries))

    def _add(self, passage: Passage) -> int:
        text = final_text(passage, self._title, self._separator)
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
            self.passages.append(passage)
        return number

    def _read(self, example: Example, merged: dict[str, MinedQuery], name: str) -> None:
        query = merged.setdefault(example.query_id, MinedQuery(example.query_id, example.query, example.prompt))
        if query.text != example.query:
            raise DataError(f"source {name!r}: query id {example.query_id!r} stands for two texts, the second {example.query[:60]!r}")
        found = list(self._look_up(example.positives, name, example.query_id))
        query.positives = list(dict.fromkeys([*query.positives, *found]))
        for passage in example.negatives:
            if passage.text is not None:
                self._add(passage)

    def _look_up(self, passages: Iterable[Passage], name: str, query_id: str) -> Iterator[int]:
        for passage in passages:
            if passage.text is not None:
                yield self._add(passage)
            elif passage.id in self._by_id:
                yield self._by_id[passage.id]
            else:
                raise DataError(
                    f"source {name!r}: passage {passage.id!r}, a positive of query {query_id!r}, is not in its corpus (--corpus names one)"
                )
