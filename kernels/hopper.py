# mypy: disable-error-code="no-untyped-def"
"""Tiles of left rightᵀ, made by Hopper's warp groups: what the kernels written in Gluon share.

One warp copies tiles of both factors through a ring of shared-memory stages; two warp groups multiply them, each the
128 × 256 tile's upper or lower 64 rows. Neither waits for the other, only for stages: while one does what follows the
product, the other has the matrix units to itself. Programs stay, and take every tile whose number is theirs modulo
their count; each needs at least one.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS, COLUMNS, INNER = gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
LEAD = gl.constexpr(3)
GROUP = gl.constexpr(64)  # row tiles in a group: they share the right factor's tiles while those are in the cache
SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
LAYOUT = gl.constexpr(SWIZZLED)
TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))

_TRITON_VERSIONS = ("3.6.", "3.7.")  # Gluon is marked experimental; other versions take the portable kernels


def fits(x: Tensor) -> bool:
    """Whether these kernels can work on `x`: bf16 or fp16 on a Hopper GPU, with a Triton whose Gluon they were written
    for.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.is_cuda:
        return False
    return torch.cuda.get_device_capability(x.device)[0] == 9 and triton.__version__.startswith(_TRITON_VERSIONS)


# fmt: off
@gluon.jit
def tile_coords(tile, row_tiles, column_tiles):
    """(row tile, column tile) of a program's tile."""
    tiles_per_group = GROUP * column_tiles
    group_start = tile // tiles_per_group * GROUP
    group_rows = gl.minimum(row_tiles - group_start, GROUP)
    return group_start + tile % tiles_per_group % group_rows, tile % tiles_per_group // group_rows


@gluon.jit
def allocate_ring(dtype: gl.constexpr, STAGES: gl.constexpr):
    """(stages of the left factor, of the right one, barriers: a stage is ready, a stage is free, the upper group has
    begun).
    """
    gl.static_assert(
        STAGES >= LEAD, "the lower group waits for the upper one's first stages, which it would have to free"
    )
    left_stages = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, INNER], LAYOUT)
    right_stages = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, INNER], LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(begun, count=1)
    fence_async_shared()
    return left_stages, right_stages, ready, free, begun


@gluon.jit
def copy_tiles(left, right, left_stages, right_stages, ready, free, M, N, K):
    """The copying warp: left [M, K] in blocks of 64 × 64, right [N, K] in blocks of 256 × 64."""
    STAGES: gl.constexpr = right_stages.shape[0]
    row_tiles = gl.cdiv(M, 2 * ROWS)
    column_tiles = gl.cdiv(N, COLUMNS)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_coords(tile, row_tiles, column_tiles)
        for k in range(0, K, INNER):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (2 * ROWS + COLUMNS) * INNER * 2)
            tma.async_copy_global_to_shared(left, [row_tile * 2 * ROWS, k], ready.index(stage),
                left_stages.index(2 * stage))
            tma.async_copy_global_to_shared(left, [row_tile * 2 * ROWS + ROWS, k], ready.index(stage),
                left_stages.index(2 * stage + 1))
            tma.async_copy_global_to_shared(right, [column_tile * COLUMNS, k], ready.index(stage),
                right_stages.index(stage))
            step += 1


@gluon.jit
def wait_for_upper(begun, LOWER: gl.constexpr):
    """Lets the upper group start a few steps ahead, so that the groups do not leave the matrix units idle at the same
    time.
    """
    if LOWER == 1:
        mbarrier.wait(begun, 0)


@gluon.jit
def multiply_tile(x, left_stages, right_stages, ready, free, begun, step, K, LOWER: gl.constexpr):
    """Adds a warp group's half of a tile to x [64, 256] float32 in TILE; `step` counts the stages that the group has
    used, K > 0.
    """
    STAGES: gl.constexpr = right_stages.shape[0]
    lead = gl.minimum(LEAD, gl.cdiv(K, INNER))
    for k in range(0, K, INNER):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        x = warpgroup_mma(left_stages.index(2 * stage + LOWER), right_stages.index(stage).permute((1, 0)), x,
            is_async=True)
        x = warpgroup_mma_wait(1, deps=(x,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)  # the previous product has been read
        step += 1
        if LOWER == 0:
            mbarrier.arrive(begun, pred=step == lead)
    x = warpgroup_mma_wait(0, deps=(x,))
    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
    return x, step


@gluon.jit
def halves(x):
    """The left and the right half of x: the registers do not hold what comes of a whole tile."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def rounded_to(x, dtype: gl.constexpr):
    """x float32 as bfloat16 or float16, two at a time: single conversions run at the rate of exponentials."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, True, 2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, True, 2)


@gluon.jit
def send(x, staging, out, row, column, underway: gl.constexpr):
    """Writes x to `out` at (row, column) by way of `staging`, which is free when all but `underway` earlier writes have
    been sent.
    """
    tma.store_wait(underway)
    staging.store(x)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], staging)


@gluon.jit
def store_column_sums(out, x, first_column, N):
    """Sums x over its rows into `out` [N], from `first_column` on."""
    sums = gl.sum(x, 0)
    columns = first_column + gl.arange(0, x.shape[1], sums.type.layout)
    gl.store(out + columns, sums, columns < N)
# fmt: on
