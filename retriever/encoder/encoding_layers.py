"""Fused layers that only encode: what no backward pass will read is not kept, and less goes through memory.

In half precision and without a graph GELU is part of the matrix product before it, in its tanh form, and the residual stream is
float16, eight times finer than bfloat16, from the embeddings on. Both are well below what rounding the matrix products' factors costs, but
an embedding is not bitwise the one of training, nor quite its function: the model's own GELU is the exact one. Padded texts, or float32,
avoid both. Everything else runs as `FusedLayers` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kernels.add_norm import add_norm
from kernels.attention import attention_forward
from kernels.post_norm_layer import Factors, Layer, Parameters
from retriever.encoder.encoding_embeddings import EncodingEmbeddings, only_encodes
from retriever.encoder.fused_embeddings import knows_embeddings
from retriever.encoder.fused_layers import FusedLayers, _read_parameters


def fuse_for_encoding(tower: PreTrainedModel) -> None:
    """Puts encoding layers into `tower`, which `fused_layers.can_fuse` knows; it takes packed texts only from then on."""
    encoder: Any = tower.encoder
    tower.encoder = EncodingLayers(encoder.layer)
    tower.encoder.training = encoder.training  # of it alone: the layers' modules are shared, and have modes of their own
    if knows_embeddings(tower):
        tower.embeddings = EncodingEmbeddings(tower.embeddings)  # type: ignore[arg-type]


@contextmanager
def fused_for_encoding(tower: PreTrainedModel) -> Iterator[None]:
    """Encoding layers instead of fused ones, if `tower` has such, until the block ends: how a model that is being trained encodes."""
    layers: Any = getattr(tower, "encoder", None)
    embeddings: Any = getattr(tower, "embeddings", None)
    if type(layers) is not FusedLayers:
        yield
        return
    fuse_for_encoding(tower)
    try:
        yield
    finally:
        tower.encoder, tower.embeddings = layers, embeddings


class EncodingLayers(FusedLayers):
    """Stands where a model's encoder stood."""

    def forward(
        self, hidden_states: Tensor, *, packed_starts: Tensor, packed_longest: int, **others: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """hidden_states [1, T, H], the embeddings of packed texts, to last_hidden_state [1, T, H] float32."""
        device = hidden_states.device
        if not only_encodes(self, device) or hidden_states.dtype == torch.float64:
            return super().forward(hidden_states, packed_starts=packed_starts, packed_longest=packed_longest, **others)
        dtype = torch.get_autocast_dtype(device.type)
        stream, rounded = hidden_states[0].to(torch.float16), hidden_states[0].to(dtype)  # [T, H]
        with torch.autocast(device.type, enabled=False):
            for i, place in enumerate(self._places):
                parameters = _read_parameters(place.holders)
                layer = Layer(place.heads, place.eps, packed_starts, packed_longest, (0.0, 0.0, 0.0), (None, None, None))
                last = i == len(self._places) - 1
                stream, rounded = _encode(stream, rounded, layer, self._factors(i, parameters, dtype), parameters, last)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=stream[None])


def _encode(stream: Tensor, rounded: Tensor, layer: Layer, read: Factors, p: Parameters, last: bool) -> tuple[Tensor, Tensor]:
    """`post_norm_layer` of stream [T, H] float16 and the same rounded to the computing dtype; what the `last` one gives is float32."""
    qkv = torch.addmm(read.qkv_bias, rounded, read.qkv.T).view(len(rounded), 3, layer.heads, -1)  # [T, 3, heads, d]
    query, key, value = qkv.unbind(1)
    context, _ = attention_forward(query, key, value, layer.starts, layer.longest, layer.mask(qkv.shape[-1]))  # [T, heads, d]
    added = context.flatten(1) @ read.attended.T  # [T, H]
    stream, rounded = add_norm(added, p.attended_bias, stream, p.attended_norm_weight, p.attended_norm_bias, eps=layer.eps)
    widened = torch._addmm_activation(read.widened_bias, rounded, read.widened.T, use_gelu=True)  # [T, F]
    narrow = widened @ read.narrowed.T  # [T, H]
    return add_norm(narrow, p.narrowed_bias, stream, p.narrowed_norm_weight, p.narrowed_norm_bias, eps=layer.eps, last=last)
