"""Which passages may become a query's negatives: what the retrievers rank inside the window, in the order they are judged in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.bm25 import bm25_run
from eval.evaluate import Ranks
from eval.search import load_queries, search
from eval.trec import Ranking
from retriever.encode import SHARD_ROWS, encode_to_shards
from retriever.shards import EmbeddingShards
from scripts.code_pairs.split import drawn
from scripts.mining.pool import Pool
from scripts.mining.settings import MiningSettings

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle

NONE = -1  # fills a row of candidates whose search found fewer
_QUERIES_AT_ONCE = 65_536  # searched together and written as one file


def encode(pool: Pool, bundle: EncoderBundle, folder: Path, ranks: Ranks, tokens_per_chunk: int | None) -> None:
    """Embeds the pool into `folder`/query and `folder`/passage, ids being rows and numbers; shards that are there already are kept."""
    texts = {"query": (pool.numbered_queries(), len(pool.queries)), "passage": (pool.numbered_texts(), len(pool.texts))}
    for side in ("query", "passage"):
        stream, count = texts[side]
        encode_to_shards(
            bundle,
            stream,
            side,
            folder / side,
            texts_fingerprint=f"{side} of pool {pool.fingerprint}",
            rank=ranks.rank,
            world_size=ranks.size,
            barrier=ranks.barrier,
            shard_rows=min(SHARD_ROWS, max(256, -(-count // 16))),
            tokens_per_chunk=tokens_per_chunk,
        )


def search_model(queries: EmbeddingShards, passages: EmbeddingShards, depth: int, index: str, folder: Path, ranks: Ranks) -> list[str]:
    """Writes the numbers of the `depth` passages nearest to each query, a part of the queries a file; rank r writes parts r, r + size, …

    Parts that are in `folder` already are kept. Returns the names of all.
    """
    embeddings, ids = load_queries(queries)
    files = [f"{part:05d}.npy" for part in range(-(-len(ids) // _QUERIES_AT_ONCE))]
    for number, file in enumerate(files):
        if number % ranks.size == ranks.rank and not (folder / file).exists():
            part = slice(number * _QUERIES_AT_ONCE, (number + 1) * _QUERIES_AT_ONCE)
            write_array(folder / file, _numbers(search(embeddings[part], ids[part], passages, depth, index=index), ids[part], depth))
    return files


def search_bm25(pool: Pool, depth: int, folder: Path) -> list[str]:
    """As `search_model`, by BM25, in one part."""
    queries = dict(pool.numbered_queries())
    write_array(folder / "00000.npy", _numbers(bm25_run(pool.numbered_texts(), queries, depth), list(queries), depth))
    return ["00000.npy"]


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
        known = pool.known(query)
        by_rank = np.stack([numbers[row, window] for numbers in searched], axis=1).ravel().tolist()
        found = [n for n in dict.fromkeys(by_rank) if n != NONE and n not in known and pool.texts[n].strip()]
        if settings.pick == "random":
            found.sort(key=lambda n, query_id=query.id: drawn(settings.seed, f"{query_id}\n{pool.texts[n]}"))  # type: ignore[misc]
        chosen.append(found[: settings.candidates])
    return chosen


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes an npy file beside `path` and renames it into place."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)
    os.replace(aside, path)


def _numbers(run: Mapping[str, Ranking], query_ids: Sequence[str], depth: int) -> np.ndarray:
    numbers = np.full((len(query_ids), depth), NONE, dtype=np.int64)
    for row, query_id in enumerate(query_ids):
        found = run[query_id].passage_ids
        numbers[row, : len(found)] = [int(passage_id) for passage_id in found]
    return numbers
