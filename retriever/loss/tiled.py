"""The tiled strategy: no similarity matrix anywhere, memory linear in the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels.lse import negatives_gradient, negatives_lse
from retriever.loss.problem import Problem, nll
from retriever.parallel.world import World


def tiled(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D] through `kernels.lse`. (Cheng et al. 2024, arXiv:2410.17243)

    Passages are gathered in the loss's own precision; their gradients come home in float32 by a reduce-scatter.
    """
    travelling = torch.bfloat16 if problem.precision == "bf16" else problem.passages.dtype
    queries, active = problem.queries.to(travelling), problem.active
    passages = world.gather_rows(problem.passages.to(travelling))
    exclusions = replace(problem.exclusions, passage_ids=world.gather_rows(problem.exclusions.passage_ids).rows)
    positive = problem.positive_logits()  # [B]
    row_lse, column_lse = negatives_lse(
        queries, passages.rows, problem.scale, exclusions, columns=problem.symmetric, precision=problem.precision
    )
    share = 0.5 if problem.symmetric else 1.0  # of each direction
    log_weight = math.log(share * problem.weight)
    losses = share * nll(row_lse, positive)
    dpositive = -share * problem.weight * torch.sigmoid(row_lse - positive)  # −(1 − p), in full precision
    row_log_weights = log_weight - torch.logaddexp(positive, row_lse)
    column_log_weights = None
    if column_lse is not None:
        column_lse = world.logsumexp(column_lse)[passages.own][problem.columns]  # [B]: of each row's positive
        losses = losses + share * nll(column_lse, positive)
        dpositive = dpositive - share * problem.weight * torch.sigmoid(column_lse - positive)
        of_rows = (log_weight - torch.logaddexp(positive, column_lse)).where(active, -torch.inf)
        column_log_weights = world.gather_rows(_segment_logsumexp(of_rows, problem.columns, len(problem.passages))).rows
    dqueries, dpassages = negatives_gradient(
        queries,
        passages.rows,
        problem.scale,
        row_log_weights.where(active, -torch.inf),
        column_log_weights,
        exclusions,
        precision=problem.precision,
    )
    dpassages = world.reduce_rows(dpassages, passages.counts)
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
