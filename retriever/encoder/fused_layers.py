"""The layers of the BERT family on packed texts, in few passes over memory: same weights, same names, same mathematics.

A layer is four matrix products and four fused kernels: attention within each text, twice dropout + residual + LayerNorm, and GELU. The
residual stream stays fp32, what the matrix products read is rounded once. Dropout masks are functions of seeds that each forward pass
draws, so a pass without a graph has the very bits of the one with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kernels.attention import packed_attention
from kernels.fused_layer import bias_gelu, dropout_add_norm
from retriever.encoder.packed_attention import draw_seeds

FAMILY = frozenset({"bert", "camembert", "electra", "roberta", "xlm-roberta"})


def can_fuse(tower: PreTrainedModel) -> bool:
    """Whether `fuse` knows the layers of `tower`: a BERT-like encoder with exact GELU whose linear layers nobody replaced."""
    config: Any = tower.config
    if config.model_type not in FAMILY:
        return False
    encoder: Any = tower.encoder
    plain = config.hidden_act == "gelu" and not config.is_decoder and config.chunk_size_feed_forward == 0
    return plain and all(type(module) is nn.Linear for layer in encoder.layer for module in _linear_layers(layer))


def fuse(tower: PreTrainedModel) -> None:
    """Puts fused layers into `tower`, which from then on takes packed texts only."""
    encoder: Any = tower.encoder
    tower.encoder = FusedLayers(encoder.layer)


class FusedLayers(nn.Module):
    """Stands where a model's encoder stood; `layer` holds its modules, whose parameters are used and whose forward is not."""

    def __init__(self, layer: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, *, packed_starts: Tensor, packed_longest: int, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """hidden_states [1, T, H], the embeddings of packed texts, to last_hidden_state [1, T, H]."""
        stream = hidden_states[0]  # [T, H]: float32, float64 where the weights are
        device = stream.device
        rounded = stream.to(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else stream
        drops = self.training and max(p for layer in self.layer for p in _dropouts(layer)) > 0
        seeds = draw_seeds(3 * len(self.layer), device).split(1) if drops else [None] * (3 * len(self.layer))
        for i, layer in enumerate(self.layer):
            stream, rounded = self._layer(layer, stream, rounded, packed_starts, packed_longest, *seeds[3 * i : 3 * i + 3])
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=stream[None])

    def _layer(
        self, layer: Any, stream: Tensor, rounded: Tensor, starts: Tensor, longest: int, *seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One layer: the residual stream [T, H], and what matrix products read of it."""
        of_attention, after_attention, after_output = _dropouts(layer) if self.training else (0.0, 0.0, 0.0)
        attention, attended, widened, output = layer.attention.self, layer.attention.output, layer.intermediate.dense, layer.output
        projections = (attention.query, attention.key, attention.value)
        weight, bias = torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])
        qkv = F.linear(rounded, weight, bias).view(len(rounded), 3, attention.num_attention_heads, -1)  # [T, 3, heads, d]
        scale = attention.attention_head_size**-0.5
        query, key, value = qkv.unbind(1)
        context = packed_attention(query, key, value, starts, longest, scale=scale, dropout=of_attention, seed=seeds[0])  # [T, heads, d]
        stream, rounded = _add_norm(F.linear(context.flatten(1), attended.dense.weight), attended, stream, after_attention, seeds[1])
        widened = bias_gelu(F.linear(rounded, widened.weight), widened.bias)  # [T, 4H]
        return _add_norm(F.linear(widened, output.dense.weight), output, stream, after_output, seeds[2])


def _add_norm(x: Tensor, block: Any, stream: Tensor, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """LayerNorm(dropout(x + bias) + stream), in float32 and rounded."""
    norm = block.LayerNorm
    return dropout_add_norm(x, block.dense.bias, stream, norm.weight, norm.bias, eps=norm.eps, dropout=dropout, seed=seed)


def _dropouts(layer: Any) -> tuple[float, float, float]:
    return layer.attention.self.dropout.p, layer.attention.output.dropout.p, layer.output.dropout.p


def _linear_layers(layer: Any) -> list[nn.Module]:
    own = layer.attention.self
    return [own.query, own.key, own.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense]
