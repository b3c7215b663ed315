"""Embeddings in parts, as a search reads them and `retriever.shards.open_shards` gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa

from retriever.errors import RefusedError
from retriever.shard_files import Stored

_PAIRS_AT_ONCE = 1024  # query-passage pairs one thread scores together


class Embeddings(Protocol):
    """A collection of embeddings in parts; it can be iterated more than once."""

    rows: int
    dimension: int

    def __iter__(self) -> Iterator[tuple[Stored, list[str]]]: ...  # (embeddings [n, D], their ids)


def check_cut(dimension: int, whole: int) -> None:
    """Raises RefusedError where embeddings of `whole` dimensions have no `dimension` leading ones."""
    if dimension > whole:
        raise RefusedError(f"--dims {dimension}: expected at most the {whole} of the embeddings")


class Derived:
    """What `of` makes of the embeddings of a collection, part by part: [n, D] -> [n, dimension]."""

    def __init__(self, whole: Embeddings, of: Callable[[Stored], Stored], dimension: int) -> None:
        self._whole, self._of = whole, of
        self.rows, self.dimension = whole.rows, dimension

    def __iter__(self) -> Iterator[tuple[Stored, list[str]]]:
        for embeddings, ids in self._whole:
            yield self._of(embeddings), ids


def leading(embeddings: Stored, dimension: int, *, unit_norm: bool) -> np.ndarray:
    """Embeddings [n, D] cut to their leading dimensions [n, dimension] float32, as unit vectors again where they were
    (Kusupati et al. 2022, arXiv:2205.13147). Raises RefusedError as `check_cut` does.
    """
    check_cut(dimension, embeddings.shape[1])
    cut = np.array(embeddings[:][:, :dimension], dtype=np.float32)
    if unit_norm:
        cut /= np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
    return cut


def pair_scores(
    parts: Iterable[Stored], queries: np.ndarray, rows: np.ndarray, positions: np.ndarray, threads: int = 1
) -> np.ndarray:
    """⟨queries[rows], passages[positions]⟩ [P], summed in float64, as float32; `parts` are the collection's embeddings.

    Reads each part once, in the order of its rows, and no row that is not asked for. Memory: 12 bytes a pair, and a
    thousand pairs of embeddings a thread.
    """
    scores, start, done = np.empty(len(positions), dtype=np.float32), 0, 0
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    for part in parts:
        end = done + int(np.searchsorted(ordered[done:], start + len(part)))
        if end > done:
            here = order[done:end]
            scores[here] = inner_products(queries, part, rows[here], ordered[done:end] - start, threads)
        start, done = start + len(part), end
    return scores


def inner_products(
    queries: np.ndarray, block: Stored, rows: np.ndarray, columns: np.ndarray, threads: int
) -> np.ndarray:
    """⟨queries[rows], block[columns]⟩ [P], summed in float64, as float32."""
    scores = np.empty(len(rows), dtype=np.float32)

    def score(first: int) -> None:
        part = slice(first, first + _PAIRS_AT_ONCE)
        # einsum casts a buffer at a time: six times faster than float64 copies of the rows
        scores[part] = np.einsum("pd,pd->p", queries[rows[part]], block[columns[part]], dtype=np.float64)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(score, range(0, len(rows), _PAIRS_AT_ONCE)))  # list: raises what a thread raised
    return scores


def slices_of(passages: Embeddings, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position of the first row in the collection, [n, D] as stored); n is at most `rows`, and a slice never spans two
    parts.
    """
    start = 0
    for embeddings, _ in passages:
        for first in range(0, len(embeddings), rows):
            yield start + first, embeddings[first : first + rows]
        start += len(embeddings)


def blocks_of(passages: Embeddings, block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """As `slices_of`, finite float32 [n, D]."""
    for start, stored in slices_of(passages, block_rows):
        block = np.ascontiguousarray(stored, dtype=np.float32)
        if not np.isfinite(block).all():
            raise not_finite(start + int((~np.isfinite(block).all(axis=1)).argmax()))
        yield start, block


def not_finite(position: int) -> RefusedError:
    """The error for a passage, given by its position in the collection, whose embedding cannot be searched."""
    return RefusedError(f"passage embedding {position} has a value that is not finite: encode the collection again")


def passage_ids(passages: Embeddings) -> pa.LargeStringArray:
    """All ids [N] in the collection's order."""
    return pa.chunked_array(
        [pa.array(ids, type=pa.large_string()) for _, ids in passages], type=pa.large_string()
    ).combine_chunks()


def load_queries(shards: Embeddings) -> tuple[np.ndarray, list[str]]:
    """All embeddings [Q, D] float32 and ids of a folder of shards, in memory: queries are few."""
    parts = [(np.asarray(embeddings, dtype=np.float32), ids) for embeddings, ids in shards]
    embeddings = (
        np.concatenate([part for part, _ in parts]) if parts else np.empty((0, shards.dimension), dtype=np.float32)
    )
    return embeddings, [i for _, ids in parts for i in ids]
