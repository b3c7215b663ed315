"""Reads the library's layers for the fused ones: the modules of the parameters, and the form of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.dispatch import WIDEST_ROW
from kernels.layers.api import Activation
from kernels.layers.layer import LayerKind
from kernels.layers.weights import Adapter, Parameters
from retriever.encoder.lora import LoraLinear
from retriever.encoder.packed_attention import attention_window

BERT_FAMILY = frozenset({"bert", "camembert", "electra", "roberta", "xlm-roberta"})
LLAMA_FAMILY = frozenset({"gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
FAMILY = BERT_FAMILY | LLAMA_FAMILY | {"modernbert", "nomic_bert"}

_GATES: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPES = frozenset({"default", "linear", "llama3", "yarn"})  # angles that depend on nothing but the position

# The last five of `Parameters`, where a layer has no second weight of a gate and no norms but two.
_NOTHING = (None,) * 5

Place = tuple[nn.Module, str] | None  # a module and the name of what it holds


class LayerSpec(NamedTuple):
    """Modules and settings of a layer that a forward pass reads, looked up once: lookups by name are slow."""

    kind: LayerKind
    places: tuple[Place, ...]  # of `Parameters`, in their order
    dropouts: tuple[Place, Place, Place]
    rope: tuple[str, ...] | None = None  # what names the layer's angles to the tower's `rotary_emb`; None: none
    adapted: tuple[tuple[str, LoraLinear], ...] = ()  # fields of `Parameters` that hold adapted weights, their layers

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        """Rates of attention probabilities, attention output and feed-forward output; 0 in evaluation mode."""
        rates = [0.0 if not place or not place[0].training else getattr(*place) for place in self.dropouts]
        return rates[0], rates[1], rates[2]

    def parameters(self) -> Parameters:
        """The present ones, past the slow way by which a module finds an attribute."""
        return Parameters(*[cast(Any, place and place[0]._parameters[place[1]]) for place in self.places])

    def adapters(self) -> dict[str, Adapter]:
        """The present ones, by the field of `Parameters` that holds their weight."""
        return {field: Adapter(layer.lora_a, layer.lora_b, layer.scale) for field, layer in self.adapted}


def layer_specs(tower: PreTrainedModel) -> list[LayerSpec]:
    """One for each layer of a tower that can be fused."""
    kind, specs = tower.config.model_type, []
    for spec in (_bert if kind in BERT_FAMILY else _OTHERS.get(kind, _llama))(tower):
        adapted = [
            (field, place[0])
            for field, place in zip(Parameters._fields, spec.places, strict=True)
            if place is not None and place[1] == "weight" and isinstance(place[0], LoraLinear)
        ]
        specs.append(spec._replace(adapted=tuple(adapted)))
    return specs


def unfused_because(tower: PreTrainedModel) -> str | None:
    """The reason why this tower cannot be fused; None if it can."""
    config: Any = tower.config
    kind = config.model_type
    if kind not in FAMILY:
        return f"the layers of a {kind!r} model are not known"
    if config.hidden_size > WIDEST_ROW:
        return f"its layers are {config.hidden_size} wide, and at most {WIDEST_ROW} is possible"
    if any(isinstance(module, LoraLinear) and module.dropout > 0 for module in tower.modules()):
        return "its LoRA adapters have dropout"
    if any(getattr(module, "gradient_checkpointing", False) for module in tower.modules()):
        return "it checkpoints gradients"
    if kind in BERT_FAMILY:
        plain = config.hidden_act == "gelu" and not config.is_decoder and config.chunk_size_feed_forward == 0
        lacks = None if plain else "it is a decoder, cuts its feed-forward part into chunks, or has another GELU"
    else:
        lacks = _unknown_part(tower)
    return lacks or _unknown_module(layer_specs(tower))


def _unknown_part(tower: Any) -> str | None:
    """An activation, rotation or dropout that the readers of layers do not support; None if there is none."""
    config = tower.config
    activation = _activation(config)
    if activation not in _GATES:
        return f"its activation is {activation}"
    ropes = config.rope_parameters
    for rope in [ropes] if "rope_type" in ropes else filter(None, ropes.values()):
        if rope["rope_type"] not in _ROPES:
            return f"its rotations are of rope_type {rope['rope_type']}"
    if getattr(config, "mlp_dropout", 0) > 0:
        return f"it has mlp_dropout={config.mlp_dropout}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"it has attn_logit_softcapping={config.attn_logit_softcapping}"
    return None


def _activation(config: Any) -> str:
    """That of the gate."""
    name = "hidden_activation" if config.model_type in ("gemma3_text", "modernbert") else "hidden_act"
    return str(getattr(config, name))


def _unknown_module(specs: list[LayerSpec]) -> str | None:
    """A module that is no plain linear layer or norm, or a bias that gated parts lack."""
    for holder in (place[0] for spec in specs for place in spec.places if place is not None):
        if type(holder) not in (nn.Linear, nn.LayerNorm, LoraLinear) and not _is_rms(holder):
            return f"it has a {type(holder).__name__}"
    if any(spec.kind.gate is not None and spec.parameters().ffn_in_bias is not None for spec in specs):
        return "its gated feed-forward part has biases"
    return None


def _is_rms(module: nn.Module) -> bool:
    """Whether it is the RMSNorm of Llama's family."""
    names = ("GemmaRMSNorm", "Gemma3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
    return type(module).__name__ in names


def _both(module: nn.Module) -> tuple[Place, Place]:
    return (module, "weight"), (module, "bias") if "bias" in module._parameters else None


def _bert(tower: Any) -> Iterator[LayerSpec]:
    for layer in tower.encoder.layer:
        own, attention_out, ffn_out = layer.attention.self, layer.attention.output, layer.output
        holders = (
            *(own.query, own.key, own.value, attention_out.dense, attention_out.LayerNorm),
            *(layer.intermediate.dense, ffn_out.dense, ffn_out.LayerNorm),
        )
        kind = LayerKind(own.num_attention_heads, own.num_attention_heads, ffn_out.LayerNorm.eps)
        dropouts = (own.dropout, "p"), (attention_out.dropout, "p"), (ffn_out.dropout, "p")
        places = [place for holder in holders for place in _both(holder)]
        yield LayerSpec(kind, (*places, *_NOTHING), dropouts)


def _modernbert(tower: Any) -> Iterator[LayerSpec]:
    config, last = tower.config, len(tower.layers) - 1
    for i, layer in enumerate(tower.layers):
        attention, mlp = layer.attn, layer.mlp
        following = tower.final_norm if i == last else tower.layers[i + 1].attn_norm
        window = attention.sliding_window
        kind = LayerKind(
            config.num_attention_heads,
            config.num_attention_heads,
            config.norm_eps,
            window=None if window is None else window - 1,  # theirs counts the token itself
            gate=_GATES[_activation(config)],
            pre_norm=True,
            last=i == last,
        )
        places = (
            *(*_both(attention.Wqkv), None, None, None, None),
            *(*_both(attention.Wo), *_both(layer.mlp_norm)),
            *(*_both(mlp.Wi), *_both(mlp.Wo), *_both(following)),
            *_NOTHING,
        )
        added = None if isinstance(attention.out_drop, nn.Identity) else (attention.out_drop, "p")
        yield LayerSpec(kind, places, ((attention, "attention_dropout"), added, None), (config.layer_types[i],))


def _llama(tower: Any) -> Iterator[LayerSpec]:
    config, last = tower.config, len(tower.layers) - 1
    causal, has_own_norms = getattr(config, "is_causal", None), config.model_type == "gemma3_text"
    for i, layer in enumerate(tower.layers):
        attention = layer.self_attn
        norm = layer.pre_feedforward_layernorm if has_own_norms else layer.post_attention_layernorm
        following = tower.norm if i == last else tower.layers[i + 1].input_layernorm
        window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            window = config.sliding_window
        kind = LayerKind(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
            attention.scaling,
            causal=attention.is_causal if causal is None else causal,
            window=attention_window(window, causal),
            gate=_GATES[_activation(config)],
            rms=True,
            unit_offset=config.model_type in ("gemma", "gemma3_text"),
            pre_norm=True,
            last=i == last,
        )
        places = _split_places(layer, norm, following)
        if has_own_norms:
            added = layer.post_attention_layernorm, layer.post_feedforward_layernorm
            places = (*places[:-2], *[(own, "weight") for own in added])
        rope = (config.layer_types[i],) if has_own_norms else ()
        yield LayerSpec(kind, places, ((attention, "attention_dropout"), None, None), rope)


def _nomic(tower: Any) -> Iterator[LayerSpec]:
    config = tower.config
    for layer in tower.layers:
        heads, eps = config.num_attention_heads, config.layer_norm_eps
        kind = LayerKind(heads, heads, eps, layer.self_attn.scaling, gate=_GATES[_activation(config)])
        places = _split_places(layer, layer.post_attention_layernorm, layer.post_mlp_layernorm)
        added = (layer.post_attention_dropout, "p"), (layer.post_mlp_dropout, "p")
        yield LayerSpec(kind, places, ((layer.self_attn, "attention_dropout"), *added), ())


_OTHERS: dict[str, Callable[[Any], Iterator[LayerSpec]]] = {"modernbert": _modernbert, "nomic_bert": _nomic}


def _split_places(layer: Any, attention_norm: nn.Module, ffn_norm: nn.Module) -> tuple[Place, ...]:
    """Parameters of a layer with separate linear layers for queries, keys, values, gate and up projection."""
    attention, mlp = layer.self_attn, layer.mlp
    holders = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, attention_norm
    places = [place for holder in holders for place in _both(holder)]
    places += [*_both(mlp.gate_proj), *_both(mlp.down_proj), *_both(ffn_norm), (mlp.up_proj, "weight")]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return (*places, *[None if norm is None else (norm, "weight") for norm in norms], None, None)


def angles(
    rotary: nn.Module | None, specs: Sequence[LayerSpec], like: Tensor, positions: Tensor, longest: int
) -> dict[tuple[str, ...] | None, tuple[Tensor, Tensor] | None]:
    """By a layer's `rope`: cos and sin [T, d/2] in the dtype of `like`, for tokens at `positions` [T] < `longest`."""
    found: dict[tuple[str, ...] | None, tuple[Tensor, Tensor] | None] = {None: None}
    for rope in {spec.rope for spec in specs} - {None}:
        assert rotary is not None and rope is not None
        each = torch.arange(longest, device=like.device)[None]
        tables = (table[0, :, : table.shape[2] // 2] for table in rotary(like[None], each, *rope))
        cos, sin = (table.index_select(0, positions) for table in tables)
        found[rope] = cos, sin
    return found
