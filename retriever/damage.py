"""Whether the files of a checkpoint are whole: a kill never leaves half of one, but a full disk, a lost power or a broken copy may."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE, WEIGHTS, OPTIMIZER, EXPORT = "state.json", "model.safetensors", "optimizer.safetensors", "export"


def damage(folder: Path) -> str | None:
    """Names the first file of a checkpoint that is missing, or damaged and how; None for a whole one.

    Of tensors the header is read, which says how long the file must be, and not their values.
    """
    for name in (STATE, WEIGHTS, OPTIMIZER):
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    if not (folder / EXPORT).is_dir():
        return f"{folder / EXPORT} is missing"
    for file in (folder / STATE, *sorted(folder.rglob("*.safetensors"))):
        try:
            _read(file)
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file} is damaged ({str(error).strip()})"
    return None


def _read(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
        return
    with safe_open(file, "numpy"):
        pass
