"""A transformer layer on packed texts, forward and backward written out: BERT's, ModernBERT's, Llama's and their kin.

With x the residual stream, h what matrix products read of it, and everything between these products one pass over
memory, a layer is

    y  = x + dropout(attention(h W_qkv) W_attention_out),        g  = norm(y)
    x' = y + dropout(activation(g W_ffn_in) W_ffn_out),          h' = norm(x')

Here the stream is pre-norm, and the second norm is the one that the next layer begins with, or the model's last. A
post-norm stream (BERT's) goes on as g and h' instead of y and x'. Queries and keys may be rotated by their positions,
after a norm of each head; keys may be fewer than queries; the feed-forward part may be gated; what is added to the
stream may be normed itself (Gemma 3).

The stream is float32, or float16 where layers only encode; matrix products read it rounded to the computing dtype, and
the gradients of weights come out in float32. Dropout masks are hashes of seeds. One autograd node a layer: with a node
for each operation the host would be slower than the GPU. (Vaswani et al. 2017, arXiv:1706.03762; Devlin et al. 2019,
arXiv:1810.04805; Xiong et al. 2020, arXiv:2002.04745)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kernels.attention.api import attention_backward, attention_forward, turns_heads
from kernels.attention.reference import Heads, Mask, Texts
from kernels.layers.api import (
    Activation,
    Norm,
    Rotary,
    check_heads,
    gated_backward,
    gated_forward,
    norm_backward,
    norm_forward,
    rotate_heads,
    rotate_heads_backward,
)
from kernels.layers.gelu_product import gelu_product, gelu_product_backward
from kernels.layers.weights import (
    Adapters,
    Parameters,
    RoundedWeights,
    adapter_gradients,
    low_rank_gradients,
    weight_gradient,
)


class LayerKind(NamedTuple):
    """The form of a layer, independent of its weights and texts."""

    heads: int  # H
    key_heads: int  # G
    eps: float
    scale: float | None = None  # of attention; None: 1 / √d
    causal: bool = False
    window: int | None = None  # of attention, in tokens to each side
    gate: Activation | None = None  # None: GELU without a gate
    rms: bool = False  # RMSNorm
    unit_offset: bool = False  # the weights of norms are stored less 1 (Gemma)
    pre_norm: bool = False
    last: bool = False  # of pre-norm layers: the stream behind it is that of the model's last norm

    @property
    def pre_norms(self) -> tuple[bool, bool]:
        """Whether the residual stream is not normalised after attention, and after the feed-forward part."""
        return self.pre_norm, self.pre_norm and not self.last


class LayerSettings(NamedTuple):
    """The settings of one call: the layer's kind, the texts, the dropout rates and their seeds."""

    kind: LayerKind
    texts: Texts
    dropouts: tuple[float, float, float]  # of attention probabilities, of what attention and the feed-forward part add
    seeds: tuple[Tensor | None, Tensor | None, Tensor | None]  # [1] int64 each
    angles: tuple[Tensor, Tensor] | None = None  # cos and sin [T, d/2] of each token's rotation; None: nothing rotates

    def mask(self, width: int) -> Mask:
        """The attention mask for heads of `width` dimensions."""
        kind, dropout, seed = self.kind, self.dropouts[0], self.seeds[0]
        scale = width**-0.5 if kind.scale is None else kind.scale
        return Mask(scale, dropout, seed if dropout > 0 else None, kind.causal, kind.window)

    def rotation(
        self, heads: Tensor, query_weight: Tensor | None, key_weight: Tensor | None
    ) -> tuple[Texts, Rotary | None]:
        """The texts for attention, with angles where attention turns heads itself; else what turns them before.

        heads [T, H + 2 G, d]; the weights are those of their norms.
        """
        kind = self.kind
        if self.angles is None:
            return self.texts, None
        query, key, _ = _query_key_value(heads, heads, kind)
        check_heads(heads, *self.angles)
        if query_weight is None and turns_heads(query, key, self.texts.longest):
            return self.texts._replace(angles=self.angles), None
        weights = self._whole(query_weight), self._whole(key_weight)
        return self.texts, Rotary(*self.angles, kind.heads, kind.key_heads, *weights, kind.eps)

    def norm(self, place: int, added: tuple[Tensor | None, ...], residual: Tensor, weight: Tensor) -> Norm:
        """The norm behind attention (place 1) or behind the feed-forward part (place 2).

        `added`: what the part added, before its bias, the bias, and the weight of its own norm.
        """
        x, bias, added_weight = added
        kind, pre = self.kind, self.kind.pre_norms[place - 1]
        modes = self.seeds[place], self.dropouts[place], kind.rms, pre
        whole: Any = self._whole(weight)
        return Norm(x, bias, residual, whole, *modes, self._whole(added_weight), kind.eps)

    def _whole(self, weight: Tensor | None) -> Tensor | None:
        """The weight of a norm, of which 1 may have been left out."""
        return weight + 1 if self.kind.unit_offset and weight is not None else weight


class SavedActivations(NamedTuple):
    """The results of a layer that cost most time for their memory: in half precision 4 bytes of a number of the
    stream, and lse.
    """

    context: Tensor  # [T, H, d]: what attention makes of the values
    lse: Tensor  # its log-sum-exp, as `attention_forward` gives it
    ffn_out: Tensor  # [T, D]: of the second product of the feed-forward part, before its bias


def transformer_layer(
    stream: Tensor,
    rounded: Tensor,
    layer: LayerSettings,
    read: RoundedWeights,
    parameters: Parameters,
    saved: SavedActivations | None = None,
    adapters: Adapters | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream after the layer [T, D], and what the next layer's matrix products read of it.

    stream [T, D] float32 (float64), contiguous; rounded [T, D] what the products read of it in the computing dtype,
    bfloat16 or float16 (or `stream` itself: nothing is normed or rounded); `read` the present `rounded_weights` of
    `parameters` and `adapters` in that dtype. To be called with autocast off. One backward pass, without retain_graph,
    in stream, rounded, parameters and adapters; what needs no gradient costs no matrix product. It uses `read` as the
    forward pass did, and raises where a parameter that it reads again (biases of the outputs, the norms' weights) was
    changed in between. `saved` of `without_graph` for the same arguments are taken as they are and not computed again;
    every result keeps its bits. Raises ValueError where shapes or dtypes do not fit.
    """
    adapters = adapters or {}
    tensors = [*parameters, *[matrix for adapter in adapters.values() for matrix in adapter[:2]]]
    read_rounded = None if rounded is stream else rounded
    stream, rounded = _Layer.apply(stream, read_rounded, layer, read, saved, tuple(adapters), *tensors)
    return stream, stream if rounded is None else rounded


@torch.no_grad()
def without_graph(
    stream: Tensor, rounded: Tensor, layer: LayerSettings, read: RoundedWeights, parameters: Parameters
) -> tuple[Tensor, Tensor, SavedActivations]:
    """The results of `transformer_layer`, bit by bit, and the products that spare a later call with a graph the most
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
    kind = layer.kind
    heads = linear(x, read.qkv, read.qkv_bias).unflatten(1, (kind.heads + 2 * kind.key_heads, -1))  # [T, H + 2 G, d]
    texts, rotary = layer.rotation(heads, p.query_norm_weight, p.key_norm_weight)
    rotated = heads if rotary is None else rotate_heads(heads, rotary)
    if known is None:
        qkv = _query_key_value(heads, rotated, kind)
        context, lse = attention_forward(*qkv, texts, layer.mask(heads.shape[2]))
    else:
        if known.ffn_out.shape != x.shape:
            raise ValueError(f"expected products of {list(x.shape)} numbers, received of {list(known.ffn_out.shape)}")
        context, lse = known.context, known.lse
    attention_out = linear(context.flatten(1), read.attention_out)
    added = attention_out, p.attention_out_bias, p.attention_added_weight
    norm1 = layer.norm(1, added, stream, p.attention_norm_weight)
    middle, middle_rounded, statistics1 = norm_forward(norm1, p.attention_norm_bias, kind.eps)
    y: Any = middle if middle_rounded is None else middle_rounded
    ffn_in, activated, ffn_out = _feed_forward(y, kind, read, None if known is None else known.ffn_out, keep)
    norm2 = layer.norm(2, (ffn_out, p.ffn_out_bias, p.ffn_added_weight), middle, p.ffn_norm_weight)
    out, out_rounded, statistics2 = norm_forward(norm2, p.ffn_norm_bias, kind.eps)
    rest = (heads, rotated, attention_out, statistics1, middle, y, ffn_in, activated, statistics2)
    return out, out_rounded, SavedActivations(context, lse, ffn_out), rest


def _feed_forward(
    y: Tensor, kind: LayerKind, read: RoundedWeights, known: Tensor | None, keep: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(the first product, what the second one reads, the second product) of the feed-forward part, as far as a backward
    pass reads them; that of a gated part computes the second of them again.
    """
    if kind.gate is None:
        assert read.ffn_in_bias is not None
        ffn_in, activated = gelu_product(y, read.ffn_in, read.ffn_in_bias, keep)
        return ffn_in, activated, linear(activated, read.ffn_out) if known is None else known
    gate_up = linear(y, read.ffn_in)
    return gate_up, None, linear(gated_forward(gate_up, kind.gate), read.ffn_out) if known is None else known


def _query_key_value(heads: Tensor, rotated: Tensor, kind: LayerKind) -> Heads:
    """Views of queries, keys and values in heads [T, H + 2 G, d]; `rotated` begins with queries and keys."""
    end = kind.heads + kind.key_heads
    return rotated[:, : kind.heads], rotated[:, kind.heads : end], heads[:, end:]


class _Layer(torch.autograd.Function):
    clear_saved_tensors_on_access = True  # newer torch frees each as the backward pass is done with it

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        rounded: Tensor | None,
        layer: LayerSettings,
        read: RoundedWeights,
        saved: SavedActivations | None,
        adapted: tuple[str, ...],  # the names of the weights that have adapters
        *tensors: Any,  # `Parameters`, and two matrices of each adapter
    ) -> tuple[Tensor, Tensor | None]:
        p = Parameters(*tensors[: len(Parameters._fields)])
        out, out_rounded, saved, rest = _forward(stream, rounded, layer, read, p, saved, keep=True)
        context, lse, ffn_out = saved
        heads, rotated, attention_out, statistics1, middle, *others = rest
        # A norm reads z again: the stream behind it, or the sum of what was added and the stream before it. The norm of
        # what was added needs the latter.
        first, second = (pre and p.ffn_added_weight is None for pre in layer.kind.pre_norms)
        of_norm1 = (None, middle) if first else (attention_out, stream)
        of_norm2 = (None, out) if second else (ffn_out, middle)
        ctx.layer, ctx.read, ctx.is_rounded = layer, read, rounded is not None
        ctx.rows = [0 if parameter is None else len(parameter) for parameter in p]
        ctx.ranks = {name: len(down) for name, down in zip(adapted, tensors[len(p) :: 2], strict=True)}
        ctx.set_materialize_grads(False)
        again = (
            *(p.attention_out_bias, p.attention_added_weight, p.attention_norm_weight),
            *(p.ffn_out_bias, p.ffn_added_weight, p.ffn_norm_weight),
            *(p.query_norm_weight, p.key_norm_weight),
        )
        x = stream if rounded is None else rounded
        ctx.save_for_backward(x, context, lse, heads, rotated, *of_norm1, statistics1, *of_norm2, *others, *again)
        return out, out_rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dout_rounded: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, read, kind = ctx.layer, ctx.read, ctx.layer.kind
        rows: Any = Parameters(*ctx.rows)
        needs_stream, needs_rounded, _, _, _, _, *needs_tensors = ctx.needs_input_grad
        needs: Any = Parameters(*needs_tensors[: len(ctx.rows)])
        low_rank: dict[str, tuple[Tensor, Tensor] | None] = {}
        (
            x, context, lse, heads, rotated, attention_out, stream, statistics1, ffn_out, middle, y, ffn_in, activated,
            statistics2,
            attention_out_bias, attention_added_weight, attention_norm_weight,
            ffn_out_bias, ffn_added_weight, ffn_norm_weight,
            query_norm_weight, key_norm_weight,
        ) = ctx.saved_tensors  # fmt: skip
        dout, dout_rounded = (None if g is None else g.contiguous() for g in (dout, dout_rounded))
        if dout_rounded is None and kind.pre_norms[1]:
            dout_rounded = torch.zeros_like(x)  # what a sum's gradient is rounded to
        norm2 = layer.norm(2, (ffn_out, ffn_out_bias, ffn_added_weight), middle, ffn_norm_weight)
        dffn_out, dmiddle, of_norm2 = norm_backward(dout, dout_rounded, norm2, statistics2)
        del norm2, ffn_out, middle
        if kind.gate is None:
            dffn_out_weight = weight_gradient(dffn_out, activated) if needs.ffn_out_weight else None
            low_rank["ffn_out"] = low_rank_gradients(dffn_out, activated, read.low_rank.get("ffn_out"))
            del activated
            dffn_in, dffn_in_bias = gelu_product_backward(dffn_out, read.ffn_out_transposed, ffn_in)
        else:
            dffn_in, activated = gated_backward(dffn_out @ read.ffn_out, ffn_in, kind.gate)
            dffn_out_weight = weight_gradient(dffn_out, activated) if needs.ffn_out_weight else None
            low_rank["ffn_out"] = low_rank_gradients(dffn_out, activated, read.low_rank.get("ffn_out"))
            dffn_in_bias = None
            del activated
        del dffn_out, ffn_in
        dffn_in_weight = weight_gradient(dffn_in, y) if needs.ffn_in_weight or needs.ffn_up_weight else None
        low_rank["ffn_in"] = low_rank_gradients(dffn_in, y, read.low_rank.get("ffn_in"))
        dmiddle, dmiddle_rounded = _to_both(dmiddle, dffn_in @ read.ffn_in, ctx.is_rounded or kind.pre_norm)
        del dffn_in, y
        added = attention_out, attention_out_bias, attention_added_weight
        norm1 = layer.norm(1, added, stream, attention_norm_weight)
        dattention_out, dstream, of_norm1 = norm_backward(dmiddle, dmiddle_rounded, norm1, statistics1)
        del norm1, added, dmiddle, dmiddle_rounded, attention_out, stream
        flat = context.flatten(1)
        dattention_out_weight = weight_gradient(dattention_out, flat) if needs.attention_out_weight else None
        low_rank["attention_out"] = low_rank_gradients(dattention_out, flat, read.low_rank.get("attention_out"))
        del flat
        dcontext = (dattention_out @ read.attention_out).view(context.shape)
        del dattention_out
        dheads, mask = torch.empty_like(heads), layer.mask(heads.shape[2])
        qkv, into = (_query_key_value(h, r, kind) for h, r in ((heads, rotated), (dheads, dheads)))
        texts, rotary = layer.rotation(heads, query_norm_weight, key_norm_weight)
        attention_backward(dcontext, qkv, (context, lse), texts, mask, into)
        del dcontext, context, qkv, rotated
        of_heads = None if rotary is None else rotate_heads_backward(dheads, heads, rotary)
        del heads
        dqkv = dheads.flatten(1)  # [T, (H + 2 G) d]
        needs_weight = needs.query_weight or needs.key_weight or needs.value_weight
        needs_bias = needs.query_bias or needs.key_bias or needs.value_bias
        weights = _by_rows(
            weight_gradient(dqkv, x) if needs_weight else None, (rows.query_weight, rows.key_weight, rows.value_weight)
        )
        biases = _by_rows(
            dqkv.sum(0, dtype=of_norm1.dtype) if needs_bias else None, (rows.query_bias, rows.key_bias, rows.value_bias)
        )
        low_rank["qkv"] = low_rank_gradients(dqkv, x, read.low_rank.get("qkv"))
        drounded = None
        if needs_stream or needs_rounded:
            dstream, drounded = _to_both(dstream, dqkv @ read.qkv, ctx.is_rounded)
        dgate, dup = _by_rows(dffn_in_weight, (rows.ffn_in_weight, rows.ffn_up_weight))
        dquery_norm, dkey_norm = (None, None) if of_heads is None else of_heads
        return (
            dstream, drounded, None, None, None, None,
            weights[0], biases[0], weights[1], biases[1], weights[2], biases[2],
            dattention_out_weight, *_of_norm(of_norm1, needs.attention_out_bias, needs.attention_norm_bias),
            dgate, dffn_in_bias,
            dffn_out_weight, *_of_norm(of_norm2, needs.ffn_out_bias, needs.ffn_norm_bias),
            dup, dquery_norm, dkey_norm,
            *(None if weight is None else sums[-1] for weight, sums in (
                (attention_added_weight, of_norm1), (ffn_added_weight, of_norm2),
            )),
            *adapter_gradients(low_rank, rows, ctx.ranks),
        )  # fmt: skip


def _by_rows(gradient: Tensor | None, rows: Sequence[Any]) -> Sequence[Tensor | None]:
    """The parts of a gradient that belong to parameters of so many rows."""
    if gradient is None:
        return [None] * len(rows)
    return [part if count else None for part, count in zip(gradient.split(list(rows)), rows, strict=True)]


def _of_norm(sums: Tensor, needs_bias: bool, needs_norm_bias: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The gradients at the bias before a norm, at its weight and at its bias, out of `norm_backward`'s sums."""
    return sums[2] if needs_bias else None, sums[0], sums[1] if needs_norm_bias else None


def _to_both(dstream: Tensor, dread: Tensor, is_rounded: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients at a stream and at what matrix products read of it; where that is the stream, their sum."""
    return (dstream, dread) if is_rounded else (dstream.add_(dread), None)
