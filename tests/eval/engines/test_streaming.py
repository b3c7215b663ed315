"""The exact search in torch against brute force in float64 and against the search in FAISS; on one and on two ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.engines import streaming
from eval.engines.nearest import Engine, SearchOptions, search
from eval.engines.streaming import Sizes, sizes
from retriever.config import ConfigError
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.eval.test_search import Parts, brute_force, same_rankings


def unit_vectors(n: int, dimension: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((n, dimension)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_equals_the_search_in_faiss_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    """Thousands of equal passages near the k-th place included; equal scores to the bit, and the same from every
    blocking.
    """
    passages: np.ndarray = unit_vectors(12_000, 25, 0).astype(dtype)
    rng = np.random.default_rng(1)
    for twin in range(3):
        passages[rng.choice(12_000, 300, replace=False)] = passages[twin]
    queries = np.concatenate([passages[:3].astype(np.float32) + 0.05, unit_vectors(20, 25, 2)])
    ids, query_ids = [f"p{i}" for i in rng.permutation(12_000)], [f"q{i}" for i in range(23)]
    parts = Parts(passages, ids, [1, 5_000, 5_001])
    wanted = search(queries, query_ids, parts, 100, SearchOptions(engine="faiss"))
    runs = []
    for chosen in (Sizes(12_000, 23, 4_000), Sizes(1_000, 5, 333), Sizes(1_777, 23, 64)):
        monkeypatch.setattr(streaming, "sizes", lambda *_, chosen=chosen: chosen)
        runs.append(search(queries, query_ids, parts, 100, SearchOptions(engine="torch")))
    assert all(same_rankings(run, runs[0]) for run in runs)
    assert all(runs[0][q].passage_ids == wanted[q].passage_ids for q in query_ids)
    assert all(np.array_equal(runs[0][q].scores, wanted[q].scores) for q in query_ids)


def test_the_bound_holds_for_truncated_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as coarse as TF32 by cutting bits off lose no passage, though they alone would order many pairs
    wrongly.
    """

    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    exact_add = streaming._Search._add_to

    def coarse(
        self: streaming._Search, part: slice, block: torch.Tensor, precedence: torch.Tensor, longest: torch.Tensor
    ) -> None:
        approximate = cut(self._queries[part]) @ cut(block).T
        coarse.wrong += int((approximate.argmax(1) != (self._queries64[part] @ block.double().T).argmax(1)).sum())  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", lambda a, b: approximate)
            exact_add(self, part, block, precedence, longest)

    coarse.wrong = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(streaming._Search, "_add_to", coarse)
    monkeypatch.setattr(streaming, "sizes", lambda *_: Sizes(1_000, 40, 999))
    passages = unit_vectors(1, 64, 3) + 0.002 * unit_vectors(8_000, 64, 4)  # scores that differ by less than TF32 sees
    queries, ids = unit_vectors(40, 64, 5) + passages[0], [str(i) for i in range(8_000)]
    run = search(queries, [f"q{i}" for i in range(40)], Parts(passages, ids, []), 20, SearchOptions(engine="torch"))
    assert [found.passage_ids for found in run.values()] == brute_force(queries, passages, ids, 20)
    assert coarse.wrong > 50  # type: ignore[attr-defined]


def test_values_that_are_not_finite_are_refused() -> None:
    passages = np.array([[0.0], [np.nan], [-1.0], [2.0]], dtype=np.float32)
    with pytest.raises(ValueError, match="passage embedding 1 has a value that is not finite"):
        search(np.ones((1, 1)), ["q"], Parts(passages, ["a", "b", "c", "d"], []), 4, SearchOptions(engine="torch"))


def test_sizes_fit_the_memory() -> None:
    for memory in (2.0, 8.0, 40.0):
        size = sizes(6_980, 8_841_823, 768, 1000, memory)
        pairs = size.queries * size.block_rows
        assert 64 * pairs + 10 * 768 * size.block_rows + 24 * 768 * size.pairs <= memory * 2**30
        assert min(size.block_rows, size.queries) > 100
    assert sizes(3, 10, 8, 5, 1.0) == Sizes(10, 3, 131_072)
    with pytest.raises(
        ConfigError, match="--memory-gib 0.01: too little for 6,980 queries of dimension 768 and k 1,000"
    ):
        sizes(6_980, 8_841_823, 768, 1000, 0.01)


def _small_search(world: World | None, _: Path) -> list[tuple[list[str], list[float]]]:
    streaming.sizes = lambda *_: Sizes(300, 9, 100)
    passages = unit_vectors(2_000, 12, 6)
    passages[500:1_500] = passages[0]
    parts = Parts(passages, [f"p{i}" for i in np.random.default_rng(7).permutation(2_000)], [700])
    queries, query_ids = np.vstack([passages[:1], unit_vectors(16, 12, 8)]), [str(i) for i in range(17)]
    run = search(queries, query_ids, parts, 40, SearchOptions(engine="torch"), world)
    return [(found.passage_ids, found.scores.tolist()) for found in run.values()]


@pytest.mark.parametrize(
    ("device", "engine", "index", "by"),
    [
        ("cpu", "auto", "flat", "search_flat"),
        ("cuda", "auto", "flat", "search_streaming"),
        ("cuda", "faiss", "flat", "search_flat"),
        ("cpu", "torch", "flat", "search_streaming"),
        ("cuda", "auto", "hnsw", "open_index"),
    ],
)
def test_what_searches(device: str, engine: Engine, index: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch on a GPU and FAISS on a CPU, unless told otherwise; an index is FAISS's wherever it is searched."""

    def stop(name: str, *_: object, **__: object) -> None:
        raise InterruptedError(name)

    for place, name in (
        ("eval.engines.streaming", "search_streaming"),
        ("eval.engines.nearest", "search_flat"),
        ("eval.engines.nearest", "open_index"),
    ):
        monkeypatch.setattr(f"{place}.{name}", partial(stop, name))
    parts = Parts(unit_vectors(9, 4, 0), list("abcdefghi"), [])
    with pytest.raises(InterruptedError, match=by):
        search(unit_vectors(2, 4, 1), ["p", "q"], parts, 3, SearchOptions(index, engine), World(torch.device(device)))


def test_two_ranks_give_the_run_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "sizes", streaming.sizes)  # restored after the test
    alone = [[ids, scores] for ids, scores in _small_search(None, tmp_path)]
    assert run_on_ranks(_small_search, 2, tmp_path) == [alone, []]
