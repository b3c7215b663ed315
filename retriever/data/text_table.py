"""Tokenised texts in a folder: tokens.npy, offsets.npy, ids.arrow, manifest.json. Written once, memory-mapped ever after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from retriever.atomic import write_text
from retriever.data.records import DataError
from retriever.data.tokens import TokenTemplate, tokenize_batch

_BATCH_TEXTS = 8192
_BATCH_CHARACTERS = 1 << 24
_ID_SCHEMA = pa.schema([("id", pa.string())])


class TextTable:
    """Token ids of n texts, with their prompts, without special tokens, untruncated. Nothing is read until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets = load_array(folder / "offsets.npy")  # [n + 1] int64
        self._tokens = load_array(folder / "tokens.npy")  # [offsets[n]] uint16 or uint32

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, special tokens not counted: [n] int64."""
        return np.diff(self._offsets)

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of one text, as a read-only view of the file."""
        return self._tokens[self._offsets[row] : self._offsets[row + 1]]

    def gather(self, rows: np.ndarray, limit: int, *, keep_end: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """At most `limit` tokens of each row, the first or the last: one row after the other [sum], and how many each has [n]."""
        starts, lengths = self._offsets[rows], self.lengths[rows]
        kept = np.minimum(lengths, limit)
        if keep_end:
            starts = starts + lengths - kept
        within = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
        return self._tokens[np.repeat(starts, kept) + within], kept

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """The texts' own ids [n], null where the data gave none; memory-mapped Arrow."""
        return pa.ipc.open_file(pa.memory_map(str(self._folder / "ids.arrow"))).read_all()["id"]

    def id_of(self, row: int) -> str | None:
        """The id of one text."""
        return self.ids[int(row)].as_py()


class TextTableWriter:
    """Writes a TextTable text by text. One batch is tokenised (on all cores: the tokenizer's own threads) while the next fills."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        folder.mkdir(parents=True)
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = token_dtype(tokenizer)
        self._adds_nothing = TokenTemplate.from_tokenizer(tokenizer).special_tokens == 0
        self._lengths: list[np.ndarray] = []
        self._ids: list[str | None] = []
        self._texts: list[str] = []
        self._characters = 0
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")
        self._tokens: IO[bytes] = (folder / "tokens.npy").open("wb")
        self._header_bytes = _write_header(self._tokens, self._dtype, 0)
        self._arrow = pa.ipc.new_file(str(folder / "ids.arrow"), _ID_SCHEMA)

    def __enter__(self) -> TextTableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._worker.shutdown()
            self._arrow.close()
            self._tokens.close()

    def add(self, id_: str | None, text: str) -> None:
        """Appends one text, its prompt already in front."""
        self._ids.append(id_)
        self._texts.append(text)
        self._characters += len(text)
        if len(self._texts) == _BATCH_TEXTS or self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        self._pending = self._worker.submit(self._write, self._ids, self._texts)
        self._ids, self._texts, self._characters = [], [], 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, ids: Sequence[str | None], texts: Sequence[str]) -> None:
        rows = tokenize_batch(self._tokenizer, texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        if self._adds_nothing and not lengths.all():
            empty = ids[int(np.argmin(lengths))]
            raise DataError(
                f"text {empty!r} has no token, and the tokenizer adds none: it cannot be embedded; expected a text that is not empty"
            )
        self._tokens.write(np.fromiter(chain.from_iterable(rows), self._dtype, int(lengths.sum())).tobytes())
        self._lengths.append(lengths)
        self._arrow.write_batch(pa.record_batch([pa.array(ids, pa.string())], schema=_ID_SCHEMA))

    def _finish(self) -> None:
        self._flush()
        self._wait()
        offsets = np.concatenate([[0], *self._lengths]).cumsum().astype(np.int64)
        self._tokens.seek(0)
        if _write_header(self._tokens, self._dtype, int(offsets[-1])) != self._header_bytes:
            raise RuntimeError(f"numpy's header for {offsets[-1]} tokens does not fit into the {self._header_bytes} bytes left for it")
        np.save(self._folder / "offsets.npy", offsets, allow_pickle=False)
        write_json(self._folder / "manifest.json", {"texts": len(offsets) - 1, "tokens": int(offsets[-1]), "dtype": self._dtype.name})


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """uint16 where every token id of the vocabulary fits, else uint32."""
    largest = max(tokenizer.get_vocab().values())
    return np.dtype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)


def load_array(path: Path) -> np.ndarray:
    """A memory-mapped npy array, as a plain ndarray (slices of np.memmap are ten times slower to make)."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON beside `path` and renames it into place."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _write_header(stream: IO[bytes], dtype: np.dtype[Any], count: int) -> int:
    """Writes the npy header of a 1-D array; returns its size, the same for every count since numpy pads it for growth."""
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    return stream.tell()
