"""What is read of one source while a store is built, and the first figures of its pairs.

The figures are shown while the store grows, in a line when a source has been read, and stay in the store's manifest as
`statistics`, one dictionary a source: `queries`, `positives` and `negatives` (different pairs); `repeated_queries`,
whose text equals an earlier one of the source; `passages` that were read and `repeated_passages` among them, whose text
any source had brought before; `query_tokens` and `passage_tokens`, the means of what was stored, prompt and special
tokens included; `queries_cut` and `passages_cut`, the shares longer than their length. Texts are compared by their
digests, exactly, as they are and not as tokens. Warnings before step 1 can start from them without reading a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from retriever.data.formats import Source
from retriever.data.relations import PairBuffer
from retriever.data.text_table import Lengths
from retriever.wording import counted

_NOUNS = {"queries": "query", "positives": "positive", "negatives": "negative", "passages": "passage"}


@dataclass
class SourceReading:
    """What is read of one source before its rows are known. Queries and passage ids are numbered as they appear."""

    source: Source
    query_prompt: str
    passage_prompt: str
    kind: int  # of its passages
    query_lengths: Lengths
    passage_lengths: Lengths
    queries: dict[str, int] = field(default_factory=dict)
    query_digests: list[bytes] = field(default_factory=list)
    references: dict[str, int] = field(default_factory=dict)
    positives: PairBuffer = field(default_factory=PairBuffer)
    negatives: PairBuffer = field(default_factory=PairBuffer)
    blank: int = 0  # passages without a text
    passages: int = 0  # with one
    repeated_passages: int = 0  # of those, with the text of an earlier one

    def so_far(self) -> str:
        """The figures that are known while examples are read."""
        repeated = self.repeated_passages / max(1, self.passages)
        return f"passages of {self.passage_lengths}, {repeated:.1%} repeat a text"

    def statistics(self, positives: int, negatives: int) -> dict[str, Any]:
        """The figures of the whole source, which has so many different pairs of either kind."""
        digests = np.frombuffer(b"".join(self.query_digests), np.uint64)[::2]  # half of 16 bytes are enough
        return {
            "queries": len(digests),
            "repeated_queries": len(digests) - len(np.unique(digests)),
            "positives": positives,
            "negatives": negatives,
            "passages": self.passages,
            "repeated_passages": self.repeated_passages,
            "query_tokens": self.query_lengths.mean,
            "passage_tokens": self.passage_lengths.mean,
            "queries_cut": self.query_lengths.cut_share,
            "passages_cut": self.passage_lengths.cut_share,
        }

    def described(self, statistics: dict[str, Any]) -> str:
        """The figures of the whole source in a line."""
        counts = {name: counted(statistics[name], noun) for name, noun in _NOUNS.items()}
        return (
            f"{self.source.name}: {counts['queries']} of {self.query_lengths}, "
            f"{statistics['repeated_queries']:,} repeat a text; {counts['positives']}, {counts['negatives']}; "
            f"{counts['passages']} read, of {self.passage_lengths}, {statistics['repeated_passages']:,} repeat a text"
        )
