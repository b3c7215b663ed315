"""Stages: work in a folder, done once for the same inputs. `manifest.json` is written last and marks a finished folder.

Until then `job.json` names the inputs that the files in the folder belong to, so that interrupted work can resume.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.collections.collection import file_fingerprint, fingerprint
from retriever.checksums import CHECKSUMS, damaged, unfinish, write_checksums
from retriever.config import ConfigError
from retriever.files import clean, read_json, read_object, remove, write_array, write_json
from retriever.lock import working_in
from retriever.parallel.world import World
from retriever.screen import Bar

MANIFEST, _JOB = "manifest.json", "job.json"
STAGE_FILES = (_JOB, MANIFEST, CHECKSUMS)  # in the folder of every stage
_BEGUN, _OURS = {"stage", "inputs"}, {"stage", "inputs", "outputs", "bytes"}  # what a stage's job and manifest say
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")

Outputs = Mapping[str, str]  # file, relative to the stage's folder -> hash of its bytes


def run_stage(
    name: str,
    folder: Path,
    inputs: Mapping[str, Any],
    work: Callable[[Path], Sequence[str]],
    *,
    writes: Sequence[str],
    world: World | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Outputs:
    """Runs `work(folder)` on every rank, unless `folder` already holds its outputs for these `inputs`; returns the
    outputs.

    `work` returns the names of its output files, relative to `folder`. The folder is empty or holds what interrupted
    work for the same inputs left. `writes` are patterns of all names that the stage ever writes there: `*.npy` of
    files, `run` of a whole folder, `query/*.npy` of files in a folder. Other inputs clear what has such a name.
    `inputs` are plain values. `facts`, which `work` may fill, are added to the manifest. Raises ConfigError if `folder`
    holds anything that the stage did not write, which is left as it is, and LockedError if another process works there.
    """
    world = world or World(torch.device("cpu"))
    job = json.loads(json.dumps(inputs))
    found = _finished(folder, job)
    if found is None:
        refuse_foreign(name, folder, job.keys(), writes)
    world.barrier()  # no rank may change the folder before every rank has looked at it
    if found is not None:
        if world.is_first:
            print(f"{name}: reused ({folder})", flush=True)
        return found
    with ExitStack() as stack:
        if world.is_first:
            stack.enter_context(working_in(folder))
            refuse_foreign(name, folder, job.keys(), writes)  # another process may have been there in between
            started = _prepare(name, folder, job, writes)
            print(f"{name}: {'goes on' if started else 'starts'} ({folder})", flush=True)
        world.barrier()
        files = work(folder)
        world.barrier()
        if world.is_first:
            outputs = {file: file_fingerprint(folder / file) for file in files}
            sizes = {file: (folder / file).stat().st_size for file in files}
            write_checksums(folder, files, remembered=True)
            write_json(
                folder / MANIFEST, {"stage": name, "inputs": job, **(facts or {}), "outputs": outputs, "bytes": sizes}
            )
    world.barrier()
    return read_json(folder / MANIFEST)["outputs"]


def write_parts(
    folder: Path, rows: int, rows_a_part: int, compute: Callable[[slice], np.ndarray], world: World, bar: str
) -> list[str]:
    """Computes an array in parts of `rows_a_part` rows and writes each to a file of its own; returns the names of all
    files.

    Files that exist are kept. Rank r computes parts r, r + size, …
    """
    files = [f"{part:05d}.npy" for part in range(-(-rows // rows_a_part))]
    mine = range(world.rank, len(files), world.size)
    for part in Bar(mine, desc=bar, unit=" parts", disable=not world.is_first):
        if not (folder / files[part]).exists():
            write_array(folder / files[part], compute(slice(part * rows_a_part, (part + 1) * rows_a_part)))
    return files


def read_parts(folder: Path, files: Iterable[str]) -> np.ndarray:
    """The rows of all parts, in order."""
    return np.concatenate([np.load(folder / file, allow_pickle=False) for file in sorted(files)])


def model_fingerprint(name_or_path: str | Path) -> str:
    """A hash of a model folder's weights, configuration and tokenizer files. A Hugging Face name is its own
    fingerprint.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return str(name_or_path)
    return files_fingerprint(folder, sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix in _MODEL_FILES))


def files_fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """A hash of the names and bytes of `files` in `folder`."""
    return fingerprint([[file.relative_to(folder).as_posix(), file_fingerprint(file)] for file in files])


def _finished(folder: Path, job: Mapping[str, Any]) -> Outputs | None:
    """The outputs that the manifest lists, if it is of this job and every file is there as it was written."""
    manifest = _read(folder / MANIFEST)
    if manifest is None or not manifest.keys() >= _OURS or manifest["inputs"] != job:
        return None
    try:
        whole = all((folder / file).stat().st_size == size for file, size in manifest["bytes"].items())
    except (FileNotFoundError, NotADirectoryError):  # another process may be clearing the folder
        return None
    return manifest["outputs"] if whole and not damaged(folder) else None


def refuse_foreign(name: str, folder: Path, inputs: Collection[str], writes: Sequence[str]) -> None:
    """Raises ConfigError with the first entry that no work of this stage left in `folder`. Hidden ones are ignored.

    `inputs` are the names of the stage's inputs, by which a job of an earlier version is recognised; `writes` as in
    `run_stage`.
    """
    begun, manifest = _read(folder / _JOB), _read(folder / MANIFEST)
    ours = {
        _JOB: begun is not None
        and (begun.keys() == _BEGUN or begun.keys() == set(inputs)),  # the latter in earlier versions
        MANIFEST: manifest is not None and manifest.keys() >= _OURS,
    }
    for entry, written in _entries(folder, [*writes, CHECKSUMS]):
        own = ours.get(entry.relative_to(folder).as_posix(), written and any(ours.values()))
        if not own or entry.is_symlink():
            raise ConfigError(
                f"{entry} was not written by the stage {name}; move it elsewhere, or choose a new folder (--output-dir)"
            )


def _prepare(name: str, folder: Path, job: Mapping[str, Any], writes: Sequence[str]) -> bool:
    """Makes the folder ready for the job: removes what another job left. Returns whether the same job was begun."""
    clean(folder)
    begun = _read(folder / _JOB) or {}
    same = begun.get("inputs", begun) == job
    unfinish(folder, MANIFEST, goes_on=same)
    if not same:
        # Of no job: after a kill while files are removed the next start removes the others.
        write_json(folder / _JOB, {"stage": name, "inputs": None})
        for entry, written in [*_entries(folder, writes)]:
            if written:
                remove(entry)
                with suppress(OSError):  # it holds other files of the stage
                    entry.parent.rmdir()
        write_json(folder / _JOB, {"stage": name, "inputs": dict(job)})
    return same


def _entries(folder: Path, writes: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """The entries of `folder`, and whether `writes` has their names; of a folder that it looks into, the entries there.

    Hidden ones are left out.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        parts = [pattern.partition("/") for pattern in writes]
        within = [rest for first, _, rest in parts if rest and fnmatch(entry.name, first)]
        if within and entry.is_dir() and not entry.is_symlink():
            yield from _entries(entry, within)
        elif not entry.name.startswith("."):
            yield entry, any(fnmatch(entry.name, pattern) for pattern in writes)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file, and an empty one where it holds anything else."""
    try:
        return read_object(path)
    except ValueError:
        return {}
