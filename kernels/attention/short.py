# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of packed attention for texts that fit one tile: forward in one kernel, backward in one kernel.

A program holds the tokens of a few consecutive texts as the rows and columns of one tile of scores, for one head:

    x = scale · log₂e · Q Kᵀ where i and j are of one text, else −∞
    P_ij = 2^(x_ij − lse_i),   lse_i = log₂ Σ_j 2^x_ij
    O = P̃ V,   P̃ = keep ∘ P / (1 − dropout)

    dV = P̃ᵀ dO,   dP = keep ∘ (dO Vᵀ) / (1 − dropout)
    dS = P ∘ (dP − Σ_j P_ij dP_ij),   dQ = scale · dS K,   dK = scale · dSᵀ Q

The backward computes P again, from lse. All sums are within a program, so runs repeat bitwise. Where there are angles,
queries and keys are turned by them as they are loaded, and their gradients turned back as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.elements import (
    LOG2E,
    constants,
    head_key,
    kept,
    load_angles,
    load_rows,
    load_turned,
    store_rows,
    store_turned_back,
)
from kernels.attention.reference import Heads, Mask, Texts

READS_OUTPUT = False  # whether `backward` reads what `forward` gave first


@dataclass(frozen=True)
class Tile:
    """Tokens per program, and its warps in the forward and backward pass."""

    block: int
    forward_warps: int
    backward_warps: int
    backward_registers: int | None = (
        None  # most of a thread, so that more programs share a multiprocessor; None: as many as it wants
    )

    @property
    def turning_warps(self) -> int:
        """Of a forward pass that turns heads: enough that angles and heads fit the registers."""
        return max(self.forward_warps, self.block // 16)


# By the width of a head, then by the longest text. Several short texts share a tile. With 128 registers two programs of
# the widest tile share a multiprocessor, but a thread spills some 800 bytes: on an H100 the backward pass still takes
# 10 % less time for texts of 64 to 90 tokens and 7 % less for 91 to 128 (33,792 tokens, 12 heads of 64) than with as
# many registers as it wants, and no spills.
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


def turns_heads(query: Tensor) -> bool:
    """Whether queries and keys of this width can be turned as they are loaded: wider ones would spill registers."""
    return query.shape[2] in (32, 64)


def tile_for(query: Tensor, longest: int) -> Tile:
    """The pinned tile for texts of up to `longest` tokens, at most `most_tokens` (tuned on an H100)."""
    if query.dtype == torch.float32:
        return _FLOAT_TILE
    return next(tile for most, tile in _TILES[64 if query.shape[2] <= 64 else 128].items() if longest <= most)


@triton.jit
def tile_of_program(starts, per, n, heads, TEXTS: tl.constexpr, BLOCK: tl.constexpr):
    """(head, the tile's first token, its number of tokens, its rows, which of the tile's texts each belongs to).

    Heads of a token are neighbours in memory. Rows behind the last text form a text of their own; where a tile has one
    text, all are alone.
    """
    first = tl.program_id(0) // heads * per
    start = tl.load(starts + first)
    rows = tl.arange(0, BLOCK)
    segments = rows
    if TEXTS > 1:
        texts = tl.arange(0, TEXTS)
        ends = tl.load(starts + first + 1 + texts, (texts < per) & (first + texts < n), other=2147483647) - start
        segments = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), 1)
    return tl.program_id(0) % heads, start, tl.load(starts + min(first + per, n)) - start, rows, segments


@triton.jit
def _scores(q, k, segments, rows, inside, window, CAUSAL: tl.constexpr, TEXTS: tl.constexpr, PRECISION: tl.constexpr):
    """⟨q_i, k_j⟩ [R, R], −∞ where row i does not look at row j; anything in rows that are not `inside`."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TEXTS == 1:
        x += tl.where(inside, 0.0, -float("inf"))[None, :]
    else:
        x = tl.where(segments[:, None] == segments[None, :], x, -float("inf"))
    if CAUSAL:
        x = tl.where(rows[None, :] <= rows[:, None], x, -float("inf"))
    if window is not None:
        x = tl.where(tl.abs(rows[:, None] - rows[None, :]) <= window, x, -float("inf"))
    return x


@triton.jit(do_not_specialize=["n", "per", "tokens", "window"])
def _forward_tiles(
    query, key, value,
    out,  # [T, H, d], contiguous
    lse,  # [H, T]
    starts,  # [n + 1] int32
    cos,  # [T, d / 2] float32, as sin, where queries and keys are to be turned; else None
    sin,
    seed,  # [1] int64 or None
    n,
    per,  # texts of a tile
    tokens,  # T
    heads,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,  # from token to token, from head to head
    scale_log2,
    window,  # int or None
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TEXTS: tl.constexpr,  # power of two, at least `per`
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, start, count, rows, segments = tile_of_program(starts, per, n, heads, TEXTS, BLOCK)
    if count == 0:
        return
    inside = rows < count
    token = start.to(tl.int64)
    c, s = None, None
    if cos is not None:
        c, s = load_angles(cos + token * (D // 2), sin + token * (D // 2), rows, inside, D)
    q = load_turned(query + token * query_stride + head * query_head, query_stride, rows, inside, c, s, D, BLOCK_D)
    k = load_turned(key + token * key_stride + head // GROUP * key_head, key_stride, rows, inside, c, s, D, BLOCK_D)
    v = load_rows(value + token * value_stride + head // GROUP * value_head, value_stride, rows, inside, D, BLOCK_D)
    x = _scores(q, k, segments, rows, inside, window, CAUSAL, TEXTS, PRECISION)
    top = tl.max(x, 1) * scale_log2
    e = tl.exp2(x * scale_log2 - top[:, None])
    total = tl.sum(e, 1)
    tl.store(lse + head.to(tl.int64) * tokens + start + rows, top + tl.log2(total), inside)
    if DROP_BELOW > 0:
        positions = start + rows
        e = tl.where(kept(head_key(seed, head), positions[:, None], positions[None, :], DROP_BELOW), e, 0.0)
    o = tl.dot(e.to(v.dtype), v, input_precision=PRECISION) * (KEEP_SCALE / total)[:, None]
    store_rows(out + (token * heads + head) * D, heads * D, rows, inside, o, D, BLOCK_D)


@triton.jit(do_not_specialize=["n", "per", "tokens", "window"])
def _backward_tiles(
    dout, query, key, value,
    lse,  # [H, T]
    dquery,  # [T, H, d], each token's heads contiguous
    dkey,  # [T, G, d], each token's heads contiguous
    dvalue,
    starts,
    cos,
    sin,
    seed,
    n,
    per,
    tokens,
    key_heads,
    dout_stride, dout_head, query_stride, query_head, key_stride, key_head, value_stride, value_head,
    dquery_stride,
    dkey_stride,
    scale, scale_log2, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TEXTS: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group, start, count, rows, segments = tile_of_program(starts, per, n, key_heads, TEXTS, BLOCK)
    if count == 0:
        return
    inside = rows < count
    token = start.to(tl.int64)
    c, s = None, None
    if cos is not None:
        cos += token * (D // 2)
        sin += token * (D // 2)
        c, s = load_angles(cos, sin, rows, inside, D)
    k = load_turned(key + token * key_stride + group * key_head, key_stride, rows, inside, c, s, D, BLOCK_D)
    v = load_rows(value + token * value_stride + group * value_head, value_stride, rows, inside, D, BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        q = load_turned(query + token * query_stride + head * query_head, query_stride, rows, inside, c, s, D, BLOCK_D)
        do = load_rows(dout + token * dout_stride + head * dout_head, dout_stride, rows, inside, D, BLOCK_D)
        row_lse = tl.load(lse + head.to(tl.int64) * tokens + start + rows, inside, other=float("inf"))
        x = _scores(q, k, segments, rows, inside, window, CAUSAL, TEXTS, PRECISION)
        p = tl.exp2(x * scale_log2 - row_lse[:, None])
        if DROP_BELOW > 0:  # the sign remembers what was dropped: a mask beside it would cost registers
            positions = start + rows
            p = tl.where(kept(head_key(seed, head), positions[:, None], positions[None, :], DROP_BELOW), p, -p)
        dv = tl.dot(tl.trans(tl.maximum(p, 0.0).to(do.dtype)), do, dv, input_precision=PRECISION)
        if member == GROUP - 1:  # written before dP needs the registers
            store_rows(dvalue + token * dkey_stride + group * D, dkey_stride, rows, inside, dv * KEEP_SCALE, D, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dp = tl.where(p > 0, dp, 0.0)
        p = tl.abs(p)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION) * (scale * KEEP_SCALE)
        to = dquery + token * dquery_stride + head * D
        store_turned_back(to, dquery_stride, rows, inside, dq, cos, sin, D, BLOCK_D)
    dk *= scale * KEEP_SCALE
    store_turned_back(dkey + token * dkey_stride + group * D, dkey_stride, rows, inside, dk, cos, sin, D, BLOCK_D)


def forward(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, mask: Mask, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """The output [T, H, d] in the inputs' dtype and lse [H, T] float32, in base 2.

    Arguments as `kernels.attention.api.packed_attention` has them; texts of at most `most_tokens`.
    """
    out, lse = query.new_empty(query.shape), query.new_empty((query.shape[1], len(query)), dtype=torch.float32)
    tile, n = tile or tile_for(query, texts.longest), len(texts.starts) - 1
    per = tile.block // texts.longest
    heads = query.shape[1]
    if n and len(query):
        _forward_tiles[(triton.cdiv(n, per) * heads,)](
            query, key, value, out, lse, texts.starts, *(texts.angles or (None, None)), mask.seed,
            n, per, len(query), heads,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], mask.scale * LOG2E, mask.window,
            **constants(query, key, mask), TEXTS=triton.next_power_of_2(per), BLOCK=tile.block,
            num_warps=tile.forward_warps if texts.angles is None else tile.turning_warps,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    qkv: Heads,
    forward: tuple[Tensor, Tensor],
    into: Heads,
    texts: Texts,
    mask: Mask,
    tile: Tile | None = None,
) -> None:
    """Writes the gradients at query [T, H, d], key and value [T, G, d] of Σ dout · forward `into` tensors like them.

    `forward`: what the function of that name gave, of which only lse is read. The gradients of key and value have one
    stride from token to token, and a token's heads are contiguous.
    """
    query, key, value = qkv
    tile, n = tile or tile_for(query, texts.longest), len(texts.starts) - 1
    per = tile.block // texts.longest
    if n and len(query):
        _backward_tiles[(triton.cdiv(n, per) * key.shape[1],)](
            dout, *qkv, forward[1], *into, texts.starts, *(texts.angles or (None, None)), mask.seed,
            n, per, len(query), key.shape[1],
            *dout.stride()[:2], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], into[0].stride(0),
            into[1].stride(0),
            mask.scale, mask.scale * LOG2E, mask.window,
            **constants(query, key, mask), TEXTS=triton.next_power_of_2(per), BLOCK=tile.block,
            num_warps=tile.backward_warps, maxnreg=tile.backward_registers,
        )  # fmt: skip
