# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of packed attention for texts longer than a tile: the backward pass, dQ by blocks of queries, then dK and dV by
blocks of keys. The equations are `kernels.attention_long`'s."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_elements import LOG2E, constants, head_key, kept, load_rows, store_rows
from kernels.attention_long import Settings, allowed_pairs, keys_seen, place, settings_for
from kernels.attention_reference import Mask


@triton.jit(do_not_specialize=["blocks", "tokens", "window"])
def _dquery_blocks(
    dout,
    query,
    key,
    value,
    out,  # [T, H, d], contiguous
    lse,  # [H, T]
    delta,  # [H, T], written here for the other kernel
    dquery,  # [T, H, d], each token's heads contiguous
    starts,
    seed,
    blocks,
    tokens,
    heads,
    dout_stride,
    dout_head,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    dquery_stride,
    scale,
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
    local = tl.arange(0, BLOCK)
    rows = first + local
    inside = rows < count
    token = start.to(tl.int64)
    at = token + first
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
        k = load_rows(key, key_stride, columns.to(tl.int64), columns < count, D, BLOCK_D)
        v = load_rows(value, value_stride, columns.to(tl.int64), columns < count, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(x * scale_log2 - row_lse[:, None])
        p = tl.where(allowed_pairs(rows[:, None], columns[None, :], count, window, CAUSAL), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROP_BELOW > 0:
            dp = tl.where(kept(word, (start + rows)[:, None], (start + columns)[None, :], DROP_BELOW), dp * KEEP_SCALE, 0.0)
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dquery + at * dquery_stride + head * D, dquery_stride, local, inside, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["blocks", "tokens", "window"])
def _dkey_blocks(
    dout,
    query,
    key,
    value,
    lse,
    delta,
    dkey,  # [T, G, d], each token's heads contiguous
    dvalue,
    starts,
    seed,
    blocks,
    tokens,
    key_heads,
    dout_stride,
    dout_head,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    dkey_stride,
    scale,
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
    group, start, count, first = place(starts, blocks, key_heads, BLOCK)
    if first >= count:
        return
    local = tl.arange(0, BLOCK)
    columns = first + local
    inside = columns < count
    token = start.to(tl.int64)
    at = token + first
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
            q = load_rows(head_query, query_stride, rows.to(tl.int64), rows < count, D, BLOCK_D)
            do = load_rows(head_dout, dout_stride, rows.to(tl.int64), rows < count, D, BLOCK_D)
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


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    starts: Tensor,
    longest: int,
    mask: Mask,
    settings: Settings | None = None,
) -> None:
    """As `attention_triton.backward`; `out` and `lse` as forward gave them."""
    T, heads, width = query.shape
    delta = torch.empty_like(lse)
    settings, n = settings or settings_for(query.dtype, width), len(starts) - 1
    strides = (*dout.stride()[:2], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    numbers = (mask.scale, mask.scale * LOG2E, mask.window)
    if n and T:
        use = settings.dquery
        blocks = triton.cdiv(longest, use.kept)
        _dquery_blocks[(n * blocks * heads,)](
            dout, query, key, value, out, lse, delta, into[0], starts, mask.seed, blocks, T, heads, *strides,
            into[0].stride(0), *numbers, **constants(query, key, mask), BLOCK=use.kept, VISITED=use.visited,
            num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
        use = settings.dkey
        blocks = triton.cdiv(longest, use.kept)
        _dkey_blocks[(n * blocks * key.shape[1],)](
            dout, query, key, value, lse, delta, into[1], into[2], starts, mask.seed, blocks, T, key.shape[1], *strides,
            into[1].stride(0), *numbers, **constants(query, key, mask), BLOCK=use.kept, VISITED=use.visited,
            num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
