"""Embeddings on disk: a folder of shards (`retriever.shard_files`), and one `manifest.json`, written last.

A shard is there once its ids are (they are written after the embeddings), a folder is finished once its manifest is.
Until then `job.json` says which embeddings the shards are of, so that interrupted work goes on where it stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retriever.checksums import damaged, unfinish, write_checksums
from retriever.config_tree import build
from retriever.data.tokens import Side
from retriever.errors import RefusedError
from retriever.files import clean, make_folder, read_object, sync, write_json
from retriever.shard_files import Dtype, ShardError, Stored, read_shard, shard_files, write_shard

FORMAT_VERSION = 2
MANIFEST, _JOB = "manifest.json", "job.json"
_AGAIN = "the command that encoded the texts writes that shard again"
_SHARD_FILE = re.compile(r"\d{5,}\.((ranges\.)?npy|ids\.arrow)(\.tmp)?")  # .tmp: of a killed writer, earlier version
_CACHE = "cache"  # of a job and its manifest: the shards may be replaced by those of another cache
_OURS = {"side", "model", "dimension", "dtype", "texts", "shard_rows"}  # of a job and its manifest, in every format


@dataclass(frozen=True)
class ShardJob:
    """Everything the content of a folder of shards depends on."""

    side: Side
    model: str  # hash of weights, architecture, tokenizer, pooling
    prompt: str
    max_tokens: int
    pooling: str
    normalize: bool
    precision: Literal["fp32", "bf16", "fp16"]
    mode: Literal["padded", "packed", "fused"]  # how the encoder computes: `retriever.encoder.text_batches.mode_of`
    dimension: int
    dtype: Dtype
    texts: str  # fingerprint of the texts and their ids
    shard_rows: int

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ShardError(f"shard_rows is {self.shard_rows}; expected at least 1")


class ShardWriter:
    """Fills a folder with the shards of one job, by any number of processes; every shard is written by one of them."""

    def __init__(self, folder: str | Path, job: ShardJob, *, cache: bool = False) -> None:
        """`cache`: the shards serve one purpose, such as an evaluation, and are replaced for the next without
        asking.
        """
        self.folder = Path(folder)
        self.job = job
        self._cache = cache

    def finished(self, *, verify: bool = False) -> bool:
        """Whether the folder already holds all of this job's embeddings; with `verify` they are read again."""
        manifest = _read_json(self.folder / MANIFEST) or {}
        if manifest | asdict(self.job) != manifest:
            return False
        try:
            shards = open_shards(self.folder, again=verify)
        except ShardError:  # of another format or damaged: it is encoded again
            return False
        return all(self.has(shard) for shard in range(len(shards.manifest["shards"])))

    def check(self, *, overwrite: bool = False) -> None:
        """Raises ShardError, naming what differs, where `prepare` would remove what another job left in the folder.

        A cache of another job may go, and with `overwrite` all shards; what is not of embedding shards never.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ShardError(f"{self.folder} is a file; choose another folder (--output)")
        job, manifest = _read_json(self.folder / _JOB), _read_json(self.folder / MANIFEST)
        for name, found in ((_JOB, job), (MANIFEST, manifest)):
            if found is not None and not found.keys() >= _OURS:
                raise ShardError(
                    f"{self.folder} has a {name} that is not of embedding shards; choose another folder (--output)"
                )
        files = sorted(file.name for file in self.folder.glob("*") if _SHARD_FILE.fullmatch(file.name))
        first = next((name for name in files if not name.endswith(".tmp")), None)
        there, asked = job or manifest, asdict(self.job)
        replaced = self._cache and there is not None and bool(there.get(_CACHE))
        if overwrite or replaced or (first is None and manifest is None):
            return
        if there is None:
            differing = f"has {first} and no {_JOB}"
        else:
            pairs = [(name, there.get(name), value) for name, value in asked.items() if there.get(name) != value]
            listed = "; ".join(f"{name}: {value!r} there, {wanted!r} asked for" for name, value, wanted in pairs)
            differing = f"holds embeddings of another job ({listed})" if pairs else ""
        if differing:
            own, cache = "replace what is there (--overwrite)", "remove it if nobody needs it"
            choices = f"folder (--output-dir), or {cache}" if self._cache else f"folder (--output), or {own}"
            raise ShardError(f"{self.folder} {differing}; choose another {choices}")

    def prepare(self) -> None:
        """Makes the folder ready, once, before any process writes: shards of another job go, those of this one stay."""
        make_folder(self.folder)
        clean(self.folder)
        started = _read_json(self.folder / _JOB) or {}
        same = {key: value for key, value in started.items() if key != _CACHE} == asdict(self.job)
        unfinish(self.folder, MANIFEST, goes_on=same)
        if same:
            return
        for file in self.folder.iterdir():
            if _SHARD_FILE.fullmatch(file.name):
                file.unlink()
        sync(self.folder)  # until here the job is that of the shards; a power cut must bring none of them back
        write_json(self.folder / _JOB, asdict(self.job) | ({_CACHE: True} if self._cache else {}))

    def has(self, shard: int) -> bool:
        """Whether shard number `shard` is complete: its files can be read, and hold as many embeddings as ids."""
        try:
            read_shard(self.folder, shard, self.job.dimension, self.job.dtype)
        except ShardError:  # missing, damaged or of other embeddings: it is written again
            return False
        return True

    def write(self, shard: int, embeddings: np.ndarray, ids: Sequence[str]) -> None:
        """Writes shard number `shard`: embeddings [n, D], stored in the job's dtype, and their n ids.

        Raises ShardError for a wrong shape, or a value that is not finite once stored.
        """
        if embeddings.shape != (len(ids), self.job.dimension):
            raise ShardError(
                f"shard {shard}: embeddings are {embeddings.shape}; expected {(len(ids), self.job.dimension)}"
            )
        write_shard(self.folder, shard, embeddings, ids, self.job.dtype)

    def finish(self, rows: int) -> None:
        """Writes the manifest, once, after all processes are done. Raises ShardError where shards do not add up to
        `rows`.
        """
        shards = _listed(rows, self.job.shard_rows)
        missing = [shard for shard in range(len(shards)) if not self.has(shard)]
        if missing:
            raise ShardError(
                f"{self.folder}: {len(missing)} of {len(shards)} shards are missing, {missing[0]:05d} first"
            )
        files = [file for shard in range(len(shards)) for file in shard_files(self.folder, shard, self.job.dtype)]
        write_checksums(self.folder, [file.name for file in files], remembered=True)
        job = _read_json(self.folder / _JOB) or {}
        manifest = {"format_version": FORMAT_VERSION, "rows": rows, **job, "shards": shards}
        write_json(self.folder / MANIFEST, manifest)


class EmbeddingShards:
    """A finished folder of shards; iterating yields (embeddings [n, D] memory-mapped, n ids) shard by shard, any number
    of times. Quantised ones are decoded where rows are taken.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.rows = int(manifest["rows"])
        self.dimension = int(manifest["dimension"])
        self._dtype = manifest["dtype"]

    def __iter__(self) -> Iterator[tuple[Stored, list[str]]]:
        """Raises ShardError where a file is missing, damaged, or not what the manifest says."""
        for number, shard in enumerate(self.manifest["shards"]):
            yield read_shard(self.folder, number, self.dimension, self._dtype, shard["rows"])


def open_shards(folder: str | Path, *, again: bool = False) -> EmbeddingShards:
    """The embeddings of a folder that `retriever/encode.py` finished, verified once on each machine, or `again`.

    Raises ShardError where it is unfinished, of another format or damaged.
    """
    folder = Path(folder)
    manifest = _read_json(folder / MANIFEST)
    if manifest is None:
        state = (
            "its encoding was interrupted; run it again"
            if (folder / _JOB).is_file()
            else "not a folder of embedding shards, which retriever/encode.py writes"
        )
        raise ShardError(f"{folder}: no {MANIFEST}: {state}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{folder / MANIFEST}: format_version is {manifest.get('format_version')!r}; expected {FORMAT_VERSION}"
        )
    _check_manifest(folder / MANIFEST, manifest)
    for name, problem in damaged(folder, again=again).items():
        raise ShardError(f"{folder / name} {problem}; {_AGAIN}")
    return EmbeddingShards(folder, manifest)


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Raises ShardError if a field is missing or has another type, or if the shards do not add up to the rows."""
    job = [field.name for field in fields(ShardJob)]
    if lacking := sorted({"rows", "shards", *job} - manifest.keys()):
        raise ShardError(f"{file}: {', '.join(lacking)} missing")
    rows, shards = manifest["rows"], manifest["shards"]
    try:
        build(ShardJob, {name: manifest[name] for name in job})
    except RefusedError as error:
        raise ShardError(f"{file}: {error}") from error
    if type(rows) is not int or rows < 0 or not isinstance(shards, list):
        raise ShardError(f"{file}: expected a whole number of rows and a list of shards; received rows {rows!r}")
    fit = len(shards) == -(-rows // manifest["shard_rows"]) and shards == _listed(rows, manifest["shard_rows"])
    if not fit:
        raise ShardError(
            f"{file}: its shards are not 00000, 00001, … that add up to its {rows} rows, "
            f"{manifest['shard_rows']} each; encode the texts again"
        )


def _listed(rows: int, shard_rows: int) -> list[dict[str, Any]]:
    """The entry of each shard in a manifest."""
    starts = range(0, rows, shard_rows)
    return [
        {"file": f"{shard:05d}.npy", "ids": f"{shard:05d}.ids.arrow", "rows": min(shard_rows, rows - start)}
        for shard, start in enumerate(starts)
    ]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except ValueError as error:
        raise ShardError(
            f"{path}: not readable as JSON ({error}); delete the folder and encode the texts again"
        ) from error
