"""A run's folder: held by one process at a time, and which names in it are the run's own.

`.bigbatch` lists the names that a run of this folder has taken. Nothing else there is replaced or removed: what stands
under a name that the run needs and has not taken is refused before anything is computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from retriever.config import Config, ConfigError
from retriever.files import remove, write_json
from retriever.lock import working_in

CHECKPOINTS, EMBEDDINGS = "checkpoints", "embeddings"
_MANIFEST, _CONFIG = ".bigbatch", "config.yaml"
_OF_EVERY_RUN = (_CONFIG, CHECKPOINTS, "metrics.jsonl", "export", "export.json", "report.html")
_OF_EVALUATIONS = ("best", "best.json", EMBEDDINGS)
_SECTIONS = {"run", "model", "data", "batch", "loss", "optim", "train"}  # of the configuration that a run writes


@contextmanager
def held(config: Config) -> Iterator[None]:
    """Holds the lock of the run's folder; on the first rank, and not for `run.preflight=only`, which leaves nothing
    behind.

    Raises LockedError where another process trains there, and ConfigError for what is there and no run's.
    """
    if os.environ.get("RANK", "0") != "0" or config.run.preflight == "only":
        yield
        return
    folder = Path(config.run.output_dir)
    with working_in(folder):
        _refuse_foreign(folder, _wanted(config))
        yield


def refuse_unless_run(folder: Path) -> None:
    """Raises ConfigError where `folder` holds anything and no run ever wrote there."""
    holds_run = (folder / _MANIFEST).exists() or _is_of_earlier_version(folder)
    if folder.is_symlink() or (folder.exists() and any(folder.iterdir()) and not holds_run):
        raise ConfigError(
            f"{folder} was not written by a run; move it elsewhere, or choose another folder (--output-dir)"
        )


def take(config: Config) -> None:
    """Records that the names this run needs are its own. The lock is held."""
    folder = Path(config.run.output_dir)
    taken = _taken(folder)
    earlier = (
        not (folder / _MANIFEST).exists() and EMBEDDINGS in taken
    )  # an earlier version's: evaluations would not know them
    if earlier and (folder / EMBEDDINGS).exists():
        remove(folder / EMBEDDINGS)
    write_json(folder / _MANIFEST, {"taken": sorted({*taken, *_wanted(config)})})


def remove_embeddings(folder: Path) -> None:
    """Removes what evaluations while training left; the name is free again for a person's own."""
    taken = _taken(folder)
    if EMBEDDINGS in taken and (folder / EMBEDDINGS).exists():
        remove(folder / EMBEDDINGS)
    write_json(folder / _MANIFEST, {"taken": sorted(taken - {EMBEDDINGS})})


def _wanted(config: Config) -> tuple[str, ...]:
    return _OF_EVERY_RUN + (_OF_EVALUATIONS if config.eval is not None else ())


def _refuse_foreign(folder: Path, wanted: tuple[str, ...]) -> None:
    """Raises ConfigError with the first entry that a run would replace and that no run of this folder made."""
    if link := next((folder / name for name in (*wanted, "logs") if (folder / name).is_symlink()), None):
        raise ConfigError(
            f"{link} is a symbolic link, which a run does not follow; remove it, or choose another run.output_dir"
        )
    taken = _taken(folder)
    for entry in (folder / name for name in wanted if name not in taken):
        empty = entry.is_dir() and not any(entry.iterdir())
        if entry.exists() and not empty:
            raise ConfigError(
                f"{entry} was not written by a run of this folder; move it elsewhere, or choose another run.output_dir"
            )


def _taken(folder: Path) -> set[str]:
    """The names that runs of this folder have taken; all where one of an earlier version ran, which kept no list."""
    try:
        return set(json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["taken"])
    except (FileNotFoundError, NotADirectoryError):
        return {*_OF_EVERY_RUN, *_OF_EVALUATIONS} if _is_of_earlier_version(folder) else set()
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / _MANIFEST} is damaged ({error}); remove it if all in {folder} is of a run"
        ) from error


def _is_of_earlier_version(folder: Path) -> bool:
    """Whether a run that kept no list wrote here: with its whole configuration, its checkpoints' folder, and no other
    embeddings.
    """
    try:
        config = yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, yaml.YAMLError):
        return False
    complete = isinstance(config, dict) and config.keys() >= _SECTIONS
    embeddings = folder / EMBEDDINGS
    kept = [*embeddings.iterdir()] if embeddings.is_dir() else []
    of_evaluations = all(entry.name == "passages" or entry.name.startswith("queries-") for entry in kept)
    return complete and (folder / CHECKPOINTS).is_dir() and of_evaluations
