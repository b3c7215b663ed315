"""The two towers: a transformer, pooling and normalisation for queries, and the same or another one for passages."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.layers.layer import SavedActivations
from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import Packed, Padded
from retriever.data.tokens import Side
from retriever.encoder.architectures import PACKED, check_lengths, set_bidirectional
from retriever.encoder.compiled_layers import compile_layer
from retriever.encoder.fused_layers import FusedLayers, fuse
from retriever.encoder.fused_specs import unfused_because
from retriever.encoder.packed_attention import packed_inputs, use_packed_attention
from retriever.encoder.pooling import PoolingMode, pool, pool_packed, unit_norm
from retriever.encoder.projection import load_projections, new_projection, projected_size
from retriever.encoder.settings import pooling_of, read_model_config, read_truncate_dim, tower_folder
from retriever.encoder.towers import detach_pooler, load_tower, new_tower, padded_inputs, repeated_layers


class DualEncoder(nn.Module):
    """Embeddings of queries and passages.

    Parameters stay as they were loaded (fp32 masters); with `autocast_dtype` the transformer computes in that
    precision, while pooling and normalisation never go below fp32.
    """

    def __init__(
        self,
        query_tower: PreTrainedModel,
        passage_tower: PreTrainedModel,
        *,
        pooling: PoolingMode,
        normalize: bool = True,
        truncate_dim: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tied = query_tower is passage_tower
        towers = {"shared": query_tower} if self.tied else {"query": query_tower, "passage": passage_tower}
        self.towers = nn.ModuleDict(towers)
        self.pooling = pooling
        self.normalize = normalize
        self.truncate_dim = truncate_dim  # how many leading dimensions are kept, before normalisation; None: all
        self.autocast_dtype = autocast_dtype
        self.packed = False
        self.projections = nn.ModuleDict()  # by tower: hidden vectors to embeddings; empty: there are none
        # Heads that no embedding depends on, by side: kept out of training, put back into exports.
        self.unused_weights = {name: detach_pooler(tower) for name, tower in towers.items()}

    @classmethod
    def from_pretrained(
        cls, config: ModelConfig, *, seed: int = 0, autocast_dtype: torch.dtype | None = None
    ) -> DualEncoder:
        """The towers of `config.name_or_path` in fp32; with `from_scratch`, `seed` draws their weights. `auto` of
        pooling and truncate_dim is what the folder says.

        A folder of two towers starts an untied encoder; any other folder starts both towers of an untied encoder from
        the same weights. Raises ConfigError where the model cannot be trained exactly, or has fewer positions than
        `config` asks for.
        """
        name = config.name_or_path
        model_config = read_model_config(name)
        check_lengths(model_config, config.query_max_tokens, config.passage_max_tokens)
        truncate_dim = read_truncate_dim(name) if config.truncate_dim == "auto" else config.truncate_dim
        if config.tied and tower_folder(name, "query") != tower_folder(name, "passage"):
            raise ConfigError(
                f"model.tied: true, but {name} holds two towers; set it to false, or name one tower's folder"
            )
        start = partial(new_tower, seed=seed) if config.from_scratch else load_tower
        passage_tower = start(name, "passage")
        query_tower = passage_tower if config.tied else start(name, "query")
        modes: dict[str, Any] = {
            "pooling": pooling_of(config),
            "normalize": config.normalize,
            "truncate_dim": truncate_dim,
        }
        encoder = cls(query_tower, passage_tower, **modes, autocast_dtype=autocast_dtype)
        for tower in encoder.each_tower:
            set_bidirectional(tower.config, config.bidirectional, name)
        if not config.from_scratch:
            encoder.projections.update(load_projections(name, encoder.towers))
        whole = config.projection or encoder.dimension
        if truncate_dim is not None and config.truncate_dim != "auto" and truncate_dim > whole:
            raise ConfigError(
                f"model.truncate_dim: expected at most {whole}, the model's dimension; received {truncate_dim}"
            )
        if config.gradient_checkpointing:
            encoder.enable_gradient_checkpointing()
        return encoder

    @property
    def query_tower(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.towers["shared" if self.tied else "query"])

    @property
    def passage_tower(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.towers["shared" if self.tied else "passage"])

    @property
    def each_tower(self) -> list[PreTrainedModel]:
        """Every tower once."""
        return [cast(PreTrainedModel, tower) for tower in self.towers.values()]

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        whole = int(self.passage_tower.config.hidden_size)
        for projection in self.projections.values():
            whole = projected_size(projection)
        return whole if self.truncate_dim is None else min(whole, self.truncate_dim)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, side: Side, tokens: Padded | Packed, saved: deque[SavedActivations] | None = None) -> Tensor:
        """Embeddings [n, D] float32 (float64 after `.double()`) of n texts of one side, each of at least one token.

        After `pack` the texts come `Packed`, before it `Padded`. Where the encoder `keeps_products`, a call without a
        graph puts those of each layer into `saved`, and a later call for the same texts with a graph takes them out of
        it instead of computing them. Raises ValueError for the other layout, a chunk without a token, or `saved` of
        layers that keep none.
        """
        if tokens.input_ids.numel() == 0:
            raise ValueError(
                f"a chunk of {len(tokens)} texts on the {side} side without a token; expected at least one token a text"
            )
        if isinstance(tokens, Packed) != self.packed:
            own = "packed" if self.packed else "padded"
            raise ValueError(f"texts are {type(tokens).__name__}, but the encoder's attention is {own}")
        if saved is not None and not self.keeps_products:
            raise ValueError("products of layers are kept by fused layers only; call fuse_layers first")
        tower = self.query_tower if side == "query" else self.passage_tower
        with torch.autocast(
            tokens.input_ids.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            if isinstance(tokens, Packed):
                kept = {} if saved is None else {"saved_activations": saved}
                hidden = tower(**packed_inputs(tower, tokens), **kept).last_hidden_state[0]  # [T, H]
                embeddings = pool_packed(hidden, tokens.starts, self.pooling)  # [n, H]
            else:
                hidden = tower(**padded_inputs(tower, tokens)).last_hidden_state  # [n, width, H]
                embeddings = pool(hidden, tokens.attention_mask, self.pooling)  # [n, H]
        if self.projections:
            with torch.autocast(tokens.input_ids.device.type, enabled=False):
                embeddings = self.projections["shared" if self.tied else side](embeddings)
        if self.truncate_dim is not None:
            embeddings = embeddings[:, : self.truncate_dim].contiguous()  # [n, D]
        return unit_norm(embeddings) if self.normalize else embeddings

    def project(self, dimension: int, seed: int) -> None:
        """Gives every tower a new projection head to `dimension`, unless it has one of this size."""
        if {projected_size(head) for head in self.projections.values()} == {dimension}:  # whatever is cut off behind it
            return
        for name, tower in self.towers.items():
            hidden_size = cast(PreTrainedModel, tower).config.hidden_size
            self.projections[name] = new_projection(hidden_size, dimension, f"{seed} projection {name}")

    @property
    def can_pack(self) -> bool:
        """Whether every tower's architecture hands the boundaries of packed texts through."""
        return all(tower.config.model_type in PACKED for tower in self.each_tower)

    def pack(self) -> None:
        """Makes attention stay within packed texts, without padding. Raises ConfigError if the model cannot."""
        for tower in self.each_tower:
            if tower.config.model_type not in PACKED:
                raise ConfigError(
                    f"model.attention: packed, but a {tower.config.model_type!r} model ignores the boundaries of "
                    "packed texts; set it to auto or padded"
                )
            use_packed_attention(tower)
        self.packed = True

    @property
    def unfused_because(self) -> str | None:
        """The reason why `fuse_layers` cannot fuse a tower; None if it can fuse all."""
        return next(filter(None, map(unfused_because, self.each_tower)), None)

    @property
    def can_fuse(self) -> bool:
        """Whether `fuse_layers` knows every tower's layers."""
        return self.unfused_because is None

    def fuse_layers(self) -> None:
        """Replaces the layers of packed towers by fused ones. Raises ConfigError, with the reason, if it cannot."""
        if reason := self.unfused_because:
            raise ConfigError(f"model.fused: true, but {reason}; set it to auto")
        for tower in self.each_tower:
            fuse(tower)

    @property
    def keeps_products(self) -> bool:
        """Whether a pass without a graph can leave the products of its layers to one with it."""
        return all(any(isinstance(part, FusedLayers) for part in tower.children()) for tower in self.each_tower)

    def compile_layers(self) -> None:
        """Compiles the repeated layers of each tower; layers of one kind share their graphs (`compile_layer`)."""
        for tower in self.each_tower:
            for layer in repeated_layers(tower):
                compile_layer(layer)

    def enable_gradient_checkpointing(self) -> None:
        """Keeps only each layer's input and recomputes the rest in the backward pass, with the same random numbers.

        Raises ConfigError where the architecture has no such layers.
        """
        for tower in self.each_tower:
            if not tower.supports_gradient_checkpointing:
                lacks = f"{type(tower).__name__} does not support it"
                raise ConfigError(f"model.gradient_checkpointing: true, but {lacks}; set it to false")
            # transformers 5 renamed the method along the way.
            enable: Any = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": True})
