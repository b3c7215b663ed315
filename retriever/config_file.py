"""The configuration of a run from one YAML file and `key.sub=value` overrides. Every error names its key."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from retriever.config import Config, ConfigError, from_dict, to_dict
from retriever.config_rules import validate
from retriever.environment import check_trackers

# ValueError: no UTF-8, or a number of thousands of digits
_NOT_YAML = (OmegaConfBaseException, YAMLError, ValueError, RecursionError)


def load(path: str | Path | Config | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run: `read`, then `check`.

    Raises ConfigError naming the key that is unknown, of a wrong type, impossible or not available.
    """
    config = read(path, overrides)
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError where the settings cannot be run together, or a tracker is not available."""
    validate(config)
    check_trackers(config.run.trackers)


def read(path: str | Path | Config | None, overrides: Sequence[str] = ()) -> Config:
    """The YAML at `path`, a Config or nothing, then `key.sub=value` overrides. Raises ConfigError naming the key that
    is unknown or of a wrong type.
    """
    tree = read_tree(path, overrides, Config)
    named = {override.partition("=")[0] for override in overrides}
    for asked, other in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if f"train.{asked}" in named and f"train.{other}" not in named and tree["train"][asked] is not None:
            tree["train"][other] = None  # one on the command line replaces the file's other
    return from_dict(tree)


def read_tree(
    path: str | Path | Config | None, overrides: Sequence[str], schema: type, inner: type | None = None
) -> dict[str, Any]:
    """The mapping of sections of a YAML file, a Config or nothing, with `key.sub=value` overrides of its settings.

    A list's entry is addressed by its position from 0. A setting that is text takes the value as it is written
    (`model.query_prompt=query: `), unless quotation marks enclose it; any other is read as YAML. `schema` is the
    dataclass that knows the settings, `inner` the one that knows those of its mappings. Raises ConfigError naming the
    file or the override.
    """
    tree: Any = to_dict(path) if isinstance(path, Config) else {}
    if path is not None and not isinstance(path, Config):
        try:
            tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror or 'expected a mapping of sections'}") from error
        except _NOT_YAML as error:
            raise ConfigError(f"--config {path}: expected YAML in UTF-8: {_on_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: expected a mapping of sections, found a list")
    for override in overrides:
        try:
            names, value = _parsed(override, schema, inner)
            tree = _with(tree, names, value)
        except (*_NOT_YAML, TypeError) as error:
            shown = repr(override if len(override) <= 100 else f"{override[:97]}...")
            raise ConfigError(f"override {shown}: {_on_one_line(error)}") from error
    return tree


def _parsed(override: str, schema: type, inner: type | None) -> tuple[list[str], Any]:
    """The names that lead to a setting, and its value."""
    override.encode()  # bytes of the command line that are no UTF-8 are lone surrogates here
    key, separator, value = override.partition("=")
    names = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not separator or not all(names):
        raise ConfigError("expected key.sub=value")
    return names, _read(value, _type_of(schema, names, inner))


def _type_of(kind: Any, names: Sequence[str], inner: type | None) -> Any:
    """The type of the setting that the names lead to, through lists and sections that may be missing; None: not
    known.
    """
    for number, name in enumerate(names):
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next((option for option in typing.get_args(kind) if is_dataclass(option)), None)
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        elif typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        else:
            return _type_of(inner, names[number:], None) if typing.get_origin(kind) is dict else None
    return kind


def _read(value: str, kind: Any) -> Any:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if kind == (str | None) and value == "null":
        return None
    if kind in (str, str | None) and not quoted:
        return value
    tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    parsed = tree["value"]
    if (isinstance(parsed, str) and not quoted) or (isinstance(parsed, Mapping) and value.lstrip()[:1] != "{"):
        return value
    if parsed == {}:
        raise ConfigError("expected settings in the braces, received none")
    return parsed


def _with(node: Any, names: Sequence[str], value: Any) -> Any:
    """`node` with `value` where the names lead to; a section that is there keeps its other settings."""
    if not names:
        merges = isinstance(node, dict) and isinstance(value, dict)
        return node | {name: _with(node.get(name), (), new) for name, new in value.items()} if merges else value
    if isinstance(node, list):
        if not names[0].isdecimal() or int(names[0]) >= len(node):
            raise ConfigError(f"expected a position from 0 to {len(node) - 1}, received {names[0]}")
        position = int(names[0])
        return [*node[:position], _with(node[position], names[1:], value), *node[position + 1 :]]
    if not isinstance(node, (dict, types.NoneType)):
        raise ConfigError(f"expected a section before .{names[0]}, received {node!r}")
    section = node or {}
    return section | {names[0]: _with(section.get(names[0]), names[1:], value)}


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
