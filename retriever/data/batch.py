"""One rank's part of a step: what is compared with what, and the chunks to encode."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.infonce.exclusions import Exclusions, Pairs, further_pairs
from retriever.config import Config, ConfigError, ModelConfig
from retriever.data.chunk_builders import chunk_builders
from retriever.data.chunks import Chunk, Chunks, filler, plan_chunks
from retriever.data.planner import GlobalBatch, Planner, RankSlice, known_positives, owners, slice_for_rank
from retriever.data.store import Csr, Store, TextTable
from retriever.data.teacher import false_negatives, scored_groups
from retriever.data.tokens import Side, TokenTemplate
from retriever.parallel.world import World


class Groups(NamedTuple):
    """Each query's own passages with a teacher's scores, its target first; they may stand on any rank. Empty: the
    teacher says nothing.
    """

    ptr: Tensor  # [B + 1] int64
    ids: Tensor  # [ptr[-1]] int64: passage ids, those of a row distinct
    scores: Tensor  # [ptr[-1]] float32


class KnownPairs(NamedTuple):
    """Which of this rank's queries and all ranks' passages are no negatives, looked up beforehand."""

    pairs: Pairs  # the queries' own targets aside; columns counted over all ranks' passages, rank after rank
    counts: tuple[int, ...]  # passages of each rank

    def map(self, function: Callable[[Tensor], Tensor]) -> KnownPairs:
        """The same pairs with every tensor replaced by `function` of it."""
        return KnownPairs(Pairs(*map(function, self.pairs)), self.counts)


@dataclass(frozen=True)
class Targets:
    """Which passages each query is compared with, and how. B queries and N passages on this rank."""

    positives: Tensor  # [B] int64: this rank's column of each query's positive, -1 for an ignored row
    passage_ids: Tensor  # [N] int64, unique across sources and ranks
    known_ptr: Tensor  # [B + 1] int64
    known_ids: Tensor  # [known_ptr[-1]] int64: passages that are no negatives of a row; the positive is among them
    global_queries: int  # queries of the whole batch, over all ranks
    groups: Groups | None = None  # what a teacher says of some passages, where it is distilled
    known_pairs: KnownPairs | None = None  # of `known_ids`; None: to be looked up where the ranks' passages meet
    ignores: bool | None = None  # whether any row is ignored; None: not asked yet

    def to(self, device: torch.device) -> Targets:
        """The same targets on `device`, `ignores` known; the copy does not block where the memory is pinned.

        Raises ValueError where a positive is none of the N columns.
        """
        ignores = self._ignores() if self.ignores is None else self.ignores
        return replace(self._map(lambda t: t.to(device, non_blocking=device.type != "cpu")), ignores=ignores)

    def pinned(self) -> Targets:
        """The same targets in page-locked host memory."""
        return self._map(Tensor.pin_memory)

    def reordered(self, query_rows: Tensor, passage_rows: Tensor) -> Targets:
        """The targets of a batch whose row i is the one that was query_rows[i] of these queries [B], passage_rows[i] of
        the passages [N].

        A teacher's groups are left out, and pairs that were looked up: they are of the old order, on other ranks too.
        """
        place = torch.empty_like(passage_rows)
        place[passage_rows] = torch.arange(len(passage_rows))  # [N]: where each passage stands now
        positives = self.positives[query_rows]
        known = Exclusions(self.passage_ids, self.known_ptr, self.known_ids).of_rows(query_rows)
        return replace(
            self,
            positives=place[positives.clamp(min=0)].where(positives >= 0, -1),
            passage_ids=self.passage_ids[passage_rows],
            known_ptr=known.known_ptr,
            known_ids=known.known_ids,
            groups=None,
            known_pairs=None,
        )

    def _ignores(self) -> bool:
        """Waits for nothing where the targets are on the host, as they are before `to`."""
        least, most = (int(x) for x in self.positives.aminmax()) if len(self.positives) else (0, -1)
        if least < -1 or most >= len(self.passage_ids):
            raise ValueError(
                f"expected positives between -1 and {len(self.passage_ids) - 1} (a column), received {least} to {most}"
            )
        return least < 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> Targets:
        return replace(
            self,
            positives=function(self.positives),
            passage_ids=function(self.passage_ids),
            known_ptr=function(self.known_ptr),
            known_ids=function(self.known_ids),
            groups=None if self.groups is None else Groups(*map(function, self.groups)),
            known_pairs=None if self.known_pairs is None else self.known_pairs.map(function),
        )


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


class BatchLoader:
    """Plans steps and prepares this rank's batches, the next one while this one is trained on."""

    def __init__(
        self,
        store: Store,
        planner: Planner,
        template: TokenTemplate,
        model: ModelConfig,
        *,
        tokens_per_chunk: int,
        packed: bool = False,
        mask_known_positives: bool,
        teacher_groups: bool = False,
        teacher_margin: float | None = None,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        even_chunks: bool = False,
        look_up: bool = True,
    ) -> None:
        """`even_chunks`: every rank has as many chunks of a side as the rank with most, fillers at the end; `look_up`:
        known pairs, too.
        """
        self._store, self._planner, self._template = store, planner, template
        self._max_tokens: dict[Side, int] = {"query": model.query_max_tokens, "passage": model.passage_max_tokens}
        self._tables: dict[Side, TextTable] = {"query": store.queries, "passage": store.passages}
        self._tokens_per_chunk, self._packed = tokens_per_chunk, packed
        self._masked = mask_known_positives
        self._teacher_groups, self._teacher_margin = teacher_groups, teacher_margin
        self._device, self._rank, self._world_size, self._even_chunks = device, rank, world_size, even_chunks
        self._look_up = look_up

    @classmethod
    def from_config(
        cls, store: Store, planner: Planner, template: TokenTemplate, config: Config, world: World
    ) -> BatchLoader:
        """The loader of one rank of a run whose `auto` values are resolved. Raises ConfigError where a teacher's scores
        are missing.
        """
        asks = config.loss.distils or config.loss.teacher_margin is not None
        if asks and (store.positive_scores is None or store.negative_scores is None):
            raise ConfigError(
                "loss: kl_weight, margin_mse_weight and teacher_margin need a teacher's scores of positives and negatives; "
                "data.train has none (scripts.mine_negatives --teacher writes them)"
            )
        gathers = config.loss.exchange != "ring" or world.size == 1
        return cls(
            store,
            planner,
            template,
            config.model,
            tokens_per_chunk=int(config.batch.tokens_per_chunk),
            packed=config.model.attention == "packed",
            mask_known_positives=config.loss.mask_known_positives,
            teacher_groups=config.loss.distils,
            teacher_margin=config.loss.teacher_margin,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            even_chunks=world.sharded,
            look_up=config.loss.strategy == "tiled" and gathers and not config.batch.offload,  # others do it themselves
        )

    def load(self, step: int) -> Batch:
        """This rank's batch of optimizer step `step`, counted from 0."""
        whole = self._planner.plan(step)
        mine = slice_for_rank(
            whole,
            self._lengths("query", whole.queries),
            self._lengths("passage", whole.passages),
            self._rank,
            self._world_size,
        )
        known, groups = known_positives(self._store, mine, self._masked), None
        if self._teacher_margin is not None:
            known = false_negatives(self._store, mine, whole.passages, self._teacher_margin, known)
        if self._teacher_groups:
            groups = Groups(
                *map(torch.from_numpy, scored_groups(self._store, mine, whole.passages, self._teacher_margin))
            )
        targets = Targets(
            torch.from_numpy(mine.targets),
            torch.from_numpy(mine.passages),
            torch.from_numpy(np.ascontiguousarray(known.ptr)),
            torch.from_numpy(np.ascontiguousarray(known.ids)),
            global_queries=len(whole.queries),
            groups=groups,
            known_pairs=_known_pairs(mine, known, self._rank) if self._look_up else None,
        )
        if self._device.type == "cuda":
            targets = targets.pinned()
        counts = self._most_chunks(whole) if self._even_chunks else (0, 0)
        builders = self._builders("query", mine.queries, counts[0]) + self._builders(
            "passage", mine.passages, counts[1]
        )
        tokens = int(self._lengths("query", mine.queries).sum() + self._lengths("passage", mine.passages).sum())
        chunks = Chunks(builders, self._device)
        return Batch(step, whole.epoch, whole.source, chunks, targets, (len(mine.queries), len(mine.passages)), tokens)

    def batches(self, first: int, last: int) -> Generator[Batch, None, None]:
        """Batches of the steps from `first` to before `last`; the next is planned, and its first chunks built, in
        threads meanwhile.

        Whoever may leave the loop early closes it, for ending its threads takes waiting for them.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan") as pool:
            coming = pool.submit(self._prefetched, first) if first < last else None
            try:
                for step in range(first, last):
                    assert coming is not None
                    asked = time.perf_counter()
                    batch = coming.result()
                    batch.chunks.waited_s = time.perf_counter() - asked
                    coming = pool.submit(self._prefetched, step + 1) if step + 1 < last else None
                    with closing(batch.chunks):
                        yield batch
            finally:
                if coming is not None and not coming.cancel() and coming.exception() is None:
                    coming.result().chunks.close()

    def _prefetched(self, step: int) -> Batch:
        batch = self.load(step)
        batch.chunks.prefetch()
        return batch

    def _lengths(self, side: Side, rows: np.ndarray) -> np.ndarray:
        return self._template.lengths(self._tables[side].lengths_of(rows), self._max_tokens[side])

    def _most_chunks(self, whole: GlobalBatch) -> tuple[int, int]:
        """Chunks of queries and of passages, each on the rank that has most of them."""
        sides = self._lengths("query", whole.queries), self._lengths("passage", whole.passages)
        queries, passages = (
            max(
                len(plan_chunks(lengths[owner == rank], self._tokens_per_chunk, packed=self._packed))
                for rank in range(self._world_size)
            )
            for lengths, owner in zip(sides, owners(whole, *sides, self._world_size), strict=True)
        )
        return queries, passages

    def _builders(self, side: Side, rows: np.ndarray, at_least: int) -> list[Callable[[], Chunk]]:
        builders = chunk_builders(
            side,
            self._tables[side],
            rows,
            self._template,
            max_tokens=self._max_tokens[side],
            tokens_per_chunk=self._tokens_per_chunk,
            packed=self._packed,
        )
        return builders + [partial(filler, side, packed=self._packed)] * (at_least - len(builders))


def _known_pairs(mine: RankSlice, known: Csr, rank: int) -> KnownPairs:
    """Looks up the passages `known` to each query of the slice among all ranks': ids are enough for it, and the host
    has them.
    """
    exclusions = Exclusions(
        *(torch.from_numpy(np.ascontiguousarray(ids)) for ids in (mine.every_passage, known.ptr, known.ids))
    )
    targets = torch.from_numpy(mine.targets + sum(mine.counts[:rank]))
    return KnownPairs(further_pairs(exclusions, targets), mine.counts)
