"""InfoNCE of one direction and its gradients in one pass over the tiles, 6·B·N·D operations.

The pass writes a slab of rows of E = 2^(logits − shift) into a bounded workspace and sums the rounded rows; then dQ = E
P, weighted by row, and dP += Eᵀ (weighted Q) are plain products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.infonce.exclusions import MaskTables
from kernels.infonce.rows import finish_passages, finish_queries, target_similarities, weigh_rows
from kernels.infonce.terms import log_one_plus_exp
from kernels.infonce.tile_pass import Pass, tile_pass
from kernels.infonce.tiles import aligned
from kernels.infonce.two_pass import (
    INNER,
    Operands,
    Shifts,
    Workspace,
    estimate_shifts,
    exact_row_shifts,
    log_of,
    outside,
    slabs,
)
from kernels.matmul import add_product, parts_of


def _one_direction(
    x: Operands, similarity: Tensor, scale: float, masks: MaskTables, weights: Tensor, shifts: Shifts, workspace: Workspace,
    dqueries: Tensor, dpassages: Tensor, fresh: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pass over row slabs: dqueries = E P and dpassages (+)= Eᵀ Q', Q' the weighted queries; returns (row_sum,
    coefficient) [B].
    """
    (B, D), N = x.queries.shape, len(x.passages)
    passages = parts_of(x.passages, x.precision)
    weighted = [x.queries.new_empty(workspace.rows, D, dtype=part.dtype) for part in workspace.parts]
    row_sum, coefficient = torch.empty_like(similarity), torch.empty_like(similarity)
    for i in slabs(B, workspace.rows):
        n = i.stop - i.start
        e, q = workspace.views(n, N), [part[:n] for part in weighted]
        asked = Pass(
            row_shift=shifts.rows[i], written=e[0], residual=e[1] if len(e) > 1 else None, rows=True, clamp=shifts.estimated,
            accurate=x.accurate, row_start=i.start,
        )  # fmt: skip
        partial, _ = tile_pass(x.queries[i], x.passages, scale, masks, asked)
        assert partial is not None
        weigh_rows(
            x.queries[i], similarity[i], partial, shifts.rows[i], weights[i], scale, row_sum[i], coefficient[i], q[0],
            q[1] if len(q) > 1 else None,
        )  # fmt: skip
        inner = INNER[x.precision]
        add_product(dpassages, [part.T for part in e], q, fresh=fresh, inner=inner)
        add_product(dqueries[i], e, passages, fresh=True, inner=inner)
        fresh = False
    return row_sum, coefficient


def infonce(
    x: Operands, targets: Tensor, scale: float, masks: MaskTables, weights: Tensor, workspace: Workspace, largest: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [B], dqueries [B, D], dpassages [N, D], dscale []) of the one-direction loss, in one pass; targets in
    0..N−1.
    """
    B, D = x.queries.shape
    dqueries = x.queries.new_empty(B, D, dtype=torch.float32)
    dpassages = x.queries.new_empty(len(x.passages), D, dtype=torch.float32)
    shifts = estimate_shifts(x, scale, columns=False, largest=largest)
    similarity = target_similarities(x.queries, x.passages, targets)
    row_sum, coefficient = _one_direction(
        x, similarity, scale, masks, weights, shifts, workspace, dqueries, dpassages, True
    )
    row_lse = log_of(row_sum, shifts.rows)
    if not shifts.safe and len(again := outside(row_sum)):
        some = Operands(aligned(x.queries[again]), x.passages, x.precision)
        some_masks = masks.select_rows(again)
        exact = exact_row_shifts(some, scale, some_masks)
        some_dqueries = dqueries.new_empty(len(again), D)
        row_sum, coefficient[again] = _one_direction(
            some, similarity[again], scale, some_masks, weights[again], Shifts(exact, None, shifts.bound, False), workspace,
            some_dqueries, dpassages, False,
        )  # fmt: skip
        row_lse[again] = log_of(row_sum, exact)
        dqueries[again] = some_dqueries
    against_target = row_lse - scale * similarity
    target_weight = scale * weights * against_target.sigmoid()
    along = finish_queries(dqueries, x.queries, x.passages, targets, coefficient, target_weight)
    finish_passages(dpassages, x.queries, targets, target_weight)
    return log_one_plus_exp(against_target), dqueries, dpassages, along.sum() / scale
