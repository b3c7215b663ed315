"""Answers in the terminal: the passages found for a query, and a loop that reads the user's own queries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Mapping
from typing import TextIO

from eval.engines.embeddings import passage_ids
from eval.engines.nearest import SearchOptions, search
from eval.engines.topk import PassageOrder
from eval.trec import Ranking
from retriever.encoder.bundle import EncoderBundle
from retriever.shards import EmbeddingShards
from scripts.code_pairs.split import drawn

WIDTH = 96  # columns
_LINES = 3  # of a passage
_SAMPLE_WORDS = 8  # a sample query says what it looks for


class Searcher:
    """An encoder and a corpus that it has encoded."""

    def __init__(self, bundle: EncoderBundle, passages: EmbeddingShards, texts: Mapping[str, str]) -> None:
        self._bundle, self._passages, self.texts = bundle, passages, texts
        self._order = PassageOrder(passage_ids(passages))

    def __call__(self, query: str, k: int = 3, excluded: str | None = None) -> Ranking:
        """The k best passages for a query, without the passage `excluded`."""
        options, own = SearchOptions(exclude_self=excluded is not None), excluded or ""
        found = search(self._bundle.encode([query], "query"), [own], self._passages, k, options, order=self._order)
        return found[own]

    def answer(self, query: str, right: Container[str] = (), k: int = 3) -> str:
        """The k best passages as text of at most WIDTH columns. Passages in `right` are marked."""
        found = self(query, k)
        lines = [f"» {query}"]
        for rank, (passage_id, score) in enumerate(zip(found.passage_ids, found.scores, strict=True), 1):
            mark = "  ✓ the function with this docstring" if passage_id in right else ""
            lines.append(f"  {rank}. {passage_id.removeprefix('stdlib.')}  {score:.2f}{mark}")
            code = [f"       {line}" for line in self.texts[passage_id].splitlines() if line.strip()]
            if len(code) > _LINES:
                code[_LINES - 1] += "  …"
            lines += code[:_LINES]
        return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines)


def sample_queries(queries: Mapping[str, str], count: int, seed: int) -> list[str]:
    """The ids of `count` queries drawn by the seed alone. Queries of fewer than eight words are taken only if there are
    too few others.
    """
    order = sorted(
        queries, key=lambda query_id: (len(queries[query_id].split()) < _SAMPLE_WORDS, drawn(seed, query_id))
    )
    return order[:count]


def answer_own_queries(answer: Callable[[str], str], stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> None:
    """Answers one query per line until an empty line, Ctrl-D or Ctrl-C. Does nothing if `stdin` is not a terminal."""
    if not stdin.isatty():
        return
    print("Describe a function in your own words (an empty line ends).", file=stdout)
    try:
        print("\nquery> ", end="", file=stdout, flush=True)
        while query := stdin.readline().strip():
            print(f"{answer(query)}\n\nquery> ", end="", file=stdout, flush=True)
    except KeyboardInterrupt:
        print(file=stdout)
