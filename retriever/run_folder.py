"""A run's folder: one process at a time works in it, and `.bigbatch` lists the names in it that belong to the run.

Nothing else in the folder is replaced or removed. If a name that the run needs is in use and not listed, the run is
refused before it computes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from retriever.config import Config, ConfigError
from retriever.files import read_json, remove, write_json
from retriever.lock import working_in

CHECKPOINTS, EMBEDDINGS, EXAMPLES, _LOGS = "checkpoints", "embeddings", "examples.json", "logs"
_MANIFEST, _CONFIG = ".bigbatch", "config.yaml"
_OF_EVERY_RUN = (_CONFIG, CHECKPOINTS, "metrics.jsonl", "export", "export.json", "report.html")
_OF_EVALUATIONS = ("best", "best.json", EXAMPLES, EMBEDDINGS)
RUN_FILES = (*_OF_EVERY_RUN, *_OF_EVALUATIONS, _LOGS)
_FOLDERS = {CHECKPOINTS, "export", "best", EMBEDDINGS, _LOGS}  # the others are files
_SECTIONS = {"run", "model", "data", "batch", "loss", "optim", "train"}  # of the configuration that a run writes


@contextmanager
def held(config: Config) -> Iterator[None]:
    """Holds the lock of the run's folder on the first rank; not for `run.preflight=only`, which leaves nothing behind.

    Raises LockedError if another process trains there, and ConfigError if the folder cannot be a run's.
    """
    folder, model = Path(config.run.output_dir), Path(config.model.name_or_path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.output_dir: {folder} is a file; expected a folder, which need not exist yet")
    if config.model.name_or_path and model.is_dir() and folder.resolve().is_relative_to(model.resolve()):
        raise ConfigError(f"run.output_dir: {folder} is in the model folder {model}; expected a folder elsewhere")
    evaluated = [asked.path for asked in config.eval.collections] if config.eval is not None else []
    for path in [*(source.path for source in config.data.train), *evaluated]:
        if path and folder.exists() and Path(path).expanduser().resolve() == folder.resolve():
            raise ConfigError(f"run.output_dir: {folder} holds the data; expected a folder elsewhere")
    if os.environ.get("RANK", "0") != "0" or config.run.preflight == "only":
        yield
        return
    with working_in(folder):
        _refuse_foreign(folder, _wanted(config))
        yield


def remove_run(folder: Path) -> None:
    """Removes what runs left in `folder`, if it exists, but not what else is there.

    Raises ConfigError if the folder holds something and no run ever wrote there, and LockedError if a run works there.
    """
    holds_run = (folder / _MANIFEST).exists() or _is_of_earlier_version(folder)
    if folder.is_symlink() or (folder.exists() and any(folder.iterdir()) and not holds_run):
        raise ConfigError(f"{folder} was not written by a run; move it elsewhere, or choose another --output-dir")
    with working_in(folder):
        for name in (*_taken(folder), _LOGS, _MANIFEST):
            remove(folder / name)


def take(config: Config) -> None:
    """Records that the names this run needs are its own. The caller holds the lock."""
    folder = Path(config.run.output_dir)
    taken = _taken(folder)
    if EMBEDDINGS in taken and not (folder / _MANIFEST).exists():
        remove(folder / EMBEDDINGS)  # of an earlier version: evaluations would not take them for their own
    write_json(folder / _MANIFEST, {"taken": sorted({*taken, *_wanted(config)})})


def remove_embeddings(folder: Path) -> None:
    """Removes the embeddings of evaluations during training, and their name from the run's list."""
    taken = _taken(folder)
    if EMBEDDINGS in taken:
        remove(folder / EMBEDDINGS)
    write_json(folder / _MANIFEST, {"taken": sorted(taken - {EMBEDDINGS})})


def _wanted(config: Config) -> tuple[str, ...]:
    return _OF_EVERY_RUN + (_OF_EVALUATIONS if config.eval is not None else ())


def _refuse_foreign(folder: Path, wanted: tuple[str, ...]) -> None:
    """Raises ConfigError with the first entry that is in the way of a run or that no run of this folder made."""
    taken = _taken(folder)
    for name in (*wanted, _LOGS):
        entry, otherwise = folder / name, "or choose another run.output_dir"
        empty = entry.is_dir() and not any(entry.iterdir())
        if entry.is_symlink():
            raise ConfigError(f"{entry} is a symbolic link, which a run does not follow; remove it, {otherwise}")
        if entry.exists() and name not in (*taken, _LOGS) and not empty:
            raise ConfigError(f"{entry} was not written by a run of this folder; move it elsewhere, {otherwise}")
        if entry.exists() and entry.is_dir() != (name in _FOLDERS):
            kinds = ("folder", "file") if entry.is_dir() else ("file", "folder")
            raise ConfigError(f"{entry} is a {kinds[0]}; expected a {kinds[1]}: move it elsewhere, {otherwise}")


def _taken(folder: Path) -> set[str]:
    """The names that runs of this folder have taken. A run of an earlier version kept no list: it took all."""
    try:
        taken = read_json(folder / _MANIFEST)["taken"]
        if not isinstance(taken, list) or not all(isinstance(name, str) for name in taken):
            raise TypeError(f"taken: expected a list of names, received {str(taken)[:80]!r}")
        return set(taken)
    except (FileNotFoundError, NotADirectoryError):
        return {*_OF_EVERY_RUN, *_OF_EVALUATIONS} if _is_of_earlier_version(folder) else set()
    except (ValueError, TypeError, KeyError) as error:
        advice = f"remove it if everything in {folder} belongs to a run"
        raise ConfigError(f"{folder / _MANIFEST} is damaged ({error}); {advice}") from error


def _is_of_earlier_version(folder: Path) -> bool:
    """Whether a run that kept no list wrote here: a whole configuration, checkpoints, and no foreign embeddings."""
    try:
        config = yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, yaml.YAMLError):
        return False
    complete = isinstance(config, dict) and config.keys() >= _SECTIONS
    embeddings = folder / EMBEDDINGS
    kept = [*embeddings.iterdir()] if embeddings.is_dir() else []
    of_evaluations = all(entry.name == "passages" or entry.name.startswith("queries-") for entry in kept)
    return complete and (folder / CHECKPOINTS).is_dir() and of_evaluations
