"""Fused layers in the place of the library's, on packed texts, with its weights, names and mathematics.

Dropout masks are functions of seeds that each forward pass draws, so a pass without a graph has the very bits of the
one with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from kernels.attention.reference import Texts
from kernels.layers.layer import LayerSettings, SavedActivations, transformer_layer, without_graph
from kernels.layers.weights import Adapters, Parameters, RoundedWeights, rounded_weights
from retriever.encoder.fused_embeddings import CHANGE_FIRST, FusedEmbeddings, has_plain_embeddings
from retriever.encoder.fused_specs import BERT_FAMILY, LayerSpec, angles, layer_specs
from retriever.encoder.packed_attention import draw_seeds
from retriever.wording import counted


def fuse(tower: PreTrainedModel) -> None:
    """Replaces the layers of `tower`, and plain embeddings, by fused ones, which take packed texts only.

    A pre-norm layer ends with the norm that the next one begins with, and the last with the tower's own.
    """
    model: Any = tower
    if tower.config.model_type in BERT_FAMILY:
        model.encoder = FusedEncoder(layer_specs(tower), model.encoder.layer)
        if has_plain_embeddings(tower):
            model.embeddings = FusedEmbeddings(model.embeddings)
        return
    for name in ("norm", "final_norm"):
        if hasattr(model, name):
            setattr(model, name, AppliedNorm(getattr(model, name)))
    named = dict(model.layers[0].named_children())
    first_norm = named.get("attn_norm", named.get("input_layernorm"))
    model.layers = FusedList(layer_specs(tower), model.layers, first_norm, model.rotary_emb)


class _Rounded(NamedTuple):
    """A layer's rounded weights, and what they were made of: `sources` keep the memory, so that no other weights can
    come to lie there.
    """

    state: tuple[object, ...]
    weights: RoundedWeights
    sources: tuple[Tensor, ...]


class FusedLayers(nn.Module):
    """All layers of a tower. It holds their modules, whose parameters are used and whose forward is not.

    Weights are rounded to the computing dtype once a step. A change is seen by the version that torch counts for every
    operation in place and, from here on, for every step of an optimizer, or by another place in memory. Writing through
    `weight.data` in place is seen by neither. Graphs kept from before a change cannot be differentiated after it.

    Other modules in the place of the layers' (adapters that came afterwards), or gradient checkpointing, are refused by
    RuntimeError.
    """

    def __init__(
        self, specs: Sequence[LayerSpec], first_norm: nn.Module | None = None, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.only_encodes = False  # whether no pass with a graph has to have the bits of this one
        self._specs = list(specs)
        self._elsewhere = first_norm, rotary  # in a tuple: the tower has registered them under names of their own
        self._rounded: dict[int, _Rounded] = {}
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of each module: the present ones, the fused
        self._can_checkpoint: list[Any] = []

    def remember_modules(self) -> None:
        """Takes the present modules for those that are fused."""
        self._children = [(module._modules, dict(module._modules)) for module in self.modules() if module._modules]
        self._can_checkpoint = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]

    def _refuse_changes(self) -> None:
        for present, fused in self._children:
            if present != fused:
                name = next(name for name in fused | present if present.get(name) is not fused.get(name))
                was, received = (type(modules.get(name)).__name__ for modules in (fused, present))
                raise RuntimeError(f"{name}: expected the {was} that was fused, received {received}; {CHANGE_FIRST}")
        if self.training and any(layer.gradient_checkpointing for layer in self._can_checkpoint):
            raise RuntimeError(f"gradient checkpointing: expected it off, received on; {CHANGE_FIRST}")

    def run(
        self,
        hidden_states: Tensor,
        *,
        packed_starts: Tensor,
        packed_longest: int,
        packed_positions: Tensor,
        saved_activations: deque[SavedActivations] | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states [1, T, H], the embeddings of packed texts, to the last layer's [1, T, H], float32 or wider.

        Without a graph, `saved_activations` receives those of each layer; with one, they are taken out of it.
        """
        self._refuse_changes()
        expected = len(self._specs) if torch.is_grad_enabled() else 0
        if saved_activations is not None and len(saved_activations) != expected:
            layers = counted(expected, "layer")
            raise ValueError(f"expected the products of {layers}, received those of {len(saved_activations)}")
        device, hidden = hidden_states.device, hidden_states[0].contiguous()
        half = torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device.type) if half else hidden.dtype
        # [T, H]. Embeddings that a linear layer projects come rounded.
        stream: Any = hidden.to(self._stream_dtype()) if half else hidden
        texts, dropouts = Texts(packed_starts, packed_longest), [spec.dropout_rates for spec in self._specs]
        seeds: Any = [None] * 3 * len(dropouts)
        if any(map(any, dropouts)):
            seeds = draw_seeds(len(seeds), device).split(1)
        with torch.autocast(device.type, enabled=False):
            first_norm, rotary = self._elsewhere
            rounded: Any = (hidden if first_norm is None else first_norm(stream)).to(dtype)
            like = hidden.new_empty(0, dtype=torch.float32) if half else hidden  # angles are never rounded
            turned = angles(rotary, self._specs, like, packed_positions, packed_longest)
            for i, spec in enumerate(self._specs):
                layer = LayerSettings(spec.kind, texts, dropouts[i], seeds[3 * i : 3 * i + 3], turned[spec.rope])
                parameters, adapters = spec.parameters(), spec.adapters()
                inputs = stream, rounded, layer, self._weights(i, parameters, adapters, dtype), parameters
                if torch.is_grad_enabled():
                    # Passed on without a name of its own: the layer frees them as soon as it can.
                    stream, rounded = transformer_layer(
                        *inputs, saved_activations.popleft() if saved_activations else None, adapters
                    )
                else:
                    stream, rounded, saved = without_graph(*inputs)
                    if saved_activations is not None:
                        saved_activations.append(saved)
                    del saved  # their memory is the next layer's
        return (stream.float() if half else stream)[None]

    def _stream_dtype(self) -> torch.dtype:
        """The dtype of the residual stream.

        For encoding in half precision a normed stream is float16, eight times finer than bfloat16: a third less memory
        traffic than float32. A pre-norm stream may exceed its range.
        """
        return torch.float16 if self.only_encodes and not self._specs[0].kind.pre_norm else torch.float32

    def _weights(self, i: int, parameters: Parameters, adapters: Adapters, dtype: torch.dtype) -> RoundedWeights:
        """The rounded weights of layer i, made anew only when a weight has changed: once a step, not once a chunk."""
        given = [p for p in parameters if p is not None]
        given += [matrix for adapter in adapters.values() for matrix in adapter[:2]]
        state = (dtype, *[(p.data_ptr(), p._version) for p in given])
        kept = self._rounded.get(i)
        if kept is None or kept.state != state:
            sources = tuple(p.detach() for p in given)
            kept = self._rounded[i] = _Rounded(state, rounded_weights(parameters, dtype, adapters), sources)
        return kept.weights

    def __getstate__(self) -> dict[str, Any]:
        """Copies round their own weights."""
        return self.__dict__ | {"_rounded": {}}


class FusedEncoder(FusedLayers):
    """Replaces the encoder of a BERT-like tower."""

    def __init__(self, specs: Sequence[LayerSpec], layer: nn.ModuleList) -> None:
        super().__init__(specs)
        self.layer = layer
        self.remember_modules()

    def forward(self, hidden_states: Tensor, **given: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        """`run`, as the tower expects its result."""
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.run(hidden_states, **given))


class FusedList(FusedLayers):
    """Replaces a tower's list of layers: its loop, over the list or a part of it, meets one layer that does the work of
    all.
    """

    def __init__(
        self, specs: Sequence[LayerSpec], layers: nn.ModuleList, first_norm: nn.Module | None, rotary: nn.Module
    ) -> None:
        super().__init__(specs, first_norm, rotary)
        for name, layer in layers.named_children():
            self.add_module(name, layer)
        self.remember_modules()
        self.attention_type = getattr(layers[0], "attention_type", None)  # ModernBERT looks the mask up, which is None

    def __iter__(self) -> Iterator[FusedList]:
        yield self

    def __getitem__(self, _: slice) -> FusedList:
        return self

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """`run`."""
        return self.run(hidden_states, **given)


class AppliedNorm(nn.Module):
    """A norm that the last fused layer applies: the parameters under their names."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm._parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


def _count_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """torch's fused optimizers write to parameters without counting a version."""
    for group in optimizer.param_groups:
        increment_version(group["params"])


register_optimizer_step_post_hook(_count_versions)
