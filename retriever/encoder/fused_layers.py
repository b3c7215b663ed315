"""Layers and embeddings of the BERT family on packed texts, with the library's weights, names and mathematics.

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
from kernels.layers.embeddings import Tables, embeddings
from kernels.layers.post_norm import (
    LayerSettings,
    Parameters,
    RoundedWeights,
    SavedActivations,
    post_norm_layer,
    rounded_weights,
    without_graph,
)
from retriever.encoder.packed_attention import draw_seeds
from retriever.wording import counted

FAMILY = frozenset({"bert", "camembert", "electra", "roberta", "xlm-roberta"})


def can_fuse(tower: PreTrainedModel) -> bool:
    """Whether `fuse` knows the layers of `tower`: BERT-like, with exact GELU and plain linear layers and norms."""
    config: Any = tower.config
    if config.model_type not in FAMILY:
        return False
    if config.hidden_act != "gelu" or config.is_decoder or config.chunk_size_feed_forward != 0:
        return False
    encoder: Any = tower.encoder
    holders = (module for layer in encoder.layer for module in _holders(layer))
    return config.hidden_size <= WIDEST_ROW and all(type(module) in (nn.Linear, nn.LayerNorm) for module in holders)


def fuse(tower: PreTrainedModel) -> None:
    """Replaces the layers of `tower`, and plain embeddings, by fused ones, which take packed texts only."""
    encoder: Any = tower.encoder
    tower.encoder = FusedLayers(encoder.layer)
    if _has_plain_embeddings(tower):
        tower.embeddings = FusedEmbeddings(tower.embeddings)  # type: ignore[arg-type]


class _LayerSpec(NamedTuple):
    """What a forward pass reads of a layer's modules. Looked up once: finding a module by name is slow for the host."""

    holders: tuple[nn.Linear | nn.LayerNorm, ...]  # of the parameters, in their order
    dropouts: tuple[nn.Dropout, nn.Dropout, nn.Dropout]
    heads: int
    eps: float

    @classmethod
    def of(cls, layer: Any) -> _LayerSpec:
        """The spec of a layer of transformers."""
        attention = layer.attention.self
        dropouts = attention.dropout, layer.attention.output.dropout, layer.output.dropout
        return cls(_holders(layer), dropouts, attention.num_attention_heads, layer.output.LayerNorm.eps)

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        attention, attended, output = (dropout.p if dropout.training else 0.0 for dropout in self.dropouts)
        return attention, attended, output


class _Rounded(NamedTuple):
    """A layer's rounded weights, and what they were made of: `sources` keep the memory, so that no other weights can
    come to lie there.
    """

    state: tuple[object, ...]
    weights: RoundedWeights
    sources: tuple[Tensor, ...]


class FusedLayers(nn.Module):
    """Replaces a model's encoder. `layer` holds its modules, whose parameters are used and whose forward is not.

    Weights are rounded to the computing dtype once a step. A change is seen by the version that torch counts for every
    operation in place and, from here on, for every step of an optimizer, or by another place in memory. Writing through
    `weight.data` in place is seen by neither. Graphs kept from before a change cannot be differentiated after it.
    """

    def __init__(self, layer: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layer
        self.only_encodes = False  # whether no pass with a graph has to have the bits of this one
        self._specs = list(map(_LayerSpec.of, layer))
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

        Without a graph, `saved_activations` receives those of each layer; with one, they are taken out of it.
        """
        expected = len(self._specs) if torch.is_grad_enabled() else 0
        if saved_activations is not None and len(saved_activations) != expected:
            layers = counted(expected, "layer")
            raise ValueError(f"expected the products of {layers}, received those of {len(saved_activations)}")
        device, hidden = hidden_states.device, hidden_states[0].contiguous()
        half = torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64
        # [T, H]. Embeddings that a linear layer projects come rounded. A stream of float16, eight times finer than
        # bfloat16, takes a third less memory traffic.
        stream: Any = hidden.to(torch.float16 if self.only_encodes else torch.float32) if half else hidden
        rounded = hidden.to(torch.get_autocast_dtype(device.type)) if half else stream
        texts, dropouts = Texts(packed_starts, packed_longest), [spec.dropout_rates for spec in self._specs]
        seeds: Any = [None] * 3 * len(dropouts)
        if any(map(any, dropouts)):
            seeds = draw_seeds(len(seeds), device).split(1)
        with torch.autocast(device.type, enabled=False):
            for i, spec in enumerate(self._specs):
                layer = LayerSettings(spec.heads, spec.eps, texts, dropouts[i], seeds[3 * i : 3 * i + 3])
                parameters = _read_parameters(spec.holders)
                inputs = stream, rounded, layer, self._weights(i, parameters, rounded.dtype), parameters
                if torch.is_grad_enabled():
                    # Passed on without a name of its own: the layer frees them as soon as it can.
                    stream, rounded = post_norm_layer(
                        *inputs, saved_activations.popleft() if saved_activations else None
                    )
                else:
                    stream, rounded, saved = without_graph(*inputs)
                    if saved_activations is not None:
                        saved_activations.append(saved)
                    del saved  # their memory is the next layer's
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=(stream.float() if half else stream)[None])

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


_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def _has_plain_embeddings(tower: PreTrainedModel) -> bool:
    """Whether `tower` hands its layers the norm of word, position and segment embeddings, as BERT and RoBERTa do."""
    module: Any = tower.embeddings
    if {name for name, _ in module.named_children()} != {*_EMBEDDINGS, "LayerNorm", "dropout"}:
        return False
    tables = [getattr(module, name) for name in _EMBEDDINGS]
    if any(type(table) is not nn.Embedding or table.max_norm is not None for table in tables):
        return False
    if any(table.sparse or table.scale_grad_by_freq for table in tables):
        return False
    if getattr(tower.config, "position_embedding_type", None) not in (None, "absolute"):
        return False
    norm, hidden = module.LayerNorm, tower.config.hidden_size
    # ELECTRA's rows may be narrower, and go through a matrix product.
    return type(norm) is nn.LayerNorm and norm.normalized_shape == (hidden,) and hidden <= WIDEST_ROW


class FusedEmbeddings(nn.Module):
    """Replaces a tower's embeddings; its modules keep their names. Takes packed texts, all of segment 0."""

    word_embeddings: nn.Embedding
    position_embeddings: nn.Embedding
    token_type_embeddings: nn.Embedding
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self.training = module.training  # of it alone: the modules are shared, and have modes of their own

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> Tensor:
        """input_ids and position_ids [1, T] to the layers' input [1, T, H] in the tables' dtype."""
        dropout = self.dropout.p if self.dropout.training else 0.0
        seed = draw_seeds(1, input_ids.device) if dropout > 0 else None
        with torch.autocast(input_ids.device.type, enabled=False):
            y = embeddings(input_ids[0], position_ids[0], self.tables(), seed, eps=self.LayerNorm.eps, dropout=dropout)
        return y[None]

    def tables(self) -> Tables:
        """The parameters, the segment's row out of its table."""
        words, positions, norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        weights = words.weight, positions.weight, self.token_type_embeddings.weight[0], norm.weight, norm.bias
        return Tables(*weights, words.padding_idx, positions.padding_idx)


def _count_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """torch's fused optimizers write to parameters without counting a version."""
    for group in optimizer.param_groups:
        increment_version(group["params"])


register_optimizer_step_post_hook(_count_versions)
