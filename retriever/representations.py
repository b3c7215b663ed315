"""Where a rank's representations are between the passes: on the device in the batch's order, or in host memory chunk
behind chunk.

In host memory the rows of a chunk stand together, so that each chunk is one copy, out in the first pass and back (its
gradient) in the second. The loss does not mind the order; the targets are brought into it.
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
    order: tuple[Tensor, Tensor] | None = (
        None  # the batch's rows [B] and [N] that these are, where they stand in another order
    )


class Place(NamedTuple):
    """Where the rows of a chunk stand in the representations and in their gradient."""

    side: Side
    rows: Tensor | slice  # [n]


class DeviceRoom:
    """Room for a batch's representations on the device of `like`, in its dtype."""

    def __init__(self, sizes: tuple[int, int], dimension: int, like: Tensor) -> None:
        queries, passages = (torch.empty(n, dimension, dtype=like.dtype, device=like.device) for n in sizes)
        self._sides = Representations(queries, passages)

    def put(self, chunk: Chunk, embeddings: Tensor) -> Place:
        """Stores the chunk's rows [n, D]."""
        getattr(self._sides, chunk.side)[chunk.rows] = embeddings
        return Place(chunk.side, chunk.rows)

    def finished(self) -> Representations:
        """All rows, in the batch's order."""
        return self._sides


class HostRoom:
    """Room for them in host memory, page-locked where `like` is on a GPU: kernels wait for a copy, the host does
    not.
    """

    def __init__(self, sizes: tuple[int, int], dimension: int, like: Tensor) -> None:
        self._device = like.device
        rows: dict[Side, int] = dict(zip(_SIDES, sizes, strict=True))
        self._rows = {side: host_rows((n, dimension), like.dtype, like.device) for side, n in rows.items()}
        self._order = {side: host_rows((n,), torch.int64, like.device) for side, n in rows.items()}
        self._filled = dict.fromkeys(rows, 0)

    def put(self, chunk: Chunk, embeddings: Tensor) -> Place:
        """Begins to copy the chunk's rows [n, D] behind those of its side that are there."""
        start = self._filled[chunk.side]
        self._filled[chunk.side] = stop = start + len(chunk.rows)
        self._rows[chunk.side][start:stop].copy_(embeddings, non_blocking=True)
        self._order[chunk.side][start:stop].copy_(chunk.rows, non_blocking=True)
        return Place(chunk.side, slice(start, stop))

    def finished(self) -> Representations:
        """All rows, which the host may read from now on, and their order."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Representations(
            self._rows["query"], self._rows["passage"], (self._order["query"], self._order["passage"])
        )
