"""A post-norm transformer layer (BERT's) on packed texts, forward and backward written out.

With x the residual stream, and everything between matrix products one pass over memory:

    y  = LayerNorm(x + dropout(attention(x W_qkv) W_attention_out))
    x' = LayerNorm(y + dropout(gelu(y W_ffn_in) W_ffn_out))

The stream is float32; matrix products read it rounded to the computing dtype, and the gradients of weights come out in
float32. Dropout masks are hashes of seeds. One autograd node a layer: with a node for each operation the host would be
slower than the GPU. (Vaswani et al. 2017, arXiv:1706.03762; Devlin et al. 2019, arXiv:1810.04805)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kernels.attention.api import attention_backward, attention_forward
from kernels.attention.reference import Mask, Texts
from kernels.layers.api import Norm, norm_backward, norm_forward
from kernels.layers.gelu_product import gelu_product, gelu_product_backward, transposed


class Parameters(NamedTuple):
    """The layer's own, as they are trained: W [out, in], b [out]; D the width of the stream, F the feed-forward one."""

    query_weight: Tensor  # [D, D]
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    attention_out_weight: Tensor  # [D, D]
    attention_out_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    ffn_in_weight: Tensor  # [F, D]
    ffn_in_bias: Tensor
    ffn_out_weight: Tensor  # [D, F]
    ffn_out_bias: Tensor
    ffn_norm_weight: Tensor
    ffn_norm_bias: Tensor


class RoundedWeights(NamedTuple):
    """What the matrix products read: the parameters in the computing dtype."""

    qkv: Tensor  # [3 D, D]
    qkv_bias: Tensor  # [3 D]
    attention_out: Tensor  # [D, D]
    ffn_in: Tensor  # [F, D]
    ffn_in_bias: Tensor  # [F]
    ffn_out: Tensor  # [D, F]
    ffn_out_transposed: Tensor  # [F, D], as `gelu_product_backward` reads it


class LayerSettings(NamedTuple):
    """What else a layer depends on: its shape, its dropouts and their seeds."""

    heads: int
    eps: float
    texts: Texts
    dropouts: tuple[float, float, float]  # of attention probabilities, of what attention and the feed-forward part add
    seeds: tuple[Tensor | None, Tensor | None, Tensor | None]  # [1] int64 each

    def mask(self, width: int) -> Mask:
        """Of attention between heads of `width` dimensions."""
        dropout, seed = self.dropouts[0], self.seeds[0]
        return Mask(width**-0.5, dropout, seed if dropout > 0 else None)


class SavedActivations(NamedTuple):
    """What of a layer takes longest to compute for the memory it takes: in half precision 4 bytes of a number of the
    stream, and lse.
    """

    context: Tensor  # [T, heads, d]: what attention makes of the values
    lse: Tensor  # its log-sum-exp, as `attention_forward` gives it
    ffn_out: Tensor  # [T, D]: of the second product of the feed-forward part, before its bias


def rounded_weights(parameters: Parameters, dtype: torch.dtype) -> RoundedWeights:
    """`parameters` as matrix products in `dtype` read them; no gradient flows back through this."""
    p = Parameters(*(parameter.detach() for parameter in parameters))
    qkv = torch.cat([p.query_weight, p.key_weight, p.value_weight]).to(dtype)
    bias = torch.cat([p.query_bias, p.key_bias, p.value_bias]).to(dtype)
    attention_out, ffn_in, ffn_out = (w.to(dtype) for w in (p.attention_out_weight, p.ffn_in_weight, p.ffn_out_weight))
    return RoundedWeights(qkv, bias, attention_out, ffn_in, p.ffn_in_bias.to(dtype), ffn_out, transposed(ffn_out))


def post_norm_layer(
    stream: Tensor,
    rounded: Tensor,
    layer: LayerSettings,
    read: RoundedWeights,
    parameters: Parameters,
    saved: SavedActivations | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream after the layer [T, D], and the same rounded.

    stream [T, D] float32 (float64), contiguous; rounded [T, D] the same in the computing dtype, bfloat16 or float16 (or
    `stream` itself: nothing is rounded); `read` the present `rounded_weights` of `parameters` in that dtype. To be
    called with autocast off. One backward pass, without retain_graph, in stream, rounded and parameters; what needs no
    gradient costs no matrix product. It uses `read` as the forward pass did, and raises where a parameter that it reads
    again (attention_out_bias, ffn_out_bias, the norms' weights) was changed in between. `saved` of `without_graph` for
    the same arguments are taken as they are and not computed again; every result keeps its bits. Raises ValueError
    where shapes or dtypes do not fit.
    """
    stream, rounded = _PostNormLayer.apply(
        stream, None if rounded is stream else rounded, layer, read, saved, *parameters
    )
    return stream, stream if rounded is None else rounded


@torch.no_grad()
def without_graph(
    stream: Tensor, rounded: Tensor, layer: LayerSettings, read: RoundedWeights, parameters: Parameters
) -> tuple[Tensor, Tensor, SavedActivations]:
    """The results of `post_norm_layer`, bit by bit, and the products that spare a later call with a graph the most
    work.

    Next to nothing is written that only a backward pass would read.
    """
    read_rounded = None if rounded is stream else rounded
    out, out_rounded, saved, _ = _forward(stream, read_rounded, layer, read, parameters, None, keep=False)
    return out, out if out_rounded is None else out_rounded, saved


def _forward(
    stream: Tensor,
    rounded: Tensor | None,
    layer: LayerSettings,
    read: RoundedWeights,
    p: Parameters,
    known: SavedActivations | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None, SavedActivations, tuple[Tensor | None, ...]]:
    """The stream after the layer, the same rounded, `known` or what is like it, and the rest that a backward pass
    reads; `keep`: with the result of the first product of the feed-forward part.
    """
    x: Any = stream if rounded is None else rounded
    T, D = x.shape
    qkv = linear(x, read.qkv, read.qkv_bias).view(T, 3, layer.heads, D // layer.heads)
    if known is None:
        query, key, value = qkv.unbind(1)
        context, lse = attention_forward(query, key, value, layer.texts, layer.mask(qkv.shape[3]))
    else:
        if known.ffn_out.shape != x.shape:
            raise ValueError(f"expected products of {list(x.shape)} numbers, received of {list(known.ffn_out.shape)}")
        context, lse = known.context, known.lse
    attention_out = linear(context.view(T, D), read.attention_out)
    norm1 = Norm(
        attention_out, p.attention_out_bias, stream, p.attention_norm_weight, layer.seeds[1], layer.dropouts[1]
    )
    middle, middle_rounded, statistics1 = norm_forward(norm1, p.attention_norm_bias, layer.eps)
    y: Any = middle if middle_rounded is None else middle_rounded
    ffn_in, activated = gelu_product(y, read.ffn_in, read.ffn_in_bias, keep)
    ffn_out = linear(activated, read.ffn_out) if known is None else known.ffn_out
    norm2 = Norm(ffn_out, p.ffn_out_bias, middle, p.ffn_norm_weight, layer.seeds[2], layer.dropouts[2])
    out, out_rounded, statistics2 = norm_forward(norm2, p.ffn_norm_bias, layer.eps)
    rest = (qkv, attention_out, statistics1, middle, y, ffn_in, activated, statistics2)
    return out, out_rounded, SavedActivations(context, lse, ffn_out), rest


class _PostNormLayer(torch.autograd.Function):
    clear_saved_tensors_on_access = True  # newer torch frees each as the backward pass is done with it

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        rounded: Tensor | None,
        layer: LayerSettings,
        read: RoundedWeights,
        saved: SavedActivations | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        p = Parameters(*tensors)
        out, out_rounded, saved, rest = _forward(stream, rounded, layer, read, p, saved, keep=True)
        ctx.layer, ctx.read, ctx.is_rounded = layer, read, rounded is not None
        ctx.set_materialize_grads(False)
        again = p.attention_out_bias, p.attention_norm_weight, p.ffn_out_bias, p.ffn_norm_weight
        ctx.save_for_backward(stream, stream if rounded is None else rounded, *saved, *rest, *again)
        return out, out_rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dout_rounded: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, read = ctx.layer, ctx.read
        needs_stream, needs_rounded, _, _, _, *needs_parameters = ctx.needs_input_grad
        needs: Any = Parameters(*needs_parameters)
        (
            stream, x, context, lse, ffn_out, qkv, attention_out, statistics1, middle, y, ffn_in, activated,
            statistics2,
            attention_out_bias, attention_norm_weight, ffn_out_bias, ffn_norm_weight,
        ) = ctx.saved_tensors  # fmt: skip
        dout, dout_rounded = (None if g is None else g.contiguous() for g in (dout, dout_rounded))
        norm2 = Norm(ffn_out, ffn_out_bias, middle, ffn_norm_weight, layer.seeds[2], layer.dropouts[2])
        dffn_out, dmiddle, of_norm2 = norm_backward(dout, dout_rounded, norm2, statistics2)
        del norm2, ffn_out, middle
        dffn_out_weight = _weight_gradient(dffn_out, activated) if needs.ffn_out_weight else None
        del activated
        dffn_in, dffn_in_bias = gelu_product_backward(dffn_out, read.ffn_out_transposed, ffn_in)
        del dffn_out, ffn_in
        dffn_in_weight = _weight_gradient(dffn_in, y) if needs.ffn_in_weight else None
        dmiddle, dmiddle_rounded = _to_both(dmiddle, dffn_in @ read.ffn_in, ctx.is_rounded)
        del dffn_in, y
        norm1 = Norm(
            attention_out, attention_out_bias, stream, attention_norm_weight, layer.seeds[1], layer.dropouts[1]
        )
        dattention_out, dstream, of_norm1 = norm_backward(dmiddle, dmiddle_rounded, norm1, statistics1)
        del norm1, dmiddle, dmiddle_rounded, attention_out, stream
        dattention_out_weight = (
            _weight_gradient(dattention_out, context.view(dattention_out.shape)) if needs.attention_out_weight else None
        )
        dcontext = (dattention_out @ read.attention_out).view(context.shape)
        del dattention_out
        dqkv, mask = torch.empty_like(qkv), layer.mask(qkv.shape[3])
        dquery, dkey, dvalue = dqkv.unbind(1)
        attention_backward(dcontext, qkv.unbind(1), (context, lse), layer.texts, mask, (dquery, dkey, dvalue))
        del dcontext, context, qkv
        dqkv = dqkv.flatten(1)  # [T, 3 D]
        weights = (
            _weight_gradient(dqkv, x).chunk(3)
            if needs.query_weight or needs.key_weight or needs.value_weight
            else (None,) * 3
        )
        biases = (
            dqkv.sum(0, dtype=of_norm1.dtype).chunk(3)
            if needs.query_bias or needs.key_bias or needs.value_bias
            else (None,) * 3
        )
        drounded = None
        if needs_stream or needs_rounded:
            dstream, drounded = _to_both(dstream, dqkv @ read.qkv, ctx.is_rounded)
        return (
            dstream, drounded, None, None, None,
            weights[0], biases[0], weights[1], biases[1], weights[2], biases[2],
            dattention_out_weight, of_norm1[2], of_norm1[0], of_norm1[1],
            dffn_in_weight, dffn_in_bias,
            dffn_out_weight, of_norm2[2], of_norm2[0], of_norm2[1],
        )  # fmt: skip


def _to_both(dstream: Tensor, dread: Tensor, is_rounded: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients at a stream and at its rounded self, which matrix products read; where that is the stream, their
    sum.
    """
    return (dstream, dread) if is_rounded else (dstream.add_(dread), None)


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x [out, in], accumulated and kept in float32 where dy and x are half precision."""
    if dy.dtype not in (torch.bfloat16, torch.float16):
        return dy.T @ x
    if dy.is_cuda:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return dy.T.float() @ x.float()
