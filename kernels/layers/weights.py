"""The weights of a layer: as they are trained, as matrix products read them, and the gradients at them.

Adapters (LoRA: Hu et al. 2021, arXiv:2106.09685) are added to a weight before it is rounded, so that a layer with them
costs no further product forward; their gradients are products of low rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.layers.gelu_product import transposed


class Parameters(NamedTuple):
    """The layer's own, as they are trained: W [out, in], b [out]; None: the layer has none.

    D is the width of the stream, F that of the feed-forward part; H query heads and G key heads are d wide. Where key
    and value (up) are None, `query_weight` (`ffn_in_weight`) holds their rows too, one part below another.
    """

    query_weight: Tensor  # [H d, D]
    query_bias: Tensor | None
    key_weight: Tensor | None  # [G d, D]
    key_bias: Tensor | None
    value_weight: Tensor | None  # [G d, D]
    value_bias: Tensor | None
    attention_out_weight: Tensor  # [D, H d]
    attention_out_bias: Tensor | None
    attention_norm_weight: Tensor  # [D]: of the norm behind attention
    attention_norm_bias: Tensor | None
    ffn_in_weight: Tensor  # [F, D]: of the gate, where there is one
    ffn_in_bias: Tensor | None  # needed without a gate; a gated part has none
    ffn_out_weight: Tensor  # [D, F]
    ffn_out_bias: Tensor | None
    ffn_norm_weight: Tensor  # [D]: of the norm behind the feed-forward part
    ffn_norm_bias: Tensor | None
    ffn_up_weight: Tensor | None = None  # [F, D]: of what a gate multiplies
    query_norm_weight: Tensor | None = None  # [d]
    key_norm_weight: Tensor | None = None
    attention_added_weight: Tensor | None = None  # [D]: of an RMSNorm of what attention adds
    ffn_added_weight: Tensor | None = None  # [D]: of an RMSNorm of what the feed-forward part adds; both or none


class Adapter(NamedTuple):
    """A trained low-rank part of a weight: W + scale · up down is in the place of W."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    scale: float


Adapters = Mapping[str, Adapter]  # by the field of `Parameters` that holds the weight

# The weights that each product reads, one below another.
_PARTS = {
    "qkv": ("query_weight", "key_weight", "value_weight"),
    "attention_out": ("attention_out_weight",),
    "ffn_in": ("ffn_in_weight", "ffn_up_weight"),
    "ffn_out": ("ffn_out_weight",),
}


class LowRank(NamedTuple):
    """The adapters of a product's weights beside each other, in the computing dtype: what gradients at them read."""

    down: Tensor  # [R, in]: scale · down of each, one below another
    up: Tensor  # [out, R]: scale · up of each, where its rows and its columns meet; else 0


class RoundedWeights(NamedTuple):
    """The parameters of the matrix products, in the computing dtype; adapters are added before they are rounded."""

    qkv: Tensor  # [(H + 2 G) d, D]
    qkv_bias: Tensor | None
    attention_out: Tensor  # [D, H d]
    ffn_in: Tensor  # [F, D], or [2 F, D]: gate and up
    ffn_in_bias: Tensor | None  # [F]
    ffn_out: Tensor  # [D, F]
    ffn_out_transposed: Tensor  # [F, D], as `gelu_product_backward` reads it
    low_rank: Mapping[str, LowRank] = {}  # by product


@torch.no_grad()
def rounded_weights(parameters: Parameters, dtype: torch.dtype, adapters: Adapters | None = None) -> RoundedWeights:
    """`parameters` as matrix products in `dtype` read them; no gradient flows back through this."""
    adapters = adapters or {}
    merged: dict[str, Any] = {
        name: torch.addmm(getattr(parameters, name), up, down, alpha=scale)
        for name, (down, up, scale) in adapters.items()
    }
    detached: list[Any] = [None if parameter is None else parameter.detach() for parameter in parameters]
    p = Parameters(*detached)._replace(**merged)
    low_rank = {
        product: _low_rank(parameters, names, dtype, adapters)
        for product, names in _PARTS.items()
        if any(name in adapters for name in names)
    }
    ffn_out = p.ffn_out_weight.to(dtype)
    qkv = _joined((p.query_weight, p.key_weight, p.value_weight), dtype)
    qkv_bias = _joined((p.query_bias, p.key_bias, p.value_bias), dtype)
    ffn_in, ffn_in_bias = _joined((p.ffn_in_weight, p.ffn_up_weight), dtype), _joined((p.ffn_in_bias,), dtype)
    assert qkv is not None and ffn_in is not None
    turned = ffn_out.T if ffn_in_bias is None else transposed(ffn_out)
    attention_out = p.attention_out_weight.to(dtype)
    return RoundedWeights(qkv, qkv_bias, attention_out, ffn_in, ffn_in_bias, ffn_out, turned, low_rank)


def _low_rank(p: Parameters, names: Sequence[str], dtype: torch.dtype, adapters: Adapters) -> LowRank:
    """The adapters of the weights called `names`, beside each other."""
    ups = []
    for name in names:
        if name in adapters:
            ups.append(adapters[name].scale * adapters[name].up)
        elif (weight := getattr(p, name)) is not None:
            ups.append(weight.new_zeros(len(weight), 0))
    downs = [adapters[name].scale * adapters[name].down for name in names if name in adapters]
    return LowRank(torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype))


def _joined(parts: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """The parts that are not None, concatenated in `dtype`; a single part is not copied without need."""
    given = [part.to(dtype) for part in parts if part is not None]
    if len(given) < 2:
        return given[0] if given else None
    return torch.cat(given)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x [out, in], accumulated and kept in float32 where dy and x are half precision."""
    if dy.dtype not in (torch.bfloat16, torch.float16):
        return dy.T @ x
    if dy.is_cuda:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return dy.T.float() @ x.float()


def low_rank_gradients(dy: Tensor, x: Tensor, low_rank: LowRank | None) -> tuple[Tensor, Tensor] | None:
    """The gradients at the matrices of a product's adapters, beside each other as in `LowRank`: [R, in], [out, R]."""
    if low_rank is None:
        return None
    return weight_gradient(dy @ low_rank.up, x), weight_gradient(dy, x @ low_rank.down.T)


def adapter_gradients(
    found: Mapping[str, tuple[Tensor, Tensor] | None], rows: Any, ranks: Mapping[str, int]
) -> list[Tensor]:
    """The gradients at `down` and `up` of each adapter, in the order of `ranks`; `rows` of each parameter."""
    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    for product, both in found.items():
        if both is None:
            continue
        ddown, dup = both
        row = rank = 0
        for name in _PARTS[product]:
            below, beside = row + getattr(rows, name), rank + ranks.get(name, 0)
            gradients[name] = ddown[rank:beside], dup[row:below, rank:beside]
            row, rank = below, beside
    return [matrix for name in ranks for matrix in gradients[name]]
