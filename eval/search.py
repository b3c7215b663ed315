"""Exact nearest passages by inner product: embedding shards -> a run.

python -m eval.search --queries shards/queries --passages shards/passages --k 1000 --output run.trec
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from eval.index import build_index
from eval.topk import PassageOrder, TopK
from eval.trec import Ranking, write_msmarco, write_trec
from retriever.config import ConfigError
from retriever.shards import ShardError, open_shards

_MARGIN = 32  # passages asked for beyond k, so that equal scores at the k-th place rarely need a second search
_QUERIES_AT_ONCE = 8192  # bounds what one search returns: 12 bytes x (k + margin) a query
_PAIRS_AT_ONCE = 1024  # query-passage pairs one thread scores together


class Embeddings(Protocol):
    """A collection of embeddings in parts, as `retriever.shards.open_shards` gives it; it can be iterated more than once."""

    rows: int
    dimension: int

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[str]]]: ...  # (embeddings [n, D], their ids)


def search(
    queries: np.ndarray,
    query_ids: Sequence[str],
    passages: Embeddings,
    k: int,
    *,
    index: str = "flat",
    exclude_self: bool = False,
    block_mib: int = 256,
    progress: bool = False,
) -> dict[str, Ranking]:
    """The k passages of largest inner product for each query, ties by passage id descending, as trec_eval orders them.

    queries [Q, D] and the passages are read as float32. A score is the inner product summed in float64 and rounded to float32:
    equal vectors score equally, and no result depends on block size, sharding or the number of threads. FAISS finds the
    candidates; its float32 rounding is bounded and allowed for. Memory: two blocks of `block_mib` MiB beside 8 bytes x Q x k.
    `exclude_self` drops a passage whose id is the query's (BEIR's rule, for ArguAna and Quora).
    Raises ValueError where dimensions differ, a value is not finite, or an id is repeated; ConfigError for an unknown index.
    """
    _check_queries(queries, query_ids, passages.dimension, k)
    queries = np.ascontiguousarray(queries, dtype=np.float32)  # [Q, D]
    ids = pa.array((i for _, shard_ids in passages for i in shard_ids), type=pa.large_string())  # [N]
    order = PassageOrder(ids)
    best = TopK(len(queries), k + exclude_self)
    searcher = build_index(index, passages.dimension)
    block_rows = max(1, block_mib * 2**20 // (4 * passages.dimension))
    with tqdm(total=passages.rows, desc="search", unit="passage", unit_scale=True, disable=not progress) as bar:
        for start, block in _blocks(passages, block_rows):  # [n, D] float32
            searcher.reset()
            searcher.add(block)
            for first in range(0, len(queries), _QUERIES_AT_ONCE):
                part = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
                rows, columns = _candidates(searcher, queries[part], block, best.worst_scores(part), k + exclude_self)
                scores = _inner_products(queries[part], block, rows, columns)
                best.merge(part, rows, scores, order.precedence[start + columns])
            bar.update(len(block))
    return dict(zip(query_ids, _rankings(best, order, query_ids if exclude_self else [None] * len(query_ids), k), strict=True))


def _blocks(passages: Embeddings, block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position of the first row in the collection, float32 [n, D]); a block never spans two shards."""
    start = 0
    for embeddings, _ in passages:
        for first in range(0, len(embeddings), block_rows):
            block = np.ascontiguousarray(embeddings[first : first + block_rows], dtype=np.float32)
            if not np.isfinite(block).all():
                row = int((~np.isfinite(block).all(axis=1)).argmax())
                raise ValueError(f"passage embedding {start + row} has a value that is not finite: encode the collection again")
            yield start, block
            start += len(block)


def _candidates(searcher: faiss.Index, queries: np.ndarray, block: np.ndarray, worst: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (query row [P], ascending; block column [P]) that hold every passage of a query's k best in this block.

    A float32 inner product of D terms is off by at most D·2^-24·|q|·|p|; twice that below the k-th score FAISS saw, or below the
    k-th best so far, nothing can be among the k best. Queries whose last hit is still above that line are searched again, deeper.
    """
    longest = float(np.sqrt(np.einsum("nd,nd->n", block, block).max(initial=0.0)))
    slack = (block.shape[1] + 1) * 2.0**-23 * longest * np.linalg.norm(queries, axis=1)  # [Q]
    pending, wanted = np.arange(len(queries)), min(k + _MARGIN, len(block))
    found_rows, found_columns = [], []
    while len(pending):
        scores, columns = searcher.search(queries[pending], wanted)  # [q, wanted], descending
        line = np.maximum(worst[pending], scores[:, k - 1] if wanted >= k else -np.inf) - slack[pending]  # [q]
        keep = scores >= line[:, None]
        deeper = keep[:, -1] & (wanted < len(block))
        keep[deeper] = False
        places, hits = np.nonzero(keep)
        found_rows.append(pending[places])
        found_columns.append(columns[places, hits])
        pending, wanted = pending[deeper], min(2 * wanted, len(block))
    rows, columns = np.concatenate(found_rows), np.concatenate(found_columns)
    by_row = np.argsort(rows, kind="stable")
    return rows[by_row], columns[by_row]


def _inner_products(queries: np.ndarray, block: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """⟨queries[rows], block[columns]⟩ [P], summed in float64, as float32."""
    scores = np.empty(len(rows), dtype=np.float32)

    def score(first: int) -> None:
        part = slice(first, first + _PAIRS_AT_ONCE)
        # einsum casts a buffer at a time: six times faster than float64 copies of the rows
        scores[part] = np.einsum("pd,pd->p", queries[rows[part]], block[columns[part]], dtype=np.float64)

    with ThreadPoolExecutor(faiss.omp_get_max_threads()) as pool:
        list(pool.map(score, range(0, len(rows), _PAIRS_AT_ONCE)))  # list: raises what a thread raised
    return scores


def _rankings(best: TopK, order: PassageOrder, excluded: Sequence[str | None], k: int) -> Iterator[Ranking]:
    rows = [best.row(row) for row in range(len(excluded))]
    ids = order.ids(np.concatenate([precedence for precedence, _ in rows]))  # one string object a passage, shared by the rankings
    first = 0
    for (precedence, scores), dropped in zip(rows, excluded, strict=True):
        row_ids = ids[first : first + len(precedence)]
        keep = np.flatnonzero(row_ids != dropped)[:k]
        first += len(precedence)
        yield Ranking(row_ids[keep].tolist(), scores[keep])


def check_k(k: int) -> None:
    """Raises ValueError where `k` is below 1."""
    if k < 1:
        raise ValueError(f"k {k}: expected at least 1 passage a query")


def _check_queries(queries: np.ndarray, query_ids: Sequence[str], dimension: int, k: int) -> None:
    check_k(k)
    if len(query_ids) == 0:
        raise ValueError("no queries: expected at least one")
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ValueError(f"queries of shape {list(queries.shape)}: expected [Q, {dimension}], the passages' dimension")
    if len(queries) != len(query_ids) or len(set(query_ids)) != len(query_ids):
        raise ValueError(f"{len(queries)} queries and {len(set(query_ids))} distinct ids: expected one id a query, each once")
    if not np.isfinite(queries).all():
        raise ValueError("a query embedding has a value that is not finite: encode the queries again")


def load_queries(shards: Embeddings) -> tuple[np.ndarray, list[str]]:
    """All embeddings [Q, D] float32 and ids of a folder of shards, in memory: queries are few."""
    parts = [(np.asarray(embeddings, dtype=np.float32), ids) for embeddings, ids in shards]
    embeddings = np.concatenate([part for part, _ in parts]) if parts else np.empty((0, shards.dimension), dtype=np.float32)
    return embeddings, [i for _, ids in parts for i in ids]


def main(arguments: Iterable[str] | None = None) -> None:
    """The command `python -m eval.search`."""
    parser = argparse.ArgumentParser(prog="python -m eval.search", description="exact search: embedding shards -> a run file")
    parser.add_argument("--queries", required=True, type=Path, help="folder of query shards, as retriever/encode.py writes them")
    parser.add_argument("--passages", required=True, type=Path, help="folder of passage shards")
    parser.add_argument("--output", required=True, type=Path, help="the run file; .gz compresses it")
    parser.add_argument("--k", type=int, default=1000, help="passages a query (default %(default)s)")
    parser.add_argument("--index", default="flat", help="flat: exact, FAISS IndexFlatIP (default %(default)s)")
    parser.add_argument("--format", choices=("trec", "msmarco"), default="trec", help="of the run file (default %(default)s)")
    parser.add_argument("--exclude-self", action="store_true", help="drop a passage whose id is the query's (ArguAna, Quora)")
    parser.add_argument("--block-mib", type=int, default=256, help="passages held at once (default %(default)s MiB)")
    parser.add_argument("--threads", type=int, help="FAISS threads (default: OMP_NUM_THREADS, else all cores)")
    given = parser.parse_args(list(arguments) if arguments is not None else None)

    if given.threads:
        faiss.omp_set_num_threads(given.threads)
    try:
        run = _search_folders(given)
    except (ShardError, ConfigError, ValueError) as error:
        raise SystemExit(str(error)) from error
    write = write_trec if given.format == "trec" else write_msmarco
    write(given.output, run)
    print(f"{given.output}: {len(run)} queries, {sum(len(r.passage_ids) for r in run.values())} lines")


def _search_folders(given: argparse.Namespace) -> dict[str, Ranking]:
    query_shards, passage_shards = open_shards(given.queries), open_shards(given.passages)
    models = query_shards.manifest["model"], passage_shards.manifest["model"]
    if models[0] != models[1]:
        raise ShardError(f"{given.queries} and {given.passages} hold embeddings of different models: {models[0]}, {models[1]}")
    queries, query_ids = load_queries(query_shards)
    return search(
        queries, query_ids, passage_shards, given.k,
        index=given.index, exclude_self=given.exclude_self, block_mib=given.block_mib, progress=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
