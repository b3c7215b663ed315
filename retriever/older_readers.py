"""Adds the old names of settings that transformers 5 renamed, so that transformers 4 reads a folder correctly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from retriever.data.tokens import is_plain
from retriever.files import write_json


def older_config_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json under the names that version 4 reads, to be written beside those of version 5."""
    rope = config.get("rope_parameters")
    if config["model_type"] == "modernbert":
        return _older_modernbert(config)
    if not isinstance(rope, dict):
        return {}
    if config["model_type"] == "gemma3_text":
        return _older_rope(rope["full_attention"]) | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    if "rope_theta" not in rope:
        return {}
    return _older_rope(rope)


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in apart}
    kept = {key: rope[key] for key in apart if key in rope}
    return kept | {"rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}


def _older_modernbert(config: dict[str, Any]) -> dict[str, Any]:
    rope, layers = config["rope_parameters"], config["layer_types"]
    full = [i for i, kind in enumerate(layers) if kind == "full_attention"]
    every = full[1] if len(full) > 1 else len(layers)  # layer 0 attends to everything, and then every so many
    thetas = {
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }
    return thetas | {"global_attn_every_n_layers": every}


def name_older_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Rewrites the tokenizer_config.json in `folder` so that version 4 takes tokenizer.json as it stands.

    Its own class of the same name may be unknown there, or put other special tokens around a text.
    """
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    if is_plain(tokenizer):
        described |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    if isinstance(extra := described.get("extra_special_tokens"), list):  # version 4 expects names beside them
        described |= {"additional_special_tokens": extra}
        del described["extra_special_tokens"]
    write_json(path, described)
