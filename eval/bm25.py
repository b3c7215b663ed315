"""BM25 runs (bm25s, Lucene's formula), the lexical baseline of every comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import bm25s
import numpy as np

from eval.trec import Ranking, ranking

K1, B = 0.9, 0.4  # Anserini's defaults for passages
DESCRIPTION = f"bm25s, Lucene's formula, k1 {K1}, b {B}, S-stemmer (plurals), bm25s's English stop words"


class Bm25:
    """An index of texts [N]; `scores` rates all of them for a query."""

    def __init__(self, texts: Sequence[str], *, progress: bool = False) -> None:
        """Raises ValueError where there are no texts, or none has a word."""
        tokens = bm25s.tokenize(list(texts), stopwords="en", stemmer=_stems, show_progress=progress)
        if not any(len(row) for row in tokens.ids):
            raise ValueError(f"{len(texts)} passages without a single word: BM25 needs text")
        self._index, self._count = bm25s.BM25(k1=K1, b=B), len(texts)
        self._index.index(tokens, show_progress=progress)

    def scores(self, query: str) -> np.ndarray:
        """BM25 of every text for the query [N] float32, 0 where they share no word."""
        words = bm25s.tokenize([query], stopwords="en", stemmer=_stems, show_progress=False, return_ids=False)[0]
        return self._index.get_scores(words) if words else np.zeros(self._count, dtype=np.float32)


def bm25_run(
    passages: Iterable[tuple[str, str]], queries: Mapping[str, str], k: int = 1000, *, exclude_self: bool = False, progress: bool = False
) -> dict[str, Ranking]:
    """The k passages of highest BM25 score for each query, in trec_eval's order; passages that share no word with it are left out.

    passages: (id, text); queries: id -> text. `exclude_self` drops a passage whose id is the query's. Holds one score a passage.
    Raises ValueError where there are no passages, or none has a word.
    """
    ids, texts = [], []
    for passage_id, text in passages:
        ids.append(passage_id)
        texts.append(text)
    index = Bm25(texts, progress=progress)
    return {name: _best(ids, index.scores(text), k, name if exclude_self else None) for name, text in queries.items()}


def plural_stem(word: str) -> str:
    """An English word in lower case without its plural s: passages -> passage, queries -> query; class, corpus and does stay.

    The first of three rules whose ending fits decides. (Harman 1991, How effective is suffixing?, the S stemmer)
    """
    if word.endswith("ies") and len(word) > 3 and word[-4] not in "ae":
        return word[:-3] + "y"
    if word.endswith("es") and len(word) > 2:
        return word if word[-3] in "aeio" else word[:-1]
    if word.endswith("s") and len(word) > 2 and word[-2] not in "us":
        return word[:-1]
    return word


def _stems(words: list[str]) -> list[str]:
    return [plural_stem(word) for word in words]


def _best(ids: list[str], scores: np.ndarray, k: int, excluded: str | None) -> Ranking:
    """The k best of the positive scores [N]; everything equal to the k-th best takes part in the tie."""
    wanted = min(k + 1, len(scores))  # one more: the excluded passage may be among the k best
    line = np.partition(scores, -wanted)[-wanted]
    hits = [int(i) for i in np.flatnonzero((scores > 0) & (scores >= line)) if ids[i] != excluded]
    found = ranking([ids[i] for i in hits], scores[hits])
    return Ranking(found.passage_ids[:k], found.scores[:k])
