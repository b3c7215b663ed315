"""A tower: one transformer of a model folder, and what the library's architectures need to be called alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedModel

from retriever.config import ConfigError
from retriever.data.layout import Padded
from retriever.data.tokens import Side
from retriever.encoder.architectures import is_decoder
from retriever.encoder.model_files import one_line
from retriever.encoder.pretrained import load_model
from retriever.encoder.settings import read_model_config, tower_folder
from retriever.rng import OwnGenerator


def load_tower(name_or_path: str | Path, side: Side) -> PreTrainedModel:
    """One side's transformer in fp32, in train mode; of T5 the encoder.

    Raises ConfigError where its weights cannot be read or one that embeddings depend on is missing.
    """
    name = str(name_or_path)
    config = read_model_config(name, side)
    model, missing = load_model(_auto_class(config), config, name, tower_folder(name, side))
    if wanted := [key for key in missing if not key.startswith("pooler.")]:
        lacks = f"lacks {len(wanted)} weights of its {side} tower, {wanted[0]} first"
        raise ConfigError(f"model {name} {lacks}; expected all")
    if missing:  # a pooler made of random numbers is nothing to keep
        model.pooler = None
    return cast(PreTrainedModel, model.train())


def new_tower(name_or_path: str | Path, side: Side, seed: int) -> PreTrainedModel:
    """As `load_tower`, with random weights, a function of `seed` and the architecture."""
    with OwnGenerator(seed):
        model = build_tower(read_model_config(name_or_path, side), f"{name_or_path}/config.json")
    detach_pooler(model)
    return cast(PreTrainedModel, model.train())


def build_tower(config: Any, where: str) -> Any:
    """A transformer of random weights in fp32. Raises ConfigError, which begins with `where`, if there can be none."""
    with one_line(f"{where}: no {config.model_type} model can be built from it"):
        return _auto_class(config).from_config(config, dtype=torch.float32)


def _auto_class(config: Any) -> Any:
    return AutoModelForTextEncoding if config.model_type == "t5" else AutoModel


def detach_pooler(tower: Any) -> dict[str, Tensor]:
    """Removes the pooler of a BERT-like model, on which no embedding depends, and returns its weights."""
    pooler = getattr(tower, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return {}
    weights = {f"pooler.{key}": value.detach().clone() for key, value in pooler.state_dict().items()}
    tower.pooler = None
    return weights


def repeated_layers(tower: nn.Module) -> list[nn.Module]:
    """The transformer's layers: the longest list of modules of one class."""
    lists = [list(module) for module in tower.modules() if isinstance(module, nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(alike, key=len, default=[])


def padded_inputs(tower: PreTrainedModel, tokens: Padded) -> dict[str, Any]:
    """Keyword arguments of a forward pass of `tower` over padded texts."""
    inputs: dict[str, Any] = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    if is_decoder(tower.config):
        positions = (tokens.attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # [n, width]
        inputs |= {"position_ids": positions, "use_cache": False}
    return inputs
