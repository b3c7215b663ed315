"""The k best passages of each query so far, in one 8-byte key a passage whose order is trec_eval's.

A key's upper 32 bits are the float32 score, its bits rearranged so that a higher score is a smaller number; its lower
32 bits are the passage's precedence among all passages when sorted by id descending. Sorting keys ascending therefore
sorts by score descending and breaks ties by id descending, and merging two result lists is a sort of numbers, whatever
shard or block they came from.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retriever.data.records import DataError
from retriever.errors import RefusedError

_EMPTY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # sorts behind every passage
_LOW = np.uint64(0xFFFF_FFFF)
_SIGN = np.uint32(0x8000_0000)
_SHIFT = np.uint64(32)


class PassageOrder:
    """All passages' precedence in a tie: position in the collection -> precedence, 0 for the greatest id (UTF-8 byte
    order).
    """

    def __init__(self, passage_ids: pa.LargeStringArray) -> None:
        """`passage_ids`: [N] in the collection's order. Raises DataError for a repeated id, RefusedError where N >=
        2^32 - 1.
        """
        if len(passage_ids) >= 2**32 - 1:
            raise RefusedError(f"{len(passage_ids)} passages: expected fewer than 2^32 - 1 in one search")
        order = pc.array_sort_indices(passage_ids, order="descending")  # [N]
        self._ids = passage_ids.take(order)  # [N], greatest id first
        if len(self._ids) > 1 and (same := pc.equal(self._ids[1:], self._ids[:-1])).true_count:
            twice = self._ids[pc.index(same, True).as_py()].as_py()
            raise DataError(f"passage id {twice!r} stands twice in the collection: expected each id once")
        self.precedence = np.empty(len(passage_ids), dtype=np.uint32)  # [N]
        self.precedence[order.to_numpy()] = np.arange(len(passage_ids), dtype=np.uint32)

    def ids(self, precedence: np.ndarray) -> np.ndarray:
        """The ids [n] (object) of passages given by precedence [n]; equal ids are one string object."""
        distinct, inverse = np.unique(precedence, return_inverse=True)
        return np.array(self._ids.take(pa.array(distinct)).to_pylist(), dtype=object)[inverse]


class TopK:
    """The k best passages of each of n queries; `merge` adds candidates, `row` reads the result."""

    def __init__(self, keys: np.ndarray) -> None:
        """`keys`: [Q, k] uint64 as this module defines them, each row ascending."""
        self._keys = keys

    @classmethod
    def empty(cls, n_queries: int, k: int) -> TopK:
        """Holds no passage yet."""
        return cls(np.full((n_queries, k), _EMPTY, dtype=np.uint64))

    def worst_scores(self, queries: slice) -> np.ndarray:
        """The k-th best score of each query of the slice, float32; -inf where there are fewer than k passages so
        far.
        """
        last = self._keys[queries, -1]
        return np.where(last == _EMPTY, np.float32(-np.inf), _scores_of(last))

    def merge(self, queries: slice | np.ndarray, rows: np.ndarray, scores: np.ndarray, precedence: np.ndarray) -> None:
        """Adds candidates in flat form: `rows` [P] int, ascending, places in `queries`; scores [P] float32; precedence
        [P].
        """
        best = self._keys[queries]  # [q, k]
        counts = np.bincount(rows, minlength=len(best))
        columns = np.arange(len(rows)) - np.repeat(
            np.cumsum(counts) - counts, counts
        )  # place of a candidate in its row
        candidates = np.full((len(best), int(counts.max(initial=0))), _EMPTY, dtype=np.uint64)  # [q, m]
        candidates[rows, columns] = _keys_of(scores, precedence)
        merged = np.concatenate([best, candidates], axis=1)  # [q, k + m]
        merged.sort(axis=1)
        self._keys[queries] = merged[:, : best.shape[1]]

    def row(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """(precedence [n] uint32, scores [n] float32) of one query's passages, best first, n <= k."""
        keys = self._keys[query]
        keys = keys[keys != _EMPTY]
        return (keys & _LOW).astype(np.uint32), _scores_of(keys)


def _keys_of(scores: np.ndarray, precedence: np.ndarray) -> np.ndarray:
    bits = (scores.astype(np.float32) + np.float32(0.0)).view(np.uint32)  # + 0.0 makes -0.0 and 0.0 one score
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)  # unsigned order = float order
    return (~ascending).astype(np.uint64) << _SHIFT | precedence.astype(np.uint64)


def _scores_of(keys: np.ndarray) -> np.ndarray:
    ascending = ~(keys >> _SHIFT).astype(np.uint32)
    return np.where(ascending & _SIGN, ascending ^ _SIGN, ~ascending).astype(np.uint32).view(np.float32)
