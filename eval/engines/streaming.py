"""Exact search on GPUs without FAISS: shards stream through the device, and only what may be among the k best is looked
at twice.

A block of passages is scored with TF32 matrix units (plain fp32 where there are none). Such a score differs from ⟨q, p⟩
by at most

    slack = (2⁻⁹ + 2⁻¹⁶ + D·2⁻²²)·‖q‖·‖p‖:

TF32 keeps 10 bits behind the point, cut off at worst, of both factors (2·2⁻¹⁰), D fp32 additions add less than 2⁻²³
each, and the rest covers the roundings of this bound itself. A passage whose approximate score is below the k-th best
exact score minus slack cannot be among the k best; all others are scored again in float64, so that the result is exact,
always. The float64 sum is a fixed tree of additions: the same bits on every device, in every block, on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from eval.engines.embeddings import Embeddings, not_finite, slices_of
from eval.engines.topk import PassageOrder, TopK
from kernels.matmul import float32_products
from retriever.config import ConfigError
from retriever.parallel.world import World
from retriever.screen import Bar

_MOST_ROWS = 65_536  # of a block: more gain nothing
_PAIR_BYTES = 64  # of a query-passage pair, should all pass: score, mask, places, keys, and their sort
_COPY_THREADS = 8


@dataclass(frozen=True)
class Sizes:
    """Numbers of queries and passages that the device holds at once."""

    block_rows: int
    queries: int  # scored against a block together
    pairs: int  # scored again together


def sizes(n_queries: int, rows: int, dimension: int, k: int, memory_gib: float) -> Sizes:
    """Sizes that keep the search within `memory_gib` of a device's memory. Raises ConfigError where that is
    impossible.
    """
    fixed = n_queries * (12 * dimension + 8 * k)  # queries in fp32 and fp64, the best so far
    free = int(memory_gib * 2**30) - fixed
    block_rows = max(
        1, min(_MOST_ROWS, rows, free // 8 // (10 * dimension))
    )  # as stored, in fp32, squared a slice at a time
    queries = min(n_queries, free * 3 // 4 // (_PAIR_BYTES * block_rows + 32 * k))
    pairs = free // 8 // (24 * dimension)  # two fp64 rows, and what indexing makes of them
    if queries < 1 or pairs < 1:
        raise ConfigError(
            f"--memory-gib {memory_gib:g}: too little for {n_queries:,} queries of dimension {dimension} and k {k:,}"
        )
    return Sizes(block_rows, queries, min(pairs, 131_072))


def search_streaming(
    queries: np.ndarray,
    passages: Embeddings,
    order: PassageOrder,
    k: int,
    *,
    world: World | None,
    memory_gib: float,
    bar: Bar,
) -> TopK:
    """The k best passages of each query [Q, D] float32, on every rank; a score is the inner product in float64, rounded
    to float32.

    Each rank streams its share of the blocks through its device. Host memory: two blocks, beside ids and results.
    Raises ValueError for a value that is not finite, ConfigError where `memory_gib` is too little.
    """
    world = world or World(torch.device("cpu"))
    size = sizes(len(queries), passages.rows, passages.dimension, k, memory_gib)
    search = _Search(torch.from_numpy(queries).to(world.device), k, size)
    with float32_products("tf32"), torch.no_grad():
        for start, stored in _stream(passages, size.block_rows, world):
            block = stored.to(world.device).float()  # [n, D]; returns once the copy is done
            search.add(block, order.precedence[start : start + len(block)].to(world.device), start)
            bar.update(min(len(block) * world.size, passages.rows - bar.n))
    search.best.gather(world)
    return search.best


class _Search:
    """The k best passages of every query so far."""

    def __init__(self, queries: Tensor, k: int, size: Sizes) -> None:
        self._queries, self._k, self._size = queries, k, size
        self._queries64 = queries.double()
        self._norms = self._queries64.norm(dim=1)  # [Q]
        self._slack = 2.0**-9 + 2.0**-16 + queries.shape[1] * 2.0**-22
        self.best = TopK(len(queries), k, queries.device)

    def add(self, block: Tensor, precedence: Tensor, start: int) -> None:
        """Looks at passages [n, D], the first of which stands at `start` in the collection."""
        norms = torch.linalg.vector_norm(block, dim=1)  # [n]; not finite where a value is not
        if not torch.isfinite(norms).all() and not torch.isfinite(block).all():
            raise not_finite(start + int((~torch.isfinite(block).all(dim=1)).int().argmax()))
        longest = norms.double().max()
        for first in range(0, len(self._queries), self._size.queries):
            part = slice(first, first + self._size.queries)
            self._add_to(part, block, precedence, longest)

    def _add_to(self, part: slice, block: Tensor, precedence: Tensor, longest: Tensor) -> None:
        approximate = self._queries[part] @ block.T  # [q, n]
        slack = (
            self._slack * longest * self._norms[part] + block.shape[1] * 2.0**-126
        )  # [q]; the last term where products underflow
        mask = self._candidates(approximate, self.best.worst_scores(part).double(), slack)
        rows, columns = mask.nonzero(as_tuple=True)  # [P], rows ascending
        del approximate, mask
        if len(rows) == 0:
            return
        self.best.merge(part, rows, self._exact(part.start + rows, block, columns), precedence[columns])

    def _candidates(self, approximate: Tensor, worst: Tensor, slack: Tensor) -> Tensor:
        """Mask [q, n] that holds every passage that can be among the k best; worst [q] is the k-th best exact score,
        -inf if none.
        """
        mask = ~(approximate < (worst - slack).float()[:, None])  # a NaN, from sums that overflow, stays in
        many = 4 * self._k
        if approximate.shape[1] > many and int(mask.sum()) > many * len(approximate):
            kth = (
                approximate.topk(self._k, dim=1, sorted=False).values.amin(dim=1).double()
            )  # k passages score at least kth - slack
            mask = ~(approximate < torch.maximum(worst - slack, kth - 2 * slack).float()[:, None])
        return mask

    def _exact(self, rows: Tensor, block: Tensor, columns: Tensor) -> Tensor:
        """⟨queries[rows], block[columns]⟩ [P] as float32."""
        scores = torch.empty(len(rows), dtype=torch.float32, device=block.device)
        for first in range(0, len(rows), self._size.pairs):
            part = slice(first, first + self._size.pairs)
            products = self._queries64.index_select(0, rows[part])  # [p, D]; fp32 factors have exact fp64 products
            products *= block.index_select(0, columns[part])
            scores[part] = _tree_sum(products).float()
        return scores


def _tree_sum(x: Tensor) -> Tensor:
    """Σ_j x[:, j] for x [p, D], which it overwrites: halves are added until one column is left."""
    width = x.shape[1]
    while width > 1:
        half = (width + 1) // 2
        x[:, : width - half] += x[:, half:width]
        width = half
    return x[:, 0]


def _stream(passages: Embeddings, block_rows: int, world: World) -> Iterator[tuple[int, Tensor]]:
    """(position of the first row, [n, D] as stored, page-locked for a GPU) of every world.size-th block, read ahead of
    its use.
    """
    pinned = world.device.type == "cuda"
    buffers = [torch.empty(4 * block_rows * passages.dimension, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(_COPY_THREADS) as copiers:

        def read(turn: int, stored: np.ndarray) -> Tensor:
            dtype = torch.float16 if stored.dtype == np.float16 else torch.float32
            into = buffers[turn % 2].view(dtype)[: stored.size].view(stored.shape)
            step = -(-len(stored) // _COPY_THREADS)
            pieces = [slice(first, first + step) for first in range(0, len(stored), step)]
            list(copiers.map(lambda piece: np.copyto(into[piece].numpy(), stored[piece], "same_kind"), pieces))
            return into

        pending = None
        own = islice(slices_of(passages, block_rows), world.rank, None, world.size)
        for turn, (start, stored) in enumerate(own):
            ahead = start, reader.submit(read, turn, stored)
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = ahead
        if pending is not None:
            yield pending[0], pending[1].result()
