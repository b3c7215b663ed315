"""BM25 runs (bm25s, Lucene's formula), the lexical baseline of every comparison."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import bm25s
import numpy as np

from eval.engines.bm25_index import read_index, write_index
from eval.trec import Ranking, ranking

K1, B = 0.9, 0.4  # Anserini's defaults for passages
DESCRIPTION = (
    f"bm25s, Lucene's formula, k1 {K1}, b {B}, S-stemmer (plurals), bm25s's English stop words, "
    "character bigrams of scripts without spaces"
)
# Thai, Lao, Burmese, Khmer, Chinese and Japanese: their letters and marks, no digits and no punctuation.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecd\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u3005-\u3007\u3041-\u309f"
    "\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_RUN = re.compile(f"[{_UNSPACED}]+")
_WORD = rf"(?u)[{_UNSPACED}]{{1,2}}|\b\w\w+\b"
_QUERIES_A_TASK = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class Bm25:
    """A search over the texts [N] of an index in a folder, which is memory-mapped. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._postings = read_index(folder)

    @staticmethod
    def build(texts: Iterable[str], folder: Path, *, progress: bool = False) -> None:
        """Writes the index of the texts into `folder`, reading them once and holding none.

        Raises DataError where there are no texts, or none has a word.
        """
        write_index(texts, folder, _tokenised, K1, B, progress=progress)

    def scores(self, query: str) -> np.ndarray:
        """BM25 of every text for the query [N] float32, 0 where they share no word."""
        scores = np.zeros(self._postings.count, dtype=np.float32)
        for word in self._words(query):
            rows, weights = self._postings.of(word)
            scores[rows] += (
                weights  # a row stands once in a word's; unlike np.add.at, this leaves other threads running
            )
        return scores

    def scores_of(self, query: str, rows: np.ndarray) -> np.ndarray:
        """BM25 of the texts in `rows` [n] alone: what `scores` gives for them, without a score for all."""
        scores = np.zeros(len(rows), dtype=np.float32)
        for word in self._words(query):
            known, weights = self._postings.of(word)
            places = np.minimum(np.searchsorted(known, rows), len(known) - 1)
            scores += np.where(known[places] == rows, weights[places], np.float32(0))
        return scores

    def rank(self, query: str, k: int, name: Callable[[int], str], excluded: str | None = None) -> Ranking:
        """The k texts of highest score in trec_eval's order; `name` gives a row's passage id, `excluded` is left out.

        Texts that share no word with the query are left out; everything equal to the k-th best takes part in the tie.
        """
        scores = self.scores(query)
        hits = np.flatnonzero(scores)
        found = scores[hits]
        wanted = k + 1  # one more: the excluded passage may be among the k best
        if len(hits) > wanted:
            kept = found >= np.partition(found, -wanted)[-wanted]
            hits, found = hits[kept], found[kept]
        names = [name(row) for row in hits.tolist()]
        if excluded in names:
            found = np.delete(found, names.index(excluded))
            names.remove(excluded)
        best = ranking(names, found)
        return Ranking(best.passage_ids[:k], best.scores[:k])

    def _words(self, query: str) -> list[int]:
        known = self._postings.words
        return [known[word] for word in _tokenised([query], return_ids=False)[0] if word in known]


def bm25_run(
    passages: Iterable[tuple[str, str]],
    queries: Mapping[str, str],
    k: int = 1000,
    *,
    exclude_self: bool = False,
    progress: bool = False,
    threads: int | None = None,
) -> dict[str, Ranking]:
    """The k passages of highest BM25 score for each query, in trec_eval's order; passages that share no word with it
    are left out.

    passages: (id, text); queries: id -> text. `exclude_self` drops a passage whose id is the query's. Holds the ids;
    texts go into an index in a temporary folder. Queries are searched in `threads` (default: one a core), each of which
    holds one score a passage. Raises DataError where there are no passages, or none has a word.
    """
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for passage_id, text in passages:
            ids.append(passage_id)
            yield text

    with tempfile.TemporaryDirectory(prefix="bm25-") as name:
        Bm25.build(texts(), Path(name), progress=progress)
        index = Bm25(Path(name))

        def found(query: tuple[str, str]) -> Ranking:
            return index.rank(query[1], k, ids.__getitem__, query[0] if exclude_self else None)

        return dict(zip(queries, in_threads(found, list(queries.items()), threads or cores()), strict=True))


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """function(item) of every item, in their order, by several threads."""
    tasks = [items[i : i + _QUERIES_A_TASK] for i in range(0, len(items), _QUERIES_A_TASK)]
    with ThreadPoolExecutor(threads, thread_name_prefix="bm25") as workers:
        for results in workers.map(lambda task: [function(item) for item in task], tasks):
            yield from results


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plural_stem(word: str) -> str:
    """Removes the plural s of an English word in lower case: passages -> passage, queries -> query; class and corpus
    stay.

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


def _tokenised(texts: list[str], *, return_ids: bool = True) -> Any:
    """Words of the texts; where a script has no spaces, every two neighbouring characters are one. (Lucene's CJK bigram
    filter)
    """
    spaced = [text if text.isascii() else _RUN.sub(_bigrams, text) for text in texts]
    return bm25s.tokenize(
        spaced, token_pattern=_WORD, stopwords="en", stemmer=_stems, show_progress=False, return_ids=return_ids
    )


def _bigrams(run: re.Match[str]) -> str:
    characters = run[0]
    return f" {' '.join(characters[i : i + 2] for i in range(len(characters) - 1)) or characters} "
