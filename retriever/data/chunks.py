"""Chunks: length-sorted slices of a batch, each at most `tokens_per_chunk` tokens with its padding.

A background thread reads, wraps and pads the next chunks (pinned where there is a GPU) while the encoder works on
this one; a chunk goes to the device when its turn comes, so the memory that data takes does not grow with the batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retriever.data.tokens import Side

_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Chunk:
    """What the encoder sees at once."""

    side: Side
    rows: Tensor  # [n] int64: positions in the rank's queries or passages
    input_ids: Tensor  # [n, width] int64
    attention_mask: Tensor  # [n, width] int64

    def to(self, device: torch.device) -> Chunk:
        """The same chunk on `device`; the copy does not block where the memory is pinned."""
        if device.type == "cpu":
            return self
        move = (t.to(device, non_blocking=True) for t in (self.rows, self.input_ids, self.attention_mask))
        return Chunk(self.side, *move)

    def pinned(self) -> Chunk:
        """The same chunk in page-locked host memory."""
        return Chunk(self.side, *(t.pin_memory() for t in (self.rows, self.input_ids, self.attention_mask)))


def plan_chunks(lengths: np.ndarray, tokens_per_chunk: int) -> list[np.ndarray]:
    """Positions [n_c] int64 of each chunk: sorted by length, longest first, rows × longest ≤ tokens_per_chunk.

    The longest chunk comes first so that a run that does not fit in memory fails at once. A function of the lengths
    alone: both passes of the gradient cache see the same bounds and the same padded widths.
    Raises ValueError where a single text is longer than the budget.
    """
    if len(lengths) == 0:
        return []
    order = np.argsort(-lengths, kind="stable")
    if lengths[order[0]] > tokens_per_chunk:
        raise ValueError(f"batch.tokens_per_chunk={tokens_per_chunk} is below the longest text of {lengths[order[0]]} tokens")
    chunks, start = [], 0
    while start < len(order):
        rows = max(1, int(tokens_per_chunk // max(1, lengths[order[start]])))
        chunks.append(order[start : start + rows])
        start += rows
    return chunks


def pad_rows(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, both [n, longest] int64, padded on the right with `pad_id`."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0))[None, :] < lengths[:, None]  # [n, width]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(rows) if len(rows) else []
    return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))


class Chunks:
    """The chunks of one rank's batch, to be iterated as often as needed: the same chunks, in the same order, each time."""

    def __init__(self, builders: Sequence[Callable[[], Chunk]], device: torch.device) -> None:
        self._builders = builders
        self._device = device

    def __len__(self) -> int:
        return len(self._builders)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks on the device, built ahead in a background thread."""
        for chunk in _ahead(self._builders, pin=self._device.type == "cuda"):
            yield chunk.to(self._device)


def _ahead(builders: Sequence[Callable[[], Chunk]], pin: bool) -> Iterator[Chunk]:
    """Builds chunks in a thread, a few ahead of the reader; an error in the thread is raised at the reader."""
    ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(maxsize=_CHUNKS_AHEAD)
    stopped = threading.Event()

    def put(item: Chunk | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for build in builders:
                if stopped.is_set():
                    return
                chunk = build()
                put(chunk.pinned() if pin else chunk)
            put(None)
        except BaseException as error:  # handed to the reader, which raises it
            put(error)

    thread = threading.Thread(target=work, name="chunks", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
