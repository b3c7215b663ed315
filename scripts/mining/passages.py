"""Passages in a file: Arrow, written once row by row, then memory-mapped. Equal texts are found by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from retriever.data.formats import Passage

_BATCH_ROWS = 512
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


class PassageWriter:
    """Appends passages to an Arrow file; what it holds does not grow with the file."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._arrow = pa.ipc.new_file(self._sink, _SCHEMA)
        self._batch: list[Passage] = []
        self.count = 0

    def __enter__(self) -> PassageWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._arrow.close()
        self._sink.close()

    def add(self, passage: Passage) -> int:
        """Writes a passage whose text is known; returns its row."""
        self._batch.append(passage)
        self.count += 1
        if len(self._batch) == _BATCH_ROWS:
            self._flush()
        return self.count - 1

    def _flush(self) -> None:
        columns = [[p.id for p in self._batch], [p.title for p in self._batch], [p.text for p in self._batch]]
        arrays = [pa.array(values, pa.string()) for values in columns]
        self._arrow.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        self._batch = []


class Passages:
    """The passages [N] in some of a file's rows, read from the disk as they are asked for."""

    def __init__(self, path: Path, rows: np.ndarray) -> None:
        """rows [N]: the row in the file of every passage."""
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._columns = [table[name].chunks for name in _SCHEMA.names]
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Passage:
        batch, place = divmod(int(self._rows[number]), _BATCH_ROWS)
        passage_id, title, text = (chunks[batch][place].as_py() for chunks in self._columns)
        return Passage(passage_id, text, title)

    def __iter__(self) -> Iterator[Passage]:
        return (self[number] for number in range(len(self)))


def digest(text: str) -> bytes:
    """16 bytes that stand for a text: unequal texts of one collection have unequal ones."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def first_equal(digests: bytes | bytearray) -> np.ndarray:
    """For each of n digests, laid end to end, the place of the first that equals it: [n] int64."""
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)  # [n, 2]
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal ones stay in their order
    ordered = halves[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first
