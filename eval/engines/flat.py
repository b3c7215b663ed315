"""Exact search on the CPU: FAISS finds candidates block by block, float64 decides among them."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
import torch

from eval.engines.embeddings import Embeddings, blocks_of, inner_products
from eval.engines.topk import PassageOrder, TopK
from retriever.screen import Bar

_MARGIN = 32  # passages asked for beyond k, so that equal scores at the k-th place rarely need a second search
_QUERIES_AT_ONCE = 8192
_HITS_AT_ONCE = 2**23  # bounds what one search returns, 12 bytes each, even where thousands of passages are equal


def search_flat(
    queries: np.ndarray, passages: Embeddings, order: PassageOrder, k: int, block_mib: int, bar: Bar
) -> TopK:
    """The k passages of largest inner product for each query [Q, D] float32; `order` breaks ties.

    A score is summed in float64 and rounded to float32. Memory: two blocks of `block_mib` MiB, and 8 bytes for each of
    the Q · k results. Raises ValueError if a query or a passage has a value that is not finite.
    """
    best = TopK(len(queries), k)
    searcher = faiss.IndexFlatIP(passages.dimension)
    block_rows = max(1, block_mib * 2**20 // (4 * passages.dimension))
    for start, block in blocks_of(passages, block_rows):  # [n, D] float32
        searcher.reset()
        searcher.add(block)
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            part = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
            worst = best.worst_scores(part).numpy()
            for group, rows, columns in _candidates(searcher, queries[part], block, worst, k):
                threads = faiss.omp_get_max_threads()
                scores = torch.from_numpy(inner_products(queries[first + group], block, rows, columns, threads))
                best.merge(first + group, torch.from_numpy(rows), scores, order.precedence[start + columns])
        bar.update(len(block))
    return best


def _candidates(
    searcher: faiss.Index, queries: np.ndarray, block: np.ndarray, worst: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Some queries [q], and pairs (row among them [P], ascending; block column [P]) with every passage of their k best
    in this block.

    A float32 inner product of D terms is off by at most D·2^-24·|q|·|p|; twice that below the k-th score FAISS saw, or
    below the k-th best so far, nothing can be among the k best. Queries whose last hit is still above that line are
    searched again, deeper.
    """
    longest = float(np.sqrt(np.einsum("nd,nd->n", block, block).max(initial=0.0)))
    slack = (block.shape[1] + 1) * 2.0**-23 * longest * np.linalg.norm(queries, axis=1)  # [Q]
    pending, wanted = np.arange(len(queries)), min(k + _MARGIN, len(block))
    while len(pending):
        unfinished, at_once = [], max(1, _HITS_AT_ONCE // wanted)
        for first in range(0, len(pending), at_once):
            group = pending[first : first + at_once]
            scores, columns = searcher.search(queries[group], wanted)  # [q, wanted], descending
            line = np.maximum(worst[group], scores[:, k - 1] if wanted >= k else -np.inf) - slack[group]  # [q]
            keep = scores >= line[:, None]
            deeper = keep[:, -1] & (wanted < len(block))
            keep[deeper] = False
            rows, hits = np.nonzero(keep)
            yield group, rows, columns[rows, hits]
            unfinished.append(group[deeper])
        pending, wanted = np.concatenate(unfinished), min(2 * wanted, len(block))
