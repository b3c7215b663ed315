"""Passages that an index finds, scored again from shards on disk: exact scores, and no corpus in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from eval.engines import faiss_index
from eval.engines.nearest import SearchOptions, search
from retriever.errors import RefusedError
from retriever.shards import EmbeddingShards
from tests.eval.engines.test_faiss_index import shards_of

ROWS, DIMENSION, QUERIES = 16_000, 64, 20
QUERY_IDS = [f"q{i}" for i in range(QUERIES)]
INDEX = "IVF16,PQ8x6 nprobe=16"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, EmbeddingShards]:
    """Queries, and four shards of clustered unit vectors: 4 MB."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((160, DIMENSION))
    found = centres[rng.integers(0, 160, ROWS + QUERIES)] + rng.standard_normal((ROWS + QUERIES, DIMENSION))
    found = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return found[ROWS:], shards_of(tmp_path_factory.mktemp("shards"), found[:ROWS])


@pytest.fixture(autouse=True)
def _learns_from_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "_TRAIN_LEAST", 2048)
    monkeypatch.setattr(faiss_index, "_TRAIN_PER_LIST", 32)


def test_scores_are_exact_and_the_best_of_all_candidates_are_kept(case: tuple[np.ndarray, EmbeddingShards]) -> None:
    queries, shards = case
    passages = np.concatenate([np.asarray(part) for part, _ in shards])
    scores = (queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32)
    exact = search(queries, QUERY_IDS, shards, 10)
    recalls = []
    for rescore in (0, 200, ROWS):
        run = search(queries, QUERY_IDS, shards, 10, SearchOptions(index=INDEX, rescore=rescore))
        for row, query in enumerate(QUERY_IDS):
            positions = [int(i.removeprefix("p")) for i in run[query].passage_ids]
            right = np.allclose(run[query].scores, scores[row, positions], rtol=0, atol=1e-7)
            assert right == (rescore > 0)
        common = [len({*run[q].passage_ids} & {*exact[q].passage_ids}) for q in QUERY_IDS]
        recalls.append(sum(common) / (10 * QUERIES))
    assert recalls[0] < 0.8 < recalls[1] and recalls[2] == 1.0
    assert all(run[q].passage_ids == exact[q].passage_ids for q in QUERY_IDS)


def test_neither_building_nor_searching_holds_the_corpus(
    case: tuple[np.ndarray, EmbeddingShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python allocates; FAISS's own lists hold 8 bytes a passage here."""
    queries, shards = case
    monkeypatch.setattr(faiss_index, "_BLOCK_ROWS", 1024)
    options = SearchOptions(index="IVF16,PQ8x6 nprobe=4", rescore=300)
    search(queries[:1], QUERY_IDS[:1], shards, 10)  # what is imported and kept once
    tracemalloc.start()
    try:
        _, before = tracemalloc.get_traced_memory()
        search(queries, QUERY_IDS, shards, 100, options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < ROWS * DIMENSION * 4 / 2, f"{(peak - before) / 2**20:.1f} MiB"


def test_an_exact_search_has_nothing_to_score_again() -> None:
    with pytest.raises(RefusedError, match="--rescore 5: expected an approximate --index, received flat"):
        SearchOptions(rescore=5)
