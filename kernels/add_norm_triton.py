# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of `add_norm`: one pass over memory, 8 bytes an element with bfloat16 products, 6 with float16 ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 2  # a program's
_COLUMNS_PER_WARP = 256


@triton.jit(do_not_specialize=["T"])
def _add_norm(
    x,  # [T, D] bfloat16 or float16
    bias,  # [D] float32
    stream,  # [T, D] float16
    weight,  # [D] float32
    norm_bias,  # [D] float32
    following,  # out [T, D] float16 or float32
    low,  # out [T, D] in x's dtype, or None
    T,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_columns = columns < D
    inside = (rows < T - first)[:, None] & in_columns[None, :]
    at = tl.cast(first, tl.int64) * D + (rows[:, None] * D + columns[None, :])
    shift = tl.load(bias + columns, in_columns, other=0.0)
    z = tl.load(x + at, inside, other=0.0).to(tl.float32) + shift[None, :] + tl.load(stream + at, inside, other=0.0).to(tl.float32)
    mean = tl.sum(z, 1) / D
    centred = tl.where(in_columns[None, :], z - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    scale, base = tl.load(weight + columns, in_columns, other=0.0), tl.load(norm_bias + columns, in_columns, other=0.0)
    y = centred * spread[:, None] * scale[None, :] + base[None, :]
    tl.store(following + at, y.to(following.dtype.element_ty), inside)
    if low is not None:
        tl.store(low + at, y.to(low.dtype.element_ty), inside)


def add_norm(x: Tensor, bias: Tensor, stream: Tensor, weight: Tensor, norm_bias: Tensor, eps: float, last: bool) -> tuple[Tensor, Tensor]:
    """The next stream [T, D] float16 and the same in x's dtype, one tensor where that is float16 too; the `last` one is float32."""
    T, D = x.shape
    following = torch.empty_like(stream, dtype=torch.float32 if last else None)
    low = None if last or x.dtype == torch.float16 else torch.empty_like(x)
    block_d, warps = block(D)
    _add_norm[(triton.cdiv(T, ROWS),)](
        x, bias, stream, weight, norm_bias, following, low, T, eps, D, ROWS=ROWS, BLOCK_D=block_d, num_warps=warps
    )  # fmt: skip
    return following, following if low is None else low


def block(D: int) -> tuple[int, int]:
    """(columns, warps) of a program."""
    columns = triton.next_power_of_2(D)
    return columns, max(1, min(16, columns // _COLUMNS_PER_WARP))
