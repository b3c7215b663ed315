# mypy: disable-error-code="no-untyped-def"
"""`_tile_pass` written for Hopper's warp groups: what Triton's own pipelining leaves idle while a tile is reduced.

One warp copies tiles of queries and passages through a ring of shared-memory stages; two warp groups multiply them, each the
128 × 256 tile's upper or lower 64 rows. Neither waits for the other, only for stages: while one exponentiates and sums,
the other has the matrix units to itself. Legend and results are those of `kernels.lse_triton`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.exclusions import MaskTables

ROWS, COLUMNS, INNER, STAGES = gl.constexpr(64), gl.constexpr(256), gl.constexpr(64), gl.constexpr(4)
HALF, LEAD = gl.constexpr(128), gl.constexpr(3)
GROUP = 64

_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_TRITON_VERSIONS = ("3.6.", "3.7.")  # Gluon is marked experimental; other versions take the portable kernel


# fmt: off
@gluon.jit
def _place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    tiles_per_group = GROUP * column_tiles
    group_start = tile // tiles_per_group * GROUP
    group_rows = gl.minimum(row_tiles - group_start, GROUP)
    return group_start + tile % tiles_per_group % group_rows, tile % tiles_per_group // group_rows


@gluon.jit
def _copy(queries, passages, q_stages, p_stages, ready, free, B, N, D, GROUP: gl.constexpr, PROGRAMS: gl.constexpr):
    row_tiles = gl.cdiv(B, 2 * ROWS)
    column_tiles = gl.cdiv(N, COLUMNS)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        for d in range(0, D, INNER):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (2 * ROWS + COLUMNS) * INNER * 2)
            tma.async_copy_global_to_shared(queries, [row_tile * 2 * ROWS, d], ready.index(stage), q_stages.index(2 * stage))
            tma.async_copy_global_to_shared(queries, [row_tile * 2 * ROWS + ROWS, d], ready.index(stage), q_stages.index(2 * stage + 1))
            tma.async_copy_global_to_shared(passages, [column_tile * COLUMNS, d], ready.index(stage), p_stages.index(stage))
            step += 1


@gluon.jit
def _store_column_sums(out, e, first_column, N):
    sums = gl.sum(e, 0)
    columns = first_column + gl.arange(0, e.shape[1], sums.type.layout)
    gl.store(out + columns, sums, columns < N)


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
        if column_shift is not None:
            factor = factor + gl.load(column_shift + columns, columns < N, other=0.0)[None, :]
        e = gl.exp2(x * scale_log2 - offset) * factor
    else:
        # Rows outside have a shift of +inf, so they add nothing to a column.
        e = gl.exp2(x * scale_log2 - gl.load(row_shift + rows, rows < B, other=float("inf"))[:, None])
        if column_shift is not None:
            e += gl.exp2(x * scale_log2 - gl.load(column_shift + columns, columns < N, other=0.0)[None, :])
    if written is not None:
        # Two at a time: single conversions run at the rate of exponentials and double this function's time.
        rounded = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [e], gl.bfloat16, True, 2)
        e = rounded.to(gl.float32)
        tma.store_wait(0)
        staging.store(rounded)
        fence_async_shared()
        tma.async_copy_shared_to_global(written, [first_row, first_column], staging)
    row_sums = gl.sum(e, 1)
    if column_out is not None:
        left, right = gl.split(gl.permute(gl.reshape(e, [ROWS, 2, HALF // 2]), [0, 2, 1]))
        _store_column_sums(column_out + part.to(gl.int64) * N, left, first_column, N)
        _store_column_sums(column_out + part.to(gl.int64) * N, right, first_column + HALF // 2, N)
    return row_sums


@gluon.jit
def _reduce(
    q_stages, p_stages, staging, ready, free, begun, written, row_shift, column_shift, targets, threshold,
    pair_ptr, pair_rows, pair_columns, row_out, column_out,
    B, N, D, row_start, column_start, pair_stride, scale_log2, offset, FACTORED: gl.constexpr, RAGGED_COLUMNS: gl.constexpr,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, LOWER: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    row_tiles = gl.cdiv(B, 2 * ROWS)
    column_tiles = gl.cdiv(N, COLUMNS)
    step = 0
    # The upper group starts a few steps ahead, so that the groups do not reduce at the same time.
    lead = gl.minimum(LEAD, gl.cdiv(D, INNER))
    if LOWER == 1:
        mbarrier.wait(begun, 0)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        x = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for d in range(0, D, INNER):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            x = warpgroup_mma(
                q_stages.index(2 * stage + LOWER), p_stages.index(stage).permute((1, 0)), x, use_acc=d > 0, is_async=True
            )
            x = warpgroup_mma_wait(1, deps=(x,))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=d > 0)  # the previous product has been read
            step += 1
            if LOWER == 0:
                mbarrier.arrive(begun, pred=step == lead)
        x = warpgroup_mma_wait(0, deps=(x,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))

        first_row = row_tile * 2 * ROWS + LOWER * ROWS
        first_column = column_tile * COLUMNS
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        row_inside = rows < B
        column_inside = columns < N
        mask_rows = row_start + rows
        mask_columns = column_start + columns
        if threshold is not None:
            x = gl.where(x > gl.load(threshold + mask_rows, row_inside, other=0.0)[:, None], -float("inf"), x)
        x = gl.where(mask_columns[None, :] == gl.load(targets + mask_rows, row_inside, other=-1)[:, None], -float("inf"), x)
        if RAGGED_COLUMNS:
            x = gl.where(column_inside[None, :], x, -float("inf"))
        if pair_ptr is not None:
            pairs = pair_ptr + (first_row + row_start).to(gl.int64) // ROWS * pair_stride + (first_column + column_start) // COLUMNS
            inside = first_row < B
            for pair in range(gl.load(pairs, inside, other=0), gl.load(pairs + 1, inside, other=0)):
                row = gl.load(pair_rows + pair) - row_start - first_row
                column = gl.load(pair_columns + pair) - column_start - first_column
                here = (gl.arange(0, ROWS, gl.SliceLayout(1, layout)) == row)[:, None]
                here &= (gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)) == column)[None, :]
                x = gl.where(here, -float("inf"), x)

        # Half of the columns at a time: the registers do not hold more.
        left, right = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))
        total = _exponentials(
            left, staging, written, row_shift, column_shift, column_out, first_row, first_column, 2 * row_tile + LOWER, B, N,
            scale_log2, offset, FACTORED,
        )
        total += _exponentials(
            right, staging, written, row_shift, column_shift, column_out, first_row, first_column + HALF, 2 * row_tile + LOWER, B, N,
            scale_log2, offset, FACTORED,
        )
        if row_out is not None:
            sum_rows = first_row + gl.arange(0, ROWS, total.type.layout)
            gl.store(row_out + column_tile.to(gl.int64) * B + sum_rows, total, sum_rows < B)
    if written is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "N", "row_start", "column_start", "pair_stride"])
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
    row_out,
    column_out,  # [2 · row tiles, N] or None
    B,
    N,
    D,
    row_start,
    column_start,
    pair_stride,
    scale_log2,
    offset,
    FACTORED: gl.constexpr,
    RAGGED_COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    q_stages = gl.allocate_shared_memory(queries.dtype, [2 * STAGES, ROWS, INNER], queries.layout)
    p_stages = gl.allocate_shared_memory(passages.dtype, [STAGES, COLUMNS, INNER], passages.layout)
    staging_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    staging = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, HALF], staging_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(begun, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (
                q_stages, p_stages, staging.index(0), ready, free, begun, written, row_shift, column_shift, targets, threshold,
                pair_ptr, pair_rows, pair_columns, row_out, column_out, B, N, D, row_start, column_start, pair_stride, scale_log2,
                offset, FACTORED, RAGGED_COLUMNS, GROUP, PROGRAMS, gl.constexpr(0),
            )),
            (_reduce, (
                q_stages, p_stages, staging.index(1), ready, free, begun, written, row_shift, column_shift, targets, threshold,
                pair_ptr, pair_rows, pair_columns, row_out, column_out, B, N, D, row_start, column_start, pair_stride, scale_log2,
                offset, FACTORED, RAGGED_COLUMNS, GROUP, PROGRAMS, gl.constexpr(1),
            )),
            (_copy, (queries, passages, q_stages, p_stages, ready, free, B, N, D, GROUP, PROGRAMS)),
        ],
        [4, 1],
        [240, 24],
    )
# fmt: on


def fits(queries: Tensor) -> bool:
    """Whether this kernel can work on `queries`: bf16 or fp16 on a Hopper GPU, with a Triton whose Gluon it was written for."""
    if queries.dtype not in (torch.bfloat16, torch.float16) or not queries.is_cuda:
        return False
    return torch.cuda.get_device_capability(queries.device)[0] == 9 and triton.__version__.startswith(_TRITON_VERSIONS)


def tile_pass(
    queries: Tensor,
    passages: Tensor,
    scale_log2: float,
    masks: MaskTables,
    *,
    row_shift: Tensor,
    column_shift: Tensor | None,
    offset: float | None,
    written: Tensor | None,
    rows: bool,
    columns: bool,
    row_start: int,
    column_start: int,
) -> tuple[Tensor | None, Tensor | None]:
    """`kernels.lse_triton.tile_pass` with row shifts that need no clamp; without residuals and maxima."""
    (B, D), N = queries.shape, len(passages)
    row_tiles, column_tiles = triton.cdiv(B, 128), triton.cdiv(N, 256)
    row_out = queries.new_empty(column_tiles, B, dtype=torch.float32) if rows else None
    column_out = queries.new_empty(2 * row_tiles, N, dtype=torch.float32) if columns else None
    programs = min(row_tiles * column_tiles, torch.cuda.get_device_properties(queries.device).multi_processor_count)
    _tile_pass_hopper[(programs,)](
        TensorDescriptor.from_tensor(queries, [64, 64], _SWIZZLED),
        TensorDescriptor.from_tensor(passages, [256, 64], _SWIZZLED),
        TensorDescriptor.from_tensor(written, [64, 128], _SWIZZLED) if written is not None else None,
        row_shift,
        column_shift,
        masks.targets,
        masks.threshold,
        *masks.pairs_by_tile(64, 256),
        row_out,
        column_out,
        B,
        N,
        D,
        row_start,
        column_start,
        triton.cdiv(masks.N, 256),
        scale_log2,
        offset or 0.0,
        FACTORED=offset is not None,
        RAGGED_COLUMNS=N % 256 != 0,
        GROUP=GROUP,
        PROGRAMS=programs,
        num_warps=4,
    )
    return row_out, column_out
