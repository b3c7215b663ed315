"""Before anything is loaded, downloaded or tokenised: whether what a configuration names is there."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import nn

from retriever.config import Config, ConfigError
from retriever.data.files import exists
from retriever.encoder.settings import read_model_config
from retriever.loss.custom import Loss, find_loss
from retriever.optimizers import make_optimizer


def check_named(config: Config, loss: Loss | None) -> None:
    """Checks that what the configuration names exists: files, folders, models, and what is imported.

    `loss`: the function of `loss.custom`, if it is at hand. Raises ConfigError with the key.
    """
    paths = {
        f"data.train.{i}.path": source.path for i, source in enumerate(config.data.train) if source.path is not None
    }
    if config.eval is not None:
        paths["eval.path"] = config.eval.path
        paths |= {f"eval.also.{i}.path": asked.path for i, asked in enumerate(config.eval.also)}
    for key, path in paths.items():
        if not exists(Path(path).expanduser()):
            raise ConfigError(f"{key}: there is no file or folder {path}")
    cache = Path(config.data.cache_dir).expanduser()
    if cache.exists() and not cache.is_dir():
        raise ConfigError(f"data.cache_dir: {cache} is a file; expected a folder, which need not exist yet")
    models = {"model.name_or_path": config.model.name_or_path, "loss.guide": config.loss.guide}
    for key, name in {**models, "loss.teacher": config.loss.teacher}.items():
        if name is not None:
            _check_spelling(key, Path(name))
            read_model_config(name)
    if config.loss.custom is not None and loss is None:
        find_loss(config.loss.custom)
    make_optimizer(config.optim, [{"params": [nn.Parameter(torch.zeros(1))]}], torch.device("cpu"))


def _check_spelling(key: str, folder: Path) -> None:
    """Raises ConfigError for a misspelt folder, which the hub would be asked for in vain."""
    if folder.exists() or not folder.parent.is_dir() or folder.parent == Path():
        return
    near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()], 1)
    if near:
        raise ConfigError(
            f"{key}: there is no folder {folder}; did you mean {folder.parent / near[0]}? "
            f"(For a model of that name on the hub, start where there is no folder {folder.parent})"
        )
