"""What a model folder says about itself beyond its weights: pooling, normalisation, prompts, lengths, title policy.

Read from `bigbatch.json` where a training run of ours wrote the folder, else from the files of sentence-transformers, else
defaults that fit the architecture.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig

from retriever.config import Config, ConfigError
from retriever.data.tokens import Side
from retriever.encoder.architectures import check_architecture, is_decoder, longest_input
from retriever.encoder.pooling import MODES, PoolingMode

SETTINGS_FILE = "bigbatch.json"
SETTINGS_VERSION = 1
_DEFAULT_MAX_TOKENS = 512
_POOLING_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' -> ours
_POOLING_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # the names in use, in the order sentence-transformers tries them
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become embeddings. Lengths are in tokens, the prompt's and special ones included.

    Scores are dot products of the embeddings; `similarity` is the name that says so elsewhere: `cosine` for unit vectors.
    """

    pooling: PoolingMode
    normalize: bool
    query_prompt: str
    passage_prompt: str
    query_max_tokens: int
    passage_max_tokens: int
    title: Literal["join", "drop"] = "join"
    title_separator: str = " "
    tied: bool = True

    @property
    def similarity(self) -> Literal["cosine", "dot"]:
        return "cosine" if self.normalize else "dot"

    def prompt(self, side: Side) -> str:
        """What stands in front of every text of that side."""
        return self.query_prompt if side == "query" else self.passage_prompt

    def max_tokens(self, side: Side) -> int:
        """How many tokens of a text of that side the encoder sees."""
        return self.query_max_tokens if side == "query" else self.passage_max_tokens


def settings_of(config: Config, pooling: PoolingMode) -> EncoderSettings:
    """The settings of a training run whose encoder pools by `pooling` (what `auto` was resolved to)."""
    model = config.model
    return EncoderSettings(
        pooling=pooling,
        normalize=model.normalize,
        query_prompt=model.query_prompt,
        passage_prompt=model.passage_prompt,
        query_max_tokens=model.query_max_tokens,
        passage_max_tokens=model.passage_max_tokens,
        title=config.data.title,
        title_separator=config.data.title_separator,
        tied=model.tied,
    )


def read_settings(name_or_path: str | Path) -> EncoderSettings:
    """The settings of a model folder or Hugging Face name.

    Raises ConfigError where there is no such model, or where it needs what this project does not compute.
    """
    name = str(name_or_path)
    config = read_model_config(name)
    ours = _read_json(name, SETTINGS_FILE)
    if ours is not None:
        return _from_own(ours, name)
    modules = _read_json(name, "modules.json")
    longest = longest_input(config) or _DEFAULT_MAX_TOKENS
    if modules is None:
        max_tokens = min(_tokenizer_limit(name) or _DEFAULT_MAX_TOKENS, _DEFAULT_MAX_TOKENS, longest)
        return EncoderSettings("last" if is_decoder(config) else "mean", True, "", "", max_tokens, max_tokens)
    return _from_sentence_transformers(name, modules, longest)


def read_model_config(name_or_path: str | Path) -> Any:
    """The passage tower's transformers config. Raises ConfigError where there is none, or of an unverified architecture."""
    name = str(name_or_path)
    folder = tower_folder(name, "passage")
    try:
        config = AutoConfig.from_pretrained(name, subfolder=folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        hint = f"; did you mean {name}/export?" if (Path(name) / "export").is_dir() else f": {reason}"
        raise ConfigError(f"model.name_or_path: {name!r} is no folder or Hugging Face name of a loadable model{hint}") from error
    check_architecture(config, name)
    return config


def tower_folder(name_or_path: str | Path, side: Side) -> str:
    """The sub-folder of a model folder where that side's transformer and tokenizer lie; "" for the folder itself."""
    name = str(name_or_path)
    ours = _read_json(name, SETTINGS_FILE)
    if ours is not None:
        return "" if ours.get("tied", True) else side
    for module in _read_json(name, "modules.json") or ():
        if _kind(module) == "Transformer":
            return str(module["path"])
    return ""


def _from_own(found: dict[str, Any], name: str) -> EncoderSettings:
    if found.get("format_version") != SETTINGS_VERSION:
        raise ConfigError(
            f"{name}/{SETTINGS_FILE}: format_version is {found.get('format_version')!r}; this version of bigbatch reads {SETTINGS_VERSION}"
        )
    try:
        return EncoderSettings(**{f.name: found[f.name] for f in fields(EncoderSettings)})
    except KeyError as error:
        raise ConfigError(f"{name}/{SETTINGS_FILE}: {error.args[0]!r} is missing") from error


def _from_sentence_transformers(name: str, modules: list[dict[str, Any]], longest: int) -> EncoderSettings:
    for module in modules:
        if _kind(module) not in _MODULES:
            expected = ", ".join(_MODULES)
            raise ConfigError(f"model.name_or_path: {name} has a module {module['type']!r} in modules.json; expected only {expected}")
    folder = tower_folder(name, "passage")
    described = _read_json(name, "config_sentence_transformers.json") or {}
    prompts = described.get("prompts") or {}
    passage_prompt = next((prompts[p] for p in _PASSAGE_PROMPTS if prompts.get(p)), "")
    transformer = _read_json(name, str(PurePosixPath(folder) / "sentence_bert_config.json")) or {}
    if transformer.get("do_lower_case"):
        raise ConfigError(f"model.name_or_path: {name} sets do_lower_case in sentence_bert_config.json; let its tokenizer lower-case")
    max_tokens = min(transformer.get("max_seq_length") or _tokenizer_limit(name, folder) or _DEFAULT_MAX_TOKENS, longest)
    kinds = [_kind(module) for module in modules]
    return EncoderSettings(
        pooling=_pooling(name, modules),
        # Cosine similarity of raw vectors is the dot product of unit ones.
        normalize="Normalize" in kinds or described.get("similarity_fn_name") == "cosine",
        query_prompt=prompts.get("query") or "",
        passage_prompt=passage_prompt,
        query_max_tokens=max_tokens,
        passage_max_tokens=max_tokens,
    )


def _pooling(name: str, modules: list[dict[str, Any]]) -> PoolingMode:
    path = next((str(m["path"]) for m in modules if _kind(m) == "Pooling"), None)
    if path is None:
        raise ConfigError(f"model.name_or_path: modules.json of {name} has no Pooling module; expected one, of {', '.join(MODES)}")
    found = _read_json(name, f"{path}/config.json") or {}
    named = found.get("pooling_mode")
    active = [key for key, value in found.items() if key.startswith("pooling_mode_") and value is True]
    mode = _POOLING_NAMES.get(named) if isinstance(named, str) else _POOLING_FLAGS.get(active[0]) if len(active) == 1 else None
    if mode is None:
        raise ConfigError(f"model.pooling: {name}/{path} pools by {named or active}; expected one of {', '.join(_POOLING_NAMES)}")
    if not found.get("include_prompt", True):
        raise ConfigError(f"model.name_or_path: {name} leaves the prompt out of its pooling (include_prompt: false): not supported")
    return cast(PoolingMode, mode)


def _kind(module: dict[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _tokenizer_limit(name: str, folder: str = "") -> int | None:
    found = (_read_json(name, str(PurePosixPath(folder) / "tokenizer_config.json")) or {}).get("model_max_length")
    return int(found) if found is not None else None


@cache
def _hub_file(name: str, file: str) -> str | None:
    """Where the file of a Hugging Face model lies, once downloaded, None where the model has none; the hub is asked once a process.

    Where the hub is not reached, a model in the cache has the files that lie there, which is said. Raises ConfigError for any other model.
    """
    try:
        return hf_hub_download(name, file)
    except LocalEntryNotFoundError as error:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = "the hub was not reached, and the model is not in the cache"
            raise ConfigError(f"model.name_or_path: {name!r} is no folder, and cannot be fetched: {reason}") from error
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"note: {name}: the hub was not reached; the cache has no {file}, so the model counts as having none", file=sys.stderr)
        return None
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # not to be taken for a file that the model does not have
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.name_or_path: {file} of {name!r} could not be fetched: {reason}") from error


def _read_json(name: str, file: str) -> Any | None:
    """The file's content, or None where the model has no such file."""
    if Path(name).exists():
        path: str | None = str(Path(name) / file) if (Path(name) / file).is_file() else None
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model.name_or_path: there is no folder {name}")
    else:
        path = _hub_file(name, file)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
