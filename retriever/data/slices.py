"""A rank's slice of a global batch, a function of (batch, world size), and what its queries know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retriever.data.planner import GlobalBatch
from retriever.data.store import Csr, Store

_MANY_KNOWN = 64  # passages a query


@dataclass(frozen=True)
class RankSlice:
    """The part of a global batch that one rank encodes. A query's target is among its rank's passages."""

    queries: np.ndarray  # [B] int64, rows of the store
    passages: np.ndarray  # [N] int64, rows of the store, ascending
    targets: np.ndarray  # [B] int64, positions in `passages`
    every_passage: np.ndarray  # [n] int64, rows of the store: all ranks' passages, rank after rank
    counts: tuple[int, ...]  # of each rank's passages
    pools: np.ndarray | None = None  # [B] int64: the pool of each query
    shares: np.ndarray | None = None  # [B] float64, as a GlobalBatch has them


def slice_for_rank(
    batch: GlobalBatch, query_lengths: np.ndarray, passage_lengths: np.ndarray, rank: int, world_size: int
) -> RankSlice:
    """The rank's slice of `batch`, balanced by tokens over the ranks.

    query_lengths [b], passage_lengths [n]: tokens that `batch.queries` and `batch.passages` take in the encoder. A
    passage and the queries whose target it is stay together; these groups are dealt to the ranks from the largest down,
    to and fro.
    """
    of_query, of_passage = owners(batch, query_lengths, passage_lengths, world_size)
    passages, mine = batch.passages[of_passage == rank], of_query == rank
    every_passage = batch.passages[np.argsort(of_passage, kind="stable")]
    counts = tuple(np.bincount(of_passage, minlength=world_size).tolist())
    targets = np.searchsorted(passages, batch.targets[mine])
    pools = None if batch.query_pools is None else batch.query_pools[mine]
    shares = None if batch.shares is None else batch.shares[mine]
    return RankSlice(batch.queries[mine], passages, targets, every_passage, counts, pools, shares)


def owners(
    batch: GlobalBatch, query_lengths: np.ndarray, passage_lengths: np.ndarray, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each query [b] and of each passage [n] of `batch`, int64; see `slice_for_rank`."""
    target = np.searchsorted(batch.passages, batch.targets)
    cost = passage_lengths + np.bincount(target, weights=query_lengths, minlength=len(batch.passages))
    place = np.empty(len(cost), dtype=np.int64)
    place[np.argsort(-cost, kind="stable")] = np.arange(len(cost))
    lap, seat = np.divmod(place, world_size)
    owner = np.where(lap % 2 == 0, seat, world_size - 1 - seat)
    return owner[target], owner


def known_positives(store: Store, rank_slice: RankSlice, masked: bool, *, in_batch: bool = True) -> Csr:
    """The passages that are no negatives of each query: all its known positives or, unless `masked`, its target alone.

    Where a text has very many positives, only those in the batch are listed if `in_batch`: every query of the text
    would list all of them.
    """
    if masked:
        texts, text_of = np.unique(store.same_text[rank_slice.queries], return_inverse=True)
        known = store.known.take(texts)
        if in_batch and np.diff(known.ptr)[text_of].sum() > _MANY_KNOWN * len(text_of):
            known = known.within(rank_slice.every_passage)
        return known.take(text_of)
    return Csr(np.arange(len(rank_slice.queries) + 1, dtype=np.int64), rank_slice.passages[rank_slice.targets])
