"""A teacher's scores in a batch: each query's scored passages, and the negatives that the teacher finds relevant."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retriever.data.relations import PASSAGE_BITS, absent, keys_of_csr
from retriever.data.slices import RankSlice
from retriever.data.store import Csr, Store


class Groups(NamedTuple):
    """Each query's target and scored negatives in the global batch, on any rank; none if the target has no score."""

    ptr: Tensor  # [B + 1] int64
    ids: Tensor  # [ptr[-1]] int64: passage ids, the target first; those of a row are distinct
    scores: Tensor  # [ptr[-1]] float32; NaN where there is none


class ScoredNegatives(NamedTuple):
    """The scored own negatives of a slice's queries that are in the global batch, whoever brought them."""

    rows: np.ndarray  # [n] int64, ascending: the query, as a row of the slice
    ids: np.ndarray  # [n] int64, rows of the store
    scores: np.ndarray  # [n] float32
    are_false: np.ndarray  # [n] bool: scored above the target's score less the margin
    targets: np.ndarray  # [B] int64, rows of the store
    target_scores: np.ndarray  # [B] float32, NaN where the target has none

    def groups(self) -> Groups:
        """The groups that a teacher is distilled from, false negatives left out."""
        kept = ~np.isnan(self.target_scores)[self.rows] & ~self.are_false
        taught = np.flatnonzero(~np.isnan(self.target_scores))
        rows = np.concatenate([taught, self.rows[kept]])
        order = np.argsort(rows, kind="stable")  # targets were put first
        ids = np.concatenate([self.targets[taught], self.ids[kept]])[order]
        scores = np.concatenate([self.target_scores[taught], self.scores[kept]])[order]
        return Groups(*map(torch.from_numpy, (_ptr(rows, len(self.targets)), ids, scores)))

    def add_to(self, known: Csr) -> Csr:
        """`known`, the passages that are no negatives of each query, with the false negatives."""
        rows = np.concatenate([np.repeat(np.arange(len(known.ptr) - 1), np.diff(known.ptr)), self.rows[self.are_false]])
        ids = np.concatenate([known.ids, self.ids[self.are_false]])
        order = np.lexsort((ids, rows))  # by row, then ascending
        return Csr(_ptr(rows, len(self.targets)), ids[order])


def scored_negatives(
    store: Store, rank_slice: RankSlice, passages: np.ndarray, margin: float | None
) -> ScoredNegatives:
    """The teacher's scores in `store` for a slice of the global batch of `passages` [n], ascending.

    Without a `margin` no negative is false. A negative that another query brought into the batch counts as one that
    this query drew: no score that is there is wasted.
    """
    assert store.positive_scores is not None  # the loader has checked it
    queries, targets = rank_slice.queries, rank_slice.passages[rank_slice.targets]
    rows, ids, scores = _scored(store.positives, store.positive_scores, queries)
    target_scores = scores[ids == targets[rows]]  # one in each row: a target is a positive of its query
    rows, ids, scores = _scored(store.negatives, store.negative_scores, queries)
    place = np.minimum(np.searchsorted(passages, ids), len(passages) - 1)
    here = (passages[place] == ids) & ~np.isnan(scores)
    rows, ids, scores = rows[here], ids[here], scores[here]
    # None is false without a margin, nor where the target has no score: comparisons with NaN are false.
    are_false = scores > target_scores[rows] - (np.nan if margin is None else margin)
    return ScoredNegatives(rows, ids, scores, are_false, targets, target_scores)


def own_groups(store: Store, rank_slice: RankSlice, passages: np.ndarray, asked: np.ndarray, known: Csr) -> Groups:
    """Each query's target and own negatives in the global batch of `passages` [n], ascending, where `asked` [B]; no
    group elsewhere. What is `known` to a query is no negative of it.
    """
    targets = rank_slice.passages[rank_slice.targets]
    ptr, ids = store.negatives.take(rank_slice.queries)
    rows = np.repeat(np.arange(len(targets)), np.diff(ptr))
    kept = asked[rows] & np.isin(ids, passages) & absent(rows << PASSAGE_BITS | ids, np.sort(keys_of_csr(known)))
    rows, ids = np.concatenate([np.flatnonzero(asked), rows[kept]]), np.concatenate([targets[asked], ids[kept]])
    order = np.argsort(rows, kind="stable")  # targets were put first
    scores = np.full(len(ids), np.nan, np.float32)
    return Groups(*map(torch.from_numpy, (_ptr(rows, len(targets)), ids[order], scores)))


def _scored(relation: Csr, scores: np.ndarray | None, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of `queries`, passage, score) [n] of the relation's pairs of `queries`; NaN where there is no score."""
    ptr, ids = relation.take(queries)
    rows = np.repeat(np.arange(len(queries)), np.diff(ptr))
    if scores is None:
        return rows, ids, np.full(len(ids), np.nan, np.float32)
    return rows, ids, Csr(relation.ptr, scores).take(queries).ids


def _ptr(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
