"""The settings of a model folder beside its weights: pooling, normalisation, prompts, lengths, title policy.

Read from `bigbatch.json` where a training run of ours wrote the folder, else from the files of sentence-transformers,
else defaults that fit the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from retriever.config import Config, ConfigError, ModelConfig
from retriever.data.tokens import Side
from retriever.encoder.architectures import check_architecture, is_causal, longest_input, set_bidirectional
from retriever.encoder.model_files import check_number, fields_of, read_fields, read_json
from retriever.encoder.peer_files import described_settings, read_described, read_modules, tokenizer_limit
from retriever.encoder.pooling import PoolingMode
from retriever.encoder.pretrained import read_config

SETTINGS_FILE = "bigbatch.json"
SETTINGS_VERSION = 1
_DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become embeddings. Lengths are in tokens, the prompt's and special ones included.

    Scores are dot products of the embeddings; `similarity` is the name that says so elsewhere: `cosine` for unit
    vectors.
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
    truncate_dim: int | None = None  # how many leading dimensions are kept, before normalisation; None: all

    @property
    def similarity(self) -> Literal["cosine", "dot"]:
        return "cosine" if self.normalize else "dot"

    def prompt(self, side: Side) -> str:
        """The prompt in front of every text of that side."""
        return self.query_prompt if side == "query" else self.passage_prompt

    def max_tokens(self, side: Side) -> int:
        """The number of tokens at which texts of that side are cut."""
        return self.query_max_tokens if side == "query" else self.passage_max_tokens


@dataclass(frozen=True)
class _Own:
    """The fields of bigbatch.json that describe the folder."""

    format_version: int
    tied: bool = True


def settings_of(config: Config, pooling: PoolingMode, truncate_dim: int | None = None) -> EncoderSettings:
    """The settings of a training run; `pooling` and `truncate_dim` are its encoder's, what `auto` was resolved to."""
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
        truncate_dim=truncate_dim,
    )


def read_settings(name_or_path: str | Path) -> EncoderSettings:
    """The settings of a model folder or Hugging Face name.

    Raises ConfigError where there is no such model, a file of it is malformed, or it needs what this project does not
    compute.
    """
    name = str(name_or_path)
    config = read_model_config(name)
    longest = longest_input(config)
    if (ours := read_json(name, SETTINGS_FILE)) is not None:
        return _from_own(ours, f"{name}/{SETTINGS_FILE}", longest)
    longest = longest or _DEFAULT_MAX_TOKENS
    if (modules := read_modules(name)) is not None:
        return EncoderSettings(**described_settings(name, modules, longest))
    max_tokens = min(tokenizer_limit(name) or _DEFAULT_MAX_TOKENS, _DEFAULT_MAX_TOKENS, longest)
    return EncoderSettings(_default_pooling(config), True, "", "", max_tokens, max_tokens)


def pooling_of(model: ModelConfig) -> PoolingMode:
    """The pooling of a run: `model.pooling`, else the model folder's, else the usual one for its attention."""
    if model.pooling != "auto":
        return model.pooling
    if describes_itself(model.name_or_path):
        return read_settings(model.name_or_path).pooling
    config = read_model_config(model.name_or_path)
    set_bidirectional(config, model.bidirectional, model.name_or_path)
    return _default_pooling(config)


def read_truncate_dim(name_or_path: str | Path) -> int | None:
    """The leading dimensions of an embedding that the folder keeps; None: all. Other settings may be unsupported."""
    name = str(name_or_path)
    if read_json(name, SETTINGS_FILE) is not None:
        return read_settings(name).truncate_dim
    return read_described(name).truncate_dim


def describes_itself(name_or_path: str | Path) -> bool:
    """Whether the model says how it embeds texts; a plain language model does not."""
    name = str(name_or_path)
    return read_json(name, SETTINGS_FILE) is not None or read_json(name, "modules.json") is not None


def read_model_config(name_or_path: str | Path, side: Side = "passage") -> Any:
    """One tower's transformers config. Raises ConfigError if it is missing, malformed or not verified."""
    name = str(name_or_path)
    folder = tower_folder(name, side)
    file = str(PurePosixPath(folder) / "config.json")
    if read_json(name, file) is None:
        exported = (f"{name}/{folder}" for folder in ("best", "export") if (Path(name) / folder).is_dir())
        found = next(exported, None)
        hint = f": it has no {file}" if found is None else f"; did you mean {found}?"
        raise ConfigError(f"model {name!r} is no folder or Hugging Face name of a loadable model{hint}")
    config = read_config(name, folder)
    check_architecture(config, name)
    return config


def own_folder(name_or_path: str | Path, side: Side) -> str:
    """The sub-folder where that side's modules.json lies: `side` in an export of two towers, "" elsewhere."""
    ours = read_fields(_Own, str(name_or_path), SETTINGS_FILE)
    return side if ours is not None and not ours.tied else ""


def tower_folder(name_or_path: str | Path, side: Side) -> str:
    """The sub-folder of a model folder where that side's transformer and tokenizer lie; "" for the folder itself."""
    name = str(name_or_path)
    if (ours := read_fields(_Own, name, SETTINGS_FILE)) is not None:
        return "" if ours.tied else side
    return next((module.path for module in read_modules(name) or () if module.kind == "Transformer"), "")


def _default_pooling(config: Any) -> PoolingMode:
    """sentence-transformers' pooling of a plain language model: the token that saw the whole text, or the mean."""
    return "last" if is_causal(config) else "mean"


def _from_own(found: Any, where: str, longest: int | None) -> EncoderSettings:
    version = fields_of(_Own, found, where).format_version
    if version != SETTINGS_VERSION:
        raise ConfigError(f"{where}: format_version is {version}; this version of bigbatch reads {SETTINGS_VERSION}")
    for name in (f.name for f in fields(EncoderSettings)):
        if name not in found and name != "truncate_dim":  # which version 1 of the format did not have at first
            raise ConfigError(f"{where}: {name!r} is missing")
    settings = fields_of(EncoderSettings, found, where)
    for name in ("query_max_tokens", "passage_max_tokens"):
        check_number(f"{where}: {name}", found[name], 4, longest)
    check_number(f"{where}: truncate_dim", settings.truncate_dim, 1)
    return settings
