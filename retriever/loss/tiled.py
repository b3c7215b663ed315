"""The tiled strategy: no similarity matrix anywhere, memory linear in the batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.infonce.api import Block, MaskTables, infonce
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

    Where the batch comes without its known pairs, passages are on their way while those are looked up.
    """
    queries, own = problem.queries.to(problem.wire_dtype), problem.passages.to(problem.wire_dtype)
    counts, known = _counts(problem, world), problem.known_pairs
    start = sum(counts[: world.rank])
    ids = None
    if known is None:
        ids = world.begin_gather(problem.exclusions.passage_ids, counts)  # few bytes, and needed first
    arriving = world.begin_gather(own, counts)
    targets = torch.where(problem.active, problem.positives + start, -1) if start else problem.positives
    if ids is not None:
        masks = MaskTables.of(replace(problem.exclusions, passage_ids=ids.wait()), targets, sum(counts))
    else:
        assert known is not None
        masks = MaskTables.of_pairs(known.pairs, targets, problem.exclusions.threshold, sum(counts))
    passages = Gathered(arriving.wait(), counts, world.rank)
    if problem.symmetric and world.size > 1:
        block = problem.block(queries, passages.rows, masks)
        return problem.contrast(GatheredPassages(block, problem.columns + start, passages, world))
    dtype = torch.promote_types(problem.queries.dtype, torch.float32)
    result = infonce(
        queries,
        passages.rows,
        targets,
        problem.scale,
        exclusions=masks,
        weights=queries.new_full((len(queries),), problem.weight, dtype=dtype),
        symmetric=problem.symmetric,
        precision=problem.precision,
        workspace_mib=problem.workspace_mib,
        ignored=problem.ignores,
        largest=problem.largest,
    )
    assert result.dqueries is not None and result.dpassages is not None
    return result.loss, result.dqueries, world.reduce_rows(result.dpassages, counts)


class GatheredPassages(Passages):
    """All ranks' passages in one block; a passage's column sum is known when all ranks' queries have been seen."""

    def __init__(self, block: Block, targets: Tensor, gathered: Gathered, world: World) -> None:
        super().__init__(block, targets)
        self._gathered, self._world = gathered, world

    def forward(self) -> FirstPass:
        row_lse, column_lse, logits = yield from super().forward()
        assert column_lse is not None
        return row_lse, self._world.logsumexp(column_lse)[self._gathered.own], logits

    def backward(self, terms: Terms) -> SecondPass:
        assert terms.column_log_weights is not None
        counts = self._gathered.counts
        weights = self._world.gather_rows(terms.column_log_weights, counts).rows
        dqueries, dpassages = yield from super().backward(terms._replace(column_log_weights=weights))
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
