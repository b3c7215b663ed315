"""The layers of the BERT family on packed texts, in few passes over memory: same weights, same names, same mathematics.

Dropout masks are functions of seeds that each forward pass draws, so a pass without a graph has the very bits of the one with it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kernels.post_norm_layer import Factors, Layer, Parameters, factors, post_norm_layer
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
        self._read: dict[int, tuple[tuple[object, ...], Factors]] = {}

    def forward(
        self, hidden_states: Tensor, *, packed_starts: Tensor, packed_longest: int, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """hidden_states [1, T, H], the embeddings of packed texts, to last_hidden_state [1, T, H]."""
        stream = hidden_states[0]  # [T, H]: float32, float64 where the weights are
        device = stream.device
        half = torch.is_autocast_enabled(device.type) and stream.dtype == torch.float32
        rounded = stream.to(torch.get_autocast_dtype(device.type)) if half else stream
        dropouts = [_dropouts(layer) if self.training else (0.0, 0.0, 0.0) for layer in self.layer]
        seeds = draw_seeds(3 * len(dropouts), device).split(1) if max(map(max, dropouts)) > 0 else (None,) * (3 * len(dropouts))
        with torch.autocast(device.type, enabled=False):
            for i, module in enumerate(self.layer):
                heads, eps = _shape(module)
                layer = Layer(heads, eps, packed_starts, packed_longest, dropouts[i], seeds[3 * i : 3 * i + 3])  # type: ignore[arg-type]
                parameters = _parameters(module)
                stream, rounded = post_norm_layer(stream, rounded, layer, self._factors(i, parameters, rounded.dtype), parameters)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=stream[None])

    def _factors(self, i: int, parameters: Parameters, dtype: torch.dtype) -> Factors:
        """The rounded weights of layer i, made anew only when a weight has changed: once a step, not once a chunk."""
        state = (dtype, *((p.data_ptr(), p._version) for p in parameters))
        if i not in self._read or self._read[i][0] != state:
            self._read[i] = (state, factors(parameters, dtype))
        return self._read[i][1]

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLayers:
        return FusedLayers(copy.deepcopy(self.layer, memo)).train(self.training)


def _parameters(layer: Any) -> Parameters:
    attention, attended, widened, output = layer.attention.self, layer.attention.output, layer.intermediate.dense, layer.output
    linear = (attention.query, attention.key, attention.value, attended.dense)
    pairs = (*linear, attended.LayerNorm, widened, output.dense, output.LayerNorm)
    return Parameters(*(tensor for module in pairs for tensor in (module.weight, module.bias)))


def _shape(layer: Any) -> tuple[int, float]:
    return layer.attention.self.num_attention_heads, layer.output.LayerNorm.eps


def _dropouts(layer: Any) -> tuple[float, float, float]:
    return layer.attention.self.dropout.p, layer.attention.output.dropout.p, layer.output.dropout.p


def _linear_layers(layer: Any) -> list[nn.Module]:
    own = layer.attention.self
    return [own.query, own.key, own.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense]
