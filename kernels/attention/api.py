"""Attention of packed texts: every token looks at its own text only, and nothing is padded.

With P = softmax(scale · Q Kᵀ) over the tokens of a text, output = dropout(P) V. A chunk of texts lies one behind
another in [T, H, d]; `starts` says where. The dropout mask is a pure function of (seed, head, row, column): the
backward pass and a second forward pass draw it again, and nothing of it is stored. Texts of up to 128 tokens are
computed whole, several in one tile (`short`); longer ones block by block with an online softmax (`long`; Dao 2023,
arXiv:2307.08691).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.reference import Heads, Mask, Texts
from kernels.dispatch import on_kernels

__all__ = ["Mask", "packed_attention"]

_WIDEST = 256


def packed_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, mask: Mask) -> Tensor:
    """out_i = Σ_j dropout(softmax_j(scale · ⟨q_i, k_j⟩)) v_j over the tokens j of i's text; [T, H, d] in the inputs'
    dtype.

    query [T, H, d], key and value [T, G, d]: one floating dtype and device, the last dimension contiguous, others may
    be strided; G divides H, and head h reads key head h // (H / G). starts int32 [n + 1] rises from 0 to T: text i has
    the tokens starts_i..starts_{i+1} − 1, none where they are equal. No text has more than `longest` tokens: a GPU
    takes this on trust (it is never asked), a CPU checks it. Under autocast inputs are cast to its dtype.
    Differentiable once in query, key and value; runs repeat bitwise. Raises ValueError where shapes, dtypes, devices or
    numbers do not fit.
    """
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check_tensors(query, key, value)
    scale, dropout, seed, causal, window = mask
    if not 0 <= dropout < 1 or (dropout > 0 and seed is None):
        raise ValueError(
            f"expected dropout in 0..1 (1 excluded) and a seed where it is above 0, received {dropout} and seed {seed}"
        )
    if window is not None and window < 0:
        raise ValueError(f"expected a window of at least 0 tokens, received {window}")
    seed = seed if dropout > 0 else None
    _check_texts(query, starts, longest, seed)
    if torch.compiler.is_compiling():  # one opaque call; elsewhere its dispatch would cost more than the kernels
        return _forward(query, key, value, starts, longest, scale, dropout, seed, causal, window)[0]
    return _PackedAttention.apply(query, key, value, Texts(starts, longest), mask._replace(seed=seed))


def attention_forward(query: Tensor, key: Tensor, value: Tensor, texts: Texts, mask: Mask) -> tuple[Tensor, Tensor]:
    """The output [T, H, d], and on a GPU the log₂-sum-exp of every row, [H, T] float32 (else empty); no graph is made.

    Arguments as `packed_attention` has them, not checked here. Raises ValueError for angles where `turns_heads` is
    false.
    """
    kernels, mask = _kernels(query, key, texts.longest), _narrowed(mask, texts.longest)
    if texts.angles is not None and not turns_heads(query, key, texts.longest):
        raise ValueError("expected no angles: heads of this width, device and length are turned before attention")
    found: tuple[Tensor, Tensor] = kernels.forward(query, key, value, texts, mask)
    return found


def turns_heads(query: Tensor, key: Tensor, longest: int) -> bool:
    """Whether `attention_forward` and `attention_backward` turn queries and keys by `Texts.angles` where these are."""
    kernels = _kernels(query, key, longest)
    return hasattr(kernels, "turns_heads") and bool(kernels.turns_heads(query))


def attention_backward(
    dout: Tensor, qkv: Heads, forward: tuple[Tensor, Tensor], texts: Texts, mask: Mask, into: Heads | None = None
) -> Heads:
    """The gradients at query, key and value, written `into` tensors like them whose tokens' heads are contiguous (None:
    new ones).

    `forward`: what `attention_forward` gave; what it does not need of that may be anything.
    """
    query, key, value = qkv
    into = into or (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    kernels, mask = _kernels(query, key, texts.longest), _narrowed(mask, texts.longest)
    kernels.backward(dout, qkv, forward, into, texts, mask)
    return into


def _narrowed(mask: Mask, longest: int) -> Mask:
    """`mask` without a window that hides nothing, which would cost time."""
    return mask._replace(window=None) if mask.window is not None and mask.window >= longest - 1 else mask


_MASK = "float scale, float dropout, Tensor? seed, bool causal, SymInt? window"


@torch.library.custom_op(
    "bigbatch::packed_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor starts, SymInt longest, {_MASK}) -> (Tensor, Tensor)",
)
def _forward(query, key, value, starts, longest, *mask):  # type: ignore[no-untyped-def]
    return attention_forward(query, key, value, Texts(starts, longest), Mask(*mask))


@torch.library.custom_op(
    "bigbatch::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? out, Tensor lse, Tensor starts, "
    f"SymInt longest, {_MASK}) -> (Tensor, Tensor, Tensor)",
)
def _backward(dout, query, key, value, *others):  # type: ignore[no-untyped-def]
    out, lse, starts, longest, *mask = others
    out = dout if out is None else out  # short texts do not need it
    return attention_backward(dout, (query, key, value), (out, lse), Texts(starts, longest), Mask(*mask))


@_forward.register_fake
def _(query, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), _row_statistics(query)


@_backward.register_fake
def _(dout, query, key, value, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, starts, longest, scale, dropout, seed, causal, window = inputs
    out = output[0] if _kernels(query, key, longest).READS_OUTPUT else None
    ctx.numbers = (longest, scale, dropout, causal, window)
    ctx.save_for_backward(query, key, value, out, output[1], starts, seed)


def _differentiate(ctx, dout, _):  # type: ignore[no-untyped-def]
    *saved, starts, seed = ctx.saved_tensors
    longest, scale, dropout, causal, window = ctx.numbers
    gradients = _backward(dout, *saved, starts, longest, scale, dropout, seed, causal, window)
    return *gradients, *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_remember)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, texts: Texts, mask: Mask) -> Tensor:
        out, lse = attention_forward(query, key, value, texts, mask)
        ctx.longest, ctx.mask = texts.longest, mask
        kept = out if _kernels(query, key, texts.longest).READS_OUTPUT else texts.starts
        ctx.save_for_backward(query, key, value, kept, lse, texts.starts)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, starts = ctx.saved_tensors
        texts = Texts(starts, ctx.longest)
        return *attention_backward(gradients[0], (query, key, value), (out, lse), texts, ctx.mask), None, None


def _kernels(query: Tensor, key: Tensor, longest: int) -> ModuleType:
    """Whose `forward` and `backward` serve texts of up to `longest` tokens."""
    if not on_kernels(query):
        return reference
    from kernels.attention import long, short

    return long if longest > short.most_tokens(query, key) else short


def _row_statistics(query: Tensor) -> Tensor:
    return query.new_empty((query.shape[1], query.shape[0]) if on_kernels(query) else (0, 0), dtype=torch.float32)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [list(x.shape) for x in (query, key, value)]
    T, H, d = query.shape if query.ndim == 3 else (0, 0, 0)
    if (
        query.ndim != 3
        or key.ndim != 3
        or key.shape != value.shape
        or key.shape[0] != T
        or key.shape[2] != d
        or not 1 <= d <= _WIDEST
    ):
        raise ValueError(f"expected query [T, H, d], key and value [T, G, d] with d in 1..{_WIDEST}, received {shapes}")
    if key.shape[1] < 1 or H % key.shape[1]:
        raise ValueError(f"expected a number of query heads that the {key.shape[1]} key heads divide, received {H}")
    kinds = {(x.dtype, x.device) for x in (query, key, value)}
    if len(kinds) > 1 or not query.is_floating_point():
        raise ValueError(
            f"expected query, key and value of one floating dtype on one device, received {sorted(map(str, kinds))}"
        )
    if any(x.stride(2) != 1 for x in (query, key, value)):
        raise ValueError(
            f"expected a contiguous last dimension, received strides {[x.stride() for x in (query, key, value)]}"
        )


def _check_texts(query: Tensor, starts: Tensor, longest: int, seed: Tensor | None) -> None:
    if starts.dtype != torch.int32 or starts.ndim != 1 or starts.device != query.device or not starts.is_contiguous():
        raise ValueError(
            f"expected starts [n + 1] int32 on {query.device}, received {starts.dtype} {list(starts.shape)} on "
            f"{starts.device}"
        )
    if longest < 1:
        raise ValueError(f"expected longest of at least 1 token, received {longest}")
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != query.device):
        raise ValueError(
            f"expected seed [1] int64 on {query.device}, received {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
