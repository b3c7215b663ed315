"""The index of a BM25 search in a folder: bm25s builds it from a stream of texts, and it is read memory-mapped.

A word's passages stand side by side: word w owns postings starts[w] to starts[w + 1]. `rows.npy` [postings] int32 are
its passages, ascending, `weights.npy` [postings] float32 what the word adds to their scores; `starts.npy` [words + 1]
int64; `words.json`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import bm25s
import numpy as np

from retriever.data.records import DataError
from retriever.files import write_array, write_text
from retriever.screen import Bar

FILES, SPOOL = ("rows.npy", "weights.npy", "starts.npy", "words.json"), "numbers.tmp"  # the latter while it is made
_BATCH_TEXTS = 512
_ROWS_AT_ONCE = 65_536

Tokenise = Callable[[list[str]], bm25s.tokenization.Tokenized]  # texts -> their words' numbers, and words -> numbers


@dataclass(frozen=True)
class Postings:
    """The arrays of an index, memory-mapped, and the number of every word."""

    rows: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    words: dict[str, int]
    count: int  # passages

    def of(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        """(passages, weights) of a word, as views."""
        here = slice(self.starts[word], self.starts[word + 1])
        return self.rows[here], self.weights[here]


def write_index(
    texts: Iterable[str], folder: Path, tokenise: Tokenise, k1: float, b: float, *, progress: bool = False
) -> None:
    """Indexes the texts [N] by Lucene's formula. Word numbers go to a file first, so that no text is held.

    Memory: some 36 bytes a posting (a distinct word of a passage) while bm25s sorts them, and the words.
    Raises DataError where there are no texts, or none has a word.
    """
    spool = folder / SPOOL
    lengths, words = _spool(Bar(texts, desc="BM25: words", unit=" texts", disable=not progress), spool, tokenise)
    if not words:
        raise DataError(f"{len(lengths)} passages without a single word: BM25 needs text")
    index = bm25s.BM25(k1=k1, b=b)
    tokens = bm25s.tokenization.Tokenized(ids=_Numbers(spool, lengths), vocab=words)
    index.index(tokens, create_empty_token=False, show_progress=False)
    spool.unlink()
    for name, found in (("rows", "indices"), ("weights", "data"), ("starts", "indptr")):
        write_array(folder / f"{name}.npy", index.scores[found])
    write_text(folder / "words.json", json.dumps({"passages": len(lengths), "words": list(words)}, ensure_ascii=True))


def read_index(folder: Path) -> Postings:
    """Opens an index written by `write_index`. Arrays are memory-mapped; the vocabulary is loaded."""
    rows, weights, starts = (
        np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in FILES[:3]
    )
    found = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    return Postings(
        rows, weights, starts, {word: number for number, word in enumerate(found["words"])}, found["passages"]
    )


def _spool(texts: Iterable[str], path: Path, tokenise: Tokenise) -> tuple[np.ndarray, dict[str, int]]:
    """Writes the numbers of all words, text after text; returns the words of every text [N] int64, and the words'
    numbers.
    """
    lengths, words, stream = array("q"), dict[str, int](), iter(texts)
    with path.open("wb") as file:
        while batch := list(islice(stream, _BATCH_TEXTS)):
            found = tokenise(batch)
            ids, known = found.ids, found.vocab
            number = np.empty(len(known), dtype=np.int32)  # of this batch -> of the index
            for word in sorted(known):  # their order in `known` differs from process to process
                number[known[word]] = words.setdefault(word, len(words))
            lengths.extend(map(len, ids))
            file.write(number[np.fromiter(chain.from_iterable(ids), np.int64)].tobytes())
    return np.frombuffer(lengths, dtype=np.int64), words


class _Numbers:
    """The word numbers of every text, a list each, read from the spool as often as bm25s goes over them."""

    def __init__(self, path: Path, lengths: np.ndarray) -> None:
        self._path, self._lengths = path, lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[list[int]]:
        with self._path.open("rb") as file:
            for first in range(0, len(self._lengths), _ROWS_AT_ONCE):
                lengths = self._lengths[first : first + _ROWS_AT_ONCE]
                numbers = np.fromfile(file, dtype=np.int32, count=int(lengths.sum()))
                for here in np.split(numbers, np.cumsum(lengths)[:-1]):
                    yield here.tolist()
