"""InfoNCE and its gradients on Triton kernels and cuBLAS: slabs of exponentials in a bounded workspace, matrix products over them.

One direction, 6·B·N·D operations: a pass over the tiles writes a slab of rows of E = 2^(logits − shift) and sums the
rounded rows; then dQ = E P, weighted by row, and dP += Eᵀ (weighted Q) are plain products. Both directions, 8·B·N·D: one pass
sums rows and columns at once, a second one writes the gradient at the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.exclusions import MaskTables
from kernels.lse_reference import log_one_plus_exp
from kernels.lse_tiled import Operands, Shifts, estimate_shifts, exact_row_shifts, log_of, negatives_lse, outside, slabs
from kernels.lse_triton import LOG2E, aligned, tile_pass
from kernels.matmul import add_product, parts_of
from kernels.rows_triton import finish_passages, finish_queries, target_similarities, weigh_rows
from kernels.targets import sum_by_target

_LEAST_SLAB_ROWS = 2048  # fewer rows a slab make reading and writing dP, slab by slab, the bulk of the work
_INNER = {"bf16": None, "high": 2048, "fp32": None}


class Workspace:
    """Room for a slab of exponentials: a bf16 matrix, two of them (value and residual), or an fp32 one."""

    def __init__(self, like: Tensor, precision: str, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        width = -(-columns // 64) * 64
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.parts = [like.new_empty(rows, width, dtype=dtype) for _ in range(2 if precision == "high" else 1)]

    def views(self, rows: int, columns: int) -> list[Tensor]:
        """Its upper left corner."""
        return [part[:rows, :columns] for part in self.parts]


def slab_rows(B: int, N: int, D: int, precision: str, budget: int, processors: int) -> int:
    """Rows of a slab over all N columns within `budget` bytes, whole waves of dQ's 128 × 256 tiles where there is room."""
    rows = budget // ((2 if precision == "bf16" else 4) * -(-N // 64) * 64)
    if rows >= B:
        return B
    wave = max(1, processors // -(-D // 256)) * 128
    if rows >= wave:
        return rows // wave * wave
    return max(256, rows // 256 * 256)


def _one_direction(
    x: Operands, similarity: Tensor, scale: float, masks: MaskTables, weights: Tensor, shifts: Shifts, workspace: Workspace,
    dqueries: Tensor, dpassages: Tensor, fresh: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pass over row slabs: dqueries = E P and dpassages (+)= Eᵀ Q', Q' the weighted queries; returns (row_sum, coefficient) [B]."""
    (B, D), N = x.queries.shape, len(x.passages)
    passages = parts_of(x.passages, x.precision)
    weighted = [x.queries.new_empty(workspace.rows, D, dtype=part.dtype) for part in workspace.parts]
    row_sum, coefficient = torch.empty_like(similarity), torch.empty_like(similarity)
    for i in slabs(B, workspace.rows):
        n = i.stop - i.start
        e, q = workspace.views(n, N), [part[:n] for part in weighted]
        partial, _ = tile_pass(
            x.queries[i], x.passages, scale, masks, row_shift=shifts.rows[i], written=e[0], residual=e[1] if len(e) > 1 else None,
            rows=True, clamp=shifts.estimated, row_start=i.start, accurate=x.accurate,
        )  # fmt: skip
        assert partial is not None
        weigh_rows(
            x.queries[i], similarity[i], partial, shifts.rows[i], weights[i], scale, row_sum[i], coefficient[i], q[0],
            q[1] if len(q) > 1 else None,
        )  # fmt: skip
        inner = _INNER[x.precision]
        add_product(dpassages, [part.T for part in e], q, fresh=fresh, inner=inner)
        add_product(dqueries[i], e, passages, fresh=True, inner=inner)
        fresh = False
    return row_sum, coefficient


def row_infonce(
    x: Operands, targets: Tensor, scale: float, masks: MaskTables, weights: Tensor, workspace: Workspace, largest: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [B], dqueries [B, D], dpassages [N, D], dscale []) of the one-direction loss, in one pass; targets in 0..N−1."""
    B, D = x.queries.shape
    dqueries = x.queries.new_empty(B, D, dtype=torch.float32)
    dpassages = x.queries.new_empty(len(x.passages), D, dtype=torch.float32)
    shifts = estimate_shifts(x, scale, columns=False, largest=largest)
    similarity = target_similarities(x.queries, x.passages, targets)
    row_sum, coefficient = _one_direction(x, similarity, scale, masks, weights, shifts, workspace, dqueries, dpassages, True)
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


def negatives_gradient(
    x: Operands,
    scale: float,
    masks: MaskTables,
    row_log_weights: Tensor,
    column_log_weights: Tensor | None,
    constant: float | None,
    budget: int,
    dqueries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.lse.negatives_gradient`; `constant` from `Shifts`. A pass writes blocks of dlogits, two products use each."""
    (B, D), N = x.queries.shape, len(x.passages)
    fresh = dqueries is None
    dqueries = x.queries.new_empty(B, D, dtype=torch.float32) if dqueries is None else dqueries
    dpassages = x.passages.new_empty(N, D, dtype=torch.float32)
    rows = slab_rows(B, N, D, x.precision, budget, _processors(x.queries))
    columns = N
    if rows < min(B, 2 * _LEAST_SLAB_ROWS):  # square blocks: the fewest reads and writes of the sums
        rows = columns = max(256, int((budget // (2 if x.precision == "bf16" else 4)) ** 0.5) // 256 * 256)
    workspace = Workspace(x.queries, x.precision, min(rows, B), min(columns, N))
    queries, passages = parts_of(x.queries, x.precision), parts_of(x.passages, x.precision)
    row_shift, column_shift, offset = _gradient_shifts(scale, row_log_weights, column_log_weights, constant)
    for i in slabs(B, rows):
        for j in slabs(N, columns):
            e = workspace.views(i.stop - i.start, j.stop - j.start)
            tile_pass(
                x.queries[i], x.passages[j], scale, masks, row_shift=row_shift[i], offset=offset,
                column_shift=None if column_shift is None else column_shift[j], written=e[0], residual=e[1] if len(e) > 1 else None,
                row_start=i.start, column_start=j.start, accurate=x.accurate,
            )  # fmt: skip
            inner = _INNER[x.precision]
            add_product(dqueries[i], e, [p[j] for p in passages], fresh=fresh and j.start == 0, inner=inner)
            add_product(dpassages[j], [part.T for part in e], [q[i] for q in queries], fresh=i.start == 0, inner=inner)
    return dqueries, dpassages


def _gradient_shifts(
    scale: float, row_log_weights: Tensor, column_log_weights: Tensor | None, constant: float | None
) -> tuple[Tensor, Tensor | None, float | None]:
    """What `tile_pass` needs to write scale · 2^x · weight for rows and columns: factors and an offset where that is safe, else shifts."""
    rows = row_log_weights.float() * LOG2E + math.log2(scale)
    if column_log_weights is None:
        return -rows, None, None
    columns = column_log_weights.float() * LOG2E + math.log2(scale)
    if constant is None:
        return -rows, -columns, None
    return (rows + constant).exp2(), (columns + constant).exp2(), constant


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def two_pass_infonce(
    x: Operands, targets: Tensor, scale: float, masks: MaskTables, weights: Tensor, symmetric: bool, gradients: bool, budget: int,
    largest: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, dqueries, dpassages, dscale): sums first, then gradients; for both directions, forward alone, or little room."""
    shifts = estimate_shifts(x, scale, symmetric, largest)
    row_lse, column_lse = negatives_lse(x, scale, masks, shifts, symmetric)
    logit = scale * target_similarities(x.queries, x.passages, targets)
    against_row = row_lse - logit
    loss, pull = log_one_plus_exp(against_row), weights * against_row.sigmoid()
    row_pull, column_log_weights = pull, None
    if column_lse is not None:
        against_column = column_lse[targets] - logit
        loss = (loss + log_one_plus_exp(against_column)) / 2
        row_pull, column_pull = pull / 2, weights * against_column.sigmoid() / 2
        pull = row_pull + column_pull
        passage_pull = sum_by_target(column_pull, targets, len(column_lse))  # a target of several queries has a term for each
        column_log_weights = torch.where(passage_pull > 0, passage_pull.log() - column_lse, -torch.inf)
    if not gradients:
        return loss, None, None, None
    row_log_weights = torch.where(row_pull > 0, row_pull.log() - row_lse, -torch.inf)
    dqueries, dpassages = negatives_gradient(x, scale, masks, row_log_weights, column_log_weights, shifts.constant, budget)
    along = finish_queries(dqueries, x.queries, x.passages, targets, None, scale * pull)
    finish_passages(dpassages, x.queries, targets, scale * pull)
    return loss, dqueries, dpassages, along.sum() / scale


def infonce(
    queries: Tensor, passages: Tensor, targets: Tensor, scale: float, masks: MaskTables, weights: Tensor, *, symmetric: bool,
    precision: str, budget: int, gradients: bool, largest: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See `kernels.lse.infonce`; every row has a target, `budget` bytes bound the slabs."""
    x = Operands.of(queries, passages, precision)
    (B, D), N = queries.shape, len(passages)
    rows = slab_rows(B, N, D, precision, budget, _processors(queries))
    if symmetric or not gradients or rows < min(B, _LEAST_SLAB_ROWS):
        return two_pass_infonce(x, targets, scale, masks, weights, symmetric, gradients, budget, largest)
    return row_infonce(x, targets, scale, masks, weights, Workspace(x.queries, precision, rows, N), largest)
