# mypy: disable-error-code="no-untyped-def"
"""A matrix product and the GELU that follows it in one kernel for Hopper, forward and backward: what lies between stays
in registers.

Forward: u = x Wᵀ + bias where a backward pass will read it, and u Φ(u), Φ the normal distribution. Backward: dy Wᵀ
times Φ(u) + u φ(u), and that summed over rows.

The tail Φ(−|u|) is 2 to the power of a polynomial in |u|: no division, one exponential. Degree 7, a minimax fit to log₂
½ erfc(|u| / √2) on 0..6.5, gives it to 5e-6 of itself there (9e-6 in float32), below which all of it is 4e-11.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.dispatch import persistent_grid
from kernels.hopper import (
    COLUMNS,
    ROWS,
    SWIZZLED,
    TILE,
    allocate_ring,
    copy_tiles,
    halves,
    multiply_tile,
    rounded_to,
    send,
    store_column_sums,
    tile_coords,
    wait_for_upper,
)

WIDTH = gl.constexpr(64)  # of a quarter


# fmt: off
@gluon.jit
def _tail(size):
    """Φ(−size), size ≥ 0."""
    exponent = -1.757775635269354e-06 * size + 5.9936559409834445e-05
    exponent = exponent * size - 0.0009163627400994301
    exponent = exponent * size + 0.008447384461760521
    exponent = exponent * size - 0.05382449924945831
    exponent = exponent * size - 0.4586157202720642
    exponent = exponent * size - 1.1511801481246948
    exponent = exponent * size - 1.0000038146972656
    return gl.exp2(exponent)


@gluon.jit
def _gelu(u):
    size = gl.abs(u)
    return gl.maximum(u, 0.0) - size * _tail(size)


@gluon.jit
def _gelu_gradient(u, product):
    """The product times Φ(u) + u φ(u), of which one half is odd in u."""
    size = gl.abs(u)
    below = 0.0007042239303700626 * size - 0.00804184190928936
    below = below * size + 0.0396721214056015
    below = below * size - 0.1169409453868866
    below = below * size + 0.24442343413829803
    below = below * size - 0.7971517443656921
    below = below * size + 0.4999842941761017
    half = 0.5 - gl.exp2(u * u * -0.7213475204444817) * below  # log₂e / 2
    odd = gl.inline_asm_elementwise("copysign.f32 $0, $1, $2;", "=f,f,f", [u, half], gl.float32, True, 1)
    return product * odd + product * 0.5


@gluon.jit
def _finish_quarter(
    x, u, u_out, out, sums, staging, row, column, F: gl.constexpr, LOWER: gl.constexpr, QUARTER: gl.constexpr,
):
    """Sends what comes of a quarter of a group's tile, [64, 64]; going backward, `staging` holds that quarter of u."""
    at = column + QUARTER * WIDTH
    if u is None:
        # Two buffers take turns.
        if u_out is not None:
            send(rounded_to(x, out.dtype), staging.index(2 * LOWER), u_out, row, at, 1)
            send(rounded_to(_gelu(x), out.dtype), staging.index(2 * LOWER + 1), out, row, at, 1)
        else:
            send(rounded_to(_gelu(x), out.dtype), staging.index(2 * LOWER + QUARTER % 2), out, row, at, 1)
    else:
        buffer = staging.index(4 * LOWER + QUARTER)
        g = _gelu_gradient(buffer.load(x.type.layout).to(gl.float32), x)
        buffer.store(rounded_to(g, out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, at], buffer)
        store_column_sums(sums + row.to(gl.int64) // ROWS * F, g, at, F)


@gluon.jit
def _finish(
    left_stages, right_stages, staging, ready, free, begun, loaded, bias, u, u_out, out, sums, T, F: gl.constexpr,
    D: gl.constexpr,
    LOWER: gl.constexpr,
):
    """A warp group's part of all tiles."""
    row_tiles = gl.cdiv(T, 2 * ROWS)
    column_tiles = gl.cdiv(F, COLUMNS)
    step = 0
    wait_for_upper(begun, LOWER)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_coords(tile, row_tiles, column_tiles)
        row, column = (2 * row_tile + LOWER) * ROWS, column_tile * COLUMNS
        x = gl.zeros([ROWS, COLUMNS], gl.float32, TILE)
        if u is None:
            columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE))
            x += gl.load(bias + columns, columns < F, other=0.0).to(gl.float32)[None, :]
        else:
            tma.store_wait(0)
            mbarrier.expect(loaded.index(LOWER), ROWS * COLUMNS * 2)
            for i in gl.static_range(4):
                tma.async_copy_global_to_shared(u, [row, column + i * WIDTH], loaded.index(LOWER),
                    staging.index(4 * LOWER + i))
        x, step = multiply_tile(x, left_stages, right_stages, ready, free, begun, step, D, LOWER)
        if u is not None:
            mbarrier.wait(loaded.index(LOWER), tile // gl.num_programs(0) & 1)
        left, right = halves(x)
        x0, x1 = halves(left)
        x2, x3 = halves(right)
        _finish_quarter(x0, u, u_out, out, sums, staging, row, column, F, LOWER, 0)
        _finish_quarter(x1, u, u_out, out, sums, staging, row, column, F, LOWER, 1)
        _finish_quarter(x2, u, u_out, out, sums, staging, row, column, F, LOWER, 2)
        _finish_quarter(x3, u, u_out, out, sums, staging, row, column, F, LOWER, 3)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def _gelu_product(
    x,  # descriptor [T, D], blocks of 64 × 64; dy of the backward pass
    weight,  # descriptor [F, D], blocks of 256 × 64
    bias,  # [F] of the forward pass
    u,  # descriptor [T, F], blocks of 64 × 64, of the backward pass; None: forward
    u_out,  # descriptor [T, F], blocks of 64 × 64, or None
    out,  # descriptor [T, F], blocks of 64 × 64
    sums,  # [2 · row tiles, F] float32 of the backward pass
    T,
    F: gl.constexpr,
    D: gl.constexpr,
):
    left_stages, right_stages, ready, free, begun = allocate_ring(x.dtype, 4 if u is None else 3)
    BUFFERS: gl.constexpr = 2 if u is None else 4
    staging = gl.allocate_shared_memory(out.dtype, [2 * BUFFERS, ROWS, WIDTH], out.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded.index(0), count=1)
    mbarrier.init(loaded.index(1), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_finish, (
                left_stages, right_stages, staging, ready, free, begun, loaded, bias, u, u_out, out, sums,
                T, gl.constexpr(F), gl.constexpr(D), gl.constexpr(0),
            )),
            (_finish, (
                left_stages, right_stages, staging, ready, free, begun, loaded, bias, u, u_out, out, sums,
                T, gl.constexpr(F), gl.constexpr(D), gl.constexpr(1),
            )),
            (copy_tiles, (
                x, weight, left_stages, right_stages, ready, free, T, gl.constexpr(F), gl.constexpr(D),
            )),
        ],
        [4, 1],
        [240, 24],
    )
# fmt: on


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor | None, Tensor]:
    """(u where `keep`, gelu(u)) [T, F] of u = x Wᵀ + bias."""
    shape = len(x), len(weight)
    u, out = x.new_empty(shape) if keep else None, x.new_empty(shape)
    _launch(x, weight, bias, None, u, out, None)
    return u, out


def gelu_product_backward(dy: Tensor, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(dy Wᵀ gelu′(u) [T, F], its sums over rows [F] float32)."""
    out, sums = torch.empty_like(u), dy.new_empty(2 * triton.cdiv(len(dy), 128), len(weight), dtype=torch.float32)
    _launch(dy, weight, None, u, None, out, sums)
    return out, sums.sum(0)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    u_out: Tensor | None,
    out: Tensor,
    sums: Tensor | None,
) -> None:
    (T, D), F = x.shape, len(weight)
    if T == 0:
        return
    programs = persistent_grid(x, triton.cdiv(T, 128) * triton.cdiv(F, 256), 1)
    _gelu_product[(programs,)](
        TensorDescriptor.from_tensor(x, [64, 64], SWIZZLED),
        TensorDescriptor.from_tensor(weight, [256, 64], SWIZZLED),
        bias,
        None if u is None else TensorDescriptor.from_tensor(u, [64, 64], SWIZZLED),
        None if u_out is None else TensorDescriptor.from_tensor(u_out, [64, 64], SWIZZLED),
        TensorDescriptor.from_tensor(out, [64, 64], SWIZZLED),
        sums,
        T,
        F,
        D,
        num_warps=4,
    )
