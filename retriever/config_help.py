"""The settings with their meanings, as `retriever/config.py` has them: for a terminal, and for docs/settings.md.

`python -m retriever.config_help > docs/settings.md` writes the page anew.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from retriever.config import Config
from retriever.config_tree import require, spell

_WIDTH = 120  # columns
_INTRODUCTION = """# Settings

Every setting of a run, with its type, its default and its meaning. A YAML file gives them section by section
(`--config`), and `key.sub=value` on the command line replaces them. `retriever/train.py --help-settings [section]`
shows this list in a terminal. The page is `retriever.config_help.page()`, made of the comments in
[retriever/config.py](../retriever/config.py).

"""


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, type and default in words, and its meaning."""

    key: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass, under the dotted key that leads to it."""

    key: str
    about: str
    settings: list[Setting]


def sections(kind: type = Config, prefix: str = "") -> Iterator[Section]:
    """Every section, each before those inside it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    inner = {field.name: section for field in fields(kind) if (section := _section_in(hints[field.name]))}
    if kind is not Config:
        meanings = _comments(kind)
        settings = [
            Setting(f"{prefix}{field.name}", spell(hints[field.name]), _written(field.default), meanings[field.name])
            for field in fields(kind)
        ]
        yield Section(prefix.removesuffix("."), " ".join(str(inspect.getdoc(kind)).split()), settings)
    for name, section in inner.items():
        yield from sections(section, f"{prefix}{name}." + ("0." if name == "train" and prefix else ""))


def page() -> str:
    """The text of docs/settings.md."""
    return f"{_INTRODUCTION}{settings_text()}\n"


def settings_text(section: str = "") -> str:
    """The settings of a section and of those inside it, or of all, as a list in Markdown that a terminal can show.

    Raises ConfigError where there is no such section.
    """
    every = list(sections())
    chosen = [found for found in every if f"{found.key}.".startswith(f"{section}." if section else "")]
    known = ", ".join(found.key for found in every)
    require(chosen != [], "--help-settings", f"a section among {known}", section)
    lines = []
    for found in chosen:
        lines += [f"## {found.key}", "", textwrap.fill(found.about, _WIDTH), ""]
        for setting in found.settings:
            text = f"- `{setting.key}` ({setting.kind}; default: {setting.default}). {setting.meaning}"
            lines.append(textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False))
        lines.append("")
    return "\n".join(lines)


def _section_in(hint: Any) -> type | None:
    """The dataclass that a type holds, itself, in a list or beside null."""
    if is_dataclass(hint):
        return typing.cast(type, hint)
    return next(filter(None, map(_section_in, typing.get_args(hint))), None)


def _comments(kind: type) -> dict[str, str]:
    """The comment above each setting of a section, in one line."""
    found, above = {}, list[str]()
    for line in inspect.getsource(kind).splitlines():
        if setting := re.match(r"    (\w+): .* =", line):
            found[setting[1]] = " ".join(above)
        comment = re.fullmatch(r"    # (.*)", line)
        above = [*above, comment[1]] if comment else []
    return found


def _written(default: Any) -> str:
    """A default as it is set."""
    return default if isinstance(default, str) and default.strip() else json.dumps(default)
