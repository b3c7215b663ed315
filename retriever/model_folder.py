"""The files of a model folder in sentence-transformers' schema: one of a tower, and one around two of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retriever.config import ModelConfig
from retriever.data.tokens import Side
from retriever.encoder.lora import LoraLinear, merged_state
from retriever.encoder.pretrained import quiet_transformers
from retriever.encoder.settings import EncoderSettings
from retriever.files import read_json, write_json
from retriever.older_readers import name_older_tokenizer, older_config_keys
from retriever.wording import without_folders

ROUTES: dict[Side, str] = {"query": "query", "passage": "document"}  # the sides' names in sentence-transformers
ADAPTER = "adapter"  # the sub-folder of the low-rank parts
_POOLING_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
_UNUSED_FLAGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")


def write_tower(
    folder: Path,
    tower: PreTrainedModel,
    unused_weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    prompts: dict[str, str],
    max_tokens: int,
) -> None:
    """A sentence-transformers folder of one transformer, its pooling and, where asked, normalisation."""
    tied: Any = tower.all_tied_weights_keys  # second names of other weights
    weights = {name: tensor for name, tensor in merged_state(tower).items() if name not in tied} | unused_weights
    with quiet_transformers():
        tower.save_pretrained(folder, state_dict={name: _as_fp32(tensor) for name, tensor in weights.items()})
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", described | older_config_keys(described) | {"dtype": "float32"})
    _save_tokenizer(tokenizer, folder, max_tokens)

    modules = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if settings.normalize else []),
    ]
    named = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", named)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    flags = {flag: mode == settings.pooling for mode, flag in _POOLING_FLAGS.items()} | dict.fromkeys(
        _UNUSED_FLAGS, False
    )
    pooling = {"word_embedding_dimension": int(tower.config.hidden_size), **flags, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_described(folder, settings, prompts)


def write_adapter(folder: Path, tower: nn.Module, model: ModelConfig) -> None:
    """The low-rank parts of a tower alone, as PEFT reads them beside the model that the training began with."""
    assert model.lora is not None
    adapted = {name: module for name, module in tower.named_modules() if isinstance(module, LoraLinear)}
    parts = {"lora_A": "lora_a", "lora_B": "lora_b"}  # names there and here
    weights = {
        f"base_model.model.{name}.{theirs}.weight": _as_fp32(module.get_parameter(ours))
        for name, module in adapted.items()
        for theirs, ours in parts.items()
    }
    described = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": without_folders(model.name_or_path),
        "r": model.lora.r,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        "target_modules": sorted(adapted),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir()
    write_json(folder / "adapter_config.json", described)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_described(folder: Path, settings: EncoderSettings, prompts: dict[str, str]) -> None:
    """What sentence-transformers knows of a whole model, beside its modules."""
    described = {
        "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": settings.similarity,
        **({} if settings.truncate_dim is None else {"truncate_dim": settings.truncate_dim}),
    }
    write_json(folder / "config_sentence_transformers.json", described)


def write_router(folder: Path) -> None:
    """Makes one model of the towers' folders in `folder`: `encode_query` takes the one, `encode_document` the other."""
    structure: dict[str, list[str]] = {}
    types: dict[str, str] = {}
    for side, route in ROUTES.items():
        modules = read_json(folder / side / "modules.json")
        named = {str(PurePosixPath(side, module["path"])): module["type"] for module in modules}
        structure[route] = list(named)
        types |= named
    parameters = {"default_route": ROUTES["passage"], "allow_empty_key": True}
    write_json(folder / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
    write_json(
        folder / "modules.json",
        [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}],
    )


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, max_tokens: int) -> None:
    """The tokenizer as training used it: cut at `max_tokens`, able to pad, without the settings of its last call."""
    saved = copy.deepcopy(tokenizer)
    saved.model_max_length = max_tokens
    saved.padding_side = "right"  # absolute positions (GPT-2) would be wrong behind padding
    if saved.pad_token is None:
        saved.pad_token = saved.eos_token
    if (backend := getattr(saved, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    saved.save_pretrained(folder)
    name_older_tokenizer(saved, folder)


def _as_fp32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
