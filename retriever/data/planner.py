"""The global batch of every step, a pure function of (seed, step, store): its queries, its passages and their ranks.

Nothing is drawn from a stateful generator. Orders and draws come from hashes of (seed, store, what, index), so any
step can be planned at once, on any rank, and a run resumes at step k without replaying k steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from retriever.config import Config, ConfigError
from retriever.data.store import Csr, Store
from retriever.wording import counted

_MANY_KNOWN = 64  # passages a query


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


class Planner:
    """Plans the batches of a run.

    `weights` are each source's passes per epoch. A source's batches in an epoch differ by at most one query and none
    exceeds `queries`; with `one_source` false, sources are mixed within every batch. Where a fractional weight lets two
    passes over a source meet in a batch, a query may stand in it twice. With `pool`, a query sees that many passages at
    most: those that neighbouring queries bring.
    """

    positives = 1  # of a query in a batch, at most

    def __init__(
        self,
        store: Store,
        *,
        queries: int,
        negatives: int,
        seed: int,
        weights: Sequence[float] | None = None,
        one_source: bool = True,
        pool: int | None = None,
    ) -> None:
        self._store = store
        self._negatives, self._pool = negatives, pool
        self._key = _hash(np.uint64(seed), np.uint64(int(store.fingerprint[:16], 16)))
        self._one_source = one_source
        weights = weights if weights is not None else [1.0] * len(store.sources)
        self._sizes = [source.last - source.first for source in store.sources]
        for source, size in zip(store.sources, self._sizes, strict=True):
            if size == 0:
                raise ConfigError(f"data.train: {source.name} has no query with a positive; expected at least one")
        # Queries that each source gives to an epoch; constant, so that a step's epoch needs no running sum.
        self._per_epoch = [max(1, round(weight * n)) for weight, n in zip(weights, self._sizes, strict=True)]
        self._taken = self._per_epoch if one_source else [sum(self._per_epoch)]  # the sources apart or as one mixture
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
            negatives=config.data.negatives,
            seed=config.run.seed,
            weights=[source.weight for source in config.data.train],
            one_source=config.batch.one_source,
            pool=config.batch.pool,
        )
        planner.positives = config.loss.positives
        planner._check_negatives()
        return planner

    def _check_negatives(self) -> None:
        """Raises ConfigError where a query may be alone in a batch and has no negatives of its own."""
        store, positives = self._store, self._store.positives
        ranges = [(source.name, source.first, source.last) for source in store.sources]
        if not self._one_source:
            ranges = [("the mixture of all sources", 0, ranges[-1][2])]
        has_none = np.diff(store.negatives.ptr) == 0
        for (name, first, last), queries, parts in zip(ranges, self._taken, self._batches, strict=True):
            texts = store.same_text[first:last]
            passages = positives.ids[positives.ptr[first] : positives.ptr[last]]
            alone = "one query" if queries // parts < 2 or texts.min() == texts.max() else ""
            alone = alone or ("one passage" if passages.min() == passages.max() else "")
            lacking = int(has_none[first:last].sum()) if self._negatives else last - first
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
        shares = None if self.positives == 1 else 1.0 / np.bincount(rows)[rows]
        if self._pool is None:
            return GlobalBatch(step, epoch, name, queries[rows], targets, np.unique(brought), shares=shares)
        passages, first = np.unique(brought, return_index=True)
        bringer = np.concatenate([rows, of])[first]  # [n]: the first query that brings each passage
        pools = _pools(np.bincount(bringer, minlength=len(queries)), self._pool)
        return GlobalBatch(step, epoch, name, queries[rows], targets, passages, pools[rows], pools[bringer], shares)

    def _make_schedule(self, epoch: int) -> list[tuple[int, int]]:
        """The epoch's batches as (source, part), in their shuffled order."""
        batches = [(source, part) for source, parts in enumerate(self._batches) for part in range(parts)]
        order = _order(_hash(self._key, np.uint64(1), np.uint64(epoch)), len(batches))
        return [batches[i] for i in order]

    def _make_pass_order(self, source: int, turn: int) -> np.ndarray:
        return _order(_hash(self._key, np.uint64(2), np.uint64(source), np.uint64(turn)), self._sizes[source])

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
        order = _order(_hash(self._key, np.uint64(3), np.uint64(epoch)), len(queries))
        return queries[order], turns[order]

    def _draw_positives(self, queries: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in `queries`, positive) of at most `positives` of each query: random first ones, then the next in
        every pass.
        """
        ptr, ids = self._store.positives
        count = ptr[queries + 1] - ptr[queries]
        first = _hash(self._key, np.uint64(4), queries.astype(np.uint64)) % count.astype(np.uint64)
        drawn = np.minimum(count, self.positives)
        rows = np.repeat(np.arange(len(queries)), drawn)
        place = np.arange(len(rows)) - (np.cumsum(drawn) - drawn)[rows]  # within the query's
        place += first.astype(np.int64)[rows] + passes[rows] * self.positives
        return rows, np.asarray(ids[ptr[queries[rows]] + place % count[rows]])

    def _draw_negatives(self, queries: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At most `negatives` of each query's negatives: a window of its shuffled list that moves with every pass.

        Returns the position of each one's query, and its row.
        """
        if self._negatives == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        ptr, ids = self._store.negatives.take(queries)
        row = np.repeat(np.arange(len(queries)), np.diff(ptr))
        place = np.arange(len(ids)) - ptr[row]  # within the row
        hashes = _hash(self._key, np.uint64(5), queries[row].astype(np.uint64), place.astype(np.uint64))
        row_bits = np.uint64(max(1, len(queries).bit_length()))
        keys = (row.astype(np.uint64) << (np.uint64(64) - row_bits)) | (hashes >> row_bits)  # the row in the high bits
        order = np.argsort(keys, kind="stable")  # shuffles every row for itself; `row` stays sorted
        count = np.diff(ptr)[row]
        chosen = (place - passes[row] * self._negatives) % np.maximum(count, 1) < self._negatives
        return row[chosen], ids[order[chosen]]


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


def _pools(passages: np.ndarray, most: int) -> np.ndarray:
    """The pool [b] of each query, in order: about equal ones of at most `most` passages, where a query brings fewer.

    passages [b] int64: how many each query brings.
    """
    before = passages.cumsum() - passages
    count = -(-passages.sum() // max(1, most + 1 - passages.max()))  # a pool may end one query's passages late
    return np.minimum(before, passages.sum() - 1) * count // passages.sum()


def _order(key: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(_hash(key, np.arange(n, dtype=np.uint64)), kind="stable")


def _hash(*parts: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit hash of the parts (splitmix64 over them in turn), element by element."""
    mixed = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            mixed = mixed + part + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
