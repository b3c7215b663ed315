"""Plain nested values to nested frozen dataclasses, strictly: every error names the dotted key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from retriever.errors import RefusedError


class ConfigError(RefusedError):
    """A configuration that cannot be run; the message names the key."""


def require(holds: bool, key: str, expected: str, received: object) -> None:
    """Raises ConfigError, which names the key and both values, where `holds` is false."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}; received {received!r}")


def build(kind: type, tree: Any, prefix: str = "") -> Any:
    """An instance of the dataclass `kind` from nested plain values. Raises ConfigError for unknown keys and wrong
    types.
    """
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
        return build(typing.cast(type, hint), value, key)
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
        if value is False and "off" in arguments:  # YAML reads a bare off as false
            return "off"
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
        return f"a list, each entry {_spell(arguments[0])}"
    if is_dataclass(hint) or origin is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def plain(value: Any) -> Any:
    """Nested values with tuples as lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings under their dotted keys; lists are leaves."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves
