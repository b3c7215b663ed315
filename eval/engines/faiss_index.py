"""FAISS indexes over passage embeddings, by name, with defaults by corpus size; trained on a sample, saved beside the
shards, reused.

| name | FAISS factory string for N passages of dimension D | at search |
|---|---|---|
| `flat` | no index: exact search, see `eval.engines.nearest` | |
| `ivf` | `IVF{nlist},Flat`, nlist the power of two nearest 4√N with at least 39 passages a list | nprobe: see below |
| `ivfpq` | `IVF{nlist},PQ{m}`, m the largest divisor of D up to D/8 (one byte each) | nprobe: see below |
| `hnsw` | `HNSW32,Flat`, efConstruction 200 | efSearch = 256, or k if that is more |

nprobe is nlist/64, at least 16, and at least as many lists as hold 2k passages on average. Anything else is a factory
string, parameters after a blank: `OPQ96,IVF4096,PQ96 nprobe=32`. `ivf nprobe=128` changes a default. A search sets
every parameter that it depends on, so a saved index keeps none of an earlier search. An index's scores are FAISS's: for
all but quantised ones, inner products in float32.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from eval.engines.embeddings import Embeddings, blocks_of
from retriever.checksums import damaged, write_checksums
from retriever.config import ConfigError
from retriever.files import make_folder, read_object, remove, replace_file, write_json
from retriever.lock import LOCK, locked
from retriever.shards import EmbeddingShards

NAMES = ("flat", "ivf", "ivfpq", "hnsw")
_FORMAT_VERSION, _SEED = 1, 0
_PER_CENTROID = 39  # FAISS asks for as many training vectors a centroid
_TRAIN_PER_LIST, _TRAIN_LEAST = 64, 16_384
_BLOCK_ROWS = 65_536
_BUILD_PARAMETERS = ("efConstruction",)  # the others matter at search alone, and changing them rebuilds nothing
_FAISS_DEFAULTS = {"nprobe": 1, "efSearch": 16, "quantizer_efSearch": 16, "k_factor_rf": 1}


@dataclass(frozen=True)
class IndexSpec:
    """An index in FAISS's terms."""

    factory: str
    parameters: tuple[str, ...] = ()  # name=value, of building and of searching, each name once

    @property
    def build_parameters(self) -> tuple[str, ...]:
        """The parameters that change the finished index."""
        return tuple(p for p in self.parameters if p.partition("=")[0] in _BUILD_PARAMETERS)


def index_spec(index: str, rows: int, dimension: int, k: int = 1000) -> IndexSpec:
    """Parses `index` for a search of k among `rows` passages. Raises ConfigError if FAISS cannot build or train it."""
    name, *words = index.split() or [""]
    nlist = _lists(rows)
    probes = f"nprobe={min(nlist, max(16, nlist // 64, -(-2 * k * nlist // max(1, rows))))}"
    codes = max(m for m in range(1, max(1, dimension // 8) + 1) if dimension % m == 0)
    named = {
        "ivf": (f"IVF{nlist},Flat", [probes]),
        "ivfpq": (f"IVF{nlist},PQ{codes}", [probes]),
        "hnsw": ("HNSW32,Flat", ["efConstruction=200", f"efSearch={max(256, k)}"]),
    }
    factory, defaults = named.get(name, (name, []))
    empty = _empty(index, factory, dimension)
    least = 256 * _PER_CENTROID if name == "ivfpq" else _least_rows(empty)
    if rows < least:
        raise _refused(index, f"flat or ivf for {rows:,} passages: {name} learns from at least {least:,}")
    space = faiss.ParameterSpace()
    space.initialize(empty)
    has = {space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())}
    defaults = [f"{name}={value}" for name, value in _FAISS_DEFAULTS.items() if name in has] + defaults
    given = [parameter for parameter in ",".join(words).split(",") if parameter]
    spec = IndexSpec(factory, tuple({p.partition("=")[0]: p for p in (*defaults, *given)}.values()))
    _set(index, empty, spec.parameters)
    return spec


def check_index(index: str, dimension: int, rows: int = 10_000_000) -> None:
    """Raises ConfigError where `index` is no name, factory string or parameter that FAISS knows, or cannot be trained
    on `rows` passages.
    """
    if index != "flat":
        index_spec(index, rows, dimension)


def open_index(passages: Embeddings, index: str, k: int = 1000, *, verify: bool = False) -> faiss.Index:
    """The index over all passages, position = place in the collection; built if it is not saved beside the shards
    already.

    Embeddings in memory are indexed in memory; a saved index is read memory-mapped, and compared with its checksum
    again with `verify`. Raises ConfigError as `index_spec`.
    """
    spec = index_spec(index, passages.rows, passages.dimension, k)
    found = (
        _saved(passages, index, spec, verify)
        if isinstance(passages, EmbeddingShards)
        else _build(passages, index, spec)
    )
    _set(index, found, spec.parameters)
    return found


def _saved(passages: EmbeddingShards, index: str, spec: IndexSpec, verify: bool) -> faiss.Index:
    folder = passages.folder / ("index-" + re.sub(r"[^A-Za-z0-9]+", "-", spec.factory).lower())
    file, manifest_file = folder / "index.faiss", folder / "manifest.json"
    wanted = {
        "format_version": _FORMAT_VERSION,
        "factory": spec.factory,
        "build_parameters": list(spec.build_parameters),
        "metric": "inner product",
        "train_rows": _train_rows(spec, passages),
        "seed": _SEED,
        "embeddings": shards_fingerprint(passages),
    }

    def is_there() -> bool:
        manifest = _manifest(manifest_file)
        same = {key: manifest.get(key) for key in wanted} == wanted
        return same and file.is_file() and not damaged(folder, again=verify)

    if not is_there():
        make_folder(folder)
        with locked(folder / LOCK, f"the index {folder}", wait=True):
            if not is_there():  # another process built it meanwhile
                built = _build(passages, index, spec)
                if manifest_file.exists():
                    remove(manifest_file)  # before there is another index
                with replace_file(file) as aside:
                    faiss.write_index(built, str(aside))
                write_checksums(folder, [file.name], remembered=True)
                facts = {"faiss": faiss.__version__, "rows": passages.rows, "bytes": file.stat().st_size}
                write_json(manifest_file, wanted | facts)
    by_lists = "IVF" in spec.factory  # inverted lists are mapped by one flag, vectors and graphs by the other
    flag = faiss.IO_FLAG_MMAP if by_lists else getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    return faiss.read_index(str(file), flag)


def shards_fingerprint(passages: EmbeddingShards) -> str:
    """A hash of the shards' manifest and of every shard's first and last embedding."""
    found = hashlib.blake2b(json.dumps(passages.manifest, sort_keys=True).encode(), digest_size=16)
    for embeddings, _ in passages:
        found.update(np.concatenate([embeddings[:1], embeddings[-1:]]).tobytes())
    return found.hexdigest()


def _build(passages: Embeddings, index: str, spec: IndexSpec) -> faiss.Index:
    built = _empty(index, spec.factory, passages.dimension)
    _set(index, built, spec.build_parameters)
    try:
        if not built.is_trained:
            built.train(_sample(passages, _train_rows(spec, passages)))
        for _, block in blocks_of(passages, _BLOCK_ROWS):
            built.add(block)
    except RuntimeError as error:
        raise _refused(
            index, f"an index that FAISS can build of {passages.rows:,} passages ({_reason(error)})"
        ) from error
    return built


def _train_rows(spec: IndexSpec, passages: Embeddings) -> int:
    lists = faiss.try_extract_index_ivf(_empty(spec.factory, spec.factory, passages.dimension))
    return min(passages.rows, max(_TRAIN_LEAST, _TRAIN_PER_LIST * lists.nlist if lists is not None else 0))


def _sample(passages: Embeddings, rows: int) -> np.ndarray:
    """`rows` passages drawn at random, always the same ones, [rows, D] float32."""
    drawn = np.sort(np.random.default_rng(_SEED).choice(passages.rows, rows, replace=False))
    sample, start = np.empty((rows, passages.dimension), dtype=np.float32), 0
    for embeddings, _ in passages:
        first, last = np.searchsorted(drawn, [start, start + len(embeddings)])
        sample[first:last] = embeddings[drawn[first:last] - start]
        start += len(embeddings)
    return sample


def _lists(rows: int) -> int:
    most = max(1, rows // _PER_CENTROID)  # a power of two is at most this, so a smaller one is too
    return int(2 ** min(round(np.log2(max(1.0, 4 * rows**0.5))), most.bit_length() - 1))


def _empty(index: str, factory: str, dimension: int) -> faiss.Index:
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        expected = f"{', '.join(NAMES)} or a FAISS factory string for dimension {dimension}"
        raise _refused(index, f"{expected} ({_reason(error)})") from error


def _least_rows(index: faiss.Index) -> int:
    """The least number of training vectors that FAISS accepts: one for each centroid of its largest codebook."""
    index = faiss.downcast_index(index)
    inner = getattr(index, "base_index", None) or getattr(index, "index", None)
    if inner is not None:  # what a transform, a refinement or an id map wraps
        return _least_rows(inner)
    return max(getattr(index, "nlist", 0), index.pq.ksub if hasattr(index, "pq") else 0)


def _set(index: str, target: faiss.Index, parameters: tuple[str, ...]) -> None:
    space = faiss.ParameterSpace()
    for parameter in parameters:
        try:
            space.set_index_parameters(target, parameter)  # type: ignore[arg-type]
        except RuntimeError as error:
            expected = "parameters that this index has, as nprobe=32 or efSearch=128"
            raise _refused(index, f"{expected}; FAISS refuses {parameter}") from error


def _reason(error: RuntimeError) -> str:
    return " ".join(str(error).rpartition(": ")[2].split())


def _refused(index: str, expected: str) -> ConfigError:
    return ConfigError(f"eval.index (--index): expected {expected}; received {index!r}")


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return read_object(path) or {}
    except ValueError:  # damaged: the index is built again
        return {}
