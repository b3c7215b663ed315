"""Scores of the positives and the shortlisted candidates, by teachers or by the model, in parts that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eval.engines.bm25 import Bm25
from eval.engines.embeddings import load_queries, pair_scores
from retriever.config import ConfigError
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards
from scripts.mining.pool import Pool
from scripts.mining.teacher import CrossEncoder
from scripts.stages import write_parts

_QUERIES_A_PART = 512

Judge = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # query rows [n] ascending, passage numbers [n] -> scores [n] float32


def fused_judge(judges: Sequence[Judge]) -> Judge:
    """The mean score of several judges, each standardised (mean 0, variance 1) over the pairs of a query that are
    judged together.

    A single judge keeps its own scores. A judge that scores all pairs of a query alike adds 0.
    """
    if len(judges) == 1:
        return judges[0]
    return lambda rows, numbers: np.mean(
        [_standardised(judge(rows, numbers), rows) for judge in judges], axis=0
    ).astype(np.float32)


def bm25_judge(pool: Pool, index: Bm25) -> Judge:
    """BM25's score of a pair; 0 if query and passage share no word."""
    return lambda rows, numbers: np.concatenate(
        [index.scores_of(pool.queries[r].text, numbers[rows == r]) for r in np.unique(rows)]
    )


def teacher_judge(pool: Pool, teacher: CrossEncoder, tokens_per_batch: int) -> Judge:
    """The cross-encoder's score of a pair."""
    return lambda rows, numbers: teacher.score(
        [pool.queries[r].text for r in rows], [pool.text(n) for n in numbers], tokens_per_batch
    )


def model_judge(queries: EmbeddingShards, passages: EmbeddingShards) -> Judge:
    """The inner product of a pair's embeddings, summed in float64. Passages are read from their shards."""
    embedded, _ = load_queries(queries)  # [Q, D]
    parts = [embeddings for embeddings, _ in passages]
    return lambda rows, numbers: pair_scores(parts, embedded, rows, numbers)


def _standardised(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """scores [n], standardised over the pairs of the same row, in float64."""
    _, group = np.unique(rows, return_inverse=True)  # [n]
    sizes = np.bincount(group)
    centred = scores - (np.bincount(group, scores) / sizes)[group]
    deviations = np.sqrt(np.bincount(group, centred * centred) / sizes)[group]
    return np.divide(centred, deviations, out=np.zeros_like(centred), where=deviations > 0)


def write_scores(
    pool: Pool, shortlists: Sequence[Sequence[int]], judge: Judge, folder: Path, world: World
) -> list[str]:
    """Scores each query's positives and then its shortlist, in the parts of `write_parts`. Raises ConfigError for a
    score that is not finite.
    """

    def score(part: slice) -> np.ndarray:
        here = range(len(pool.queries))[part]
        pairs = [(row, number) for row in here for number in (*pool.queries[row].positives, *shortlists[row])]
        rows, numbers = np.array(pairs, dtype=np.int64).T
        scores = judge(rows, numbers)
        if len(lost := np.flatnonzero(~np.isfinite(scores))):
            query, passage = pool.queries[rows[lost[0]]], pool.passages[numbers[lost[0]]]
            raise ConfigError(
                f"--precision: the score of query {query.id!r} with passage {passage.id!r} is not finite; "
                "expected a number: fp32 or bf16 reaches further than fp16"
            )
        return scores

    return write_parts(folder, len(pool.queries), _QUERIES_A_PART, score, world, "score")
