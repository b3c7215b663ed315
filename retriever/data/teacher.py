"""A teacher's scores in a batch: each query's scored passages, and the negatives that the teacher takes for
relevant.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from retriever.data.planner import RankSlice
from retriever.data.store import Csr, Store


class ScoredGroups(NamedTuple):
    """Each query's target and scored negatives in the global batch; an empty row where the target has no score."""

    ptr: np.ndarray  # [B + 1] int64
    ids: np.ndarray  # [ptr[-1]] int64, rows of the store, the target first
    scores: np.ndarray  # [ptr[-1]] float32


class _Scored(NamedTuple):
    """The scored own negatives of a slice's queries that stand in the global batch, by query."""

    rows: np.ndarray  # [n] int64, ascending: the query, as a row of the slice
    ids: np.ndarray  # [n] int64
    scores: np.ndarray  # [n] float32
    false: np.ndarray  # [n] bool: scored above the target's score less the margin
    targets: np.ndarray  # [B] float32: the target's score, NaN where it has none


def scored_groups(store: Store, rank_slice: RankSlice, passages: np.ndarray, margin: float | None) -> ScoredGroups:
    """The groups that a teacher is distilled from.

    passages [n]: those of the global batch, ascending. With a `margin`, a negative scored above the target's score less
    it is left out. A negative that another query brought into the batch counts as one that this query drew: no score
    that is there is wasted.
    """
    found = _scored_negatives(store, rank_slice, passages, margin)
    kept = ~np.isnan(found.targets)[found.rows] & ~found.false
    taught = np.flatnonzero(~np.isnan(found.targets))
    rows = np.concatenate([taught, found.rows[kept]])
    order = np.argsort(rows, kind="stable")  # targets were put first
    ids = np.concatenate([rank_slice.passages[rank_slice.targets[taught]], found.ids[kept]])[order]
    scores = np.concatenate([found.targets[taught], found.scores[kept]])[order]
    return ScoredGroups(_ptr(rows, len(rank_slice.queries)), ids, scores)


def false_negatives(store: Store, rank_slice: RankSlice, passages: np.ndarray, margin: float, known: Csr) -> Csr:
    """`known`, with each query's own negatives that the teacher scores above its target's score less `margin`."""
    found = _scored_negatives(store, rank_slice, passages, margin)
    rows = np.concatenate([np.repeat(np.arange(len(known.ptr) - 1), np.diff(known.ptr)), found.rows[found.false]])
    ids = np.concatenate([known.ids, found.ids[found.false]])
    order = np.lexsort((ids, rows))  # by row, then ascending
    return Csr(_ptr(rows, len(known.ptr) - 1), ids[order])


def _scored_negatives(store: Store, rank_slice: RankSlice, passages: np.ndarray, margin: float | None) -> _Scored:
    assert (
        store.positive_scores is not None and store.negative_scores is not None
    )  # asked of the loader before the first batch
    queries, (ptr, ids) = rank_slice.queries, store.negatives.take(rank_slice.queries)
    rows = np.repeat(np.arange(len(queries)), np.diff(ptr))
    scores = _scores_of(store.negatives, store.negative_scores, queries)
    place = np.minimum(np.searchsorted(passages, ids), len(passages) - 1)
    here = (passages[place] == ids) & ~np.isnan(scores)
    rows, ids, scores = rows[here], ids[here], scores[here]
    targets = _target_scores(store, rank_slice)
    false = (
        scores > targets[rows] - margin if margin is not None else np.zeros(len(rows), dtype=bool)
    )  # never where a score is NaN
    return _Scored(rows, ids, scores, false, targets)


def _target_scores(store: Store, rank_slice: RankSlice) -> np.ndarray:
    assert store.positive_scores is not None
    ptr, ids = store.positives.take(rank_slice.queries)
    scores = _scores_of(store.positives, store.positive_scores, rank_slice.queries)
    rows = np.repeat(np.arange(len(rank_slice.queries)), np.diff(ptr))
    is_target = (
        ids == rank_slice.passages[rank_slice.targets][rows]
    )  # one in each row: a target is a positive of its query
    return scores[is_target]


def _scores_of(relation: Csr, scores: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The scores beside `relation.take(queries).ids`."""
    return Csr(relation.ptr, scores).take(queries).ids


def _ptr(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
