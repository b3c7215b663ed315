"""Answers on the screen: the passages a model finds for a query, and a loop that takes the user's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from scripts.code_pairs.split import drawn

if TYPE_CHECKING:
    from eval.collections.collection import Collection
    from eval.trec import Ranking
    from retriever.encoder.bundle import EncoderBundle

WIDTH = 96  # columns
_LINES = 3  # of a passage
_SAMPLE_WORDS = 8  # a sample query says what it looks for


class Searcher:
    """An encoder over a corpus that is encoded already."""

    def __init__(self, bundle: EncoderBundle, shards: Path, corpus: Path) -> None:
        from retriever.shards import open_shards

        self._bundle, self._shards = bundle, open_shards(shards)
        with corpus.open(encoding="utf-8") as lines:
            self.texts: dict[str, str] = {record["_id"]: record["text"] for record in map(json.loads, lines)}

    def __call__(self, query: str, k: int = 3) -> Ranking:
        """The k best passages for a query."""
        from eval.engines.nearest import search

        return search(self._bundle.encode([query], "query"), [query], self._shards, k)[query]

    def answer(self, query: str, right: Container[str] = (), k: int = 3) -> str:
        """The k best passages as text of at most WIDTH columns; those of `right` are marked."""
        found = self(query, k)
        lines = [_cut(f"» {query}")]
        for rank, (passage_id, score) in enumerate(zip(found.passage_ids, found.scores, strict=True), 1):
            mark = "  ✓ the function with this docstring" if passage_id in right else ""
            lines.append(_cut(f"  {rank}. {passage_id.removeprefix('stdlib.')}  {score:.2f}{mark}"))
            code = [line for line in self.texts[passage_id].splitlines() if line.strip()]
            lines += [_cut(f"       {line}") for line in code[:_LINES]]
            if len(code) > _LINES:
                lines[-1] = _cut(f"{lines[-1]}  …")
        return "\n".join(lines)


def read_test(data: Path) -> tuple[Collection, dict[str, str]]:
    """The test split of a folder of code pairs, and the module of each of its queries."""
    from eval.collections.collection import read_beir

    test = read_beir(data)
    with (data / "queries.jsonl").open(encoding="utf-8") as lines:
        modules = {record["_id"]: record["metadata"]["module"] for record in map(json.loads, lines)}
    return test, {query_id: modules[query_id] for query_id in test.queries}


def sample_queries(queries: Mapping[str, str], count: int, seed: int) -> list[str]:
    """Ids of `count` queries of eight words or more (of any, where there are too few), drawn by the seed and by nothing else."""
    order = sorted(queries, key=lambda query_id: (len(queries[query_id].split()) < _SAMPLE_WORDS, drawn(seed, query_id)))
    return order[:count]


def answer_own_queries(answer: Callable[[str], str], stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> None:
    """Answers one query a line until an empty one, Ctrl-D or Ctrl-C. Does nothing where `stdin` is no terminal."""
    if not stdin.isatty():
        return
    print("Describe a function in your own words (an empty line ends).", file=stdout)
    try:
        while True:
            print("\nquery> ", end="", file=stdout, flush=True)
            query = stdin.readline().strip()
            if not query:
                break
            print(answer(query), file=stdout)
    except KeyboardInterrupt:
        print(file=stdout)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
