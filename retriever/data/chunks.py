"""Chunks: length-sorted slices of a batch, each at most `tokens_per_chunk` tokens, padding included where there is any.

Background threads read, wrap and lay out the next chunks (pinned where there is a GPU) while the encoder works on
this one; a chunk goes to the device when its turn comes, so that the device holds the tokens of one chunk (and of those
whose products the gradient cache keeps).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.data.tokens import Side

_THREADS = 2  # laying out holds the interpreter's lock: more make the first chunk later
_CHUNKS_AHEAD = 8


@dataclass(frozen=True)
class Chunk:
    """What the encoder sees at once."""

    side: Side
    rows: Tensor  # [n] int64: positions in the rank's queries or passages
    tokens: Padded | Packed  # of n texts; of one text in a filler, which has no rows

    def to(self, device: torch.device) -> Chunk:
        """The same chunk on `device`; the copy does not block where the memory is pinned."""
        if device.type == "cpu":
            return self
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> Chunk:
        """The same chunk in page-locked host memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Chunk:
        return Chunk(self.side, function(self.rows), self.tokens.map(function))


def filler(side: Side, *, packed: bool) -> Chunk:
    """A chunk of a single token and no rows, for a rank to encode while others have more chunks than it has."""
    text = [np.zeros(1, dtype=np.int64)]  # token 0: every vocabulary has one
    return Chunk(side, torch.empty(0, dtype=torch.int64), pack_rows(text) if packed else pad_rows(text, 0))


def plan_chunks(lengths: np.ndarray, tokens_per_chunk: int, *, packed: bool = False) -> list[np.ndarray]:
    """Positions [n_c] int64 of each chunk: sorted by length, longest first, at most `tokens_per_chunk` tokens each.

    Padded, a chunk of n rows has n × its longest tokens. Packed, the fewest chunks share the tokens evenly: a small one
    would leave a GPU waiting for the host. The longest chunk comes first so that a run that does not fit in memory
    fails at once. A function of the lengths alone: both passes of the gradient cache see the same bounds and the same
    widths. Raises ValueError where a single text is longer than the budget.
    """
    if len(lengths) == 0:
        return []
    order = np.argsort(-lengths, kind="stable")
    if lengths[order[0]] > tokens_per_chunk:
        raise ValueError(
            f"batch.tokens_per_chunk={tokens_per_chunk} is below the longest text of {lengths[order[0]]} tokens"
        )
    before = np.concatenate([[0], lengths[order].cumsum()])  # tokens that stand before each place of the order
    fewest = max(1, -(-before[-1] // tokens_per_chunk))
    share = min(tokens_per_chunk, before[-1] // fewest + lengths[order[0]])  # a text more, so that no chunk falls short
    chunks, start = [], 0
    while start < len(order):
        if packed:
            stop = int(np.searchsorted(before, before[start] + share, side="right")) - 1
        else:
            stop = start + int(tokens_per_chunk // max(1, lengths[order[start]]))
        chunks.append(order[start : max(stop, start + 1)])
        start = max(stop, start + 1)
    return chunks


class Chunks:
    """The chunks of one rank's batch, to be iterated as often as needed: the same chunks, in the same order, each
    time.
    """

    def __init__(self, builders: Sequence[Callable[[], Chunk]], device: torch.device) -> None:
        self._builders = builders
        self._device = device
        self._prefetched: _Ahead | None = None
        self.waited_s = 0.0  # that iterations spent waiting for a chunk to be built

    def __len__(self) -> int:
        return len(self._builders)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks on the device, built ahead in background threads."""
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Chunk]:
        """The chunks without the first `first` ones."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and first > 0:
            prefetched.close()
        with closing(prefetched if prefetched is not None and first == 0 else self._ahead(first)) as ready:
            for chunk in ready.chunks():
                self.waited_s += ready.waited_s
                yield chunk.to(self._device)

    def prefetch(self) -> None:
        """Starts to build the first chunks of the next iteration, which must come, or `close`."""
        self._prefetched = self._prefetched or self._ahead(0)

    def close(self) -> None:
        """Drops what `prefetch` made."""
        if self._prefetched is not None:
            self._prefetched.close()
            self._prefetched = None

    def _ahead(self, first: int) -> _Ahead:
        return _Ahead(self._builders[first:], pin=self._device.type == "cuda")


class _Ahead:
    """Chunks being built in threads, a few ahead of the reader."""

    def __init__(self, builders: Sequence[Callable[[], Chunk]], pin: bool) -> None:
        self._pin = pin
        self._coming = iter(builders)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="chunks")
        self._pending = deque(
            self._pool.submit(self._build, builder) for builder in islice(self._coming, _CHUNKS_AHEAD)
        )
        self.waited_s = 0.0  # for the last chunk

    def chunks(self) -> Iterator[Chunk]:
        """Each in its turn; an error of its builder is raised then."""
        while self._pending:
            started = time.perf_counter()
            chunk = self._pending.popleft().result()
            self.waited_s = time.perf_counter() - started
            self._pending.extend(self._pool.submit(self._build, builder) for builder in islice(self._coming, 1))
            yield chunk

    def close(self) -> None:
        """Ends the threads; what they have not begun is not built."""
        self._pool.shutdown(cancel_futures=True)

    def _build(self, builder: Callable[[], Chunk]) -> Chunk:
        chunk = builder()
        return chunk.pinned() if self._pin else chunk
