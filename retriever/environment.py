"""Checks of the Python environment that come before the first import of torch and transformers."""

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
    """Refuses to go on where this project and Hugging Face's distribution `kernels` were installed into one folder.

    The later of the two has replaced the `__init__.py` of the other. Ours does not know what theirs held, which
    transformers asks for; with theirs both work. In folders of their own both work too: see `kernels/__init__.py`.
    Raises ConfigError.
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
    """Raises ConfigError for a name of `run.trackers` that is unknown or not installed, which accelerate would leave
    out silently.

    Only the first rank (`RANK`, as launchers set it) logs to trackers, so only there must they be installed. As
    accelerate does, it goes by a tracker's distribution: the module alone may be a folder of runs, as ./wandb is, or
    another distribution's.
    """
    logs = os.environ.get("RANK", "0") == "0"
    for name in names:
        if name not in (_ALL, *_TRACKERS):
            raise ConfigError(f"run.trackers: expected names among {', '.join((*_TRACKERS, _ALL))}; received {name!r}")
        if logs and name != _ALL and not any(map(_is_installed, _TRACKERS[name])):
            distributions = _TRACKERS[name]
            raise ConfigError(
                f"run.trackers: {name} is not installed (no distribution {' or '.join(distributions)}, which accelerate asks for); "
                f"run `pip install {distributions[0]}`, or leave it out of run.trackers"
            )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
