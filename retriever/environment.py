"""Checks of the Python environment that come before the first import of torch and transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from retriever.config_tree import ConfigError

_OURS = Path(__file__).resolve().parents[1] / "kernels"
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
    """Stops the command with one line where another `kernels` package is installed.

    Hugging Face publishes a distribution of that name. With its metadata present transformers imports `kernels` and expects that
    one, while this project imports its own folder: whichever comes first on the path, one of the two fails.
    Raises SystemExit with the line.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = None
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
    if version is not None:
        what = "hides bigbatch's own package" if found != _OURS else "is hidden from transformers by bigbatch's own package"
        raise SystemExit(f"the distribution kernels {version} {what} kernels: run `pip uninstall kernels` in this environment")
    if found != _OURS:
        raise SystemExit(f"the package kernels is found at {found}, not at {_OURS}: rename or remove it, or install bigbatch again")


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a name of `run.trackers` that is unknown or not installed, which accelerate would leave out silently.

    Only the first rank (`RANK`, as launchers set it) logs to trackers, so only there must they be installed. As accelerate does,
    it goes by a tracker's distribution: the module alone may be a folder of runs, as ./wandb is, or another distribution's.
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
