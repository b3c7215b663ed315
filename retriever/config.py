"""The run's configuration: nested frozen dataclasses, filled from one YAML file and `key.sub=value` overrides.

OmegaConf reads and merges; this file decides what is allowed. Every error names the key it is about.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Auto = Literal["auto"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key."""


@dataclass(frozen=True)
class RunConfig:
    output_dir: str = "runs/default"
    seed: int = 0
    resume: str = "auto"  # auto | never | a checkpoint folder
    trackers: tuple[str, ...] = ("tensorboard",)
    verify: bool = False
    preflight: Literal["auto", "only", "off"] = "auto"
    timeout_s: int = 1800


@dataclass(frozen=True)
class ModelConfig:
    name_or_path: str = ""
    tied: bool = True
    pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    normalize: bool = True
    query_prompt: str = ""
    passage_prompt: str = ""
    query_max_tokens: int = 32
    passage_max_tokens: int = 144
    attention: Literal["auto", "packed", "padded"] = "auto"
    compile: bool | Auto = "auto"
    gradient_checkpointing: bool = False
    lora: dict[str, Any] | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One training source: a file or folder (`path`) or a Hugging Face dataset (`name`)."""

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    format: Literal["auto", "msmarco", "beir", "tevatron", "dpr", "flagembedding", "columns"] = "auto"
    split: str = "train"
    columns: tuple[str, ...] | None = None  # anchor, positive[, negative...]: which columns of a columns file
    corpus: str | None = None
    queries: str | None = None
    weight: float = 1.0
    limit: int | None = None


@dataclass(frozen=True)
class DataConfig:
    train: tuple[SourceConfig, ...] = ()
    negatives: int = 7
    title: Literal["join", "drop"] = "join"
    title_separator: str = " "
    cache_dir: str = "cache"


@dataclass(frozen=True)
class BatchConfig:
    queries: int = 1024  # global, per optimizer step
    tokens_per_chunk: int | Auto = "auto"
    retain: bool | Auto = "auto"
    one_source: bool = True
    offload: bool = False


@dataclass(frozen=True)
class LossConfig:
    strategy: Literal["tiled", "dense", "local", "disco"] = "tiled"
    precision: Literal["bf16", "high", "fp32"] = "bf16"
    exchange: Literal["auto", "ring", "gather"] = "auto"
    temperature: float = 0.02
    learn_temperature: bool = False
    symmetric: bool = False
    mask_known_positives: bool = True
    false_negative_margin: float | None = None
    dims: tuple[int, ...] = ()
    workspace_mib: int | Auto = "auto"


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 2.0e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: float = 0.1  # a share of all steps, or a number of steps if >= 1
    max_grad_norm: float = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int | None = None
    epochs: float | None = None
    log_every: int = 10
    save_every: int = 500
    keep_last: int = 2
    eval_every: int = 0  # 0: only after the last step


@dataclass(frozen=True)
class EvalConfig:
    path: str = ""
    split: str = "dev"
    metrics: tuple[str, ...] = ("nDCG@10", "MRR@10", "Recall@100")
    k: int = 1000
    index: str = "flat"


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. `load` reads it, `to_yaml` writes it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig | None = None


# Settings whose room is not built yet. Each is refused by name; the room that brings it deletes its line.
_NOT_AVAILABLE: dict[str, tuple[Any, ...]] = {
    "model.attention": ("packed",),
    "model.compile": (True,),
    "batch.retain": (True,),
    "batch.offload": (True,),
    "loss.exchange": ("ring",),
    "run.verify": (True,),
    "run.preflight": ("only",),
}


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run: the YAML at `path`, then `key.sub=value` overrides, then `validate`.

    A list entry is addressed by its number: `data.train.0.limit=100`.
    Raises ConfigError naming the key that is unknown, of a wrong type, impossible or not available.
    """
    try:
        merged = OmegaConf.load(path) if path is not None else OmegaConf.create({})
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator or not key:
                raise ConfigError(f"override {override!r}: expected key.sub=value")
            parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
            OmegaConf.update(merged, key, parsed, force_add=True)
        tree = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: expected a mapping of sections, found {type(tree).__name__}")
    config = from_dict(tree)
    validate(config)
    return config


def from_dict(tree: Mapping[Any, Any]) -> Config:
    """A Config from nested plain values, types checked, combinations not. Raises ConfigError."""
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values (tuples as lists), as they are saved with a run."""
    return _plain(asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def validate(config: Config) -> None:
    """Raises ConfigError where the values cannot be run together."""
    for key, refused in _NOT_AVAILABLE.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value in refused and type(value) is type(refused[0]):
            raise ConfigError(f"{key}: {value!r} is not available in this version; leave it at its default")
    model, loss, train = config.model, config.loss, config.train
    _require(model.name_or_path != "", "model.name_or_path", "a model folder or Hugging Face name", "")
    _require(model.lora is None, "model.lora", "null: LoRA is not available in this version", model.lora)
    _require(model.query_max_tokens >= 4, "model.query_max_tokens", "at least 4", model.query_max_tokens)
    _require(model.passage_max_tokens >= 4, "model.passage_max_tokens", "at least 4", model.passage_max_tokens)
    _require(len(config.data.train) > 0, "data.train", "at least one source", [])
    for i, source in enumerate(config.data.train):
        key = f"data.train.{i}"
        _require((source.path is None) != (source.name is None), key, "exactly one of path and name", asdict(source))
        _require(source.weight > 0, f"{key}.weight", "a number above 0", source.weight)
        _require(source.limit is None or source.limit > 0, f"{key}.limit", "null or at least 1", source.limit)
    _require(config.data.negatives >= 0, "data.negatives", "0 or more", config.data.negatives)
    _require(config.batch.queries >= 2, "batch.queries", "at least 2: a batch of one has no negatives", config.batch.queries)
    if config.batch.tokens_per_chunk != "auto":
        longest = max(model.query_max_tokens, model.passage_max_tokens)
        _require(
            config.batch.tokens_per_chunk >= longest,
            "batch.tokens_per_chunk",
            f"auto or at least {longest}, the longest text of model.*_max_tokens",
            config.batch.tokens_per_chunk,
        )
    _require(loss.temperature > 0, "loss.temperature", "a number above 0", loss.temperature)
    _require(loss.dims == (), "loss.dims", "[]: Matryoshka losses are not available in this version", list(loss.dims))
    margin = loss.false_negative_margin
    _require(margin is None or margin >= 0, "loss.false_negative_margin", "null or 0 or more", margin)
    _require(config.optim.lr > 0, "optim.lr", "a number above 0", config.optim.lr)
    _require(config.optim.warmup >= 0, "optim.warmup", "0 or more", config.optim.warmup)
    _require(config.optim.max_grad_norm > 0, "optim.max_grad_norm", "a number above 0", config.optim.max_grad_norm)
    one = (train.max_steps is None) != (train.epochs is None)
    _require(one, "train", "exactly one of train.max_steps and train.epochs", asdict(train))
    _require(train.max_steps is None or train.max_steps > 0, "train.max_steps", "at least 1", train.max_steps)
    _require(train.epochs is None or train.epochs > 0, "train.epochs", "a number above 0", train.epochs)
    for name in ("log_every", "save_every", "keep_last"):
        _require(getattr(train, name) >= 1, f"train.{name}", "at least 1", getattr(train, name))
    _require(train.eval_every >= 0, "train.eval_every", "0 or more", train.eval_every)
    _require(train.eval_every == 0 or config.eval is not None, "train.eval_every", "0 where there is no eval section", train.eval_every)
    if config.eval is not None:
        _require(config.eval.path != "", "eval.path", "a BEIR folder", "")
        _require(config.eval.index == "flat", "eval.index", "flat: other indexes are not available in this version", config.eval.index)


def warnings(config: Config) -> list[str]:
    """What is allowed and probably not meant; nothing is changed silently."""
    found = []
    if config.batch.queries >= 8192 and config.optim.lr < 1e-4:
        found.append(f"optim.lr={config.optim.lr:g} is small for batch.queries={config.batch.queries}: at this size 1e-4 and more is usual")
    if not config.model.normalize and config.loss.temperature < 0.1:
        found.append(f"model.normalize=false with loss.temperature={config.loss.temperature:g}: logits may be very large")
    return found


def differences(old: Config, new: Config) -> list[str]:
    """The keys that differ, as `key: old -> new`."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def _require(holds: bool, key: str, expected: str, received: Any) -> None:
    if not holds:
        raise ConfigError(f"{key}: expected {expected}; received {received!r}")


def _build(kind: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix or 'config'}: expected a mapping, received {tree!r}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    values = {}
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"
            raise ConfigError(f"{key}: unknown key; {hint}")
        values[name] = _convert(hints[name], value, key)
    return kind(**values)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        for option in (a for a in arguments if a is not type(None)):
            if is_dataclass(option) or len([a for a in arguments if a is not type(None)]) == 1:
                return _convert(option, value, key)
            try:
                return _convert(option, value, key)
            except ConfigError:
                continue
        raise ConfigError(f"{key}: expected {_spell(hint)}, received {value!r}")
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            if len(inner) == len(value):
                return tuple(_convert(h, v, f"{key}.{i}") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    raise ConfigError(f"{key}: expected {_spell(hint)}, received {value!r}")


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if a is type(None) else _spell(a) for a in arguments)
    if origin is tuple:
        return f"a list of {_spell(arguments[0])}"
    if is_dataclass(hint) or origin is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves
