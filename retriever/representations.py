"""Buffers for a rank's representations between the two passes: on the device in the batch's order, or in host memory
in the order of the chunks.

In host memory the rows of a chunk are contiguous, so that a chunk is one copy in each direction: its embeddings out in
the first pass, its gradient back in the second. The loss does not depend on the order; the targets are reordered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retriever.data.chunks import Chunk
from retriever.data.tokens import Side
from retriever.parallel.host import host_rows

_SIDES: tuple[Side, Side] = ("query", "passage")


class Representations(NamedTuple):
    """Embeddings of a rank's batch, or the loss's gradient at them."""

    query: Tensor  # [B, D]
    passage: Tensor  # [N, D]
    order: tuple[Tensor, Tensor] | None = None  # the batch's rows, [B] and [N], if the order is another


class RowSlice(NamedTuple):
    """The rows of a chunk, in the representations and in their gradient."""

    side: Side
    rows: Tensor | slice  # [n]


class DeviceBuffer:
    """A buffer for a batch's representations on the device of `like`, in its dtype."""

    def __init__(self, sizes: tuple[int, int], dimension: int, like: Tensor) -> None:
        queries, passages = (torch.empty(n, dimension, dtype=like.dtype, device=like.device) for n in sizes)
        self._sides = Representations(queries, passages)

    def put(self, chunk: Chunk, embeddings: Tensor) -> RowSlice:
        """Stores the chunk's rows [n, D]."""
        getattr(self._sides, chunk.side)[chunk.rows] = embeddings
        return RowSlice(chunk.side, chunk.rows)

    def finished(self) -> Representations:
        """All rows, in the batch's order."""
        return self._sides


class HostBuffer:
    """A buffer in host memory, page-locked if `like` is on a GPU. Kernels wait for its copies, the host does not."""

    def __init__(self, sizes: tuple[int, int], dimension: int, like: Tensor) -> None:
        self._device = like.device
        rows: dict[Side, int] = dict(zip(_SIDES, sizes, strict=True))
        self._rows = {side: host_rows((n, dimension), like.dtype, like.device) for side, n in rows.items()}
        self._order = {side: host_rows((n,), torch.int64, like.device) for side, n in rows.items()}
        self._filled = dict.fromkeys(rows, 0)

    def put(self, chunk: Chunk, embeddings: Tensor) -> RowSlice:
        """Starts to copy the chunk's rows [n, D] behind the earlier rows of its side."""
        start = self._filled[chunk.side]
        self._filled[chunk.side] = stop = start + len(chunk.rows)
        self._rows[chunk.side][start:stop].copy_(embeddings, non_blocking=True)
        self._order[chunk.side][start:stop].copy_(chunk.rows, non_blocking=True)
        return RowSlice(chunk.side, slice(start, stop))

    def finished(self) -> Representations:
        """All rows and their order, once every copy has arrived."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Representations(
            self._rows["query"], self._rows["passage"], (self._order["query"], self._order["passage"])
        )
