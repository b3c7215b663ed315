"""The layers of the BERT family on packed texts, in few passes over memory: same weights, same names, same mathematics.

Dropout masks are functions of seeds that each forward pass draws, so a pass without a graph has the very bits of the
one with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kernels.attention.reference import Texts
from kernels.dispatch import WIDEST_ROW
from kernels.layers.post_norm import (
    LayerSettings,
    Parameters,
    RoundedWeights,
    SavedActivations,
    post_norm_layer,
    rounded_weights,
    without_graph,
)
from retriever.encoder.fused_embeddings import FusedEmbeddings, knows_embeddings
from retriever.encoder.packed_attention import draw_seeds
from retriever.wording import counted

FAMILY = frozenset({"bert", "camembert", "electra", "roberta", "xlm-roberta"})


def can_fuse(tower: PreTrainedModel) -> bool:
    """Whether `fuse` knows the layers of `tower`: a BERT-like encoder with exact GELU whose linear layers and norms
    nobody replaced.
    """
    config: Any = tower.config
    if config.model_type not in FAMILY:
        return False
    encoder: Any = tower.encoder
    plain = config.hidden_act == "gelu" and not config.is_decoder and config.chunk_size_feed_forward == 0
    fits = config.hidden_size <= WIDEST_ROW
    return (
        plain
        and fits
        and all(type(module) in (nn.Linear, nn.LayerNorm) for layer in encoder.layer for module in _holders(layer))
    )


def fuse(tower: PreTrainedModel) -> None:
    """Puts fused layers, and fused embeddings where they are plain ones, into `tower`, which from then on takes packed
    texts only.
    """
    encoder: Any = tower.encoder
    tower.encoder = FusedLayers(encoder.layer)
    if knows_embeddings(tower):
        tower.embeddings = FusedEmbeddings(tower.embeddings)  # type: ignore[arg-type]


class _LayerSpec(NamedTuple):
    """What of a layer's modules a forward pass reads, looked up once: finding a module by name costs the host more than
    a product.
    """

    holders: tuple[nn.Linear | nn.LayerNorm, ...]  # of the parameters, in their order
    dropouts: tuple[nn.Dropout, nn.Dropout, nn.Dropout]
    heads: int
    eps: float


class _Rounded(NamedTuple):
    """A layer's rounded weights, and what they were made of: `sources` keep the memory, so that no other weights can
    come to lie there.
    """

    state: tuple[object, ...]
    weights: RoundedWeights
    sources: tuple[Tensor, ...]


class FusedLayers(nn.Module):
    """Stands where a model's encoder stood; `layer` holds its modules, whose parameters are used and whose forward is
    not.

    Weights are rounded to the computing dtype once a step. A change is seen by the version that torch counts for every
    operation in place and, from here on, for every step of an optimizer, or by another place in memory. Writing through
    `weight.data` in place is seen by neither. Graphs kept from before a change cannot be differentiated after it.
    """

    def __init__(self, layer: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layer
        self._specs = [_LayerSpec(_holders(module), _dropouts(module), *_shape(module)) for module in layer]
        self._rounded: dict[int, _Rounded] = {}

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_starts: Tensor,
        packed_longest: int,
        saved_activations: deque[SavedActivations] | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """hidden_states [1, T, H], the embeddings of packed texts, to last_hidden_state [1, T, H], float32 or wider.

        Without a graph, the products of each layer are put into `saved_activations`; with one, they are taken out of it.
        """
        if saved_activations is not None and len(saved_activations) != (
            expected := len(self._specs) * torch.is_grad_enabled()
        ):
            raise ValueError(
                f"expected the products of {counted(expected, 'layer')}, received those of {len(saved_activations)}"
            )
        device, hidden = hidden_states.device, hidden_states[0].contiguous()
        half = torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64
        stream: Any = hidden.float() if half else hidden  # [T, H]: embeddings that a linear layer projects come rounded
        rounded = hidden.to(torch.get_autocast_dtype(device.type)) if half else stream
        texts, dropouts = Texts(packed_starts, packed_longest), [self._dropouts(spec) for spec in self._specs]
        seeds: Any = [None] * 3 * len(dropouts)
        if any(map(any, dropouts)):
            seeds = draw_seeds(len(seeds), device).split(1)
        with torch.autocast(device.type, enabled=False):
            for i, spec in enumerate(self._specs):
                layer = LayerSettings(spec.heads, spec.eps, texts, dropouts[i], seeds[3 * i : 3 * i + 3])
                parameters = _read_parameters(spec.holders)
                args = stream, rounded, layer, self._weights(i, parameters, rounded.dtype), parameters
                if torch.is_grad_enabled():
                    stream, rounded = post_norm_layer(*args, saved_activations.popleft() if saved_activations else None)
                else:
                    stream, rounded, saved = without_graph(*args)
                    if saved_activations is not None:
                        saved_activations.append(saved)
                    del saved  # their memory is the next layer's
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=stream[None])

    def _dropouts(self, spec: _LayerSpec) -> tuple[float, float, float]:
        attention, attention_out, ffn_out = (dropout.p if dropout.training else 0.0 for dropout in spec.dropouts)
        return attention, attention_out, ffn_out

    def _weights(self, i: int, parameters: Parameters, dtype: torch.dtype) -> RoundedWeights:
        """The rounded weights of layer i, made anew only when a weight has changed: once a step, not once a chunk."""
        state = (dtype, *[(p.data_ptr(), p._version) for p in parameters])
        kept = self._rounded.get(i)
        if kept is None or kept.state != state:
            sources = tuple(p.detach() for p in parameters)
            kept = self._rounded[i] = _Rounded(state, rounded_weights(parameters, dtype), sources)
        return kept.weights

    def __getstate__(self) -> dict[str, Any]:
        """Copies round their own weights."""
        return self.__dict__ | {"_rounded": {}}


def _holders(layer: Any) -> tuple[nn.Linear | nn.LayerNorm, ...]:
    """The modules of `Parameters`, each with a weight and a bias."""
    own, attention_out, ffn_out = layer.attention.self, layer.attention.output, layer.output
    ffn_in, norms = layer.intermediate, (attention_out.LayerNorm, ffn_out.LayerNorm)
    return own.query, own.key, own.value, attention_out.dense, norms[0], ffn_in.dense, ffn_out.dense, norms[1]


def _read_parameters(holders: Sequence[nn.Module]) -> Parameters:
    """Their weights and biases, past the slow way by which a module finds an attribute."""
    return Parameters(*[cast(Tensor, module._parameters[name]) for module in holders for name in ("weight", "bias")])


def _dropouts(layer: Any) -> tuple[nn.Dropout, nn.Dropout, nn.Dropout]:
    return layer.attention.self.dropout, layer.attention.output.dropout, layer.output.dropout


def _shape(layer: Any) -> tuple[int, float]:
    return layer.attention.self.num_attention_heads, layer.output.LayerNorm.eps


def _count_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """torch's fused optimizers write to parameters without counting a version."""
    for group in optimizer.param_groups:
        increment_version(group["params"])


register_optimizer_step_post_hook(_count_versions)
