# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of packed attention for texts that fit one tile: forward in one kernel, backward in one kernel.

A program holds the tokens of a few consecutive texts as the rows and columns of one tile of scores, for one head:

    P_ij = 2^(x_ij − max_j x_ij) / Σ_j 2^(…),   x = scale · log₂e · Q Kᵀ where i and j are of one text, else −∞
    O = P̃ V,   P̃ = keep ∘ P / (1 − dropout)
    dV = P̃ᵀ dO,   dP = keep ∘ (dO Vᵀ) / (1 − dropout),   dS = P ∘ (dP − Σ_j P_ij dP_ij),   dQ = scale · dS K,   dK = scale · dSᵀ Q

The backward computes P again, so that the forward leaves nothing but O; all sums are within a program, so runs repeat bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import attention_reference
from kernels.attention_reference import Mask, drop_below

LOG2E = 1.4426950408889634
FIRST = tl.constexpr(attention_reference.FIRST)
SECOND = tl.constexpr(attention_reference.SECOND)
GOLDEN = tl.constexpr(attention_reference.GOLDEN)


@dataclass(frozen=True)
class Tile:
    """How many tokens a program holds, and the warps that work on them, forward and backward."""

    block: int
    forward_warps: int
    backward_warps: int
    backward_registers: int | None = None  # most of a thread, so that more programs share a multiprocessor; None: as many as it wants


# By the width of a head, then by the longest text. Several short texts share a tile.
_TILES = {
    64: {
        16: Tile(64, 4, 4),
        32: Tile(32, 2, 2),
        64: Tile(64, 4, 4),
        96: Tile(128, 4, 8, backward_registers=128),
        128: Tile(128, 8, 8, backward_registers=128),
    },
    128: {32: Tile(32, 2, 4), 64: Tile(64, 4, 4)},
}
_FLOAT_TILE = Tile(32, 4, 4)


def most_tokens(query: Tensor, key: Tensor) -> int:
    """The longest text whose tile, with its gradients, fits the registers; 0: none does."""
    width, grouped, wide = query.shape[2], key.shape[1] < query.shape[1], query.dtype == torch.float32
    return 128 >> ((width > 64) + grouped + 2 * wide) if width <= 128 else 0


def tile_for(query: Tensor, longest: int) -> Tile:
    """The pinned tile for texts of up to `longest` tokens, at most `most_tokens` (tuned on an H100)."""
    if query.dtype == torch.float32:
        return _FLOAT_TILE
    return next(tile for most, tile in _TILES[64 if query.shape[2] <= 64 else 128].items() if longest <= most)


@triton.jit
def mix(x):
    """`attention_reference.mix` on uint32."""
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 13)) * SECOND
    return x ^ (x >> 16)


@triton.jit
def head_key(seed, head):
    """The word that stands for (seed, head); `seed` points to an int64."""
    word = tl.load(seed)
    return mix(mix(mix((word >> 32).to(tl.uint32) ^ GOLDEN) ^ word.to(tl.uint32)) ^ head.to(tl.uint32))


@triton.jit
def kept(key, rows, columns, DROP_BELOW: tl.constexpr):
    """`attention_reference.kept` for rows [R, 1] and columns [1, C], or [1, R] and [C, 1], counted from the chunk's first token."""
    word = (mix(rows.to(tl.uint32) ^ key) ^ mix(columns.to(tl.uint32) ^ mix(key ^ GOLDEN))) * FIRST
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
def store_rows(base, stride, rows, inside, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes what `load_rows` reads."""
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dims < D)[None, :]
    tl.store(base + rows[:, None] * stride + dims[None, :], x.to(base.dtype.element_ty), mask)


@triton.jit
def _segments(starts, first, per, n, start, rows, inside, TEXTS: tl.constexpr):
    """Which of the tile's texts each row belongs to; rows behind the last text form one of their own."""
    if TEXTS == 1:
        return tl.where(inside, 0, 1)
    else:
        texts = tl.arange(0, TEXTS)
        ends = tl.load(starts + first + 1 + texts, (texts < per) & (first + texts < n), other=2147483647) - start
        return tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), 1)


@triton.jit
def _exponentials(q, k, segments, rows, scale_log2, window, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """2^(x_ij − max_j x_ij) [R, R] and its row sums; every row sees itself, so no sum is empty."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    allowed = segments[:, None] == segments[None, :]
    if CAUSAL:
        allowed = allowed & (rows[None, :] <= rows[:, None])
    if window is not None:
        allowed = allowed & (tl.abs(rows[:, None] - rows[None, :]) <= window)
    x = tl.where(allowed, x, -float("inf"))
    e = tl.exp2(x * scale_log2 - (tl.max(x, 1) * scale_log2)[:, None])
    return e, tl.sum(e, 1)


@triton.jit(do_not_specialize=["n", "per", "window"])
def _forward_tiles(
    query,
    key,
    value,
    out,  # [T, H, d], contiguous
    starts,  # [n + 1] int32
    seed,  # [1] int64 or None
    n,
    per,  # texts of a tile
    heads,
    query_stride,  # from token to token
    query_head,  # from head to head
    key_stride,
    key_head,
    value_stride,
    value_head,
    scale_log2,
    window,  # int or None
    GROUP: tl.constexpr,  # query heads of a key head
    CAUSAL: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TEXTS: tl.constexpr,  # power of two, at least `per`
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0) % heads  # heads of a token are neighbours in memory
    first = tl.program_id(0) // heads * per
    start = tl.load(starts + first)
    count = tl.load(starts + min(first + per, n)) - start
    if count == 0:
        return
    rows = tl.arange(0, BLOCK)
    inside = rows < count
    segments = _segments(starts, first, per, n, start, rows, inside, TEXTS)
    token = start.to(tl.int64)
    q = load_rows(query + token * query_stride + head * query_head, query_stride, rows, inside, D, BLOCK_D)
    k = load_rows(key + token * key_stride + head // GROUP * key_head, key_stride, rows, inside, D, BLOCK_D)
    v = load_rows(value + token * value_stride + head // GROUP * value_head, value_stride, rows, inside, D, BLOCK_D)
    e, total = _exponentials(q, k, segments, rows, scale_log2, window, CAUSAL, PRECISION)
    if DROP_BELOW > 0:
        tokens = start + rows
        e = tl.where(kept(head_key(seed, head), tokens[:, None], tokens[None, :], DROP_BELOW), e, 0.0)
    o = tl.dot(e.to(v.dtype), v, input_precision=PRECISION) * (KEEP_SCALE / total)[:, None]
    store_rows(out + (token * heads + head) * D, heads * D, rows, inside, o, D, BLOCK_D)


@triton.jit(do_not_specialize=["n", "per", "window"])
def _backward_tiles(
    dout,
    query,
    key,
    value,
    dquery,  # [T, H, d], each token's heads contiguous
    dkey,  # [T, G, d], each token's heads contiguous
    dvalue,
    starts,
    seed,
    n,
    per,
    key_heads,
    dout_stride,
    dout_head,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    dquery_stride,
    dkey_stride,
    scale,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TEXTS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0) % key_heads
    first = tl.program_id(0) // key_heads * per
    start = tl.load(starts + first)
    count = tl.load(starts + min(first + per, n)) - start
    if count == 0:
        return
    rows = tl.arange(0, BLOCK)
    inside = rows < count
    segments = _segments(starts, first, per, n, start, rows, inside, TEXTS)
    token = start.to(tl.int64)
    k = load_rows(key + token * key_stride + group * key_head, key_stride, rows, inside, D, BLOCK_D)
    v = load_rows(value + token * value_stride + group * value_head, value_stride, rows, inside, D, BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        q = load_rows(query + token * query_stride + head * query_head, query_stride, rows, inside, D, BLOCK_D)
        do = load_rows(dout + token * dout_stride + head * dout_head, dout_stride, rows, inside, D, BLOCK_D)
        e, total = _exponentials(q, k, segments, rows, scale_log2, window, CAUSAL, PRECISION)
        p = e * (1.0 / total)[:, None]
        if DROP_BELOW > 0:  # the sign remembers what was dropped: a mask beside it would cost registers
            tokens = start + rows
            p = tl.where(kept(head_key(seed, head), tokens[:, None], tokens[None, :], DROP_BELOW), p, -p)
        dv = tl.dot(tl.trans(tl.maximum(p, 0.0).to(do.dtype)), do, dv, input_precision=PRECISION)
        if member == GROUP - 1:  # written before dP needs the registers
            store_rows(dvalue + token * dkey_stride + group * D, dkey_stride, rows, inside, dv * KEEP_SCALE, D, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dp = tl.where(p > 0, dp, 0.0)
        p = tl.abs(p)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION) * (scale * KEEP_SCALE)
        store_rows(dquery + token * dquery_stride + head * D, dquery_stride, rows, inside, dq, D, BLOCK_D)
    store_rows(dkey + token * dkey_stride + group * D, dkey_stride, rows, inside, dk * (scale * KEEP_SCALE), D, BLOCK_D)


def constants(query: Tensor, key: Tensor, mask: Mask) -> dict[str, Any]:
    """What every kernel of packed attention is compiled for, beside its blocks."""
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "CAUSAL": mask.causal,
        "DROP_BELOW": drop_below(mask.dropout),
        "KEEP_SCALE": 1 / (1 - mask.dropout),
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "D": query.shape[2],
        "BLOCK_D": max(triton.next_power_of_2(query.shape[2]), 16),
    }


def forward(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, mask: Mask, tile: Tile | None = None) -> Tensor:
    """The output [T, H, d] in the inputs' dtype; arguments as `kernels.attention.packed_attention` has them, texts that `fits`."""
    out = query.new_empty(query.shape)
    tile, n = tile or tile_for(query, longest), len(starts) - 1
    per = tile.block // longest
    heads = query.shape[1]
    if n and len(query):
        _forward_tiles[(triton.cdiv(n, per) * heads,)](
            query, key, value, out, starts, mask.seed, n, per, heads,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], mask.scale * LOG2E, mask.window,
            **constants(query, key, mask), TEXTS=triton.next_power_of_2(per), BLOCK=tile.block, num_warps=tile.forward_warps,
        )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    starts: Tensor,
    longest: int,
    mask: Mask,
    tile: Tile | None = None,
) -> None:
    """Writes the gradients at query [T, H, d], key and value [T, G, d] of Σ dout · forward `into` tensors like them.

    Those of key and value have one stride from token to token, and a token's heads are contiguous.
    """
    tile, n = tile or tile_for(query, longest), len(starts) - 1
    per = tile.block // longest
    if n and len(query):
        _backward_tiles[(triton.cdiv(n, per) * key.shape[1],)](
            dout, query, key, value, *into, starts, mask.seed, n, per, key.shape[1],
            *dout.stride()[:2], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], into[0].stride(0), into[1].stride(0),
            mask.scale, mask.scale * LOG2E, mask.window,
            **constants(query, key, mask), TEXTS=triton.next_power_of_2(per), BLOCK=tile.block,
            num_warps=tile.backward_warps, maxnreg=tile.backward_registers,
        )  # fmt: skip
