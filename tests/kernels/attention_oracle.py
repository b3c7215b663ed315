"""Packed attention by its definition: one [T, T] matrix a head in float64, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels.attention.api import attention_backward, attention_forward, packed_attention
from kernels.attention.reference import Mask, Texts, kept
from kernels.layers.api import rotate_heads, rotate_heads_backward
from kernels.layers.layer import LayerKind, LayerSettings
from tests.kernels.oracle import relative_error

NAMES = ("output", "dquery", "dkey", "dvalue")
Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]  # query [T, H, d], key and value [T, G, d]


def texts(lengths: list[int], device: str = "cpu") -> tuple[Tensor, int]:
    """(starts, longest) of texts one behind another."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).int(), max(lengths)


def each(heads: Heads, change: Callable[[Tensor], Tensor]) -> Heads:
    """`change` of query, of key and of value."""
    query, key, value = heads
    return change(query), change(key), change(value)


def heads_of(
    T: int, H: int, G: int, d: int, dtype: torch.dtype = torch.float64, device: str = "cpu", fused: bool = False
) -> Heads:
    """Leaves that want gradients; `fused`: cut from one buffer."""
    generator = torch.Generator(device).manual_seed(T + H + d)
    buffer = torch.randn(T, H + 2 * G, d, generator=generator, device=device).to(dtype)
    parts = buffer[:, :H], buffer[:, H : H + G], buffer[:, H + G :]
    return each(parts, lambda part: (part if fused else part.contiguous()).detach().requires_grad_())


def dense_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, mask: Mask) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V with everything as a matrix, [T, H, d]."""
    T, H, _ = query.shape
    token = torch.arange(T, device=query.device)
    text = torch.searchsorted(starts.long(), token, right=True)
    allowed = text[:, None] == text[None, :]
    if mask.causal:
        allowed = allowed & (token[:, None] >= token[None, :])
    if mask.window is not None:
        allowed = allowed & ((token[:, None] - token[None, :]).abs() <= mask.window)
    share = H // key.shape[1]
    scores = mask.scale * torch.einsum("ihd,jhd->hij", query, key.repeat_interleave(share, dim=1))
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    if mask.seed is not None and mask.dropout > 0:
        survivors = kept(mask.seed, torch.arange(H, device=query.device), token, token, mask.dropout)
        probabilities = probabilities * survivors / (1 - mask.dropout)
    return torch.einsum("hij,jhd->ihd", probabilities, value.repeat_interleave(share, dim=1))


def turned_errors(heads: Tensor, H: int, G: int, texts: Texts, mask: Mask) -> tuple[dict[str, float], bool]:
    """As `errors`, of a layer's attention between heads [T, H + 2 G, d] that it turns by random angles; and whether
    attention itself turned them. In the oracle, pairs of a head's dimensions are complex numbers.
    """
    T, _, d = heads.shape
    angles = torch.randn(T, d // 2, generator=torch.Generator().manual_seed(2)).to(heads.device)
    layer = LayerSettings(
        LayerKind(H, G, 0.0), texts, (0.0, 0.0, 0.0), (None, None, None), (angles.cos(), angles.sin())
    )
    exact = heads.detach().double().requires_grad_()
    pairs = torch.complex(*exact[:, : H + G].chunk(2, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.cat([pairs.real, pairs.imag], 2)
    want = dense_attention(turned[:, :H], turned[:, H:], exact[:, H + G :], texts.starts, mask)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(heads)
    (expected,) = torch.autograd.grad(want, exact, weights.double())
    given, rotary = layer.rotation(heads, None, None)
    turns = rotary is None
    if rotary is not None:
        heads = rotate_heads(heads.clone(), rotary)
    qkv = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    dheads = torch.empty_like(heads)
    output, lse = attention_forward(*qkv, given, mask)
    into = dheads[:, :H], dheads[:, H : H + G], dheads[:, H + G :]
    attention_backward(weights, qkv, (output, lse), given, mask, into)
    if rotary is not None:
        rotate_heads_backward(dheads, heads, rotary)
    assert expected.norm() > 0
    return {"output": relative_error(output, want), "dheads": relative_error(dheads, expected)}, turns


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, **mask: Any) -> Tensor:
    """`packed_attention` with the mask's fields as arguments."""
    return packed_attention(query, key, value, starts, longest, Mask(**mask))


def errors(inputs: Heads, starts: Tensor, longest: int, **options: Any) -> dict[str, float]:
    """Relative errors of `packed_attention` and its gradients against the definition in float64."""
    exact = each(inputs, lambda x: x.detach().double().requires_grad_())
    output, want = (
        attend(*inputs, starts, longest, **options),
        dense_attention(*exact, starts, Mask(**options)),
    )
    weights = torch.randn(
        output.shape, generator=torch.Generator(output.device).manual_seed(1), device=output.device
    ).to(output.dtype)
    got = [output.detach(), *torch.autograd.grad(output, inputs, weights)]
    wanted = [want.detach(), *torch.autograd.grad(want, exact, weights.double())]
    assert all(y.norm() > 0 for y in wanted)
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in zip(got, [inputs[0], *inputs], strict=True))
    return {name: relative_error(x, y) for name, x, y in zip(NAMES, got, wanted, strict=True)}
