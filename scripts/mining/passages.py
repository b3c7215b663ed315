"""Passages in a file: Arrow, written once row by row, then memory-mapped. Equal texts are found by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from retriever.data.formats import Passage
from retriever.files import replace_file

_BATCH_ROWS = 512
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


def write_passages(path: Path, passages: Iterable[Passage]) -> None:
    """Writes passages whose texts are known to an Arrow file; the memory that it takes does not grow with their
    number.
    """
    rows = ({"id": passage.id, "title": passage.title, "text": passage.text} for passage in passages)
    with replace_file(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as arrow:
        while batch := list(islice(rows, _BATCH_ROWS)):
            arrow.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))


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


def numbered(digests: bytes | bytearray) -> np.ndarray:
    """A number for each of n digests, laid end to end: [n]. Equal ones have the same; they count from 0 in the order
    they first occur.
    """
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(digests) // 16, [None, pa.py_buffer(digests)])
    return column.dictionary_encode().indices.to_numpy()
