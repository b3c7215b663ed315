# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that norm and rotate the heads of queries and keys: one pass over memory forward, one backward.

With x a head, x̂ = x · rstd (RMSNorm; left out where there are no weights) and y = weight · x̂, each pair of y is
turned by the angle of its token:

    out_j = y_j cos_j − y_{j + d/2} sin_j,    out_{j + d/2} = y_{j + d/2} cos_j + y_j sin_j

The backward pass turns back, and then is that of the norm. Its programs stay and keep the sums of the weights'
gradients; these are added up in a fixed order, without atomics. (Su et al. 2021, arXiv:2104.09864)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import persistent_grid
from kernels.layers.reference import Rotary

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 2048, 1024  # of half a block of heads; tuned on an H200
WARPS = 4
_PROGRAMS_PER_SM = 8


@triton.jit
def _heads(block, T, ROTATED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr):
    """(tokens, heads, whether each is a key's, whether it exists) of a block of the rotated heads, [ROWS] each."""
    number = block * ROWS + tl.arange(0, ROWS)
    head = number % ROTATED
    return (number // ROTATED).to(tl.int64), head, (head >= QUERIES)[:, None], (number < T * ROTATED)[:, None]


@triton.jit
def _turn(left, right, cos, sin):
    return left * cos - right * sin, right * cos + left * sin


@triton.jit
def _weights(query_weight, key_weight, columns, is_key, wanted):
    """The weights of each head's norm, [ROWS, columns]."""
    q = tl.load(query_weight + columns, wanted, other=0.0).to(tl.float32)
    k = tl.load(key_weight + columns, wanted, other=0.0).to(tl.float32)
    return tl.where(is_key, k[None, :], q[None, :])


@triton.jit(do_not_specialize=["T"])
def _rotate_forward(
    heads,  # [T, HEADS, D]
    out,  # [T, OUT_HEADS, D], of which the first QUERIES + KEYS are written; may be `heads`
    cos,  # [T, D / 2] float32
    sin,
    query_weight,  # [D] or None
    key_weight,
    T,
    eps,
    HEADS: tl.constexpr,
    OUT_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    tokens, head, is_key, inside = _heads(tl.program_id(0), T, QUERIES + KEYS, QUERIES, ROWS)
    columns = tl.arange(0, HALF)
    wanted = columns < D // 2
    inside = inside & wanted[None, :]
    at = ((tokens * HEADS + head) * D)[:, None] + columns[None, :]
    left = tl.load(heads + at, inside, other=0.0).to(tl.float32)
    right = tl.load(heads + at + D // 2, inside, other=0.0).to(tl.float32)
    if query_weight is not None:
        rstd = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / D + eps)[:, None]
        left *= rstd * _weights(query_weight, key_weight, columns, is_key, wanted)
        right *= rstd * _weights(query_weight, key_weight, columns + D // 2, is_key, wanted)
    angle = (tokens * (D // 2))[:, None] + columns[None, :]
    c, s = tl.load(cos + angle, inside, other=0.0), tl.load(sin + angle, inside, other=0.0)
    left, right = _turn(left, right, c, s)
    at = ((tokens * OUT_HEADS + head) * D)[:, None] + columns[None, :]
    tl.store(out + at, left.to(out.dtype.element_ty), inside)
    tl.store(out + at + D // 2, right.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T", "blocks"])
def _rotate_backward(
    dheads,  # [T, HEADS, D]; the first QUERIES + KEYS are overwritten
    heads,  # [T, HEADS, D], before the norm; read only where there are weights
    cos,
    sin,
    query_weight,
    key_weight,
    partial,  # out [programs, 2, D] float32 where there are weights
    T,
    blocks,
    eps,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    columns = tl.arange(0, HALF)
    wanted = columns < D // 2
    dquery_left = tl.zeros((ROWS, HALF), tl.float32)
    dquery_right = tl.zeros((ROWS, HALF), tl.float32)
    dkey_left = tl.zeros((ROWS, HALF), tl.float32)
    dkey_right = tl.zeros((ROWS, HALF), tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tokens, head, is_key, inside = _heads(block, T, QUERIES + KEYS, QUERIES, ROWS)
        inside = inside & wanted[None, :]
        at = ((tokens * HEADS + head) * D)[:, None] + columns[None, :]
        angle = (tokens * (D // 2))[:, None] + columns[None, :]
        c, s = tl.load(cos + angle, inside, other=0.0), tl.load(sin + angle, inside, other=0.0)
        left = tl.load(dheads + at, inside, other=0.0).to(tl.float32)
        right = tl.load(dheads + at + D // 2, inside, other=0.0).to(tl.float32)
        left, right = _turn(left, right, c, -s)
        if query_weight is not None:
            x_left = tl.load(heads + at, inside, other=0.0).to(tl.float32)
            x_right = tl.load(heads + at + D // 2, inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt((tl.sum(x_left * x_left, 1) + tl.sum(x_right * x_right, 1)) / D + eps)[:, None]
            x_left *= rstd
            x_right *= rstd
            along_left, along_right = left * x_left, right * x_right
            dquery_left += tl.where(is_key, 0.0, along_left)
            dquery_right += tl.where(is_key, 0.0, along_right)
            dkey_left += tl.where(is_key, along_left, 0.0)
            dkey_right += tl.where(is_key, along_right, 0.0)
            w_left = _weights(query_weight, key_weight, columns, is_key, wanted)
            w_right = _weights(query_weight, key_weight, columns + D // 2, is_key, wanted)
            along = ((tl.sum(along_left * w_left, 1) + tl.sum(along_right * w_right, 1)) / D)[:, None]
            left = rstd * (left * w_left - x_left * along)
            right = rstd * (right * w_right - x_right * along)
        tl.store(dheads + at, left.to(dheads.dtype.element_ty), inside)
        tl.store(dheads + at + D // 2, right.to(dheads.dtype.element_ty), inside)
    if query_weight is not None:
        sums = partial + tl.program_id(0) * 2 * D + columns
        tl.store(sums, tl.sum(dquery_left, 0), wanted)
        tl.store(sums + D // 2, tl.sum(dquery_right, 0), wanted)
        tl.store(sums + D, tl.sum(dkey_left, 0), wanted)
        tl.store(sums + D + D // 2, tl.sum(dkey_right, 0), wanted)


def rotate_heads(heads: Tensor, rotary: Rotary, out: Tensor) -> None:
    """Writes the first heads of each token of heads [T, N, d], normed and rotated, to `out` [T, at least R, d]."""
    T, N, D = heads.shape
    rows, half, blocks = _blocks(T, D, rotary, FORWARD_ELEMENTS)
    if T:
        _rotate_forward[(blocks,)](
            heads, out, rotary.cos, rotary.sin, rotary.query_weight, rotary.key_weight, T, rotary.eps, N, out.shape[1],
            rotary.query_heads, rotary.key_heads, D, ROWS=rows, HALF=half, num_warps=WARPS,
        )  # fmt: skip


def rotate_heads_backward_(dheads: Tensor, heads: Tensor, rotary: Rotary) -> Tensor | None:
    """The gradients at the weights of the norms [2, d] float32, or None; those at the rotated heads become those
    before.
    """
    T, N, D = dheads.shape
    rows, half, blocks = _blocks(T, D, rotary, BACKWARD_ELEMENTS)
    programs = persistent_grid(dheads, blocks, _PROGRAMS_PER_SM)
    weighted = rotary.query_weight is not None
    partial = rotary.cos.new_empty(programs, 2, D) if weighted else None
    _rotate_backward[(programs,)](
        dheads, heads, rotary.cos, rotary.sin, rotary.query_weight, rotary.key_weight, partial, T, blocks, rotary.eps,
        N, rotary.query_heads, rotary.key_heads, D, ROWS=rows, HALF=half, num_warps=WARPS,
    )  # fmt: skip
    return None if partial is None else partial.sum(0)


def _blocks(T: int, D: int, rotary: Rotary, elements: int) -> tuple[int, int, int]:
    """(heads, columns of half a head, number) of blocks."""
    half = triton.next_power_of_2(D // 2)
    rows = max(1, elements // half)
    return rows, half, triton.cdiv(T * (rotary.query_heads + rotary.key_heads), rows)
