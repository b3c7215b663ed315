# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of packed attention for texts longer than a tile: block by block, with an online softmax.

A program of the forward and of the dQ kernel holds a block of one text's queries and visits the keys that these may
see; a program of the dK, dV kernel holds a block of keys and visits queries. In base 2, with x = scale · log₂e · ⟨q_i,
k_j⟩ and lse_i = log₂ Σ_j 2^x_ij:

    P_ij = 2^(x_ij − lse_i),   dS = P ∘ (dP − delta_i),   delta_i = Σ_j P_ij dP_ij = ⟨o_i, do_i⟩    (Dao 2023,
    arXiv:2307.08691)

Blocks behind a text's end have nothing to do. No sum crosses programs, so runs repeat bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.elements import LOG2E, constants, head_key, kept, load_rows, store_rows
from kernels.attention.reference import Heads, Mask, Texts

READS_OUTPUT = True  # whether `backward` reads what `forward` gave first


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
    128: Settings(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1)),
    256: Settings(Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1)),
}
_FLOAT = {
    64: Settings(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: Settings(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    256: Settings(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def settings_for(dtype: torch.dtype, width: int) -> Settings:
    """The pinned blocks for heads of `width` ≤ 256 (tuned on an H100; 128 on an H200, texts of 75 to 256 tokens)."""
    table = _FLOAT if dtype == torch.float32 else _HALF
    return next(settings for most, settings in table.items() if width <= most)


@triton.jit
def block_of_program(starts, blocks, heads, BLOCK: tl.constexpr):
    """(head, the text's first token, its number of tokens, where this program's block begins in it)."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    start = tl.load(starts + block // blocks)
    return head, start, tl.load(starts + block // blocks + 1) - start, block % blocks * BLOCK


@triton.jit
def block_rows(start, first, count, BLOCK: tl.constexpr):
    """(0..BLOCK − 1, the block's rows in the text, which exist, the text's first token, the block's first token)."""
    local = tl.arange(0, BLOCK)
    token = start.to(tl.int64)
    return local, first + local, first + local < count, token, token + first


@triton.jit
def load_visited(left, right, left_stride, right_stride, rows, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same rows of two tensors, counted from the text's first token; zeros behind its end."""
    at, inside = rows.to(tl.int64), rows < count
    return load_rows(left, left_stride, at, inside, D, BLOCK_D), load_rows(right, right_stride, at, inside, D, BLOCK_D)


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
    query, key, value,
    out,  # [T, H, d], contiguous
    lse,  # [H, T]
    starts,
    seed,
    blocks,  # of the longest text
    tokens,  # T
    heads,
    query_stride, query_head, key_stride, key_head, value_stride, value_head,
    scale_log2,
    window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, VISITED: tl.constexpr,
):  # fmt: skip
    head, start, count, first = block_of_program(starts, blocks, heads, BLOCK)
    if first >= count:
        return
    local, rows, inside, token, at = block_rows(start, first, count, BLOCK)
    q = load_rows(query + at * query_stride + head * query_head, query_stride, local, inside, D, BLOCK_D)
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
        k, v = load_visited(key, value, key_stride, value_stride, columns, count, D, BLOCK_D)
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
    store_rows(out + (at * heads + head) * D, heads * D, local, inside, o, D, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * tokens + start + rows, top + tl.log2(total), inside)


@triton.jit(do_not_specialize=["blocks", "tokens", "window"])
def _dquery_blocks(
    dout, query, key, value,
    out,  # [T, H, d], contiguous
    lse,  # [H, T]
    delta,  # [H, T], written here for the other kernel
    dquery,  # [T, H, d], each token's heads contiguous
    starts,
    seed,
    blocks,
    tokens,
    heads,
    dout_stride, dout_head, query_stride, query_head, key_stride, key_head, value_stride, value_head,
    dquery_stride,
    scale, scale_log2, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, VISITED: tl.constexpr,
):  # fmt: skip
    head, start, count, first = block_of_program(starts, blocks, heads, BLOCK)
    if first >= count:
        return
    local, rows, inside, token, at = block_rows(start, first, count, BLOCK)
    q = load_rows(query + at * query_stride + head * query_head, query_stride, local, inside, D, BLOCK_D)
    do = load_rows(dout + at * dout_stride + head * dout_head, dout_stride, local, inside, D, BLOCK_D)
    o = load_rows(out + (at * heads + head) * D, heads * D, local, inside, D, BLOCK_D)
    statistics = head.to(tl.int64) * tokens + start + rows
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + statistics, row_delta, inside)
    row_lse = tl.load(lse + statistics, inside, other=float("inf"))
    key += token * key_stride + head // GROUP * key_head
    value += token * value_stride + head // GROUP * value_head
    if DROP_BELOW > 0:
        word = head_key(seed, head)
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    low, high = keys_seen(first, count, window, CAUSAL, BLOCK, VISITED)
    for begin in range(low, high, VISITED):
        columns = begin + tl.arange(0, VISITED)
        k, v = load_visited(key, value, key_stride, value_stride, columns, count, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(x * scale_log2 - row_lse[:, None])
        p = tl.where(allowed_pairs(rows[:, None], columns[None, :], count, window, CAUSAL), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROP_BELOW > 0:
            dp = tl.where(
                kept(word, (start + rows)[:, None], (start + columns)[None, :], DROP_BELOW), dp * KEEP_SCALE, 0.0
            )
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dquery + at * dquery_stride + head * D, dquery_stride, local, inside, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["blocks", "tokens", "window"])
def _dkey_blocks(
    dout, query, key, value,
    lse,
    delta,
    dkey,  # [T, G, d], each token's heads contiguous
    dvalue,
    starts,
    seed,
    blocks,
    tokens,
    key_heads,
    dout_stride, dout_head, query_stride, query_head, key_stride, key_head, value_stride, value_head,
    dkey_stride,
    scale, scale_log2, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, DROP_BELOW: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, VISITED: tl.constexpr,
):  # fmt: skip
    group, start, count, first = block_of_program(starts, blocks, key_heads, BLOCK)
    if first >= count:
        return
    local, columns, inside, token, at = block_rows(start, first, count, BLOCK)
    k = load_rows(key + at * key_stride + group * key_head, key_stride, local, inside, D, BLOCK_D)
    v = load_rows(value + at * value_stride + group * value_head, value_stride, local, inside, D, BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    low, high = 0, count
    if CAUSAL:
        low = first // VISITED * VISITED
    if window is not None:
        low = max(low, max(first - window, 0) // VISITED * VISITED)
        high = min(high, first + BLOCK + window)
    for member in range(GROUP):
        head = group * GROUP + member
        head_query = query + token * query_stride + head * query_head
        head_dout = dout + token * dout_stride + head * dout_head
        statistics = head.to(tl.int64) * tokens + start
        if DROP_BELOW > 0:
            word = head_key(seed, head)
        for begin in range(low, high, VISITED):
            rows = begin + tl.arange(0, VISITED)
            q, do = load_visited(head_query, head_dout, query_stride, dout_stride, rows, count, D, BLOCK_D)
            row_lse = tl.load(lse + statistics + rows, rows < count, other=float("inf"))
            row_delta = tl.load(delta + statistics + rows, rows < count, other=0.0)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [keys, queries]
            p = tl.exp2(x * scale_log2 - row_lse[None, :])
            p = tl.where(allowed_pairs(rows[None, :], columns[:, None], count, window, CAUSAL), p, 0.0)
            if DROP_BELOW > 0:  # the sign remembers what was dropped
                p = tl.where(kept(word, (start + rows)[None, :], (start + columns)[:, None], DROP_BELOW), p, -p)
            dv = tl.dot(tl.maximum(p, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dp = tl.where(p > 0, dp * KEEP_SCALE, 0.0)
            ds = tl.abs(p) * (dp - row_delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    store_rows(dkey + at * dkey_stride + group * D, dkey_stride, local, inside, dk * scale, D, BLOCK_D)
    store_rows(dvalue + at * dkey_stride + group * D, dkey_stride, local, inside, dv * KEEP_SCALE, D, BLOCK_D)


def forward(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, mask: Mask, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    """The output [T, H, d] in the inputs' dtype and lse [H, T] float32; arguments as
    `kernels.attention.api.packed_attention` has them.
    """
    T, heads, width = query.shape
    out, lse = query.new_empty(query.shape), query.new_empty((heads, T), dtype=torch.float32)
    use = (settings or settings_for(query.dtype, width)).forward
    blocks, n = triton.cdiv(texts.longest, use.kept), len(texts.starts) - 1
    if n and T:
        _forward_blocks[(n * blocks * heads,)](
            query, key, value, out, lse, texts.starts, mask.seed, blocks, T, heads,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], mask.scale * LOG2E, mask.window,
            **constants(query, key, mask), BLOCK=use.kept, VISITED=use.visited, num_warps=use.warps,
            num_stages=use.stages,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    qkv: Heads,
    forward: tuple[Tensor, Tensor],
    into: Heads,
    texts: Texts,
    mask: Mask,
    settings: Settings | None = None,
) -> None:
    """As `short.backward`; `forward`: output and lse, as the function of that name gave them."""
    query, key, value = qkv
    T, heads, width = query.shape
    out, lse = forward
    delta = torch.empty_like(lse)
    settings, n = settings or settings_for(query.dtype, width), len(texts.starts) - 1
    strides = (*dout.stride()[:2], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    numbers = (mask.scale, mask.scale * LOG2E, mask.window)
    if n and T:
        use = settings.dquery
        blocks = triton.cdiv(texts.longest, use.kept)
        _dquery_blocks[(n * blocks * heads,)](
            dout, *qkv, out, lse, delta, into[0], texts.starts, mask.seed, blocks, T, heads, *strides,
            into[0].stride(0), *numbers, **constants(query, key, mask), BLOCK=use.kept, VISITED=use.visited,
            num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
        use = settings.dkey
        blocks = triton.cdiv(texts.longest, use.kept)
        _dkey_blocks[(n * blocks * key.shape[1],)](
            dout, *qkv, lse, delta, into[1], into[2], texts.starts, mask.seed, blocks, T, key.shape[1], *strides,
            into[1].stride(0), *numbers, **constants(query, key, mask), BLOCK=use.kept, VISITED=use.visited,
            num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
