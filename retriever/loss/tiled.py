"""The tiled strategy: no similarity matrix anywhere, memory linear in the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.infonce.api import MaskTables, infonce
from kernels.infonce.terms import Terms
from kernels.infonce.two_pass import FirstPass, Passages, SecondPass
from retriever.loss.offload import offloaded
from retriever.loss.problem import Problem
from retriever.loss.ring import ring
from retriever.parallel.world import Gathered, World


def tiled(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D] through `kernels.infonce`. (Cheng et al. 2024,
    arXiv:2410.17243)

    `problem.exchange` says how ranks see each other's passages, `problem.block_rows` that rows are in host memory; the
    result is the same.
    """
    if problem.block_rows is not None:
        return offloaded(problem, world)
    return ring(problem, world) if problem.exchange == "ring" and world.size > 1 else gathered(problem, world)


def gathered(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """`tiled` with all ranks' passages at hand, in the loss's own precision; their gradients come home in float32 by a
    reduce-scatter.
    """
    if problem.directions != ("query_to_passage",):
        return problem.contrast(lambda part: GatheredPassages(part, world))
    every = _Gathering.of(problem, world)
    result = infonce(
        problem.queries.to(problem.wire_dtype),
        every.passages.rows,
        every.targets,
        problem.scale,
        exclusions=every.masks,
        weights=problem.weights,
        precision=problem.precision,
        workspace_mib=problem.workspace_mib,
        ignored=problem.ignores,
        largest=problem.largest,
    )
    assert result.dqueries is not None and result.dpassages is not None
    return result.loss, result.dqueries, world.reduce_rows(result.dpassages, every.passages.counts)


class _Gathering(NamedTuple):
    """All ranks' passages, and what counts among them."""

    passages: Gathered
    targets: Tensor  # [B]: columns over all ranks' passages, −1 where a row is ignored
    masks: MaskTables

    @staticmethod
    def of(problem: Problem, world: World) -> _Gathering:
        """Every rank calls it. Where the batch comes without its known pairs, passages are on their way while those are
        looked up.
        """
        counts, known, exclusions = _counts(problem, world), problem.known_pairs, problem.exclusions
        start = sum(counts[: world.rank])
        ids = None
        if known is None:
            ids = world.begin_gather(exclusions.passage_ids, counts)  # few bytes, and needed first
        arriving = world.begin_gather(problem.passages.to(problem.wire_dtype), counts)
        guide = exclusions.guide
        if guide is not None:
            every = world.gather_rows(guide.passages, counts).rows
            exclusions = replace(exclusions, guide=guide._replace(passages=every))
        targets = torch.where(problem.active, problem.positives + start, -1) if start else problem.positives
        if ids is not None:
            masks = MaskTables.of(replace(exclusions, passage_ids=ids.wait()), targets, sum(counts))
        else:
            assert known is not None
            if known.passage_ids is not None:
                exclusions = replace(exclusions, passage_ids=known.passage_ids)
            masks = MaskTables.of_pairs(known.pairs, exclusions, targets, sum(counts))
        return _Gathering(Gathered(arriving.wait(), counts, world.rank), targets, masks)


class GatheredPassages(Passages):
    """All ranks' passages in one block; a passage's column sum is known when all ranks' queries have been seen."""

    def __init__(self, problem: Problem, world: World) -> None:
        self._gathered, targets, masks = _Gathering.of(problem, world)
        block = problem.block(problem.queries.to(problem.wire_dtype), self._gathered.rows, masks)
        super().__init__(block, targets.clamp(min=0))
        self._world = world

    def forward(self) -> FirstPass:
        row_lse, column_lse, logits = yield from super().forward()
        own = None if column_lse is None else self._world.logsumexp(column_lse)[self._gathered.own]
        return row_lse, own, logits

    def backward(self, terms: Terms) -> SecondPass:
        counts = self._gathered.counts
        if terms.column_log_weights is not None:
            every = self._world.gather_rows(terms.column_log_weights, counts).rows
            terms = terms._replace(column_log_weights=every)
        dqueries, dpassages = yield from super().backward(terms)
        return dqueries, self._world.reduce_rows(dpassages, counts)


def _counts(problem: Problem, world: World) -> tuple[int, ...]:
    """Every rank's passages; the host waits for them where they are not known."""
    known, own = problem.known_pairs, len(problem.passages)
    if known is None:
        return world.counts(own)
    if len(known.counts) != world.size or known.counts[world.rank] != own:
        raise ValueError(
            f"expected known pairs of {world.size} ranks, of which rank {world.rank} has {own} passages; received "
            f"counts {known.counts}"
        )
    return known.counts
