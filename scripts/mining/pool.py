"""What is mined: all passages of a training source, each distinct final text once, and its queries with what they know
as positive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from eval.collections.collection import fingerprint
from retriever.data.formats import DataError, Source, final_text
from retriever.parallel.world import World
from scripts.mining.passages import Passages
from scripts.mining.pool_reader import PASSAGES, QUERIES, ROWS, PoolReader
from scripts.stages import run_stage


@dataclass(frozen=True)
class MinedQuery:
    """One query of the source. Passages are numbers in the pool."""

    id: str
    text: str
    prompt: str | None
    positives: list[int]
    own: int | None  # the passage whose text is the query's


class Pool:
    """The passages [N] that negatives are taken from, and the queries [Q] that have a positive among them.

    Passages stay in a file of `folder`, numbered as the source gives them, its corpus first. The queries are held in
    memory.
    """

    def __init__(
        self, source: Source, title: Literal["join", "drop"], separator: str, folder: Path, world: World
    ) -> None:
        """Reads the corpus of the source, if it has one, then its examples, whose own passages join the pool; rank 0
        does, once.

        Raises DataError where the source cannot be read, names a passage that its corpus lacks, or has no query with a
        positive.
        """
        self._final_text = partial(final_text, title=title, separator=separator)
        self.fingerprint = fingerprint([source.fingerprint(), title, separator])

        def read(folder: Path) -> list[str]:
            return PoolReader(source, self._final_text).write(folder) if world.is_first else []

        run_stage("read", folder, {"data": self.fingerprint}, read, writes=(PASSAGES, ROWS, QUERIES), world=world)
        self.passages = Passages(folder / PASSAGES, np.load(folder / ROWS, mmap_mode="r", allow_pickle=False))
        with (folder / QUERIES).open(encoding="utf-8") as stream:
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
