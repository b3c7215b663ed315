"""InfoNCE of one direction and its gradients in one pass over the tiles, 6·B·N·D operations.

The pass writes rows of E = 2^(logits − shift) into a bounded workspace and sums the rounded rows. Then dQ = E P,
weighted by row, and dP += Eᵀ (weighted Q) are plain products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.infonce.passes import INNER, LEAST_ROWS, TiledBlock, log_of, outside, slices
from kernels.infonce.rows import RowVectors, finish_passages, finish_queries, target_similarities, weigh_rows
from kernels.infonce.terms import log_one_plus_exp
from kernels.infonce.tiles import Pass
from kernels.matmul import add_product, parts_of


def has_room(block: TiledBlock) -> bool:
    """Whether the workspace holds enough rows for one pass to be faster than two."""
    return block.rows_at_once() >= min(len(block.queries), LEAST_ROWS)


def infonce(block: TiledBlock, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], dqueries [B, D], dpassages [N, D], ⟨q_i, dq_i⟩ [B]) of the one-direction loss; targets [B] in 0..N−1,
    weights [B] float32.
    """
    queries, passages = block.operands
    (B, D), N = queries.shape, len(passages)
    dqueries = queries.new_empty(B, D, dtype=torch.float32)
    dpassages = queries.new_empty(N, D, dtype=torch.float32)
    workspace = block.workspace(block.rows_at_once(), N)
    rows = _row_vectors(target_similarities(queries, passages, targets), block.shifts.rows, weights)
    _sweep(block, rows, workspace, dqueries, dpassages, clamp=block.shifts.estimated)
    row_lse = log_of(rows.sum, rows.shift)
    if block.shifts.constant is None and len(again := outside(rows.sum)):
        some, some_dqueries = block.select_rows(again), dqueries.new_empty(len(again), D)
        exact = _row_vectors(rows.similarity[again], some.exact_shifts(), weights[again])
        _sweep(some, exact, workspace, some_dqueries, dpassages, fresh=False)
        rows.coefficient[again] = exact.coefficient
        row_lse[again] = log_of(exact.sum, exact.shift)
        dqueries[again] = some_dqueries
    against_target = row_lse - block.scale * rows.similarity
    target_weight = block.scale * weights * against_target.sigmoid()
    along = finish_queries(dqueries, queries, passages, targets, rows.coefficient, target_weight)
    finish_passages(dpassages, queries, targets, target_weight)
    return log_one_plus_exp(against_target), dqueries, dpassages, along


def _row_vectors(similarity: Tensor, shift: Tensor, weights: Tensor) -> RowVectors:
    return RowVectors(similarity, shift, weights, torch.empty_like(similarity), torch.empty_like(similarity))


def _sweep(
    block: TiledBlock,
    rows: RowVectors,
    workspace: list[Tensor],
    dqueries: Tensor,
    dpassages: Tensor,
    *,
    fresh: bool = True,
    clamp: bool = False,
) -> None:
    """One pass: dqueries = E P and dpassages (+)= Eᵀ Q', Q' the weighted queries; `fresh` overwrites dpassages."""
    queries, inner = block.operands[0], INNER[block.precision]
    (B, D), N = queries.shape, len(block.passages)
    passages = parts_of(block.operands[1], block.precision)
    weighted = [queries.new_empty(len(part), D, dtype=part.dtype) for part in workspace]
    asked = Pass(rows.shift, rows=True, clamp=clamp)
    for i in slices(B, len(workspace[0])):
        n = i.stop - i.start
        e, q = [part[:n, :N] for part in workspace], [part[:n] for part in weighted]
        partial, _ = block.tile_pass(asked, i, slice(0, N), e)
        assert partial is not None
        weigh_rows(queries[i], rows.of_rows(i), partial, block.scale, q)
        add_product(dpassages, [part.T for part in e], q, fresh=fresh, inner=inner)
        add_product(dqueries[i], e, passages, fresh=True, inner=inner)
        fresh = False
