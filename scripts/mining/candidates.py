"""The candidates for a query's negatives: what the retrievers rank inside the window, in the order in which they are
judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.engines.bm25 import Bm25, cores, in_threads
from eval.engines.embeddings import load_queries
from eval.engines.nearest import SearchOptions, search
from eval.trec import Ranking
from retriever.data.tokens import Side
from retriever.encode_shards import SHARD_ROWS, ShardOptions, encode_to_shards
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards
from scripts.code_pairs.split import drawn, normal
from scripts.mining.pool import Pool
from scripts.mining.settings import MiningSettings
from scripts.stages import write_parts

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle

NONE = -1  # fills a row of candidates whose search found fewer
_QUERIES_AT_ONCE = 65_536  # searched together by the model and written as one file
_BM25_QUERIES = 4_096


def encode(pool: Pool, bundle: EncoderBundle, folder: Path, world: World, tokens_per_chunk: int | None) -> list[str]:
    """Embeds the pool into `folder`/query and `folder`/passage; an id is the number of the query or passage. Finished
    shards are kept.

    Returns the names of the two manifests.
    """
    sides: dict[Side, tuple[Iterator[str], int]] = {
        "query": ((query.text for query in pool.queries), len(pool.queries)),
        "passage": (pool.texts(), len(pool.passages)),
    }
    for side, (texts, count) in sides.items():
        options = ShardOptions(
            shard_rows=min(SHARD_ROWS, max(256, -(-count // 16))),
            tokens_per_chunk=tokens_per_chunk,
            cache=True,  # run_stage knows whose folder it is, but not in which mode an interrupted encoding began
        )
        numbered = ((str(number), text) for number, text in enumerate(texts))
        named = f"{side} of pool {pool.fingerprint}"
        encode_to_shards(bundle, numbered, side, folder / side, named, options, world)
    return ["query/manifest.json", "passage/manifest.json"]


def search_model(
    queries: EmbeddingShards, passages: EmbeddingShards, depth: int, index: str, folder: Path, world: World
) -> list[str]:
    """Writes the numbers of the `depth` passages nearest to each query, in the parts of `write_parts`."""
    embeddings, ids = load_queries(queries)

    def numbers(part: slice) -> np.ndarray:
        alone = World(world.device)  # this rank
        run = search(embeddings[part], ids[part], passages, depth, SearchOptions(index), alone)
        return np.stack([_row(run[query_id], depth) for query_id in ids[part]])

    return write_parts(folder, len(ids), _QUERIES_AT_ONCE, numbers, world, "search by model")


def search_bm25(
    pool: Pool, index: Bm25, depth: int, folder: Path, world: World, threads: int | None = None
) -> list[str]:
    """As `search_model`, by BM25, with one query per thread. By default the ranks divide the cores of the machine."""

    def numbers(part: slice) -> np.ndarray:
        texts = [query.text for query in pool.queries[part]]
        found = in_threads(
            lambda text: _row(index.rank(text, depth, str), depth), texts, threads or max(1, cores() // world.size)
        )
        return np.stack(list(found))

    return write_parts(folder, len(pool.queries), _BM25_QUERIES, numbers, world, "search by bm25")


def shortlist(pool: Pool, searched: Sequence[np.ndarray], settings: MiningSettings) -> list[list[int]]:
    """The candidates of each query that are judged, at most `settings.candidates`, the preferred ones first.

    Candidates are inside the rank window of any of `searched` [Q, depth]. Blank passages are left out, and so are the
    known positives of the query and of others with the same text. `top` prefers the smaller rank and, for equal ranks,
    the retriever named first. `random` draws an order from the seed, the query and the passage's text.
    """
    window = slice(settings.first_rank - 1, settings.last_rank)
    same_text = defaultdict[str, list[int]](list)
    for query in pool.queries:
        same_text[normal(query.text)] += query.positives
    chosen = []
    for row, query in enumerate(pool.queries):
        known = {*same_text[normal(query.text)], query.own}
        by_rank = np.stack([numbers[row, window] for numbers in searched], axis=1).ravel().tolist()
        found = [n for n in dict.fromkeys(by_rank) if n != NONE and n not in known and pool.text(n).strip()]
        if settings.pick == "random":
            order = {n: drawn(settings.seed, f"{query.id}\n{pool.text(n)}") for n in found}
            found.sort(key=order.__getitem__)
        chosen.append(found[: settings.candidates])
    return chosen


def _row(found: Ranking, depth: int) -> np.ndarray:
    """The numbers [depth] int64 of one query's passages."""
    numbers = np.full(depth, NONE, dtype=np.int64)
    numbers[: len(found.passage_ids)] = [int(passage_id) for passage_id in found.passage_ids]
    return numbers
