"""Which passages may become a query's negatives: what the retrievers rank inside the window, in the order they are judged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from eval.engines.bm25 import Bm25, cores, in_threads
from eval.engines.embeddings import load_queries
from eval.engines.nearest import search
from eval.trec import Ranking
from retriever.encode_shards import SHARD_ROWS, encode_to_shards
from retriever.files import write_array
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards
from scripts.code_pairs.split import drawn
from scripts.mining.pool import Pool
from scripts.mining.settings import MiningSettings

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle

NONE = -1  # fills a row of candidates whose search found fewer
_QUERIES_AT_ONCE = 65_536  # searched together by the model and written as one file
_BM25_QUERIES = 4_096


def encode(pool: Pool, bundle: EncoderBundle, folder: Path, world: World, tokens_per_chunk: int | None) -> None:
    """Embeds the pool into `folder`/query and `folder`/passage, ids being rows and numbers; shards that are there already are kept."""
    texts = {"query": (pool.numbered_queries(), len(pool.queries)), "passage": (pool.numbered_texts(), len(pool.passages))}
    for side in ("query", "passage"):
        stream, count = texts[side]
        encode_to_shards(
            bundle,
            stream,
            side,
            folder / side,
            texts_fingerprint=f"{side} of pool {pool.fingerprint}",
            world=world,
            shard_rows=min(SHARD_ROWS, max(256, -(-count // 16))),
            tokens_per_chunk=tokens_per_chunk,
            overwrite=True,  # run_stage knows whose folder it is, but not in which mode an interrupted encoding began
        )


def search_model(queries: EmbeddingShards, passages: EmbeddingShards, depth: int, index: str, folder: Path, world: World) -> list[str]:
    """Writes the numbers of the `depth` passages nearest to each query, a part of the queries a file; rank r writes parts r, r + size, …

    Parts that are in `folder` already are kept. Returns the names of all.
    """
    embeddings, ids = load_queries(queries)
    files = [f"{part:05d}.npy" for part in range(-(-len(ids) // _QUERIES_AT_ONCE))]
    for number, file in enumerate(files):
        if number % world.size == world.rank and not (folder / file).exists():
            part = slice(number * _QUERIES_AT_ONCE, (number + 1) * _QUERIES_AT_ONCE)
            run = search(embeddings[part], ids[part], passages, depth, index=index, world=World(world.device))  # this rank alone
            write_array(folder / file, _numbers(run, ids[part], depth))
    return files


def search_bm25(pool: Pool, index: Bm25, depth: int, folder: Path, world: World, threads: int | None = None) -> list[str]:
    """As `search_model`, by BM25, each query in one of `threads`; the ranks divide the cores of their machine among them by default."""
    files = [f"{part:05d}.npy" for part in range(-(-len(pool.queries) // _BM25_QUERIES))]
    mine = [part for part in range(len(files)) if part % world.size == world.rank]
    threads = threads or max(1, cores() // world.size)
    for part in tqdm(mine, desc="search by bm25", unit=" parts", disable=not world.is_first):
        if not (folder / files[part]).exists():
            texts = [query.text for query in pool.queries[part * _BM25_QUERIES : (part + 1) * _BM25_QUERIES]]
            found = in_threads(lambda text: _row(index.rank(text, depth, str), depth), texts, threads)
            write_array(folder / files[part], np.stack(list(found)))
    return files


def read_candidates(folder: Path, files: Sequence[str]) -> np.ndarray:
    """The numbers [Q, depth] int64 that a search wrote, best first, NONE where it found fewer."""
    return np.concatenate([np.load(folder / file, allow_pickle=False) for file in sorted(files)])


def shortlist(pool: Pool, searched: Sequence[np.ndarray], settings: MiningSettings) -> list[list[int]]:
    """The candidates of each query that are judged: at most `settings.candidates`, in the order they are preferred in.

    Candidates are those inside the rank window of any of `searched` [Q, depth], without what the query knows as positive and
    without blank passages. `top` prefers the smaller rank, a retriever named earlier before one named later; `random` an order
    drawn by the seed, the query and the passage's text.
    """
    window = slice(settings.first_rank - 1, settings.last_rank)
    chosen = []
    for row, query in enumerate(pool.queries):
        known = {*query.positives, query.own}
        by_rank = np.stack([numbers[row, window] for numbers in searched], axis=1).ravel().tolist()
        found = [n for n in dict.fromkeys(by_rank) if n != NONE and n not in known and pool.text(n).strip()]
        if settings.pick == "random":
            found.sort(key=lambda n, query_id=query.id: drawn(settings.seed, f"{query_id}\n{pool.text(n)}"))  # type: ignore[misc]
        chosen.append(found[: settings.candidates])
    return chosen


def _numbers(run: Mapping[str, Ranking], query_ids: Sequence[str], depth: int) -> np.ndarray:
    return np.stack([_row(run[query_id], depth) for query_id in query_ids])  # [Q, depth]


def _row(found: Ranking, depth: int) -> np.ndarray:
    """The numbers [depth] int64 of one query's passages."""
    numbers = np.full(depth, NONE, dtype=np.int64)
    numbers[: len(found.passage_ids)] = [int(passage_id) for passage_id in found.passage_ids]
    return numbers
