# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of packed attention for texts longer than a tile: block by block, with an online softmax.

A program of the forward and of the dQ kernel holds a block of one text's queries and visits the keys that these may see; a program of the
dK, dV kernel holds a block of keys and visits queries. In base 2, with x = scale · log₂e · ⟨q_i, k_j⟩ and lse_i = log₂ Σ_j 2^x_ij:

    P_ij = 2^(x_ij − lse_i),   dS = P ∘ (dP − delta_i),   delta_i = Σ_j P_ij dP_ij = ⟨o_i, do_i⟩    (Dao 2023, arXiv:2307.08691)

Blocks behind a text's end have nothing to do. No sum crosses programs, so runs repeat bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_elements import LOG2E, constants, head_key, kept, load_rows, store_rows
from kernels.attention_reference import Mask


@dataclass(frozen=True)
class Blocks:
    """Tokens that a program keeps and tokens that it visits at a time, and how it works on them."""

    kept: int
    visited: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Settings:
    """Blocks of the three kernels."""

    forward: Blocks
    dquery: Blocks
    dkey: Blocks


# By the width of a head.
_HALF = {
    64: Settings(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 2)),
    128: Settings(Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
    256: Settings(Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1)),
}
_FLOAT = {
    64: Settings(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: Settings(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    256: Settings(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def settings_for(dtype: torch.dtype, width: int) -> Settings:
    """The pinned blocks for heads of `width` ≤ 256 (tuned on an H100)."""
    table = _FLOAT if dtype == torch.float32 else _HALF
    return next(settings for most, settings in table.items() if width <= most)


@triton.jit
def place(starts, blocks, heads, BLOCK: tl.constexpr):
    """(head, the text's first token, its number of tokens, where this program's block begins in it)."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    start = tl.load(starts + block // blocks)
    return head, start, tl.load(starts + block // blocks + 1) - start, block % blocks * BLOCK


@triton.jit
def allowed_pairs(query_rows, key_rows, count, window, CAUSAL: tl.constexpr):
    """Whether a query looks at a key, both counted from the text's first token."""
    allowed = key_rows < count
    if CAUSAL:
        allowed = allowed & (key_rows <= query_rows)
    if window is not None:
        allowed = allowed & (tl.abs(query_rows - key_rows) <= window)
    return allowed


@triton.jit
def keys_seen(first, count, window, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, VISITED: tl.constexpr):
    """The range of keys that queries first..first + BLOCK − 1 may see, from the start of a block of keys."""
    low, high = 0, count
    if CAUSAL:
        high = min(high, first + BLOCK)
    if window is not None:
        low = max(first - window, 0) // VISITED * VISITED
        high = min(high, first + BLOCK + window)
    return low, high


@triton.jit(do_not_specialize=["blocks", "tokens", "window"])
def _forward_blocks(
    query,
    key,
    value,
    out,  # [T, H, d], contiguous
    lse,  # [H, T]
    starts,
    seed,
    blocks,  # of the longest text
    tokens,  # T
    heads,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP_BELOW: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    VISITED: tl.constexpr,
):
    head, start, count, first = place(starts, blocks, heads, BLOCK)
    if first >= count:
        return
    rows = first + tl.arange(0, BLOCK)
    inside = rows < count
    token = start.to(tl.int64)
    at = (token + first).to(tl.int64)
    q = load_rows(query + at * query_stride + head * query_head, query_stride, tl.arange(0, BLOCK), inside, D, BLOCK_D)
    key += token * key_stride + head // GROUP * key_head
    value += token * value_stride + head // GROUP * value_head
    if DROP_BELOW > 0:
        word = head_key(seed, head)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    o = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    low, high = keys_seen(first, count, window, CAUSAL, BLOCK, VISITED)
    for begin in range(low, high, VISITED):
        columns = begin + tl.arange(0, VISITED)
        k = load_rows(key, key_stride, columns.to(tl.int64), columns < count, D, BLOCK_D)
        v = load_rows(value, value_stride, columns.to(tl.int64), columns < count, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        x = tl.where(allowed_pairs(rows[:, None], columns[None, :], count, window, CAUSAL), x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # a row may see nothing of a block: −∞ less −∞ is NaN
        e = tl.exp2(x - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(e, 1)
        if DROP_BELOW > 0:
            e = tl.where(kept(word, (start + rows)[:, None], (start + columns)[None, :], DROP_BELOW), e, 0.0)
        o = tl.dot(e.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        top = higher
    total = tl.where(inside, total, 1.0)
    o = o * (KEEP_SCALE / total)[:, None]
    store_rows(out + (at * heads + head) * D, heads * D, tl.arange(0, BLOCK), inside, o, D, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * tokens + start + rows, top + tl.log2(total), inside)


def forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, mask: Mask, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    """The output [T, H, d] in the inputs' dtype and lse [H, T] float32; arguments as `kernels.attention.packed_attention` has them."""
    T, heads, width = query.shape
    out, lse = query.new_empty(query.shape), query.new_empty((heads, T), dtype=torch.float32)
    use = (settings or settings_for(query.dtype, width)).forward
    blocks, n = triton.cdiv(longest, use.kept), len(starts) - 1
    if n and T:
        _forward_blocks[(n * blocks * heads,)](
            query, key, value, out, lse, starts, mask.seed, blocks, T, heads,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], mask.scale * LOG2E, mask.window,
            **constants(query, key, mask), BLOCK=use.kept, VISITED=use.visited, num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
    return out, lse
