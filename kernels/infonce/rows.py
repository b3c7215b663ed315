# mypy: disable-error-code="no-untyped-def"
"""Triton kernels over rows: what stands between the pass over tiles and the matrix products, and after them.

With Z_i the sum of row i's exponentials and t_i its target's logit, a one-direction row of weight w has the gradient

    dq_i = coefficient_i · Σ_j E_ij p_j − target_weight_i · p_target
    coefficient_i = scale · w_i · σ(log Z_i − t_i) / Z_i

and passage j gets Σ_i E_ij · coefficient_i · q_i less target_weight_i · q_i of the queries whose target it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.infonce.tiles import LOG2E

# Sums of a row outside of these bounds may have lost terms to underflow or overflow: 2^-126 is the smallest bf16 and
# fp32.
SMALLEST_SUM, LARGEST_SUM = 2.0**-96, 2.0**84


@triton.jit
def _target_rows(passages, targets, B, stride, BLOCK_B: tl.constexpr):
    """(a program's rows, which exist, pointers [rows, 1] to their targets' vectors)."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = rows < B
    return rows, inside, passages + tl.load(targets + rows, inside, other=0).to(tl.int64)[:, None] * stride


@triton.jit(do_not_specialize=["B"])
def _target_similarities(
    queries,
    passages,
    targets,
    out,  # [B]
    B,
    D,
    query_stride,
    passage_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, inside, target_rows = _target_rows(passages, targets, B, passage_stride, BLOCK_B)
    query_rows = queries + rows.to(tl.int64)[:, None] * query_stride
    similarity = tl.zeros((BLOCK_B,), tl.float32)
    for d in range(0, D, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (at < D)[None, :]
        q = tl.load(query_rows + at[None, :], mask, other=0.0).to(tl.float32)
        similarity += tl.sum(q * tl.load(target_rows + at[None, :], mask, other=0.0).to(tl.float32), 1)
    tl.store(out + rows, similarity, inside)


@triton.jit(do_not_specialize=["B", "column_tiles"])
def _weigh_rows(
    queries,
    similarity,  # [B]: with the target
    partial,  # [column tiles, B]: sums of a row's exponentials, tile by tile
    shift,
    weights,
    row_sum,  # out [B]
    coefficient,  # out [B]: what a row's exponentials are multiplied with in the gradient
    weighted,  # out [B, D]: coefficient · query
    residual,  # out [B, D] or None: what rounding left of it
    B,
    D,
    column_tiles,
    query_stride,
    weighted_stride,
    scale,
    scale_log2,
    smallest,
    largest,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = rows < B
    total = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, column_tiles, BLOCK_T):
        tiles = first + tl.arange(0, BLOCK_T)
        of_tiles = partial + tiles.to(tl.int64)[:, None] * B + rows[None, :]
        total += tl.sum(tl.load(of_tiles, (tiles < column_tiles)[:, None] & inside[None, :], other=0.0), 0)
    usable = (total >= smallest) & (total <= largest)
    denominator = tl.where(usable, total, 1.0)
    row_lse = tl.log2(denominator) + tl.load(shift + rows, inside, other=0.0)
    against = tl.load(similarity + rows, inside, other=0.0) * scale_log2 - row_lse
    weight = tl.load(weights + rows, inside, other=0.0) * scale / (1.0 + tl.exp2(tl.minimum(against, 126.0)))
    weight = tl.where(usable, weight / denominator, 0.0)
    tl.store(row_sum + rows, total, inside)
    tl.store(coefficient + rows, weight, inside)
    for d in range(0, D, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (at < D)[None, :]
        q = tl.load(queries + rows.to(tl.int64)[:, None] * query_stride + at[None, :], mask, other=0.0)
        out = weight[:, None] * q.to(tl.float32)
        offset = rows.to(tl.int64)[:, None] * weighted_stride + at[None, :]
        high = out.to(weighted.dtype.element_ty)
        tl.store(weighted + offset, high, mask)
        if residual is not None:
            tl.store(residual + offset, (out - high.to(tl.float32)).to(residual.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["B"])
def _finish_queries(
    dqueries,  # in and out [B, D]: Σ_j E_ij p_j, then coefficient_i · that − target_weight_i · p_target
    queries,
    passages,
    targets,
    coefficient,  # [B] or None (ones)
    target_weight,
    along,  # out [B]: ⟨q_i, dq_i⟩
    B,
    D,
    query_stride,
    passage_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, inside, target_rows = _target_rows(passages, targets, B, passage_stride, BLOCK_B)
    of_target = tl.load(target_weight + rows, inside, other=0.0)
    dot = tl.zeros((BLOCK_B,), tl.float32)
    for d in range(0, D, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (at < D)[None, :]
        offset = rows.to(tl.int64)[:, None] * D + at[None, :]
        dq = tl.load(dqueries + offset, mask, other=0.0)
        if coefficient is not None:
            factor = tl.load(coefficient + rows, inside, other=0.0)[:, None]
            dq = tl.where(factor == 0.0, 0.0, dq * factor)  # a row that overflowed has a factor of zero: 0 · inf is NaN
        dq -= of_target[:, None] * tl.load(target_rows + at[None, :], mask, other=0.0).to(tl.float32)
        tl.store(dqueries + offset, dq, mask)
        q = tl.load(queries + rows.to(tl.int64)[:, None] * query_stride + at[None, :], mask, other=0.0)
        dot += tl.sum(q.to(tl.float32) * dq, 1)
    tl.store(along + rows, dot, inside)


@triton.jit
def _finish_passages(
    dpassages,  # in and out [N, D]: less Σ over the queries whose target it is of target_weight · query
    queries,
    by_target,  # [B] int64: queries in the order of their targets
    first,  # [N + 1] int64: where a passage's queries start in it
    target_weight,
    D,
    query_stride,
    BLOCK_D: tl.constexpr,
):
    passage = tl.program_id(0).to(tl.int64)
    start = tl.load(first + passage)
    stop = tl.load(first + passage + 1)
    if start == stop:
        return
    for d in range(0, D, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        mask = at < D
        dp = tl.load(dpassages + passage * D + at, mask, other=0.0)
        for k in range(start, stop):
            query = tl.load(by_target + k)
            dp -= tl.load(target_weight + query) * tl.load(queries + query * query_stride + at, mask, other=0.0).to(
                tl.float32
            )
        tl.store(dpassages + passage * D + at, dp, mask)


def target_similarities(queries: Tensor, passages: Tensor, targets: Tensor) -> Tensor:
    """⟨q_i, p_target⟩ [B] in fp32, of the vectors as they are; targets [B] in 0..N−1."""
    B, D = queries.shape
    out = queries.new_empty(B, dtype=torch.float32)
    _target_similarities[(triton.cdiv(B, 8),)](
        queries,
        passages,
        targets,
        out,
        B,
        D,
        queries.stride(0),
        passages.stride(0),
        BLOCK_B=8,
        BLOCK_D=256,
        num_warps=4,
    )
    return out


class RowVectors(NamedTuple):
    """A one-direction row's numbers, [B] float32 each."""

    similarity: Tensor  # with the target
    shift: Tensor  # in base-2 units
    weight: Tensor
    sum: Tensor  # of the row's exponentials; `weigh_rows` writes it
    coefficient: Tensor  # what they are multiplied with in the gradient; `weigh_rows` writes it

    def of_rows(self, i: slice) -> RowVectors:
        """The selection of some rows."""
        return RowVectors(*(vector[i] for vector in self))


def weigh_rows(queries: Tensor, rows: RowVectors, partial: Tensor, scale: float, weighted: Sequence[Tensor]) -> None:
    """Fills `rows.sum` and `rows.coefficient`, and writes coefficient · query to `weighted`: one tensor [B, D], or two
    (value and rounding residual).

    partial [column tiles, B] comes from a pass over the tiles. A row whose sum is empty, or lost terms to underflow,
    gets the coefficient 0.
    """
    B, D = queries.shape
    _weigh_rows[(triton.cdiv(B, 8),)](
        queries, rows.similarity, partial, rows.shift, rows.weight, rows.sum, rows.coefficient,
        weighted[0], weighted[1] if len(weighted) > 1 else None, B, D, len(partial), queries.stride(0),
        weighted[0].stride(0),
        scale, scale * LOG2E, SMALLEST_SUM, LARGEST_SUM, BLOCK_T=64, BLOCK_B=8, BLOCK_D=256, num_warps=4,
    )  # fmt: skip


def finish_queries(
    dqueries: Tensor,
    queries: Tensor,
    passages: Tensor,
    targets: Tensor,
    coefficient: Tensor | None,
    target_weight: Tensor,
) -> Tensor:
    """Turns Σ_j E_ij p_j into dq_i in place, as this file's head says; returns ⟨q_i, dq_i⟩ [B]. `coefficient` None:
    ones.
    """
    B, D = queries.shape
    along = dqueries.new_empty(B)
    _finish_queries[(triton.cdiv(B, 4),)](
        dqueries,
        queries,
        passages,
        targets,
        coefficient,
        target_weight,
        along,
        B,
        D,
        queries.stride(0),
        passages.stride(0),
        BLOCK_B=4,
        BLOCK_D=256,
        num_warps=4,
    )
    return along


def finish_passages(dpassages: Tensor, queries: Tensor, targets: Tensor, target_weight: Tensor) -> None:
    """dp_j −= Σ_{i : target_i = j} target_weight_i · q_i, in place and in the order of i."""
    N, D = dpassages.shape
    ordered, by_target = targets.int().sort(stable=True)  # half the passes of a 64-bit sort
    first = torch.searchsorted(ordered, torch.arange(N + 1, device=targets.device, dtype=torch.int32))
    _finish_passages[(N,)](
        dpassages, queries, by_target, first, target_weight, D, queries.stride(0), BLOCK_D=256, num_warps=1
    )
