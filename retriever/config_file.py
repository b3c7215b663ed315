"""The configuration of a run from one YAML file and `key.sub=value` overrides. Every error names its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from retriever.config import Config, ConfigError, from_dict
from retriever.config_rules import validate


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run: the YAML at `path`, then `key.sub=value` overrides, then `validate`.

    A list entry is addressed by its number: `data.train.0.limit=100`.
    Raises ConfigError naming the key that is unknown, of a wrong type, impossible or not available.
    """
    try:
        merged = OmegaConf.load(path) if path is not None else OmegaConf.create({})
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or 'expected a mapping of sections'}") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"--config {path}: expected a mapping of sections, found a list")
    for override in overrides:
        apply_override(merged, override)
    named_keys = {override.partition("=")[0] for override in overrides}
    for named, other in (("max_steps", "epochs"), ("epochs", "max_steps")):  # one on the command line replaces the file's other
        if f"train.{named}" in named_keys and f"train.{other}" not in named_keys and OmegaConf.select(merged, f"train.{named}") is not None:
            OmegaConf.update(merged, f"train.{other}", None, force_add=True)
    config = from_dict(OmegaConf.to_container(merged, resolve=False))  # type: ignore[arg-type]
    validate(config)
    return config


def apply_override(merged: DictConfig, override: str) -> None:
    """Sets one `key.sub=value`; the value is read as YAML, but unquoted text is taken as it stands: `model.query_prompt=query: `.

    Raises ConfigError naming the override.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
        first = value.lstrip()[:1]
        if isinstance(parsed, str) and first not in ("'", '"') or isinstance(parsed, Mapping) and first != "{":
            parsed = value
        OmegaConf.update(merged, key, parsed, force_add=True)
    except (OmegaConfBaseException, YAMLError, TypeError, IndexError) as error:
        raise ConfigError(f"override {override!r}: {error}") from error
