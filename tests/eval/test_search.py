"""Exact search against brute force in float64: ties, blocks, shards, threads, and the command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.engines import flat
from eval.engines.nearest import Engine, SearchOptions, search
from eval.engines.streaming import Sizes
from eval.search import main
from eval.trec import Ranking, read_msmarco, read_trec
from retriever.shards import ShardJob, ShardWriter
from tests.commands import assert_refused

MIB_OF_ONE_BLOCK = 1
ENGINES: tuple[Engine, ...] = ("faiss", "torch")


class Parts:
    """Embeddings in memory, cut into shards."""

    def __init__(self, embeddings: np.ndarray, ids: list[str], cuts: list[int]) -> None:
        self.rows, self.dimension = embeddings.shape
        ends = [0, *sorted(cuts), len(ids)]
        self._parts = [(embeddings[a:b], ids[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        return iter(self._parts)


def brute_force(queries: np.ndarray, passages: np.ndarray, ids: list[str], k: int) -> list[list[str]]:
    """Every pair's float64 score as float32; sorted by score, then id, both descending."""
    scores = (queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32)
    return [
        [ids[j] for j in sorted(range(len(ids)), key=lambda j: (row[j], ids[j]), reverse=True)[:k]] for row in scores
    ]


def same_rankings(a: dict[str, Ranking], b: dict[str, Ranking]) -> bool:
    return a.keys() == b.keys() and all(
        a[q].passage_ids == b[q].passage_ids and a[q].scores.tobytes() == b[q].scores.tobytes() for q in a
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_engines_equal_brute_force_with_ties_across_blocks_and_shards(data: st.DataObject) -> None:
    n, n_queries, dimension = (
        data.draw(st.integers(1, 400)),
        data.draw(st.integers(1, 30)),
        data.draw(st.integers(1, 9)),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    distinct = data.draw(st.integers(1, n))  # few distinct passages: many equal scores, at the k-th place too
    passages = rng.integers(-3, 4, (distinct, dimension)).astype(np.float32)[
        rng.integers(0, distinct, n)
    ]  # exact in float32
    queries = rng.integers(-3, 4, (n_queries, dimension)).astype(np.float32)
    ids, query_ids = [str(i) for i in rng.permutation(n)], [f"q{i}" for i in range(n_queries)]
    k = data.draw(st.integers(1, n + 5))
    parts = Parts(passages, ids, data.draw(st.lists(st.integers(0, n), max_size=3)))
    chosen = Sizes(data.draw(st.integers(1, n)), data.draw(st.integers(1, n_queries)), data.draw(st.integers(1, 50)))
    expected = brute_force(queries, passages, ids, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.engines.streaming.sizes", lambda *_: chosen)
        for engine in ENGINES:
            run = search(queries, query_ids, parts, k, SearchOptions(engine=engine))
            assert [found.passage_ids for found in run.values()] == expected, engine


def test_real_valued_duplicates_tie_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """More equal passages than the margin, in several blocks, near the k-th place; FAISS alone rounds them
    differently.
    """
    monkeypatch.setattr(flat, "_QUERIES_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    passages = rng.standard_normal((30_000, 24)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    for twin in range(3):
        passages[rng.choice(30_000, 300, replace=False)] = passages[twin]
    queries = np.concatenate([passages[:3] + 0.05, rng.standard_normal((25, 24))]).astype(np.float32)
    ids = [f"p{i}" for i in rng.permutation(30_000)]
    query_ids = [f"q{i}" for i in range(len(queries))]
    wanted = brute_force(queries, passages, ids, 100)
    whole = search(queries, query_ids, Parts(passages, ids, []), 100)
    assert [found.passage_ids for found in whole.values()] == wanted
    assert len(set(whole["q0"].scores.tolist())) < 50  # the case is what it says
    blocks = search(
        queries, query_ids, Parts(passages, ids, [1, 9_000, 9_001]), 100, SearchOptions(block_mib=MIB_OF_ONE_BLOCK)
    )
    assert same_rankings(whole, blocks)
    alone = {q: search(queries[i : i + 1], [q], Parts(passages, ids, []), 100)[q] for i, q in enumerate(query_ids)}
    assert same_rankings(whole, alone)


def test_embeddings_that_are_all_the_same_do_not_take_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every passage of a collapsed model may be among the k best, so that every query is searched to the end of the
    block.
    """
    most: list[int] = []

    class Watched(faiss.IndexFlatIP):
        def search(self, *args: Any, **kwargs: Any) -> Any:
            queries, k = args
            most.append(len(queries) * k)
            return super().search(queries, k, **kwargs)

    monkeypatch.setattr(faiss, "IndexFlatIP", Watched)
    monkeypatch.setattr(flat, "_HITS_AT_ONCE", 4_000)
    ids = [f"{i:05d}" for i in range(3_000)]
    run = search(
        np.ones((50, 8), np.float32), [f"q{i}" for i in range(50)], Parts(np.ones((3_000, 8), np.float32), ids, []), 10
    )
    assert max(most) <= 4_000 and len(most) > 50
    assert all(found.passage_ids == ids[:-11:-1] for found in run.values())


def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(1)
    passages, queries = (
        rng.standard_normal((3_000, 16)).astype(np.float16),
        rng.standard_normal((40, 16)).astype(np.float32),
    )
    parts, query_ids = Parts(passages, [f"p{i}" for i in range(3_000)], [700]), [f"q{i}" for i in range(40)]
    before = faiss.omp_get_max_threads()
    runs = []
    try:
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            runs.append(search(queries, query_ids, parts, 50))
    finally:
        faiss.omp_set_num_threads(before)
    assert same_rankings(*runs)
    assert [found.passage_ids for found in runs[0].values()] == brute_force(
        queries, passages, [f"p{i}" for i in range(3_000)], 50
    )


def test_excluding_the_query_itself_still_returns_k_passages() -> None:
    vectors = np.eye(5, dtype=np.float32)
    ids = ["a", "b", "c", "d", "e"]
    run = search(vectors, ids, Parts(vectors, ids, [2]), 2, SearchOptions(exclude_self=True))
    assert run["a"].passage_ids == ["e", "d"]
    assert run["e"].passage_ids == ["d", "c"]
    assert search(vectors, ids, Parts(vectors, ids, [2]), 2)["a"].passage_ids == ["a", "e"]


@pytest.mark.parametrize("engine", ENGINES)
def test_products_that_round_to_negative_zero_tie_with_zero(engine: Engine) -> None:
    passages = np.array([[0.0], [-1e-30], [-1.0], [2.0]], dtype=np.float32)
    parts = Parts(passages, ["a", "b", "c", "d"], [])
    found = search(np.array([[1e-30]]), ["q"], parts, 4, SearchOptions(engine=engine))["q"]
    assert found.passage_ids == ["d", "b", "a", "c"]
    assert found.scores.tolist() == [np.float32(2e-30), 0.0, 0.0, np.float32(-1e-30)]


def test_scores_are_summed_in_float64() -> None:
    passages = np.array([[3e8, 1.0, -3e8], [3e8, 2.0, -3e8], [0.0, 1.5, 0.0]], dtype=np.float32)
    found = search(np.ones((1, 3)), ["q"], Parts(passages, ["a", "b", "c"], []), 3)["q"]
    assert (found.passage_ids, found.scores.tolist()) == (["b", "c", "a"], [2.0, 1.5, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k 0: expected at least 1"),
        ({"queries": np.zeros((2, 3), dtype=np.float32)}, r"shape \[2, 3\]: expected \[Q, 4\]"),
        ({"query_ids": ["q", "q"]}, "2 queries and 1 distinct ids"),
        ({"queries": np.full((2, 4), np.nan)}, "query embedding has a value that is not finite"),
        ({"queries": np.zeros((0, 4)), "query_ids": []}, "no queries"),
        ({"passages": Parts(np.zeros((2, 4)), ["p", "p"], [1])}, "passage id 'p' stands twice"),
        (
            {"passages": Parts(np.array([[0, 0, 0, 0], [0, np.inf, 0, 0]]), ["p", "r"], [1])},
            "passage embedding 1 has a value that is not",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(change: dict, message: str) -> None:
    good = {
        "queries": np.zeros((2, 4)),
        "query_ids": ["q", "r"],
        "passages": Parts(np.zeros((2, 4)), ["p", "s"], []),
        "k": 1,
    }
    with pytest.raises(ValueError, match=message):
        search(**(good | change))


def write_shards(folder: Path, side: Any, embeddings: np.ndarray, ids: list[str], **changed: Any) -> Path:
    job = ShardJob(side, "m", "", 32, "mean", True, "fp32", "padded", embeddings.shape[1], "float32", "t", 4)
    job = replace(job, **changed)
    writer = ShardWriter(folder, job)
    writer.prepare()
    for shard, start in enumerate(range(0, len(ids), 4)):
        writer.write(shard, embeddings[start : start + 4], ids[start : start + 4])
    writer.finish(len(ids))
    return folder


def test_the_command_turns_shards_into_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    passages, queries = rng.standard_normal((11, 6)).astype(np.float32), rng.standard_normal((5, 6)).astype(np.float32)
    ids, query_ids = [f"p{i}" for i in range(11)], [f"q{i}" for i in range(5)]
    write_shards(tmp_path / "passages", "passage", passages, ids)
    write_shards(tmp_path / "queries", "query", queries, query_ids)
    folders = ["--queries", str(tmp_path / "queries"), "--passages", str(tmp_path / "passages"), "--k", "3"]
    main([*folders, "--output", str(tmp_path / "run.trec")])
    main([*folders, "--output", str(tmp_path / "run.tsv"), "--format", "msmarco"])
    wanted = dict(zip(query_ids, brute_force(queries, passages, ids, 3), strict=True))
    assert {q: found.passage_ids for q, found in read_trec(tmp_path / "run.trec").items()} == wanted
    assert {q: found.passage_ids for q, found in read_msmarco(tmp_path / "run.tsv").items()} == wanted
    assert "5 queries, 15 lines" in capsys.readouterr().out


def test_shards_of_the_other_side_are_not_searched(tmp_path: Path) -> None:
    write_shards(tmp_path / "passages", "passage", np.eye(3), ["a", "b", "c"])
    write_shards(tmp_path / "queries", "query", np.eye(3), ["a", "b", "c"])
    swapped = [
        "--queries",
        str(tmp_path / "passages"),
        "--passages",
        str(tmp_path / "queries"),
        "--output",
        str(tmp_path / "run.trec"),
    ]
    assert_refused(main, swapped, "passages holds embeddings of the passage side; expected the query side")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "two"}, "queries and .*passages differ in model; expected embeddings of one model"),
        (
            {"model": "two", "pooling": "cls"},
            r"queries and .*passages differ in pooling \('cls', 'mean'\), model; expected",
        ),
        ({"normalize": False, "pooling": "last"}, r"differ in pooling \('last', 'mean'\), normalize \(False, True\); "),
        ({"dimension": 2}, r"differ in dimension \(2, 3\)"),
    ],
)
def test_shards_that_were_not_made_alike_are_not_searched_together(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    write_shards(tmp_path / "passages", "passage", np.eye(3), ["a", "b", "c"])
    queries = np.eye(3)[:, : changed.get("dimension", 3)]
    write_shards(tmp_path / "queries", "query", queries, ["a", "b", "c"], **changed)
    assert_refused(main, [*words(tmp_path), "--output", str(tmp_path / "run")], message)


def words(folder: Path) -> list[str]:
    return ["--queries", str(folder / "queries"), "--passages", str(folder / "passages")]


def test_the_prompts_of_shards_and_the_parameters_of_the_search_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody but the person who encoded them knows which prompts belong together."""
    ids = [f"p{i}" for i in range(50)]
    embeddings = np.random.default_rng(0).standard_normal((50, 8))
    write_shards(tmp_path / "passages", "passage", embeddings, ids, prompt="passage: ")
    write_shards(tmp_path / "queries", "query", embeddings[:2], ["a", "b"])
    arguments = [*words(tmp_path), "--output", str(tmp_path / "run"), "--k", "45"]
    assert main([*arguments, "--index", "IVF8,Flat nprobe=2"]) == 0
    said = capsys.readouterr().out
    assert f"note: {tmp_path}/passages: every passage begins with the prompt 'passage: '" in said
    assert "IVF8,Flat nprobe=2 search\n" in said and "queries:" not in said
    assert "note: --index IVF8,Flat nprobe=2 found fewer than 45 passages for 2 of 2 queries" in said


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz", "run.tsv"])
def test_a_file_that_is_no_run_of_ours_is_not_replaced(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path / "passages", "passage", np.eye(3), ["a", "b", "c"])
    write_shards(tmp_path / "queries", "query", np.eye(3), ["a", "b", "c"])
    output = tmp_path / "out" / name
    arguments = [*words(tmp_path), "--output", str(output), *(["--format", "msmarco"] if "tsv" in name else [])]
    assert main(arguments) == main(arguments) == 0, "a run is replaced"
    for content in (b"years of work\n", b"\nyears of work\n", b"a note 1\n", b"q0 Q0 p1 1 0.5 another-tool\n"):
        output.write_bytes(content)
        assert_refused(main, arguments, f"{output} was not written by an evaluation; move it .*--output")
        assert output.read_bytes() == content
    output.unlink()
    output.symlink_to(tmp_path / "passages" / "manifest.json")
    assert_refused(main, arguments, f"{output} was not written by an evaluation")
    assert_refused(main, [*words(tmp_path), "--output", str(tmp_path)], f"{tmp_path} is a folder; choose another file")
