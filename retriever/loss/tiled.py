"""The tiled strategy: no similarity matrix anywhere, memory linear in the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels.lse import infonce, negatives_gradient, negatives_lse
from retriever.loss.problem import Problem, nll
from retriever.parallel.world import Gathered, World


def tiled(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D] through `kernels.lse`. (Cheng et al. 2024, arXiv:2410.17243)

    Passages are gathered in the loss's own precision; their gradients come home in float32 by a reduce-scatter.
    """
    travelling = torch.bfloat16 if problem.precision == "bf16" else problem.passages.dtype
    queries, passages = problem.queries.to(travelling), world.gather_rows(problem.passages.to(travelling))
    passage_ids = world.gather_rows(problem.exclusions.passage_ids).rows
    problem = replace(problem, exclusions=replace(problem.exclusions, passage_ids=passage_ids))
    if problem.symmetric and world.size > 1:
        return _symmetric_over_ranks(problem, queries, passages, world)
    result = infonce(
        queries,
        passages.rows,
        torch.where(problem.active, problem.positives + passages.own.start, -1),
        problem.scale,
        exclusions=problem.exclusions,
        weights=queries.new_full((len(queries),), problem.weight, dtype=problem.queries.dtype),
        symmetric=problem.symmetric,
        precision=problem.precision,
        workspace_mib=problem.workspace_mib,
    )
    assert result.dqueries is not None and result.dpassages is not None
    return result.loss, result.dqueries, world.reduce_rows(result.dpassages, passages.counts)


def _symmetric_over_ranks(problem: Problem, queries: Tensor, passages: Gathered, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """`tiled` for the symmetric loss: a passage's column sum is known only after all ranks' queries have been seen."""
    positive, active = problem.positive_logits(), problem.active  # [B]
    row_lse, column_lse = negatives_lse(
        queries, passages.rows, problem.scale, problem.exclusions, columns=True, precision=problem.precision
    )
    assert column_lse is not None
    column_lse = world.logsumexp(column_lse)[passages.own][problem.columns]  # [B]: of each row's positive
    losses = 0.5 * (nll(row_lse, positive) + nll(column_lse, positive))
    log_weight = math.log(0.5 * problem.weight)
    row_log_weights = log_weight - torch.logaddexp(positive, row_lse)
    of_rows = (log_weight - torch.logaddexp(positive, column_lse)).where(active, -torch.inf)
    dqueries, dpassages = negatives_gradient(
        queries,
        passages.rows,
        problem.scale,
        row_log_weights.where(active, -torch.inf),
        world.gather_rows(_segment_logsumexp(of_rows, problem.columns, len(problem.passages))).rows,
        problem.exclusions,
        precision=problem.precision,
    )
    dpassages = world.reduce_rows(dpassages, passages.counts)
    # The positive's own term, −(1 − p) of each direction, in full precision.
    dpositive = -0.5 * problem.weight * (torch.sigmoid(row_lse - positive) + torch.sigmoid(column_lse - positive))
    dpositive = (problem.scale * dpositive).where(active, 0.0)[:, None]  # [B, 1]
    dqueries = dqueries + dpositive * problem.passages[problem.columns]
    # index_put_ sorts before it adds, so that shared positives sum in the same order every time; index_add_ does not.
    dpassages = dpassages.index_put((problem.columns,), dpositive * problem.queries, accumulate=True)
    return losses.where(active, 0.0), dqueries, dpassages


def _segment_logsumexp(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """log Σ exp(x) over the entries of each segment [segments]; −inf where a segment has none."""
    top = x.new_full((segments,), -torch.inf).scatter_reduce(0, segment, x, "amax")
    shift = top.nan_to_num(neginf=0.0)
    return torch.zeros_like(top).index_put((segment,), (x - shift[segment]).exp(), accumulate=True).log() + shift
