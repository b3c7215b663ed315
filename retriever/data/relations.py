"""Relations between queries and passages: compressed rows (CSR), and the buffer that collects pairs from sources."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# A pair is one int64, query << 32 | passage: sorting the keys sorts by query, then passage, and equal pairs meet.
PASSAGE_BITS = 32
PASSAGE_MASK = (1 << PASSAGE_BITS) - 1
REFERENCE = 1 << 31  # set in a pair's passage: not a row yet but the number of an id, to be looked up in the corpus
_COMPACT_PAIRS = 1 << 22


class Csr(NamedTuple):
    """Lists of passages, one a row: row i is ids[ptr[i]:ptr[i+1]], ascending."""

    ptr: np.ndarray  # [n + 1] int64
    ids: np.ndarray  # [ptr[n]] int64

    def row(self, i: int) -> np.ndarray:
        """The passages of row i, as a view."""
        return self.ids[self.ptr[i] : self.ptr[i + 1]]

    def take(self, rows: np.ndarray) -> Csr:
        """The given rows, in the given order, as a new Csr of len(rows) rows."""
        starts = self.ptr[rows]
        counts = self.ptr[rows + 1] - starts
        ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        within = np.arange(ptr[-1]) - np.repeat(ptr[:-1], counts)
        return Csr(ptr, self.ids[np.repeat(starts, counts) + within])

    def within(self, passages: np.ndarray) -> Csr:
        """The same rows with only those of their passages that are among `passages`."""
        kept = np.isin(self.ids, passages)
        return Csr(np.concatenate([[0], np.cumsum(kept)])[self.ptr], self.ids[kept])


def csr_of_keys(keys: np.ndarray, rows: int) -> Csr:
    """The Csr of `rows` rows from sorted, distinct pair keys [n] int64."""
    counts = np.bincount(keys >> PASSAGE_BITS, minlength=rows)
    return Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), keys & PASSAGE_MASK)


def keys_of_csr(relation: Csr, rows: np.ndarray | None = None) -> np.ndarray:
    """The pair keys [n] int64 of a relation, row after row; its ids replaced by rows[ids] where `rows` is given."""
    queries = np.repeat(np.arange(len(relation.ptr) - 1), np.diff(relation.ptr))
    return queries << PASSAGE_BITS | (relation.ids if rows is None else rows[relation.ids])


def of_queries(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The pair keys with query q replaced by queries[q]."""
    return queries[keys >> PASSAGE_BITS] << PASSAGE_BITS | keys & PASSAGE_MASK


def with_equal_passages(keys: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The pair keys and, for each, those of the passages equal to its own; first [N] int64: the first equal row."""
    order = np.argsort(first, kind="stable")
    equal = Csr(np.searchsorted(first[order], np.arange(len(first) + 1)), order).take(first[keys & PASSAGE_MASK])
    queries = np.repeat(keys >> PASSAGE_BITS, np.diff(equal.ptr))
    return queries << PASSAGE_BITS | equal.ids


def absent(keys: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """[n] bool: which of the keys [n] are not among `excluded`, sorted."""
    if len(excluded) == 0:
        return np.ones(len(keys), bool)
    place = np.minimum(np.searchsorted(excluded, keys), len(excluded) - 1)
    return excluded[place] != keys


class Pairs(NamedTuple):
    """Sorted, distinct pair keys [n] int64, with float32 scores [n] (NaN: none) where any pair has one."""

    keys: np.ndarray
    scores: np.ndarray | None

    def kept(self, mask: np.ndarray) -> Pairs:
        """The pairs where `mask` [n] is true."""
        return Pairs(self.keys[mask], None if self.scores is None else self.scores[mask])

    @classmethod
    def distinct(cls, keys: np.ndarray, scores: np.ndarray | None) -> Pairs:
        """Pairs from keys in any order, with repetitions. A repeated pair has its first score that is not NaN."""
        if scores is None:
            return cls(np.unique(keys), None)
        order = np.lexsort((np.isnan(scores), keys))
        keys, first = np.unique(keys[order], return_index=True)
        return cls(keys, scores[order][first])


class PairBuffer:
    """Collects pairs in any order, with repetitions. Takes at most about twice the memory of the distinct pairs."""

    def __init__(self) -> None:
        self._recent = array("q")
        self._distinct = np.empty(0, np.int64)
        self._scored = array("q")
        self._scores = array("f")

    def extend(self, query: int, passages: Sequence[int], scores: Sequence[float] = ()) -> None:
        """Adds pairs of one query; `scores` is empty or as long as `passages`."""
        high = query << PASSAGE_BITS
        keys = [high | passage for passage in passages]
        self._recent.extend(keys)
        if scores:
            self._scored.extend(keys)
            self._scores.extend(scores)
        if len(self._recent) > max(_COMPACT_PAIRS, len(self._distinct) // 2):
            self._compact()

    def queries(self, count: int, passage_rows: np.ndarray) -> np.ndarray:
        """[count] bool: which queries have a pair with a passage; see `resolved`."""
        self._compact()
        _, kept = _resolve(self._distinct, np.arange(count), passage_rows)
        return np.bincount(self._distinct[kept] >> PASSAGE_BITS, minlength=count) > 0

    def references(self) -> np.ndarray:
        """The keys [n] whose passage is still a reference."""
        self._compact()
        return self._distinct[(self._distinct & REFERENCE) != 0]

    def resolved(self, query_rows: np.ndarray, passage_rows: np.ndarray) -> Pairs:
        """The pairs in rows of the store: query_rows[q] for query q, passage_rows[r] for reference r; below 0, none.

        Where a pair was given several scores, the first counts.
        """
        self._compact()
        keys = np.unique(_resolve(self._distinct, query_rows, passage_rows)[0])
        if not self._scores:
            return Pairs(keys, None)
        scored, kept = _resolve(np.frombuffer(self._scored, np.int64), query_rows, passage_rows)
        scores = np.full(len(keys), np.nan, np.float32)
        place, first = np.unique(np.searchsorted(keys, scored), return_index=True)
        scores[place] = np.frombuffer(self._scores, np.float32)[kept][first]
        return Pairs(keys, scores)

    def _compact(self) -> None:
        if self._recent:
            self._distinct = np.unique(np.concatenate([self._distinct, np.frombuffer(self._recent, np.int64)]))
            self._recent = array("q")


def _resolve(keys: np.ndarray, query_rows: np.ndarray, passage_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keys in rows of the store, bool mask of the keys that are kept)."""
    queries, passages = query_rows[keys >> PASSAGE_BITS], keys & PASSAGE_MASK
    referred = (passages & REFERENCE) != 0
    passages[referred] = passage_rows[passages[referred] ^ REFERENCE]
    kept = (queries >= 0) & (passages >= 0)
    return (queries[kept] << PASSAGE_BITS) | passages[kept], kept


def join_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all sources, whose query rows ascend from part to part."""
    keys = np.concatenate([part.keys for part in parts])
    if all(part.scores is None for part in parts):
        return Pairs(keys, None)
    missing = [np.full(len(part.keys), np.nan, np.float32) if part.scores is None else part.scores for part in parts]
    return Pairs(keys, np.concatenate(missing))


def write_relations(folder: Path, queries: int, positives: Pairs, known: Pairs, negatives: Pairs) -> None:
    """Writes a store's relations: `<name>.ptr.npy`, `<name>.ids.npy` and `<name>.scores.npy` where there are scores."""
    for name, pairs in (("positives", positives), ("known", known), ("negatives", negatives)):
        relation = csr_of_keys(pairs.keys, queries)
        np.save(folder / f"{name}.ptr.npy", relation.ptr, allow_pickle=False)
        np.save(folder / f"{name}.ids.npy", relation.ids, allow_pickle=False)
        if pairs.scores is not None:
            np.save(folder / f"{name}.scores.npy", pairs.scores, allow_pickle=False)
