"""Reads how a model embeds texts from the files of sentence-transformers and of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from retriever.config import ConfigError
from retriever.encoder.model_files import check_number, fields_of, read_fields, read_json

_DESCRIBED = "config_sentence_transformers.json"
_POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' names -> ours
_POOLING |= {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}  # before version 6
_MODULES = re.compile(r"Transformer, Pooling(, Dense)*(, Normalize)?")


@dataclass(frozen=True)
class Module:
    """An entry of modules.json."""

    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        """The class's name in sentence-transformers, wherever it is kept; the whole name of other classes."""
        return self.type.rpartition(".")[2] if self.type.startswith("sentence_transformers.") else self.type


@dataclass(frozen=True)
class _Prompts:
    """The prompts in config_sentence_transformers.json that belong to a side. The first one of a passage counts."""

    query: str | None = None
    document: str | None = None
    passage: str | None = None
    corpus: str | None = None


@dataclass(frozen=True)
class Described:
    """config_sentence_transformers.json."""

    prompts: dict[str, Any] | None = None
    similarity_fn_name: Literal["cosine", "dot"] | None = (
        None  # where it says nothing, sentence-transformers takes the cosine
    )
    truncate_dim: int | None = None


@dataclass(frozen=True)
class _Transformer:
    """sentence_bert_config.json."""

    max_seq_length: int | None = None
    query_length: int | None = None
    document_length: int | None = None
    do_lower_case: bool | None = None
    processing_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Pooling:
    """The configuration of the pooling module, as version 6 writes it; the older one is a flag for every mode."""

    pooling_mode: str | None = None
    include_prompt: bool = True


@dataclass(frozen=True)
class _Tokenizer:
    """tokenizer_config.json."""

    model_max_length: int | float | None = None


def read_modules(name: str, folder: str = "") -> list[Module] | None:
    """The modules of sentence-transformers in their order, None where the model's `folder` has no modules.json."""
    file = str(PurePosixPath(folder) / "modules.json")
    found, where = read_json(name, file), f"{name}/{file}"
    if found is None:
        return None
    if not isinstance(found, list):
        raise ConfigError(f"{where}: expected a list of modules, received {type(found).__name__}")
    modules = [fields_of(Module, module, f"{where}: module {i}") for i, module in enumerate(found)]
    for i, module in enumerate(modules):
        if PurePosixPath(module.path).is_absolute() or ".." in PurePosixPath(module.path).parts or "\\" in module.path:
            raise ConfigError(
                f"{where}: module {i}: path: expected a folder inside the model's, received {module.path!r}"
            )
    return modules


def read_described(name: str) -> Described:
    """config_sentence_transformers.json, or what counts where there is none."""
    described = read_fields(Described, name, _DESCRIBED) or Described()
    check_number(f"{name}/{_DESCRIBED}: truncate_dim", described.truncate_dim, 1)
    return described


def described_settings(name: str, modules: Sequence[Module], longest: int) -> dict[str, Any]:
    """The fields of `EncoderSettings` that the folder of these modules gives, for a model of `longest` positions."""
    if not _MODULES.fullmatch(", ".join(module.kind for module in modules)):
        expected = "Transformer, Pooling, any number of Dense, and Normalize or not"
        received = ", ".join(module.type for module in modules) or "none"
        raise ConfigError(f"{name}/modules.json: expected the modules {expected}; received {received}")
    folder, normalizes, where = modules[0].path, modules[-1].kind == "Normalize", f"{name}/{_DESCRIBED}"
    described = read_described(name)
    if described.truncate_dim is not None and normalizes and described.similarity_fn_name == "dot":
        raise ConfigError(
            f"{where}: similarity_fn_name: dot of unit vectors cut at truncate_dim is not supported; expected cosine"
        )
    prompts = fields_of(_Prompts, described.prompts or {}, f"{where}: prompts")
    passage_prompts = (prompts.document, prompts.passage, prompts.corpus)

    file = str(PurePosixPath(folder) / "sentence_bert_config.json")
    transformer = read_fields(_Transformer, name, file) or _Transformer()
    for key in ("do_lower_case", "processing_kwargs"):
        if value := getattr(transformer, key):
            hint = "; let its tokenizer lower-case" if key == "do_lower_case" else ""
            raise ConfigError(f"{name}/{file}: {key}: {value} is not supported{hint}")
    for key in ("max_seq_length", "query_length", "document_length"):
        check_number(f"{name}/{file}: {key}", getattr(transformer, key), 4)
    max_tokens = min(transformer.max_seq_length or tokenizer_limit(name, folder) or longest, longest)
    return dict(
        pooling=_pooling(name, modules[1].path),
        # Cosine similarity of raw vectors is the dot product of unit ones.
        normalize=normalizes or described.similarity_fn_name != "dot",
        query_prompt=prompts.query or "",
        passage_prompt=next((prompt for prompt in passage_prompts if prompt is not None), ""),
        query_max_tokens=min(transformer.query_length or max_tokens, max_tokens),
        passage_max_tokens=min(transformer.document_length or max_tokens, max_tokens),
        truncate_dim=described.truncate_dim,
    )


def _pooling(name: str, path: str) -> str:
    file = str(PurePosixPath(path) / "config.json")
    where, found = f"{name}/{file}", read_json(name, file)
    if found is None:
        raise ConfigError(f"{where}: is missing; expected how the model pools")
    pooling = fields_of(_Pooling, found, where)
    active = [key for key, value in found.items() if key.startswith("pooling_mode_") and value is True]
    chosen = [pooling.pooling_mode] if pooling.pooling_mode is not None else active
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        expected, received = ", ".join(list(_POOLING)[:3]), ", ".join(chosen) or "none"
        raise ConfigError(f"{where}: pooling_mode: expected one of {expected}; received {received}")
    if not pooling.include_prompt:
        raise ConfigError(f"{where}: include_prompt: false (the prompt is left out of the pooling) is not supported")
    return _POOLING[chosen[0]]


def tokenizer_limit(name: str, folder: str = "") -> int | None:
    """The longest input that the tokenizer names, in tokens; None where it names none."""
    file = str(PurePosixPath(folder) / "tokenizer_config.json")
    limit = (read_fields(_Tokenizer, name, file) or _Tokenizer()).model_max_length
    check_number(f"{name}/{file}: model_max_length", limit, 4)
    return None if limit is None else int(min(limit, 10**9))  # 1e30 stands for no limit
