# mypy: disable-error-code="no-untyped-def"
"""What all Triton kernels of packed attention share: the dropout mask, rows of a head in memory, and what they are
compiled for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.reference import Mask
from kernels.dropout import drop_below
from kernels.dropout_triton import FIRST, GOLDEN, SECOND, mix

LOG2E = 1.4426950408889634


@triton.jit
def head_key(seed, head):
    """The word that stands for (seed, head); `seed` points to an int64."""
    word = tl.load(seed)
    return mix(mix(mix((word >> 32).to(tl.uint32) ^ GOLDEN) ^ word.to(tl.uint32)) ^ head.to(tl.uint32))


@triton.jit
def kept(key, rows, columns, DROP_BELOW: tl.constexpr):
    """`reference.kept` for rows [R, 1] and columns [1, C], or [1, R] and [C, 1], counted from the chunk's first
    token.
    """
    word = (mix(rows.to(tl.uint32) ^ key) ^ (columns.to(tl.uint32) * GOLDEN + mix(key ^ GOLDEN))) * FIRST
    word = (word ^ (word >> 16)) * SECOND
    return word >= DROP_BELOW


@triton.jit
def load_rows(base, stride, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[R, BLOCK_D]: rows of a head, zeros where not `inside` and beyond D."""
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dims < D)[None, :]
    return tl.load(base + rows[:, None] * stride + dims[None, :], mask, other=0.0)


@triton.jit
def load_angles(cos, sin, rows, inside, D: tl.constexpr):
    """cos and sin [R, D] of the angle of each pair of dimensions (j, j + D/2); sin is negated in the left half."""
    dims = tl.arange(0, D)
    at = rows[:, None] * (D // 2) + (dims % (D // 2))[None, :]
    s = tl.load(sin + at, inside[:, None], other=0.0)
    return tl.load(cos + at, inside[:, None], other=0.0), tl.where((dims < D // 2)[None, :], -s, s)


@triton.jit
def load_turned(base, stride, rows, inside, c, s, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_rows`, turned by the angles of `load_angles` unless they are None."""
    x = load_rows(base, stride, rows, inside, D, BLOCK_D)
    if c is None:
        return x
    else:
        swapped = (tl.arange(0, D) + D // 2) % D
        other = tl.load(base + rows[:, None] * stride + swapped[None, :], inside[:, None], other=0.0)
        return (x.to(tl.float32) * c + other.to(tl.float32) * s).to(x.dtype)


@triton.jit
def store_turned_back(base, stride, rows, inside, x, cos, sin, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the gradient at the rows in memory, given x, the gradient at what `load_turned` made of them."""
    if cos is None:
        store_rows(base, stride, rows, inside, x, D, BLOCK_D)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, D // 2)), (0, 2, 1)))
        dims, mask = tl.arange(0, D // 2), inside[:, None]
        at = rows[:, None] * (D // 2) + dims[None, :]
        c, s = tl.load(cos + at, mask, other=0.0), tl.load(sin + at, mask, other=0.0)
        to = base + rows[:, None] * stride + dims[None, :]
        tl.store(to, (left * c + right * s).to(base.dtype.element_ty), mask)
        tl.store(to + D // 2, (right * c - left * s).to(base.dtype.element_ty), mask)


@triton.jit
def store_rows(base, stride, rows, inside, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes what `load_rows` reads."""
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dims < D)[None, :]
    tl.store(base + rows[:, None] * stride + dims[None, :], x.to(base.dtype.element_ty), mask)


def constants(query: Tensor, key: Tensor, mask: Mask) -> dict[str, Any]:
    """The compile-time constants that all kernels of packed attention share, apart from block sizes."""
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "CAUSAL": mask.causal,
        "DROP_BELOW": drop_below(mask.dropout),
        "KEEP_SCALE": 1 / (1 - mask.dropout),
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "D": query.shape[2],
        "BLOCK_D": max(triton.next_power_of_2(query.shape[2]), 16),
    }
