"""Checks of the Python environment that come before the first import of torch and transformers; its versions."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

from retriever.config_tree import ConfigError
from retriever.own_kernels import FOLDER

_ALL = "all"  # the trackers that are installed, whichever they are
# What accelerate can log to, by the distributions of which one must be there.
_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio",),
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet-ml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}


def check_environment() -> None:
    """Raises ConfigError if this project was installed over Hugging Face's distribution `kernels`, in one folder.

    Our `__init__.py` then replaced theirs and lacks what transformers imports from it; with theirs both work. In two
    folders both work too: see `kernels/__init__.py`.
    """
    try:
        theirs = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    shared = Path(str(theirs.locate_file("kernels"))).resolve() == FOLDER
    if shared and "_folder_of_theirs" in (FOLDER / "__init__.py").read_text(encoding="utf-8"):
        raise ConfigError(
            f"bigbatch was installed over the distribution kernels {theirs.version} in {FOLDER}: "
            f"run `pip install --force-reinstall --no-deps kernels=={theirs.version}`, with which both work"
        )


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a name of `run.trackers` that is unknown or not installed; accelerate would ignore it.

    Trackers must be installed on the first rank only, which logs to them. Like accelerate it looks for a tracker's
    distribution, since a module of that name may be a folder of runs, such as ./wandb.
    """
    logs = os.environ.get("RANK", "0") == "0"
    for name in names:
        if name not in (_ALL, *_TRACKERS):
            raise ConfigError(f"run.trackers: expected names among {', '.join((*_TRACKERS, _ALL))}; received {name!r}")
        if logs and name != _ALL and not any(map(_is_installed, _TRACKERS[name])):
            distributions = _TRACKERS[name]
            raise ConfigError(
                f"run.trackers: {name} is not installed (no distribution {' or '.join(distributions)}, which "
                f"accelerate asks for); run `pip install {distributions[0]}`, or leave it out of run.trackers"
            )


def check_extra(extra: str, *distributions: str) -> None:
    """Raises ConfigError where a distribution of an optional extra is not installed."""
    if absent := [name for name in distributions if not _is_installed(name)]:
        raise ConfigError(f"{' and '.join(absent)} not installed: run `pip install '.[{extra}]'` in the clone")


def versions(names: Sequence[str]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
