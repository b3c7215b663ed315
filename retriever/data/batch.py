"""One rank's part of a step: what is compared with what, and the chunks to encode."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.infonce.exclusions import Exclusions, further_pairs
from kernels.infonce.rules import Guide, Lists, Pairs, Pools
from retriever.config import Config, ConfigError, SourceConfig
from retriever.data.accuracy import Ranking
from retriever.data.chunks import Ahead, Chunking, Chunks
from retriever.data.layout import OfTensors
from retriever.data.planner import GlobalBatch, Planner
from retriever.data.slices import RankSlice, known_positives, owners, slice_for_rank
from retriever.data.store import Csr, Store
from retriever.data.teacher import Groups, own_groups, scored_negatives
from retriever.data.text_vectors import TeacherVectors
from retriever.data.tokens import SIDES, TokenTemplate
from retriever.parallel.world import World

_POLICIES = ("in_batch", "own", "none")  # as data.train.<n>.negatives names them
_IN_BATCH, _OWN, _ = range(len(_POLICIES))


class KnownPairs(NamedTuple):
    """Pairs of this rank's queries and all ranks' passages that are no plain negatives, looked up in advance."""

    # Without the queries' own targets, with their own negatives where the loss asks for these; columns counted over all
    # ranks' passages, rank after rank.
    pairs: Pairs
    counts: tuple[int, ...]  # passages of each rank
    passage_ids: Tensor | None = None  # [n] int64, of all ranks' passages; asked for where there are pools


@dataclass(frozen=True)
class Targets(OfTensors):
    """Which passages each query is compared with, and how. B queries and N passages on this rank."""

    positives: Tensor  # [B] int64: this rank's column of each query's positive, -1 for an ignored row
    passage_ids: Tensor  # [N] int64, unique across sources and ranks
    known_ptr: Tensor  # [B + 1] int64
    known_ids: Tensor  # [known_ptr[-1]] int64: passages that are no negatives of a row; the positive is among them
    global_queries: int  # queries of the whole batch, over all ranks
    groups: Groups | None = None  # what a teacher says of some passages, where it is distilled
    known_pairs: KnownPairs | None = None  # of `known_ids`; None: to be looked up where the ranks' passages meet
    ignores: bool | None = None  # whether any row is ignored; None: not asked yet
    pools: Pools | None = None  # of queries and of all ranks' passages; None: a query sees every passage
    shares: Tensor | None = None  # [B] float64: of a query's loss, where it stands once for each of several positives
    own: Lists | None = None  # each row's own negatives in the global batch, where the loss asks for them
    guide: Guide | None = None  # a guide model's vectors, where there is one
    teacher: TeacherVectors | None = None  # a teacher's embeddings, where they are distilled
    # [B] bool: which rows are contrasted with the batch's passages; None: all
    in_batch: Tensor | None = None
    own_groups: Groups | None = None  # of rows that are contrasted with their own negatives; None: no row of any rank
    contrasts: bool = True  # whether any row on any rank is contrasted with the batch's passages
    temperature: float | None = None  # of this batch; None: the objective's

    def to(self, device: torch.device) -> Targets:
        """A copy on `device`, `ignores` known. Raises ValueError where a positive is none of the N columns."""
        ignores = self._ignores() if self.ignores is None else self.ignores
        return replace(super().to(device), ignores=ignores)

    @property
    def exclusions(self) -> Exclusions:
        """Which pairs are no negatives, by what is known of the texts."""
        ids = self.passage_ids, self.known_ptr, self.known_ids
        return Exclusions(*ids, guide=self.guide, own=self.own, pools=self.pools)

    def reordered(self, query_rows: Tensor, passage_rows: Tensor) -> Targets:
        """The targets of a batch whose row i is query_rows[i] [B] of the queries, passage_rows[i] [N] of the passages.

        A teacher's groups are left out, and pairs that were looked up: they are of the old order, on other ranks too.
        """
        column_of = torch.empty_like(passage_rows)
        column_of[passage_rows] = torch.arange(len(passage_rows))  # [N]: where each passage stands now
        positives = self.positives[query_rows]
        exclusions = self.exclusions.of_rows(query_rows)
        guide, teacher = exclusions.guide, self.teacher
        return replace(
            self,
            positives=column_of[positives.clamp(min=0)].where(positives >= 0, -1),
            passage_ids=self.passage_ids[passage_rows],
            known_ptr=exclusions.known_ptr,
            known_ids=exclusions.known_ids,
            shares=None if self.shares is None else self.shares[query_rows],
            own=exclusions.own,
            guide=None if guide is None else guide._replace(passages=guide.passages[passage_rows]),
            teacher=teacher and TeacherVectors(teacher.queries[query_rows], teacher.passages[passage_rows]),
            groups=None,
            known_pairs=None,
            pools=exclusions.pools,
            in_batch=None if self.in_batch is None else self.in_batch[query_rows],
        )

    def _ignores(self) -> bool:
        """Waits for nothing where the targets are on the host, as they are before `to`."""
        least, most = (int(x) for x in self.positives.aminmax()) if len(self.positives) else (0, -1)
        if least < -1 or most >= len(self.passage_ids):
            raise ValueError(
                f"expected positives between -1 and {len(self.passage_ids) - 1} (a column), received {least} to {most}"
            )
        return least < 0


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
