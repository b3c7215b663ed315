"""Chunks: length-sorted slices of a batch, each at most `tokens_per_chunk` tokens, padding included where there is any.

Background threads read, wrap and lay out the next chunks (pinned where there is a GPU) while the encoder works on
this one; a chunk goes to the device when its turn comes, so that the device holds the tokens of one chunk (and of those
whose products the gradient cache keeps).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from retriever.data.layout import OfTensors, Packed, Padded, pack, pack_rows, pad, pad_rows
from retriever.data.text_table import TokenRows, at
from retriever.data.tokens import Side, TokenTemplate

_THREADS = 2  # laying out holds the interpreter's lock: more make the first chunk later
_CHUNKS_AHEAD = 8

Item = TypeVar("Item")


@dataclass(frozen=True)
class Chunk(OfTensors):
    """The texts that the encoder processes at once."""

    side: Side
    rows: Tensor  # [n] int64: positions in the rank's queries or passages
    tokens: Padded | Packed  # of n texts; of one text in a filler, which has no rows


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


@dataclass(frozen=True)
class Chunking:
    """The texts of one side and how chunks are made of them."""

    side: Side
    texts: TokenRows
    template: TokenTemplate
    max_tokens: int | np.ndarray  # of a text, special tokens included: of every text, or of each row of `texts`
    tokens_per_chunk: int
    packed: bool

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens [n] int64 that the texts in `rows` [n] take in the encoder."""
        return self.template.lengths(self.texts.lengths_of(rows), at(self.max_tokens, rows))

    def plan(self, rows: np.ndarray) -> list[np.ndarray]:
        """The chunks of the texts in `rows` [n], as positions in `rows` (`plan_chunks`)."""
        return plan_chunks(self.lengths(rows), self.tokens_per_chunk, packed=self.packed)

    def builders(self, rows: np.ndarray, at_least: int = 0) -> list[Callable[[], Chunk]]:
        """One function a chunk of the texts in `rows` [n] int64, which reads and lays it out; fillers up to `at_least`.

        Raises ValueError where a single text is longer than `tokens_per_chunk`.
        """
        plan = self.plan(rows)
        builders: list[Callable[[], Chunk]] = [partial(self._build, chunk, rows[chunk]) for chunk in plan]
        return builders + [partial(filler, self.side, packed=self.packed)] * (at_least - len(builders))

    def _build(self, positions: np.ndarray, rows: np.ndarray) -> Chunk:
        template = self.template
        room = at(self.max_tokens, rows) - template.special_tokens
        found = self.texts.gather(rows, room, keep_end=template.keep_end)
        tokens, lengths = template.wrap(*found)
        layout = pack(tokens, lengths) if self.packed else pad(tokens, lengths, template.pad_id)
        return Chunk(self.side, torch.from_numpy(positions), layout)


class Chunks:
    """The chunks of one rank's batch. Every iteration gives the same chunks in the same order."""

    def __init__(self, builders: Sequence[Callable[[], Chunk]], device: torch.device) -> None:
        self._builders = builders
        self._device = device
        self._prefetched: Ahead[Chunk] | None = None
        self.waited_s = 0.0  # that iterations spent waiting for a chunk to be built

    def __len__(self) -> int:
        return len(self._builders)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks on the device, built ahead in background threads."""
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Chunk]:
        """The chunks without the first `first` ones."""
        if first > 0:
            self.close()
        ready, self._prefetched = self._prefetched or self._ahead(first), None
        with closing(ready):
            for chunk in ready:
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

    def _ahead(self, first: int) -> Ahead[Chunk]:
        builders = (partial(self._built, builder) for builder in self._builders[first:])
        return Ahead(builders, _CHUNKS_AHEAD, _THREADS, "chunks")

    def _built(self, builder: Callable[[], Chunk]) -> Chunk:
        return builder().pinned() if self._device.type == "cuda" else builder()


class Ahead(Generic[Item]):
    """Results of calls, in order, made in threads up to `depth` calls ahead of the reader."""

    def __init__(self, calls: Iterable[Callable[[], Item]], depth: int, threads: int, name: str) -> None:
        self._calls = iter(calls)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._pending = deque(map(self._pool.submit, islice(self._calls, depth)))
        self.waited_s = 0.0  # for the last result

    def __iter__(self) -> Iterator[Item]:
        """Each result in its turn; an error of its call is raised then."""
        while self._pending:
            started = time.perf_counter()
            item = self._pending.popleft().result()
            self.waited_s = time.perf_counter() - started
            self._pending.extend(map(self._pool.submit, islice(self._calls, 1)))
            yield item

    def close(self) -> list[Item]:
        """Ends the threads without beginning another call; returns the results that nobody has read."""
        self._pool.shutdown(cancel_futures=True)
        return [call.result() for call in self._pending if not call.cancelled() and call.exception() is None]
