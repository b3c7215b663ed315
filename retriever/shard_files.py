"""The files of one shard: `00000.npy` with embeddings [rows, D] or their codes, of int8 also `00000.ranges.npy` [2, D],
and `00000.ids.arrow`, written last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from retriever.errors import RefusedError
from retriever.files import replace_file, write_array
from retriever.quantized import QUANTIZATIONS, Codes, quantize

Dtype: TypeAlias = Literal["float32", "float16", "int8", "binary"]
Stored: TypeAlias = np.ndarray | Codes  # embeddings [n, D]; of codes float32, decoded where rows are taken
_IDS = pa.schema([("id", pa.string())])
_AGAIN = "encode the texts again"


class ShardError(RefusedError):
    """A folder of shards that cannot be read or continued; the message names the file."""


def shard_files(folder: Path, shard: int, dtype: Dtype) -> tuple[Path, ...]:
    """The files of shard number `shard`: embeddings, ids, and of int8 ranges."""
    endings = (".npy", ".ids.arrow", *([".ranges.npy"] if dtype == "int8" else []))
    return tuple(folder / f"{shard:05d}{ending}" for ending in endings)


def write_shard(folder: Path, shard: int, embeddings: np.ndarray, ids: Sequence[str], dtype: Dtype) -> None:
    """Writes embeddings [n, D] in `dtype`, and their n ids. Raises ShardError for a value that is not finite there."""
    coded = dtype in QUANTIZATIONS
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(embeddings, dtype="float32" if coded else dtype)
    if not np.isfinite(stored).all():
        row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
        raise ShardError(f"shard {shard}: the embedding of {ids[row]!r} is not finite in {dtype}")
    file, ids_file, *ranges_file = shard_files(folder, shard, dtype)
    if dtype == "int8" or dtype == "binary":
        codes = quantize(stored, dtype)
        stored = codes.codes
        if codes.ranges is not None:
            write_array(ranges_file[0], codes.ranges)
    write_array(file, stored)
    with replace_file(ids_file) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, _IDS) as writer:
        writer.write_batch(pa.record_batch([pa.array(ids, type=pa.string())], schema=_IDS))


def read_shard(
    folder: Path, shard: int, dimension: int, dtype: Dtype, rows: int | None = None
) -> tuple[Stored, list[str]]:
    """The embeddings of shard number `shard`, memory-mapped, and its ids; `rows` of each, if it is given.

    Raises ShardError where a file is missing, damaged, or holds something else.
    """
    file, ids_file, *ranges_file = shard_files(folder, shard, dtype)
    stored, table = _read_array(file), _read_ids(ids_file)
    rows = len(table) if rows is None else rows
    width, kind = (-(-dimension // 8), "uint8") if dtype == "binary" else (dimension, dtype)
    _expect(file, stored, (rows, width), kind)
    if table.schema != _IDS or len(table) != rows:
        raise ShardError(
            f"{ids_file}: holds {len(table)} rows with columns {table.schema.names}; expected {rows} rows "
            f"with columns {_IDS.names}; {_AGAIN}"
        )
    if nulls := table.column("id").null_count:
        raise ShardError(f"{ids_file}: {nulls:,} of {len(table):,} ids are null; {_AGAIN}")
    ids = table.column("id").to_pylist()
    if dtype == "float32" or dtype == "float16":
        return stored, ids
    ranges = None
    if ranges_file:
        ranges = np.array(_read_array(ranges_file[0]))
        _expect(ranges_file[0], ranges, (2, dimension), "float32")
    return Codes(stored, dimension, ranges), ids


def _read_array(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ShardError(f"{file}: not readable as npy ({error}); {_AGAIN}") from error


def _read_ids(file: Path) -> pa.Table:
    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{file}: not readable as an Arrow file ({error}); {_AGAIN}") from error


def _expect(file: Path, array: np.ndarray, shape: tuple[int, int], dtype: str) -> None:
    if (array.shape, array.dtype.name) != (shape, dtype):
        raise ShardError(f"{file}: holds {array.shape} {array.dtype.name}; its manifest says {shape} {dtype}")
