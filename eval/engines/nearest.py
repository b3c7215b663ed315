"""Nearest passages by inner product, exactly or through a FAISS index (`eval.engines.faiss_index`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import faiss
import numpy as np
import torch

from eval.engines.embeddings import Embeddings, pair_scores, passage_ids
from eval.engines.faiss_gpu import GpuUse, to_gpus
from eval.engines.faiss_index import index_spec, open_index
from eval.engines.flat import search_flat
from eval.engines.topk import PassageOrder, TopK
from eval.trec import Ranking, Run
from retriever.errors import RefusedError
from retriever.parallel.world import World
from retriever.screen import Bar
from retriever.wording import counted

Engine = Literal["auto", "faiss", "torch"]
_QUERIES_AT_ONCE = 8192  # bounds what an index returns at once: 12 bytes x k a query


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search; the fields are the options of the commands.

    Of `index=flat`, `engine` says what searches: FAISS on the CPU (in blocks of `block_mib`), or torch on every rank's
    device within `memory_gib` of it; `auto` is torch where the ranks are on GPUs. Other indexes are those of
    `eval.engines.faiss_index`, on the GPUs that `faiss_gpu` asks for. The `rescore` passages that such an index finds
    best (0: none) are scored again, exactly, from the embeddings themselves, and the k best of them are kept.
    """

    index: str = "flat"
    engine: Engine = "auto"
    memory_gib: float = 8.0
    faiss_gpu: GpuUse = "off"
    rescore: int = 0
    block_mib: int = 256
    exclude_self: bool = False  # drops a passage whose id is the query's (BEIR's rule, for ArguAna and Quora)
    verify: bool = False  # compares a saved index with its checksum again
    progress: bool = False

    def __post_init__(self) -> None:
        if self.rescore and self.index == "flat":
            raise RefusedError(
                f"--rescore {self.rescore}: expected an approximate --index, received flat, which is exact"
            )

    def describe(self, passages: Embeddings, k: int) -> dict[str, Any]:
        """The index and all parameters that `search` uses for k passages."""
        if self.index == "flat":
            return {"index": "flat"}
        spec = index_spec(self.index, passages.rows, passages.dimension, self.depth(k))
        return {"index": self.index, **asdict(spec), **({"rescore": self.rescore} if self.rescore else {})}

    def wanted(self, k: int) -> int:
        """Passages to keep for each query so that k remain after the query's own is dropped."""
        return k + self.exclude_self

    def depth(self, k: int) -> int:
        """Passages that an index is searched for."""
        return max(self.wanted(k), self.rescore)

    def shortage(self, run: Run, passages: Embeddings, k: int) -> tuple[str, ...]:
        """A note if an approximate index found fewer than k passages for some queries."""
        wanted = min(k, passages.rows - self.exclude_self)
        short = sum(len(found.passage_ids) < wanted for found in run.values())
        if self.index == "flat" or not short:
            return ()
        queries = f"{short:,} of {counted(len(run), 'query')}"
        return (f"--index {self.index} found fewer than {wanted:,} passages for {queries}; raise nprobe or efSearch",)


_DEFAULTS = SearchOptions()


def search(
    queries: np.ndarray,
    query_ids: Sequence[str],
    passages: Embeddings,
    k: int,
    options: SearchOptions = _DEFAULTS,
    world: World | None = None,
    order: PassageOrder | None = None,
) -> dict[str, Ranking]:
    """The k passages of largest inner product for each query, ties by passage id descending, as trec_eval orders them.

    queries [Q, D] and the passages are read as float32. With `flat` a score is the inner product summed in float64 and
    rounded to float32: equal vectors score equally, and no result depends on block size, sharding, threads or ranks.
    Every rank calls it, with the same values; ranks other than the first return {}. The first rank alone searches an
    approximate index. `order` is that of the passages, where it is known already. Raises RefusedError where dimensions
    differ, a value is not finite, an id is repeated or the index is unknown.
    """
    _check_queries(queries, query_ids, passages.dimension, k)
    is_first = world is None or world.is_first
    on_gpu = world is not None and world.device.type == "cuda"
    on_torch = options.index == "flat" and (options.engine == "torch" or (options.engine == "auto" and on_gpu))
    if not on_torch and not is_first:
        return {}
    queries = np.ascontiguousarray(queries, dtype=np.float32)  # [Q, D]
    order = order or PassageOrder(passage_ids(passages))
    wanted, silent = options.wanted(k), not (options.progress and is_first)
    with Bar(total=passages.rows, desc="search", unit=" passages", unit_scale=True, disable=silent) as bar:
        if on_torch:
            from eval.engines.streaming import search_streaming

            best = search_streaming(
                queries, passages, order, wanted, world=world, memory_gib=options.memory_gib, bar=bar
            )
        elif options.index == "flat":
            best = search_flat(queries, passages, order, wanted, options.block_mib, bar)
        else:
            depth = options.depth(k)
            index = to_gpus(open_index(passages, options.index, depth, verify=options.verify), options.faiss_gpu, depth)
            best = TopK(len(queries), wanted)
            for part, rows, positions, scores in _found(index, queries, depth):
                if options.rescore:
                    stored = (embeddings for embeddings, _ in passages)
                    scores = pair_scores(stored, queries[part], rows, positions, faiss.omp_get_max_threads())
                best.merge(part, torch.from_numpy(rows), torch.from_numpy(scores), order.precedence[positions])
    if not is_first:
        return {}
    excluded = query_ids if options.exclude_self else [None] * len(query_ids)
    return dict(zip(query_ids, _rankings(best, order, excluded, k), strict=True))


def _found(
    searcher: faiss.Index, queries: np.ndarray, k: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Some queries, and what the index finds for them: rows among them [P], ascending, positions and scores."""
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
        scores, positions = searcher.search(queries[part], min(k, searcher.ntotal))  # each [q, k]
        there = positions >= 0  # -1 where it found fewer
        yield part, there.nonzero()[0], positions[there], scores[there]


def _rankings(best: TopK, order: PassageOrder, excluded: Sequence[str | None], k: int) -> Iterator[Ranking]:
    rows = [best.row(row) for row in range(len(excluded))]
    ids = order.ids(
        np.concatenate([precedence for precedence, _ in rows])
    )  # one string object a passage, shared by the rankings
    first = 0
    for (precedence, scores), dropped in zip(rows, excluded, strict=True):
        row_ids = ids[first : first + len(precedence)]
        keep = np.flatnonzero(row_ids != dropped)[:k]
        first += len(precedence)
        yield Ranking(row_ids[keep].tolist(), scores[keep])


def _check_queries(queries: np.ndarray, query_ids: Sequence[str], dimension: int, k: int) -> None:
    if k < 1:
        raise RefusedError(f"k {k}: expected at least 1 passage a query")
    if len(query_ids) == 0:
        raise RefusedError("no queries: expected at least one")
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise RefusedError(
            f"queries of shape {list(queries.shape)}: expected [Q, {dimension}], the passages' dimension"
        )
    if len(queries) != len(query_ids) or len(set(query_ids)) != len(query_ids):
        raise RefusedError(
            f"{len(queries)} queries and {len(set(query_ids))} distinct ids: expected one id a query, each once"
        )
    if not np.isfinite(queries).all():
        raise RefusedError("a query embedding has a value that is not finite: encode the queries again")
