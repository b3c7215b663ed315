"""One rank's part of a step: what is compared with what, and the chunks to encode."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kernels.infonce.exclusions import Exclusions, further_pairs
from kernels.infonce.rules import Lists, Pools
from retriever.config import Config, ConfigError, SourceConfig
from retriever.data.accuracy import Ranking
from retriever.data.chunks import Ahead, Chunking, Chunks
from retriever.data.planner import GlobalBatch, Planner
from retriever.data.slices import RankSlice, known_positives, owners, slice_for_rank
from retriever.data.store import Csr, Store
from retriever.data.targets import KnownPairs, Targets
from retriever.data.teacher import own_groups, scored_negatives
from retriever.data.tokens import SIDES, TokenTemplate
from retriever.parallel.world import World

_POLICIES = ("in_batch", "own", "none")  # as data.train.<n>.negatives names them
_IN_BATCH, _OWN, _ = range(len(_POLICIES))


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch."""

    step: int
    epoch: int
    source: str
    chunks: Chunks  # of queries and passages; at most tokens_per_chunk tokens each
    targets: Targets
    sizes: tuple[int, int]  # B, N
    tokens: int  # special tokens included, padding not
    ranking: Ranking | None = None  # what its accuracy is counted over
    candidates: float = 0.0  # passages that a query is contrasted with, its target included, on average; 0: it depends


class BatchLoader:
    """Plans steps and prepares this rank's batches, the next one while this one is trained on."""

    def __init__(self, store: Store, planner: Planner, template: TokenTemplate, config: Config, world: World) -> None:
        """The `auto` values of `config` are resolved. Raises ConfigError where a teacher's scores are missing."""
        self._store, self._planner, self._loss, self._world = store, planner, config.loss, world
        scored = store.positive_scores is not None and store.negative_scores is not None
        takes = config.loss.custom is not None and scored
        self._asks_teacher = config.loss.distils or config.loss.teacher_margin is not None or takes
        compares = config.loss.compares_negatives or config.loss.teacher_margin is not None
        if compares and not scored:
            raise ConfigError(
                "loss: kl_weight, margin_mse_weight and teacher_margin need a teacher's scores of positives and "
                "negatives; data.train has none (scripts.mine_negatives --teacher writes them)"
            )
        if self._asks_teacher and store.positive_scores is None:
            raise ConfigError("loss: cosent_weight needs scores of the positives; data.train has none")
        budget, packed = int(config.batch.tokens_per_chunk), config.model.attention == "packed"
        limits = [store.limits(config, side) for side in SIDES]
        self._queries = Chunking("query", store.queries, template, limits[0], budget, packed)
        self._passages = Chunking("passage", store.passages, template, limits[1], budget, packed)
        sources = config.data.train or (SourceConfig(),) * len(store.sources)
        self._policies = np.array([_POLICIES.index(source.negatives) for source in sources])
        self._temperatures = [source.temperature for source in sources]
        gathers = config.loss.exchange != "ring" or world.size == 1
        self._offloads = config.batch.offload
        # Elsewhere the loss looks known pairs up itself. For a bank it needs ids in any case.
        listed = config.loss.strategy == "tiled" and gathers and config.loss.bank == "none"
        self._looks_up = listed and not self._offloads

    def load(self, step: int) -> Batch:
        """This rank's batch of optimizer step `step`, counted from 0."""
        store, loss, rank = self._store, self._loss, self._world.rank
        whole = self._planner.plan(step)
        lengths = self._queries.lengths(whole.queries), self._passages.lengths(whole.passages)
        mine = slice_for_rank(whole, *lengths, rank, self._world.size)
        known = known_positives(store, mine, loss.mask_known_positives, in_batch=loss.bank == "none")
        scored = scored_negatives(store, mine, whole.passages, loss.teacher_margin) if self._asks_teacher else None
        if scored is not None and scored.are_false.any():
            known = scored.add_to(known)
        own = store.negatives.take(mine.queries).within(whole.passages) if loss.needs_own_negatives else None
        targets = Targets(
            torch.from_numpy(mine.targets),
            torch.from_numpy(mine.passages),
            *_lists(known),
            global_queries=whole.query_count,
            shares=None if mine.shares is None else torch.from_numpy(mine.shares),
            own=None if own is None else _lists(own),
            guide=None if store.guide is None else store.guide.guide(mine.queries, mine.passages, mine.targets, loss),
            teacher=None if store.teacher is None else store.teacher.of(mine.queries, mine.passages),
            groups=scored.groups() if scored is not None and (loss.distils or loss.custom) else None,
            pools=_pools(whole, mine),
            **self._contrasts(whole, mine, known),
        )
        if self._looks_up:
            targets = replace(targets, known_pairs=_known_pairs(mine, targets.exclusions, rank))
        ranking = None if self._offloads else Ranking.of(targets.positives, targets.exclusions)
        if self._world.device.type == "cuda":
            targets, ranking = targets.pinned(), None if ranking is None else ranking.pinned()
        most = self._most_chunks(whole, *lengths) if self._world.sharded else (0, 0)
        builders = self._queries.builders(mine.queries, most[0]) + self._passages.builders(mine.passages, most[1])
        tokens = int(self._queries.lengths(mine.queries).sum() + self._passages.lengths(mine.passages).sum())
        chunks, sizes = Chunks(builders, self._world.device), (len(mine.queries), len(mine.passages))
        return Batch(
            step, whole.epoch, whole.source, chunks, targets, sizes, tokens, ranking, self._candidates(whole, targets)
        )

    def _candidates(self, whole: GlobalBatch, targets: Targets) -> float:
        if targets.in_batch is not None or self._loss.bank != "none" or self._loss.custom is not None:
            return 0.0
        if whole.query_pools is None or whole.passage_pools is None:
            return float(len(whole.passages))
        return float(np.bincount(whole.passage_pools)[whole.query_pools].mean())

    def _contrasts(self, whole: GlobalBatch, mine: RankSlice, known: Csr) -> dict[str, Any]:
        """The fields of Targets that the batch's sources decide."""
        sources = self._planner.source_of(whole.queries)
        batch_temperature = {self._temperatures[source] for source in np.unique(sources)}
        fields: dict[str, Any] = {"temperature": batch_temperature.pop() if len(batch_temperature) == 1 else None}
        every, policies = (self._policies[s] for s in (sources, self._planner.source_of(mine.queries)))
        if not every.any():
            return fields
        if (every == _OWN).any():
            fields["own_groups"] = own_groups(self._store, mine, whole.passages, policies == _OWN, known)
        contrasts = bool((every == _IN_BATCH).any())
        return fields | {"in_batch": torch.from_numpy(policies == _IN_BATCH), "contrasts": contrasts}

    def batches(self, first: int, last: int) -> Generator[Batch, None, None]:
        """Batches of the steps from `first` to before `last`; threads plan the next and build its first chunks.

        Close it where the loop may be left early: closing waits for the threads.
        """
        coming = Ahead((partial(self._prefetched, step) for step in range(first, last)), 1, 1, "plan")
        try:
            for batch in coming:
                batch.chunks.waited_s = coming.waited_s
                with closing(batch.chunks):
                    yield batch
        finally:
            for batch in coming.close():
                batch.chunks.close()

    def _prefetched(self, step: int) -> Batch:
        batch = self.load(step)
        batch.chunks.prefetch()
        return batch

    def _most_chunks(
        self, whole: GlobalBatch, query_lengths: np.ndarray, passage_lengths: np.ndarray
    ) -> tuple[int, int]:
        """The largest number of query and of passage chunks on any rank: a sharded encoder runs equally many on all."""
        size = self._world.size
        of_query, of_passage = owners(whole, query_lengths, passage_lengths, size)
        queries = max(len(self._queries.plan(whole.queries[of_query == rank])) for rank in range(size))
        passages = max(len(self._passages.plan(whole.passages[of_passage == rank])) for rank in range(size))
        return queries, passages


def _pools(whole: GlobalBatch, mine: RankSlice) -> Pools | None:
    """The pools of the slice's queries and of all passages of the batch."""
    if mine.pools is None or whole.passage_pools is None:
        return None
    return Pools(*map(torch.from_numpy, (mine.pools, whole.passages, whole.passage_pools)))


def _lists(relation: Csr) -> Lists:
    return Lists(*(torch.from_numpy(np.ascontiguousarray(part)) for part in relation))


def _known_pairs(mine: RankSlice, exclusions: Exclusions, rank: int) -> KnownPairs:
    """The listed pairs of the slice's queries among all ranks' passages."""
    every = torch.from_numpy(np.ascontiguousarray(mine.every_passage))
    targets = torch.from_numpy(mine.targets + sum(mine.counts[:rank]))
    pairs = further_pairs(replace(exclusions, passage_ids=every), targets)
    return KnownPairs(pairs, mine.counts, None if mine.pools is None else every)
