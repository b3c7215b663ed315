"""Checks that the files of a checkpoint are whole. Kills and power cuts never leave half of one; broken disks may."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from retriever.checksums import damaged
from retriever.config_tree import ConfigError
from retriever.files import read_json

STATE, WEIGHTS, OPTIMIZER, EXPORT = "state.json", "model.safetensors", "optimizer.safetensors", "export"
FORMAT_VERSION = 1
NAME = re.compile(r"step-([0-9]{8,})")  # of a checkpoint's folder, by its step
_ALWAYS_SAID = ("step", "scaler", "store", "config")  # by a state of this format
_TOWERS = ("query", "passage")  # the folders of an untied export
_PARTS = "model.safetensors.index.json"  # where an export's weights are too many for one file


class DamageError(ConfigError):
    """A file of a checkpoint is missing or damaged; the message names it and says what is wrong."""


def damage(folder: Path) -> str | None:
    """Names the first missing or damaged file of a checkpoint and says what is wrong; None if all are whole.

    It compares every byte with the checksums that were written. A checkpoint of an earlier version has none: then only
    the headers of its tensors are read, which say how long the files must be. Raises ConfigError if a file cannot be
    read, so that its state is unknown.
    """
    try:
        read_state(folder)
        for file in (folder / WEIGHTS, folder / OPTIMIZER, *_exported(folder / EXPORT)):
            _read_header(file)
        with _reading(folder):
            found = damaged(folder, remembered=False)
        if found:
            name, problem = next(iter(found.items()))
            raise DamageError(f"{folder / name} {problem}")
    except DamageError as found:
        return str(found)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json; if it is of this version's format, no key is missing.

    Raises DamageError if it is missing or damaged, and ConfigError if it cannot be read.
    """
    with _reading(folder / STATE) as file:
        state = read_json(file)
        if not isinstance(state, dict):
            raise ValueError(f"expected a JSON object, found {json.dumps(state)[:40]}")
        expected = _ALWAYS_SAID if state.get("format_version") == FORMAT_VERSION else ("format_version",)
        if lacking := [key for key in expected if key not in state]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if "step" in expected:
            _check_step(folder, state["step"])
    return state


def _check_step(folder: Path, step: object) -> None:
    """Raises ValueError if a checkpoint's step is no number of steps, or not the one in its folder's name."""
    if type(step) is not int or step < 0:
        raise ValueError(f"step: expected a number of steps, received {json.dumps(step)[:40]}")
    named = re.fullmatch(NAME, folder.name)
    if named and int(named[1]) != step:
        raise ValueError(f"step: expected {int(named[1])}, as the folder is named, received {step}")


def _exported(export: Path) -> Iterator[Path]:
    """The files of weights that an export must hold."""
    with _reading(export):
        untied = any((export / side).exists() for side in _TOWERS)
        towers = [export / side for side in _TOWERS] if untied else [export]
        in_parts = [(tower / _PARTS).exists() for tower in towers]
    for tower, several in zip(towers, in_parts, strict=True):
        yield from _parts(tower) if several else [tower / WEIGHTS]


def _parts(tower: Path) -> list[Path]:
    with _reading(tower / _PARTS) as file:
        index = read_json(file)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError("expected a JSON object with a weight_map")
        return [tower / part for part in sorted(set(index["weight_map"].values()))]


def _read_header(weights: Path) -> None:
    with _reading(weights) as file:
        file.open("rb").close()  # safetensors calls whatever it cannot open a file that is not there
        with safe_open(file, "numpy"):
            pass


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Turns an error while `file` is read into one line with its name."""
    try:
        yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamageError(f"{file} is missing") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror or error}); start again once it can") from error
    except (ValueError, SafetensorError) as error:
        raise DamageError(f"{file} is damaged ({str(error).strip()})") from error
