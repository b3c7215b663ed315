"""A post-norm transformer layer (BERT's) on packed texts, forward and backward written out.

With x the residual stream, and everything between matrix products one pass over memory:

    a = x + dropout(attention(x W_qkv) W_attended),   y = LayerNorm(a)
    z = y + dropout(gelu(y W_widened) W_narrowed),    x' = LayerNorm(z)

The stream is float32; matrix products read it rounded to the computing dtype, and write the gradients of weights in float32. Dropout
masks are hashes of seeds. One autograd node a layer: on a GPU the host would otherwise be slower than the device.
(Vaswani et al. 2017, arXiv:1706.03762; Devlin et al. 2019, arXiv:1810.04805)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import attention_backward, attention_forward
from kernels.attention_reference import Mask
from kernels.fused_layer import column_sum, gelu_backward, gelu_forward, norm_backward, norm_forward

_HALF = (torch.bfloat16, torch.float16)


class Parameters(NamedTuple):
    """The layer's own, as they are trained: W [out, in], b [out]; D the width of the stream, F of the widened one."""

    query_weight: Tensor  # [D, D]
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    attended_weight: Tensor  # [D, D]
    attended_bias: Tensor
    attended_norm_weight: Tensor
    attended_norm_bias: Tensor
    widened_weight: Tensor  # [F, D]
    widened_bias: Tensor
    narrowed_weight: Tensor  # [D, F]
    narrowed_bias: Tensor
    narrowed_norm_weight: Tensor
    narrowed_norm_bias: Tensor


class Factors(NamedTuple):
    """What the matrix products read: the parameters in the computing dtype."""

    qkv: Tensor  # [3 D, D]
    qkv_bias: Tensor  # [3 D]
    attended: Tensor  # [D, D]
    widened: Tensor  # [F, D]
    narrowed: Tensor  # [D, F]


@dataclass(frozen=True)
class Layer:
    """What else a layer depends on: its shape, its dropouts and their seeds."""

    heads: int
    eps: float
    starts: Tensor  # [n + 1] int32: of the texts
    longest: int
    dropouts: tuple[float, float, float]  # of attention probabilities, of what attention adds, of what the widened part adds
    seeds: tuple[Tensor | None, Tensor | None, Tensor | None]  # [1] int64 each

    def mask(self, width: int) -> Mask:
        """Of attention between heads of `width` dimensions."""
        return Mask(width**-0.5, self.dropouts[0], self.seeds[0], False, None)


def factors(parameters: Parameters, dtype: torch.dtype) -> Factors:
    """`parameters` as matrix products in `dtype` read them; no gradient flows back through this."""
    p = Parameters(*(parameter.detach() for parameter in parameters))
    qkv = torch.cat([p.query_weight, p.key_weight, p.value_weight]).to(dtype)
    bias = torch.cat([p.query_bias, p.key_bias, p.value_bias]).to(dtype)
    return Factors(qkv, bias, p.attended_weight.to(dtype), p.widened_weight.to(dtype), p.narrowed_weight.to(dtype))


def post_norm_layer(stream: Tensor, rounded: Tensor, layer: Layer, read: Factors, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """The stream after the layer [T, D], and the same rounded.

    stream [T, D] float32, rounded [T, D] the same in the computing dtype (float64 and float32: one tensor twice), `read` the present
    `factors` of `parameters`. Differentiable once in stream, rounded and parameters.
    """
    low = None if rounded.dtype == stream.dtype else rounded
    stream, low = _PostNormLayer.apply(stream, low, layer, read, *parameters)
    return stream, stream if low is None else low


class _PostNormLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, low: Tensor | None, layer: Layer, read: Factors, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        p = Parameters(*tensors)
        x = stream if low is None else low
        qkv = torch.addmm(read.qkv_bias, x, read.qkv.T).view(len(x), 3, layer.heads, -1)  # [T, 3, heads, d]
        query, key, value = qkv.unbind(1)
        context, lse = attention_forward(query, key, value, layer.starts, layer.longest, layer.mask(qkv.shape[-1]))
        added = context.flatten(1) @ read.attended.T  # [T, D]
        middle, middle_low, *middle_statistics = norm_forward(
            added, p.attended_bias, stream, p.attended_norm_weight, p.attended_norm_bias, layer.seeds[1], layer.eps, layer.dropouts[1]
        )
        y = middle if low is None else middle_low
        wide = y @ read.widened.T  # [T, F], before its bias
        activated = gelu_forward(wide, p.widened_bias)
        narrow = activated @ read.narrowed.T  # [T, D]
        out, out_low, *out_statistics = norm_forward(
            narrow, p.narrowed_bias, middle, p.narrowed_norm_weight, p.narrowed_norm_bias, layer.seeds[2], layer.eps, layer.dropouts[2]
        )
        ctx.layer, ctx.read, ctx.is_rounded = layer, read, low is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            stream, x, qkv, context, lse, added, *middle_statistics, middle, y, wide, activated, narrow, *out_statistics, *p
        )  # fmt: skip
        return out, None if low is None else out_low

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dout_low: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, read = ctx.layer, ctx.read
        stream, x, qkv, context, lse, added, mean1, rstd1, middle, y, wide, activated, narrow, mean2, rstd2, *tensors = ctx.saved_tensors
        p = Parameters(*tensors)
        dnarrow, dmiddle, of_norm2 = norm_backward(
            dout, dout_low, narrow, p.narrowed_bias, middle, p.narrowed_norm_weight, mean2, rstd2, layer.seeds[2], layer.dropouts[2]
        )
        dnarrowed = _weight_gradient(dnarrow, activated)
        dwide, dwidened_bias = gelu_backward(dnarrow @ read.narrowed, wide, p.widened_bias)
        dwidened = _weight_gradient(dwide, y)
        dy = dwide @ read.widened
        dmiddle, dmiddle_low = (dmiddle, dy) if ctx.is_rounded else (dmiddle + dy, None)
        dadded, dstream, of_norm1 = norm_backward(
            dmiddle, dmiddle_low, added, p.attended_bias, stream, p.attended_norm_weight, mean1, rstd1, layer.seeds[1], layer.dropouts[1]
        )
        dattended = _weight_gradient(dadded, context.flatten(1))
        dcontext = (dadded @ read.attended).view(context.shape)
        (query, key, value), mask = qkv.unbind(1), layer.mask(qkv.shape[-1])
        dqkv = torch.empty_like(qkv)
        dquery, dkey, dvalue = dqkv.unbind(1)
        attention_backward(dcontext, query, key, value, context, lse, layer.starts, layer.longest, mask, (dquery, dkey, dvalue))
        dqkv = dqkv.flatten(1)
        dx = dqkv @ read.qkv
        dx_stream, dx_low = (dstream, dx) if ctx.is_rounded else (dstream + dx, None)
        weights, biases = _weight_gradient(dqkv, x).chunk(3), column_sum(dqkv).chunk(3)
        return (
            dx_stream, dx_low, None, None,
            weights[0], biases[0], weights[1], biases[1], weights[2], biases[2],
            dattended, of_norm1[2], of_norm1[0], of_norm1[1],
            dwidened, dwidened_bias,
            dnarrowed, of_norm2[2], of_norm2[0], of_norm2[1],
        )  # fmt: skip


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x [out, in], accumulated and kept in float32 where the factors are half precision."""
    if dy.dtype in _HALF and dy.is_cuda:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return (dy.T @ x).to(torch.promote_types(dy.dtype, torch.float32))
