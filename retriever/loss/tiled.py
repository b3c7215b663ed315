"""The tiled strategy: no similarity matrix anywhere, memory linear in the batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.lse import infonce, negatives_gradient, negatives_lse
from kernels.targets import pull_targets, target_similarities
from retriever.loss.problem import Problem
from retriever.loss.ring import ring
from retriever.loss.terms import Terms
from retriever.parallel.world import Gathered, World


def tiled(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D] through `kernels.lse`. (Cheng et al. 2024, arXiv:2410.17243)

    `problem.exchange` says how ranks see each other's passages; the result is the same.
    """
    return ring(problem, world) if problem.exchange == "ring" and world.size > 1 else gathered(problem, world)


def gathered(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """`tiled` with all ranks' passages at hand, in the loss's own precision; their gradients come home in float32 by a reduce-scatter."""
    travelling = torch.bfloat16 if problem.precision == "bf16" else problem.passages.dtype
    queries, passages = problem.queries.to(travelling), world.gather_rows(problem.passages.to(travelling))
    passage_ids = world.gather_rows(problem.exclusions.passage_ids, passages.counts).rows
    problem = replace(problem, exclusions=replace(problem.exclusions, passage_ids=passage_ids))
    if problem.symmetric and world.size > 1:
        return _symmetric_over_ranks(problem, queries, passages, world)
    result = infonce(
        queries,
        passages.rows,
        torch.where(problem.active, problem.positives + passages.own.start, -1),
        problem.scale,
        exclusions=problem.exclusions,
        weights=queries.new_full((len(queries),), problem.weight, dtype=torch.promote_types(problem.queries.dtype, torch.float32)),
        symmetric=problem.symmetric,
        precision=problem.precision,
        workspace_mib=problem.workspace_mib,
    )
    assert result.dqueries is not None and result.dpassages is not None
    return result.loss, result.dqueries, world.reduce_rows(result.dpassages, passages.counts)


def _symmetric_over_ranks(problem: Problem, queries: Tensor, passages: Gathered, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """`gathered` for the symmetric loss: a passage's column sum is known only after all ranks' queries have been seen."""
    own = passages.rows[passages.own]
    positive = problem.scale * target_similarities(queries, own, problem.columns, precision=problem.precision)
    row_lse, column_lse = negatives_lse(
        queries, passages.rows, problem.scale, problem.exclusions, columns=True, precision=problem.precision
    )
    assert column_lse is not None
    terms = Terms.of(problem, positive, row_lse, world.logsumexp(column_lse)[passages.own])
    assert terms.column_log_weights is not None
    dqueries, dpassages = negatives_gradient(
        queries,
        passages.rows,
        problem.scale,
        terms.row_log_weights,
        world.gather_rows(terms.column_log_weights, passages.counts).rows,
        problem.exclusions,
        precision=problem.precision,
        workspace_mib=problem.workspace_mib,
    )
    dpassages = world.reduce_rows(dpassages, passages.counts)
    pull_targets(dqueries, dpassages, queries, own, problem.columns, terms.pull, precision=problem.precision)
    return terms.losses, dqueries, dpassages
