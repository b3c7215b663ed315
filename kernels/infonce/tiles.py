# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of the contrastive loss: one pass over the tiles of scale · Q Pᵀ.

`tile_pass` visits every tile of logits x_ij = scale · log₂e · ⟨q_i, p_j⟩ (base 2 throughout) once, drops the excluded
pairs, multiplies those of own negatives with their factor and, as asked,

    writes   E_ij = 2^(x_ij − row_shift_i) [+ 2^(x_ij − column_shift_j)]
             as bf16, as a bf16 pair (value, residual) or as fp32;
    reduces  Σ_j 2^(x_ij − row_shift_i) by rows and Σ_i 2^(x_ij − column_shift_j) by columns, or the maxima of x_ij.

Sums are of the values as written, so that weights built from them sum to one. A tile writes its own partial reductions
and the host adds them up in a fixed order: repeated runs give the same bits.

Descriptors carry 64-bit addresses and return zeros outside of the matrix, so loads at ragged edges need no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import persistent_grid
from kernels.infonce.exclusions import MaskTables

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """Size of a tile of logits, and the launch settings (warps, stages) of the Triton program that computes it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Sized to fit shared memory and registers. On Hopper `kernels.infonce.tiles_hopper` does the work that counts.
_HALF_TILES = {8: Tile(64, 64, 64, 8, 3), 9: Tile(128, 128, 64, 8, 3), 10: Tile(128, 128, 64, 8, 3)}
_FLOAT_TILES = {8: Tile(64, 32, 32, 8, 2), 9: Tile(64, 64, 32, 8, 2), 10: Tile(64, 64, 32, 8, 2)}
_CHUNK = 256
_GROUP = 16


def tile_for(dtype: torch.dtype, capability_major: int) -> Tile:
    """The pinned tile for inputs of `dtype` on a GPU of this generation."""
    return (_FLOAT_TILES if dtype == torch.float32 else _HALF_TILES)[min(max(capability_major, 8), 10)]


class Pass(NamedTuple):
    """One pass over the tiles: its operands, its results, and the offset of its block in the masks.

    With an `offset` the shifts are factors: E_ij = 2^(x_ij − offset) · (row_shift_i + column_shift_j), one exponential
    instead of two. Columns reduce with `row_shift` where there is no `column_shift`. `clamp` keeps exponentials finite
    where shifts are estimates. `accurate` splits fp32 inputs into three tf32 products, and sums D in short pieces: the
    matrix unit's accumulator rounds towards zero.
    """

    row_shift: Tensor | None = None  # [B]
    column_shift: Tensor | None = None  # [N]
    offset: float | None = None
    written: Tensor | None = None  # [B, N]: receives E
    residual: Tensor | None = None  # [B, N]: receives what rounding left of E
    rows: bool = False  # reduce them
    columns: bool = False  # reduce them
    maximum: bool = False  # by maxima instead of sums
    clamp: bool = False
    accurate: bool = False
    own_factor: float = 1.0  # of own negatives' logits, where the masks list these
    row_start: int = 0
    column_start: int = 0


@triton.jit
def _exponential(x, scale_log2, shift, CLAMP: tl.constexpr):
    y = x * scale_log2 - shift
    if CLAMP:
        y = tl.minimum(y, 126.0)
    return tl.exp2(y)


@triton.jit(do_not_specialize=["B", "N", "row_start", "column_start", "pair_stride", "own_factor"])
def _tile_pass(
    queries,  # descriptor [B, D]
    passages,  # descriptor [N, D]
    written,  # descriptor [B, N] or None
    residual,  # descriptor [B, N] or None
    row_shift,  # [B] or None
    column_shift,  # [N] or None
    targets,  # [all rows] int32: a column excluded from each row, −1: none
    threshold,  # [all rows] or None, in similarity units
    pair_ptr,  # [all row tiles · all column tiles + 1] int32 or None: further pairs, by tile
    pair_rows,
    pair_columns,
    pair_term,  # −inf: excluded, 0: own negative; None: all are excluded
    guide_limit,  # [all rows] or None: pairs that the guide finds more similar are excluded
    guide_queries,  # descriptor [all rows, G]
    guide_passages,  # descriptor [all columns, G]
    row_out,  # [column tiles, B] or None
    column_out,  # [row tiles, N] or None
    B,
    N,
    D,
    G,
    row_start,  # where this block stands in the masks
    column_start,
    pair_stride,
    own_factor,
    scale_log2,
    # FACTORED: E_ij = 2^(x_ij − offset) · (row_shift_i + column_shift_j),
    # with one exponential where that is safe
    offset,
    FACTORED: tl.constexpr,
    MAXIMUM: tl.constexpr,
    CLAMP: tl.constexpr,
    RAGGED_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    row_tiles = tl.cdiv(B, BLOCK_B)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles_per_group = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        # Down the rows of a group first: its queries stay in L2 while the passages stream by once.
        group_start = tile // tiles_per_group * GROUP
        group_rows = min(row_tiles - group_start, GROUP)
        row_tile = group_start + tile % tiles_per_group % group_rows
        column_tile = tile % tiles_per_group // group_rows
        first_row = row_tile * BLOCK_B
        first_column = column_tile * BLOCK_N

        x = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        if guide_limit is not None:
            for g in tl.range(0, G, BLOCK_D):
                guide_q = guide_queries.load([row_start + first_row, g])
                x = tl.dot(guide_q, guide_passages.load([column_start + first_column, g]).T, x, input_precision="ieee")
            guide_rows = first_row + tl.arange(0, BLOCK_B)
            limit = tl.load(guide_limit + row_start + guide_rows, guide_rows < B, other=0.0)
            x = tl.where(x > limit[:, None], -float("inf"), 0.0)  # −inf stays when the similarities are added
        if CHUNK is None:
            for d in tl.range(0, D, BLOCK_D):
                x = tl.dot(
                    queries.load([first_row, d]), passages.load([first_column, d]).T, x, input_precision=PRECISION
                )
        else:
            for start in tl.range(0, D, CHUNK):
                part = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
                for d in tl.range(start, start + CHUNK, BLOCK_D):
                    part = tl.dot(
                        queries.load([first_row, d]),
                        passages.load([first_column, d]).T,
                        part,
                        input_precision=PRECISION,
                    )
                x += part

        rows = first_row + tl.arange(0, BLOCK_B)
        columns = first_column + tl.arange(0, BLOCK_N)
        row_inside = rows < B
        column_inside = columns < N
        mask_rows = row_start + rows
        mask_columns = column_start + columns
        if threshold is not None:
            x = tl.where(x > tl.load(threshold + mask_rows, row_inside, other=0.0)[:, None], -float("inf"), x)
        x = tl.where(
            mask_columns[None, :] == tl.load(targets + mask_rows, row_inside, other=-1)[:, None], -float("inf"), x
        )
        if RAGGED_COLUMNS:
            x = tl.where(column_inside[None, :], x, -float("inf"))
        if column_out is not None or column_shift is not None:
            x = tl.where(row_inside[:, None], x, -float("inf"))
        if pair_ptr is not None:
            pairs = (
                pair_ptr
                + (row_start // BLOCK_B + row_tile).to(tl.int64) * pair_stride
                + column_start // BLOCK_N
                + column_tile
            )
            for pair in tl.range(tl.load(pairs), tl.load(pairs + 1)):
                row = mask_rows == tl.load(pair_rows + pair)
                here = row[:, None] & (mask_columns == tl.load(pair_columns + pair))[None, :]
                if pair_term is None:
                    x = tl.where(here, -float("inf"), x)
                else:
                    x = tl.where(here, x * own_factor + tl.load(pair_term + pair), x)

        if MAXIMUM:
            x *= scale_log2
            if row_out is not None:
                tl.store(row_out + column_tile.to(tl.int64) * B + rows, tl.max(x, 1), row_inside)
            if column_out is not None:
                tl.store(column_out + row_tile.to(tl.int64) * N + columns, tl.max(x, 0), column_inside)
        else:
            if FACTORED:
                factor = tl.load(row_shift + rows, row_inside, other=0.0)[:, None]
                factor += tl.load(column_shift + columns, column_inside, other=0.0)[None, :]
                e = _exponential(x, scale_log2, offset, CLAMP) * factor
            elif row_shift is not None:
                e = _exponential(x, scale_log2, tl.load(row_shift + rows, row_inside, other=0.0)[:, None], CLAMP)
            if column_shift is not None and not FACTORED:
                e_column = _exponential(
                    x, scale_log2, tl.load(column_shift + columns, column_inside, other=0.0)[None, :], CLAMP
                )
            elif column_out is not None:
                e_column = e
            if written is not None:
                if column_shift is not None and not FACTORED:
                    e += e_column
                e_written = e.to(written.dtype)
                written.store([first_row, first_column], e_written)
                if residual is not None:
                    e_residual = (e - e_written.to(tl.float32)).to(residual.dtype)
                    residual.store([first_row, first_column], e_residual)
                    e = e_written.to(tl.float32) + e_residual.to(tl.float32)
                else:
                    e = e_written.to(tl.float32)
            if row_out is not None:
                tl.store(row_out + column_tile.to(tl.int64) * B + rows, tl.sum(e, 1), row_inside)
            if column_out is not None:
                tl.store(column_out + row_tile.to(tl.int64) * N + columns, tl.sum(e_column, 0), column_inside)


def aligned(x: Tensor) -> Tensor:
    """`x` [rows, D] itself where a tensor descriptor can read it, else a copy with padded rows."""
    unit = 16 // x.itemsize
    if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros(x.shape[0], -(-x.shape[1] // unit) * unit)[:, : x.shape[1]]
    return copy.copy_(x)


def _descriptor(x: Tensor, rows: int, inner: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(aligned(x), [rows, inner])


def tile_pass(
    queries: Tensor, passages: Tensor, scale: float, masks: MaskTables, asked: Pass, tile: Tile | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The pass over all tiles that this file's head describes; returns the partial reductions.

    queries [B, D], passages [N, D]: bf16, fp16 or fp32, `aligned`. Returns ([column tiles, B] where `rows`, [row tiles,
    N] where `columns`), float32, in base-2 units of scale · similarity.
    """
    (B, D), N = queries.shape, len(passages)
    major = torch.cuda.get_device_capability(queries.device)[0] if queries.is_cuda else 9
    tile = tile or (tile_for(queries.dtype, major) if queries.is_cuda else Tile(32, 32, 32, 4, 1))
    row_tiles, column_tiles = triton.cdiv(B, tile.rows), triton.cdiv(N, tile.columns)
    row_out = queries.new_empty(column_tiles, B, dtype=torch.float32) if asked.rows else None
    column_out = queries.new_empty(row_tiles, N, dtype=torch.float32) if asked.columns else None
    block = [tile.rows, tile.columns]
    programs = persistent_grid(queries, row_tiles * column_tiles, 1)
    pairs, guide = masks.pairs_by_tile(tile.rows, tile.columns), masks.guide
    if pairs[0] is not None and (asked.row_start % tile.rows or asked.column_start % tile.columns):
        start = f"{asked.row_start}, {asked.column_start}"
        raise ValueError(f"expected a block that starts on a tile of {tile.rows} × {tile.columns}, received {start}")
    _tile_pass[(programs,)](
        _descriptor(queries, tile.rows, tile.inner),
        _descriptor(passages, tile.columns, tile.inner),
        TensorDescriptor.from_tensor(asked.written, block) if asked.written is not None else None,
        TensorDescriptor.from_tensor(asked.residual, block) if asked.residual is not None else None,
        asked.row_shift,
        asked.column_shift,
        masks.targets,
        masks.threshold,
        *pairs,
        None if guide is None else guide.limit,
        None if guide is None else _descriptor(guide.queries, tile.rows, tile.inner),
        None if guide is None else _descriptor(guide.passages, tile.columns, tile.inner),
        row_out,
        column_out,
        B,
        N,
        D,
        0 if guide is None else guide.queries.shape[1],
        asked.row_start,
        asked.column_start,
        triton.cdiv(masks.N, tile.columns),
        asked.own_factor,
        scale * LOG2E,
        asked.offset or 0.0,
        FACTORED=asked.offset is not None,
        MAXIMUM=asked.maximum,
        CLAMP=asked.clamp,
        RAGGED_COLUMNS=N % tile.columns != 0,
        PRECISION="tf32x3" if asked.accurate and queries.dtype == torch.float32 else "ieee",
        CHUNK=_CHUNK if asked.accurate else None,
        BLOCK_B=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_D=tile.inner,
        GROUP=_GROUP,
        PROGRAMS=programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return row_out, column_out
