"""Tokenised texts in a folder: tokens.npy, offsets.npy, ids.arrow, manifest.json. Written once, then memory-mapped."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from retriever.data.records import DataError
from retriever.data.tokens import TokenTemplate, tokenize_flat
from retriever.files import write_json

_WORKERS = 2
_BATCH_TEXTS = 4096
_BATCH_CHARACTERS = 1 << 24
_ID_SCHEMA = pa.schema([("id", pa.string())])


class TokenRows:
    """Token ids of n texts, with their prompts, without special tokens, untruncated: one text behind another."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self._tokens = tokens  # [offsets[n]] of any integer type
        self._offsets = offsets  # [n + 1] int64

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text without special ones: [n] int64, computed each time; for a few, use `lengths_of`."""
        return np.diff(self._offsets)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the texts in `rows`, special tokens not counted: [len(rows)] int64."""
        return self._offsets[rows + 1] - self._offsets[rows]

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of one text, as a view."""
        return self._tokens[self._offsets[row] : self._offsets[row + 1]]

    def gather(
        self, rows: np.ndarray, limit: int | np.ndarray, *, keep_end: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` tokens of each row [n], or the last: one row behind another [sum], and their numbers [n].

        `limit`: one number, or one for each of the rows.
        """
        first, last = self._offsets[rows], self._offsets[rows + 1]
        kept = np.minimum(last - first, limit)  # [n]
        if keep_end:
            first = last - kept
        shifts = np.repeat(first - (np.cumsum(kept) - kept), kept)  # [sum]: from a token's position in the result
        return self._tokens[shifts + np.arange(len(shifts))], kept


class TextTable(TokenRows):
    """The texts of a folder, memory-mapped and read-only. Nothing is read until it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_array(folder / "tokens.npy"), load_array(folder / "offsets.npy"))
        self._folder = folder

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """The texts' own ids [n], null where the data gave none; memory-mapped Arrow."""
        return pa.ipc.open_file(pa.memory_map(str(self._folder / "ids.arrow"))).read_all()["id"]


@dataclass
class Lengths:
    """The lengths of texts that are written, in tokens, special ones included."""

    limit: int  # longer texts will be cut
    texts: int = 0
    tokens: int = 0
    cut: int = 0

    def add(self, tokens: np.ndarray) -> None:
        """Counts texts of `tokens` [n]."""
        self.texts += len(tokens)
        self.tokens += int(tokens.sum())
        self.cut += int((tokens > self.limit).sum())

    @property
    def mean(self) -> float:
        return self.tokens / max(1, self.texts)

    @property
    def cut_share(self) -> float:
        """The share of the texts that will be cut."""
        return self.cut / max(1, self.texts)

    def __str__(self) -> str:
        return f"{self.mean:.1f} tokens ({self.cut_share:.1%} cut at {self.limit})"


class TextTableWriter:
    """Writes a TextTable text by text; what it holds in memory does not grow with the table.

    Two batches are tokenised at a time, each on all cores: while one is handed over, the other keeps the cores busy.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        folder.mkdir(parents=True)
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = token_dtype(tokenizer)
        self._special_tokens = TokenTemplate.from_tokenizer(tokenizer).special_tokens
        self._ids: list[str | None] = []
        self._texts: list[str] = []
        self._characters = 0
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tokenise")
        self._pending: deque[tuple[list[str | None], Lengths, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
        self._lengths = Lengths(0)
        self._tokens = _GrowingArray(folder / "tokens.npy", self._dtype)
        self._offsets = _GrowingArray(folder / "offsets.npy", np.dtype(np.int64))
        self._offsets.append(np.zeros(1, np.int64))
        self._arrow = pa.ipc.new_file(str(folder / "ids.arrow"), _ID_SCHEMA)

    def __enter__(self) -> TextTableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._workers.shutdown(cancel_futures=True)
            for file in (self._arrow, self._tokens, self._offsets):
                file.close()
        if kind is None:
            found = {"texts": self._offsets.count - 1, "tokens": self._tokens.count, "dtype": self._dtype.name}
            write_json(self._folder / "manifest.json", found)

    def add(self, id_: str | None, text: str) -> None:
        """Appends one text, its prompt already in front."""
        self._ids.append(id_)
        self._texts.append(text)
        self._characters += len(text)
        if len(self._texts) == _BATCH_TEXTS or self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def counted_from_now(self, limit: int) -> Lengths:
        """The lengths of the texts that are added from now on until the next call; whole after `finish`."""
        self._flush()
        self._lengths = Lengths(limit)
        return self._lengths

    def finish(self) -> None:
        """Writes what was added so far."""
        self._flush()
        while self._pending:
            self._write_first()

    def _flush(self) -> None:
        if not self._texts:
            return
        tokens = self._workers.submit(tokenize_flat, self._tokenizer, self._texts, self._dtype)
        self._pending.append((self._ids, self._lengths, tokens))
        self._ids, self._texts, self._characters = [], [], 0
        if len(self._pending) > _WORKERS:
            self._write_first()

    def _write_first(self) -> None:
        ids, lengths, result = self._pending.popleft()
        tokens, counts = result.result()
        if not self._special_tokens and not counts.all():
            problem = (
                "has no token, and the tokenizer adds none: it cannot be embedded; expected a text that is not empty"
            )
            raise DataError(f"text {ids[int(np.argmin(counts))]!r} {problem}")
        lengths.add(counts + self._special_tokens)
        self._offsets.append(self._tokens.count + np.cumsum(counts))
        self._tokens.append(tokens)
        self._arrow.write_batch(pa.record_batch([pa.array(ids, pa.string())], schema=_ID_SCHEMA))


class _GrowingArray:
    """A 1-D npy file that is appended to; it can be read once it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._stream, self._dtype, self.count = path.open("wb"), dtype, 0
        self._header_bytes = self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._stream.write(np.ascontiguousarray(values, self._dtype).data)
        self.count += len(values)

    def close(self) -> None:
        with self._stream:
            self._stream.seek(0)
            if self._write_header() != self._header_bytes:
                room = f"the {self._header_bytes} bytes left for it"
                raise RuntimeError(f"numpy's header for {self.count} values does not fit into {room}")

    def _write_header(self) -> int:
        """Writes the header; returns its size, the same for every count since numpy pads it for growth."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._stream, header)
        return self._stream.tell()


def at(values: int | np.ndarray, rows: np.ndarray) -> int | np.ndarray:
    """The values of `rows` [n]: one number for all, or the rows' own out of an array."""
    return values[rows] if isinstance(values, np.ndarray) and values.ndim else values


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """uint16 where every token id of the vocabulary fits, else uint32."""
    largest = max(tokenizer.get_vocab().values())
    return np.dtype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)


def load_array(path: Path) -> np.ndarray:
    """A memory-mapped npy array, as a plain ndarray (slices of np.memmap are ten times slower to make)."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
