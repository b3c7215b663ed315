"""Checks of the Python environment that must come before the first import of transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

_OURS = Path(__file__).resolve().parents[1] / "kernels"


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
