# mypy: disable-error-code="no-untyped-def"
"""`_tile_pass` written for Hopper's warp groups (`kernels.hopper`): what Triton's own pipelining leaves idle while a
tile is reduced.

While one group exponentiates and sums its half of a tile, the other has the matrix units to itself. Legend and results
are those of `kernels.infonce.tiles`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.dispatch import persistent_grid
from kernels.hopper import (
    COLUMNS,
    LAYOUT,
    ROWS,
    SWIZZLED,
    TILE,
    allocate_ring,
    copy_tiles,
    fits,
    halves,
    multiply_tile,
    rounded_to,
    send,
    store_column_sums,
    tile_coords,
    wait_for_upper,
)
from kernels.infonce.exclusions import MaskTables
from kernels.infonce.tiles import LOG2E, Pass

__all__ = ["can_do", "fits", "tile_pass"]

HALF = gl.constexpr(128)  # columns that are reduced at a time


# fmt: off
@gluon.jit
def _exponentials(
    x, staging, written, row_shift, column_shift, column_out, first_row, first_column, part, B, N, scale_log2, offset,
    FACTORED: gl.constexpr,
):
    """Writes and sums 2^x of half a tile, [64, 128]; returns the sums of its rows."""
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    columns = first_column + gl.arange(0, HALF, gl.SliceLayout(0, x.type.layout))
    if FACTORED:
        factor = gl.load(row_shift + rows, rows < B, other=0.0)[:, None]
        factor += gl.load(column_shift + columns, columns < N, other=0.0)[None, :]
        e = gl.exp2(x * scale_log2 - offset) * factor
    else:
        # Rows outside have a shift of +inf, so they add nothing to a column.
        e = gl.exp2(x * scale_log2 - gl.load(row_shift + rows, rows < B, other=float("inf"))[:, None])
        if column_shift is not None:
            e += gl.exp2(x * scale_log2 - gl.load(column_shift + columns, columns < N, other=0.0)[None, :])
    if written is not None:
        rounded = rounded_to(e, gl.bfloat16)
        e = rounded.to(gl.float32)
        send(rounded, staging, written, first_row, first_column, 0)
    row_sums = gl.sum(e, 1)
    if column_out is not None:
        left, right = halves(e)
        store_column_sums(column_out + part.to(gl.int64) * N, left, first_column, N)
        store_column_sums(column_out + part.to(gl.int64) * N, right, first_column + HALF // 2, N)
    return row_sums


@gluon.jit
def _reduce(
    q_stages, p_stages, staging, ready, free, begun, written, row_shift, column_shift, targets, threshold,
    pair_ptr, pair_rows, pair_columns, pair_term, row_out, column_out,
    B, N, D, row_start, column_start, pair_stride, own_factor, scale_log2, offset, FACTORED: gl.constexpr,
    RAGGED_COLUMNS: gl.constexpr,
    LOWER: gl.constexpr,
):
    row_tiles = gl.cdiv(B, 2 * ROWS)
    column_tiles = gl.cdiv(N, COLUMNS)
    step = 0
    wait_for_upper(begun, LOWER)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_coords(tile, row_tiles, column_tiles)
        x = gl.zeros([ROWS, COLUMNS], gl.float32, TILE)
        x, step = multiply_tile(x, q_stages, p_stages, ready, free, begun, step, D, LOWER)

        first_row = row_tile * 2 * ROWS + LOWER * ROWS
        first_column = column_tile * COLUMNS
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
        columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
        row_inside = rows < B
        column_inside = columns < N
        mask_rows = row_start + rows
        mask_columns = column_start + columns
        if threshold is not None:
            x = gl.where(x > gl.load(threshold + mask_rows, row_inside, other=0.0)[:, None], -float("inf"), x)
        x = gl.where(
            mask_columns[None, :] == gl.load(targets + mask_rows, row_inside, other=-1)[:, None], -float("inf"), x
        )
        if RAGGED_COLUMNS:
            x = gl.where(column_inside[None, :], x, -float("inf"))
        if pair_ptr is not None:
            pairs = (
                pair_ptr
                + (first_row + row_start).to(gl.int64) // ROWS * pair_stride
                + (first_column + column_start) // COLUMNS
            )
            inside = first_row < B
            for pair in range(gl.load(pairs, inside, other=0), gl.load(pairs + 1, inside, other=0)):
                row = gl.load(pair_rows + pair) - row_start - first_row
                column = gl.load(pair_columns + pair) - column_start - first_column
                here = (gl.arange(0, ROWS, gl.SliceLayout(1, TILE)) == row)[:, None]
                here &= (gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE)) == column)[None, :]
                if pair_term is None:
                    x = gl.where(here, -float("inf"), x)
                else:
                    x = gl.where(here, x * own_factor + gl.load(pair_term + pair), x)

        left, right = halves(x)
        total = _exponentials(
            left, staging, written, row_shift, column_shift, column_out, first_row, first_column,
            2 * row_tile + LOWER, B, N,
            scale_log2, offset, FACTORED,
        )
        total += _exponentials(
            right, staging, written, row_shift, column_shift, column_out, first_row, first_column + HALF,
            2 * row_tile + LOWER, B, N,
            scale_log2, offset, FACTORED,
        )
        if row_out is not None:
            sum_rows = first_row + gl.arange(0, ROWS, total.type.layout)
            gl.store(row_out + column_tile.to(gl.int64) * B + sum_rows, total, sum_rows < B)
    if written is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "N", "row_start", "column_start", "pair_stride", "own_factor"])
def _tile_pass_hopper(
    queries,  # descriptor [B, D], blocks of 64 × 64
    passages,  # descriptor [N, D], blocks of 256 × 64
    written,  # descriptor [B, N], blocks of 64 × 128, or None
    row_shift,
    column_shift,
    targets,
    threshold,
    pair_ptr,  # by tiles of 64 × 256
    pair_rows,
    pair_columns,
    pair_term,
    row_out,
    column_out,  # [2 · row tiles, N] or None
    B,
    N,
    D,
    row_start,
    column_start,
    pair_stride,
    own_factor,
    scale_log2,
    offset,
    FACTORED: gl.constexpr,
    RAGGED_COLUMNS: gl.constexpr,
):
    q_stages, p_stages, ready, free, begun = allocate_ring(queries.dtype, 4)
    staging = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, HALF], LAYOUT)
    gl.warp_specialize(
        [
            (_reduce, (
                q_stages, p_stages, staging.index(0), ready, free, begun, written, row_shift, column_shift, targets,
                threshold,
                pair_ptr, pair_rows, pair_columns, pair_term, row_out, column_out, B, N, D, row_start, column_start,
                pair_stride, own_factor, scale_log2, offset, FACTORED, RAGGED_COLUMNS, gl.constexpr(0),
            )),
            (_reduce, (
                q_stages, p_stages, staging.index(1), ready, free, begun, written, row_shift, column_shift, targets,
                threshold,
                pair_ptr, pair_rows, pair_columns, pair_term, row_out, column_out, B, N, D, row_start, column_start,
                pair_stride, own_factor, scale_log2, offset, FACTORED, RAGGED_COLUMNS, gl.constexpr(1),
            )),
            (copy_tiles, (queries, passages, q_stages, p_stages, ready, free, B, N, D)),
        ],
        [4, 1],
        [240, 24],
    )
# fmt: on


def can_do(asked: Pass) -> bool:
    """Whether this kernel supports the pass: sums of bf16 under row shifts that need no clamp, columns by those
    shifts.
    """
    plain = not (asked.accurate or asked.maximum or asked.clamp)
    return (
        plain
        and asked.row_shift is not None
        and asked.residual is None
        and not (asked.columns and asked.column_shift is not None)
    )


def tile_pass(
    queries: Tensor, passages: Tensor, scale: float, masks: MaskTables, asked: Pass
) -> tuple[Tensor | None, Tensor | None]:
    """As `kernels.infonce.tiles.tile_pass`, by this kernel; only for passes that `can_do` accepts."""
    (B, D), N = queries.shape, len(passages)
    row_tiles, column_tiles = triton.cdiv(B, 128), triton.cdiv(N, 256)
    row_out = queries.new_empty(column_tiles, B, dtype=torch.float32) if asked.rows else None
    column_out = queries.new_empty(2 * row_tiles, N, dtype=torch.float32) if asked.columns else None
    programs = persistent_grid(queries, row_tiles * column_tiles, 1)
    _tile_pass_hopper[(programs,)](
        TensorDescriptor.from_tensor(queries, [64, 64], SWIZZLED),
        TensorDescriptor.from_tensor(passages, [256, 64], SWIZZLED),
        TensorDescriptor.from_tensor(asked.written, [64, 128], SWIZZLED) if asked.written is not None else None,
        asked.row_shift,
        asked.column_shift,
        masks.targets,
        masks.threshold,
        *masks.pairs_by_tile(64, 256),
        row_out,
        column_out,
        B,
        N,
        D,
        asked.row_start,
        asked.column_start,
        triton.cdiv(masks.N, 256),
        asked.own_factor,
        scale * LOG2E,
        asked.offset or 0.0,
        FACTORED=asked.offset is not None,
        RAGGED_COLUMNS=N % 256 != 0,
        num_warps=4,
    )
    return row_out, column_out
