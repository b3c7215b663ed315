"""Stages: work in a folder that is done once for the same inputs. A folder's `manifest.json`, written last, says that it is done.

Until then `job.json` says what the folder's files are of, so that work that can go on where it stopped does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.collections.collection import file_fingerprint, fingerprint
from retriever.config import ConfigError
from retriever.files import make_folder, write_array, write_json
from retriever.parallel.world import World

MANIFEST, _JOB = "manifest.json", "job.json"
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")

Outputs = Mapping[str, str]  # file, relative to the stage's folder -> hash of its bytes


def run_stage(
    name: str,
    folder: Path,
    inputs: Mapping[str, Any],
    work: Callable[[Path], Sequence[str]],
    *,
    world: World | None = None,
    facts: Callable[[], Mapping[str, Any]] | None = None,
) -> Outputs:
    """The outputs of a stage, which is worked on only where `folder` does not hold them for these `inputs` yet.

    `work(folder)` runs on every rank and returns the names of its output files, relative to `folder`, which is empty or
    holds what an interrupted work of the same inputs left. `inputs` are plain values; `facts` go into the manifest beside them.
    Raises ConfigError where `folder` holds files that no stage wrote.
    """
    world = world or World(torch.device("cpu"))
    job = json.loads(json.dumps(inputs))
    found = _finished(folder, job)
    world.barrier()  # no rank may change the folder before every rank has looked at it
    if found is not None:
        if world.is_first:
            print(f"{name}: reused ({folder})", flush=True)
        return found
    if world.is_first:
        started = _prepare(folder, job)
        print(f"{name}: {'goes on' if started else 'starts'} ({folder})", flush=True)
    world.barrier()
    files = work(folder)
    world.barrier()
    if world.is_first:
        outputs = {file: file_fingerprint(folder / file) for file in files}
        sizes = {file: (folder / file).stat().st_size for file in files}
        said = dict(facts()) if facts is not None else {}
        write_json(folder / MANIFEST, {"stage": name, "inputs": job, **said, "outputs": outputs, "bytes": sizes})
    world.barrier()
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["outputs"]


def write_parts(folder: Path, rows: int, rows_a_part: int, compute: Callable[[slice], np.ndarray], world: World, bar: str) -> list[str]:
    """Writes what `compute` gives for the rows of each part to a file that is kept if there already; returns the names of all files.

    Rank r computes parts r, r + size, …
    """
    files = [f"{part:05d}.npy" for part in range(-(-rows // rows_a_part))]
    mine = range(world.rank, len(files), world.size)
    for part in tqdm(mine, desc=bar, unit=" parts", disable=not world.is_first):
        if not (folder / files[part]).exists():
            write_array(folder / files[part], compute(slice(part * rows_a_part, (part + 1) * rows_a_part)))
    return files


def read_parts(folder: Path, files: Iterable[str]) -> np.ndarray:
    """The rows of all parts, in order."""
    return np.concatenate([np.load(folder / file, allow_pickle=False) for file in sorted(files)])


def model_fingerprint(name_or_path: str | Path) -> str:
    """A hash of a model folder's weights, configuration and tokenizer files; a Hugging Face name stands for itself."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return str(name_or_path)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix in _MODEL_FILES)
    return fingerprint([[f.relative_to(folder).as_posix(), file_fingerprint(f)] for f in files])


def _finished(folder: Path, job: Mapping[str, Any]) -> Outputs | None:
    """The outputs that the manifest lists, where it is of this job and each file is there in its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    if manifest.get("inputs") != job:
        return None
    sizes: Mapping[str, int] = manifest["bytes"]
    there = all((folder / file).is_file() and (folder / file).stat().st_size == size for file, size in sizes.items())
    return manifest["outputs"] if there else None


def _prepare(folder: Path, job: Mapping[str, Any]) -> bool:
    """Makes the folder ready for the job; returns whether an interrupted work of the same job is there. What is of another job goes."""
    make_folder(folder)
    known = folder / _JOB
    same = known.exists() and json.loads(known.read_text(encoding="utf-8")) == job
    (folder / MANIFEST).unlink(missing_ok=True)
    if not same:
        stage_of_ours = known.exists() or not any(folder.iterdir())
        if not stage_of_ours:
            raise ConfigError(f"{folder} holds files that are not of a stage; expected an empty or a new folder (--output-dir)")
        write_json(known, {})  # of no job: a kill while files go leaves a folder that is cleared again
        _clear(folder)
        write_json(known, dict(job))
    return same


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == _JOB:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
