"""The JSON files of a model folder or of a Hugging Face model, read strictly: an error names the file and the field."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from retriever.config import ConfigError
from retriever.config_tree import build
from retriever.files import read_json as read_json_file
from retriever.screen import say

_SAID_BY = "model.name_or_path, --model or --teacher"
_LONGEST_REASON = 300  # characters of another library's message

Fields = TypeVar("Fields")


def read_fields(kind: type[Fields], name: str, file: str) -> Fields | None:
    """The fields of the dataclass `kind` from a JSON object, other keys ignored; None where the model has no such file.

    Raises ConfigError where a field is missing or of another type.
    """
    found = read_json(name, file)
    return None if found is None else fields_of(kind, found, f"{name}/{file}")


def fields_of(kind: type[Fields], found: Any, where: str) -> Fields:
    """As `read_fields`, of a value that was read from `where`."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected an object, received {type(found).__name__}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for field in known.values():
        if field.name not in found and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}: {field.name!r} is missing")
    try:
        return build(kind, {key: value for key, value in found.items() if key in known})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_json(name: str, file: str) -> Any | None:
    """The content of a JSON file, None where there is none. Raises ConfigError for malformed JSON or no model."""
    path = file_of(name, file)
    if path is None:
        return None
    with one_line(f"{path}: expected JSON"):
        found = read_json_file(Path(path))
    if found is None:
        raise ConfigError(f"{path}: expected an object or a list, received null")
    return found


def file_of(name: str, file: str) -> str | None:
    """The path of a model's file, None where there is none. Raises ConfigError where there is no such model."""
    if Path(name).exists():
        return str(Path(name) / file) if (Path(name) / file).is_file() else None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model {name}: there is no such folder ({_SAID_BY})")
    return _hub_file(name, file)


def check_number(what: str, value: float | None, least: int, most: int | None = None) -> None:
    """Raises ConfigError where a value that is given is not between `least` and `most`."""
    if value is not None and not least <= value <= (value if most is None else most):
        expected = f"at least {least}" if most is None else f"from {least} to {most}, the model's positions"
        raise ConfigError(f"{what}: expected {expected}; received {value}")


@contextmanager
def one_line(message: str) -> Iterator[None]:
    """Raises ConfigError(`message: reason`), in one line, for whatever a library raises on a file that it cannot use.

    Such an error may be of any kind: malformed files lead libraries to TypeError, KeyError, RuntimeError and bare
    Exceptions.
    """
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise ConfigError(f"{message}: {reason}") from error


@cache
def _hub_file(name: str, file: str) -> str | None:
    """The path of a Hugging Face model's file, downloaded once a process; None where the model has no such file.

    Where the hub is not reached, a model in the cache has the files that lie there, which is said. Raises ConfigError
    for any other model.
    """
    try:
        return hf_hub_download(name, file)
    except LocalEntryNotFoundError as error:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = "the hub was not reached, and the model is not in the cache"
            raise ConfigError(f"model {name!r} is no folder, and cannot be fetched: {reason} ({_SAID_BY})") from error
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"note: {name}: the hub was not reached; the cache has no {file}, so the model counts as having none")
        return None
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # not to be taken for a file that the model does not have
        reason = " ".join(str(error).split())
        raise ConfigError(f"model {name!r}: {file} could not be fetched: {reason}") from error
