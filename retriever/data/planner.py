"""The global batch of every step, a pure function of (seed, step, store): its queries and its passages.

Nothing is drawn from a stateful generator. Orders and draws come from hashes of (seed, store, what, index), so any
step can be planned at once, on any rank, and a run resumes at step k without replaying k steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from retriever.config import Config, ConfigError
from retriever.config_sources import hard_negatives, queries_per_epoch
from retriever.data.hashing import hashed, hashed_order
from retriever.data.store import Store
from retriever.wording import counted


@dataclass(frozen=True)
class GlobalBatch:
    """One step's batch over all ranks, in rows of the store. Every passage stands once, a query once for each of its
    positives that are drawn.
    """

    step: int
    epoch: int
    source: str
    queries: np.ndarray  # [b] int64
    targets: np.ndarray  # [b] int64: the positive drawn for each query
    passages: np.ndarray  # [n] int64, ascending: all targets and negatives
    query_pools: np.ndarray | None = None  # [b] int64; None: every query sees every passage
    passage_pools: np.ndarray | None = None  # [n] int64
    shares: np.ndarray | None = None  # [b] float64: 1 / times that the query stands; None: 1 each

    @property
    def query_count(self) -> int:
        """Queries, each counted once."""
        return len(self.queries) if self.shares is None else round(self.shares.sum())


class Mixture(NamedTuple):
    """The share of each source in an epoch, and whether batches mix sources."""

    per_epoch: Sequence[int] | None = None  # queries of each source; None: all of its queries
    one_source: bool = True  # in a batch
    takes_turns: bool = False  # batches of one source come from each in turn
    apart: Sequence[int] = ()  # numbers of the sources that see their own passages only


_EVERY_QUERY_ONCE = Mixture()


class Planner:
    """Plans the batches of a run.

    A source's batches in an epoch differ by at most one query and none exceeds `queries`; with `one_source` false,
    sources are mixed within every batch. Where a fraction of a pass lets two passes over a source meet in a batch, a
    query may stand in it twice. With `pool`, a query sees that many passages at most: those that neighbouring queries
    bring.
    """

    def __init__(
        self,
        store: Store,
        *,
        queries: int,
        negatives: int | Sequence[int],
        seed: int,
        positives: int = 1,
        pool: int | None = None,
        mixture: Mixture = _EVERY_QUERY_ONCE,
    ) -> None:
        """`negatives`: hard negatives of a query, of every source or of each. `positives`: the most of a query."""
        self._store, self._mixture, self._positives = store, mixture, positives
        self._negatives = np.broadcast_to(np.asarray(negatives, np.int64), len(store.sources))
        self._pool = pool
        self._key = hashed(np.uint64(seed), np.uint64(int(store.fingerprint[:16], 16)))
        self._one_source = mixture.one_source
        self._sizes = [source.last - source.first for source in store.sources]
        for source, size in zip(store.sources, self._sizes, strict=True):
            if size == 0:
                raise ConfigError(f"data.train: {source.name} has no query with a positive; expected at least one")
        # Constant, so that a step's epoch needs no running sum.
        self._per_epoch = list(self._sizes if mixture.per_epoch is None else mixture.per_epoch)
        self._taken = self._per_epoch if mixture.one_source else [sum(self._per_epoch)]  # or the whole mixture
        self._batches = [-(-taken // queries) for taken in self._taken]
        self._schedule = lru_cache(maxsize=2)(self._make_schedule)
        self._pass_order = lru_cache(maxsize=2 * len(self._sizes))(self._make_pass_order)
        self._mixed_epoch = lru_cache(maxsize=1)(self._make_mixed_epoch)

    @classmethod
    def from_config(cls, store: Store, config: Config) -> Planner:
        """The planner of a run. Raises ConfigError where a query may have no negative in its batch, and so no loss."""
        planner = cls(
            store,
            queries=config.batch.queries,
            negatives=hard_negatives(config.data),
            seed=config.run.seed,
            positives=config.loss.positives,
            pool=config.batch.pool,
            mixture=Mixture(
                queries_per_epoch(config.data, [source.last - source.first for source in store.sources]),
                one_source=config.batch.one_source,
                takes_turns=config.data.sampling == "round_robin",
                apart=[number for number, source in enumerate(config.data.train) if source.apart],
            ),
        )
        planner._check_negatives([source.negatives for source in config.data.train])
        return planner

    def _check_negatives(self, policies: Sequence[str]) -> None:
        """Raises ConfigError where a query may be alone in a batch and has no negatives of its own, or where queries
        are contrasted with their own negatives and none has any.
        """
        store, positives = self._store, self._store.positives
        ranges = [(source.name, source.first, source.last) for source in store.sources]
        has_none = np.diff(store.negatives.ptr) == 0
        for (name, first, last), policy in zip(ranges, policies, strict=True):
            if policy == "own" and has_none[first:last].all():
                raise ConfigError(f"data.train: {name} has negatives=own, and no query of it has a hard negative")
        if not self._one_source:
            ranges = [("the mixture of all sources", 0, ranges[-1][2])]
        has_none |= np.repeat(self._negatives == 0, self._sizes)
        for (name, first, last), queries, parts in zip(ranges, self._taken, self._batches, strict=True):
            texts = store.same_text[first:last]
            passages = positives.ids[positives.ptr[first] : positives.ptr[last]]
            alone = "one query" if queries // parts < 2 or texts.min() == texts.max() else ""
            alone = alone or ("one passage" if passages.min() == passages.max() else "")
            lacking = int(has_none[first:last].sum())
            if alone and lacking:
                raise ConfigError(
                    f"data.train: {name} gives batches of {alone}, and {counted(lacking, 'query')} of it without "
                    "negatives of their own (data.negatives), for which there is no loss; raise its weight or add data"
                )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return sum(self._batches)

    @property
    def batch_queries(self) -> tuple[int, int]:
        """Queries in the smallest and in the largest batch of an epoch."""
        sizes = list(zip(self._taken, self._batches, strict=True))
        return min(queries // parts for queries, parts in sizes), max(-(-queries // parts) for queries, parts in sizes)

    def plan(self, step: int) -> GlobalBatch:
        """The batch of optimizer step `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._one_source:
            source, part = self._schedule(epoch)[index]
            taken, parts = self._per_epoch[source], self._batches[source]
            positions = np.arange(part * taken // parts, (part + 1) * taken // parts) + epoch * taken
            queries, passes = self._at(source, positions)
            name = self._store.sources[source].name
        else:
            queries, passes = (column[index :: self.steps_per_epoch] for column in self._mixed_epoch(epoch))
            name = "mixed"
        rows, targets = self._draw_positives(queries, passes)
        of, negatives = self._draw_negatives(queries, passes)
        brought = np.concatenate([targets, negatives])
        shares = None if self._positives == 1 else 1.0 / np.bincount(rows)[rows]
        if self._pool is None and not self._mixture.apart:
            return GlobalBatch(step, epoch, name, queries[rows], targets, np.unique(brought), shares=shares)
        passages, first = np.unique(brought, return_index=True)
        bringer = np.concatenate([rows, of])[first]  # [n]: the first query that brings each passage
        pools = self._pools_of(queries, np.bincount(bringer, minlength=len(queries)))
        return GlobalBatch(step, epoch, name, queries[rows], targets, passages, pools[rows], pools[bringer], shares)

    def source_of(self, queries: np.ndarray) -> np.ndarray:
        """The number of the source of each of `queries` [n], rows of the store: int64."""
        return np.searchsorted([source.last for source in self._store.sources], queries, side="right")

    def _pools_of(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """The pool [b] of each query, which brings `passages` [b]; sources that stand apart are pools of their own."""
        pools = np.zeros(len(queries), np.int64) if self._pool is None else _pools(passages, self._pool)
        sources = self.source_of(queries)
        own = np.where(np.isin(sources, self._mixture.apart), 1 + sources, 0)
        return np.unique(pools * (1 + len(self._sizes)) + own, return_inverse=True)[1]

    def _make_schedule(self, epoch: int) -> list[tuple[int, int]]:
        """The epoch's batches as (source, part): shuffled, or each source's next one in turn."""
        batches = [(source, part) for source, parts in enumerate(self._batches) for part in range(parts)]
        order = hashed_order(hashed(self._key, np.uint64(1), np.uint64(epoch)), len(batches))
        shuffled = [batches[i] for i in order]
        return sorted(shuffled, key=lambda batch: batch[1]) if self._mixture.takes_turns else shuffled

    def _make_pass_order(self, source: int, turn: int) -> np.ndarray:
        return hashed_order(hashed(self._key, np.uint64(2), np.uint64(source), np.uint64(turn)), self._sizes[source])

    def _at(self, source: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query rows at `positions` of the source's endless shuffled sequence, and the pass over the source of each."""
        turns, places = np.divmod(positions, self._sizes[source])
        rows = np.empty_like(positions)
        for turn in np.unique(turns):
            here = turns == turn
            rows[here] = self._pass_order(source, int(turn))[places[here]]
        return rows + self._store.sources[source].first, turns

    def _make_mixed_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._at(source, np.arange(taken) + epoch * taken) for source, taken in enumerate(self._per_epoch)]
        queries, turns = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = hashed_order(hashed(self._key, np.uint64(3), np.uint64(epoch)), len(queries))
        return queries[order], turns[order]

    def _draw_positives(self, queries: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in `queries`, positive) of at most `positives` of each query: random first ones, then the next in
        every pass.
        """
        ptr, ids = self._store.positives
        count = ptr[queries + 1] - ptr[queries]
        first = hashed(self._key, np.uint64(4), queries.astype(np.uint64)) % count.astype(np.uint64)
        drawn = np.minimum(count, self._positives)
        rows = np.repeat(np.arange(len(queries)), drawn)
        place = np.arange(len(rows)) - (np.cumsum(drawn) - drawn)[rows]  # within the query's
        place += first.astype(np.int64)[rows] + passes[rows] * self._positives
        return rows, np.asarray(ids[ptr[queries[rows]] + place % count[rows]])

    def _draw_negatives(self, queries: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At most its source's number of each query's negatives: a window of its shuffled list that moves with every
        pass.

        Returns the position of each one's query, and its row.
        """
        if not self._negatives.any():
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        most = self._negatives[self.source_of(queries)]
        ptr, ids = self._store.negatives.take(queries)
        row = np.repeat(np.arange(len(queries)), np.diff(ptr))
        place = np.arange(len(ids)) - ptr[row]  # within the row
        hashes = hashed(self._key, np.uint64(5), queries[row].astype(np.uint64), place.astype(np.uint64))
        row_bits = np.uint64(max(1, len(queries).bit_length()))
        keys = (row.astype(np.uint64) << (np.uint64(64) - row_bits)) | (hashes >> row_bits)  # the row in the high bits
        order = np.argsort(keys, kind="stable")  # shuffles every row for itself; `row` stays sorted
        count = np.diff(ptr)[row]
        chosen = (place - passes[row] * most[row]) % np.maximum(count, 1) < most[row]
        return row[chosen], ids[order[chosen]]


def _pools(passages: np.ndarray, most: int) -> np.ndarray:
    """The pool [b] of each query, in order: about equal ones of at most `most` passages, where a query brings fewer.

    passages [b] int64: how many each query brings.
    """
    before = passages.cumsum() - passages
    count = -(-passages.sum() // max(1, most + 1 - passages.max()))  # a pool may end one query's passages late
    return np.minimum(before, passages.sum() - 1) * count // passages.sum()
