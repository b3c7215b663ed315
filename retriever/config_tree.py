"""Plain nested values to nested frozen dataclasses, strictly: every error names the dotted key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple

from retriever.errors import RefusedError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


class ConfigError(RefusedError):
    """A configuration that cannot be run; the message names the key."""


class Range(NamedTuple):
    """The numbers that a setting takes, as in `Annotated[int, Range(1)]`; `above`, `below`: without the bound."""

    least: float
    most: float = float("inf")
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether the number is in the range."""
        outside = (self.above and value == self.least) or (self.below and value == self.most)
        return self.least <= value <= self.most and not outside

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'of at least'} {self.least:,}"
        return (
            least if self.most == float("inf") else f"{least} and {'below' if self.below else 'at most'} {self.most:,}"
        )


def require(holds: bool, key: str, expected: str, received: object) -> None:
    """Raises ConfigError, which names the key and both values, where `holds` is false."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}; received {received!r}")


def build(kind: type, tree: Any, prefix: str = "") -> Any:
    """An instance of the dataclass `kind` from nested plain values.

    Raises ConfigError for an unknown key, a wrong type or a number out of its range.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix or 'config'}: expected a mapping, received {tree!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
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
    """`value` as the type `hint` has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    if origin in (types.UnionType, typing.Union):
        return _convert_any(hint, value, key)
    if origin is Annotated:
        number = _convert(arguments[0], value, key)
        if arguments[1].holds(number):
            return number
    elif origin is Literal:
        if value is False and "off" in arguments:  # YAML reads a bare off as false
            return "off"
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(_convert(h, v, f"{key}.{i}") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is (origin or hint):  # True is no whole number
        return value
    raise ConfigError(f"{key}: expected {spell(hint)}, received {value!r}")


def _convert_any(hint: Any, value: Any, key: str) -> Any:
    """`value` as the first type of the union that takes it."""
    options = [option for option in typing.get_args(hint) if (option is types.NoneType) == (value is None)]
    if len(options) == 1:
        return _convert(options[0], value, key)  # its error may name an inner key
    for option in options:
        try:
            return _convert(option, value, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key}: expected {spell(hint)}, received {value!r}")


def spell(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{spell(arguments[0])} {arguments[1]}"
    if origin is Literal:
        return " | ".join(arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(spell, arguments))
    if origin is tuple:
        return f"a list, each entry {spell(arguments[0])}"
    return "a mapping" if is_dataclass(hint) or origin is dict else _NAMES.get(hint, str(hint))


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
