"""BM25 against the formula written out, and against its known figure on a real collection."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from eval.bm25 import bm25_run, plural_stem
from eval.collection import read_beir
from eval.metrics import measure_run

DATA = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))

PASSAGES = [
    ("a", "storm river river"),
    ("b", "river bridges"),
    ("c", "storm storm storm mountain village"),
    ("d", "river bridge"),
    ("e", "nothing else here"),
]


def test_scores_are_the_formulas() -> None:
    """Lucene's BM25: idf·tf / (tf + k1(1 - b + b·length/average)), idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 0.9, b 0.4."""
    average = (3 + 2 + 5 + 2 + 3) / 5

    def score(tf: int, n: int, length: int) -> float:
        return math.log(1 + (5 - n + 0.5) / (n + 0.5)) * tf / (tf + 0.9 * (0.6 + 0.4 * length / average))

    found = bm25_run(PASSAGES, {"q": "the river's storms"})["q"]
    wanted = {"a": score(2, 3, 3) + score(1, 2, 3), "b": score(1, 3, 2), "d": score(1, 3, 2), "c": score(3, 2, 5)}
    assert found.passage_ids == ["a", "c", "d", "b"]  # d and b tie: descending id
    for passage_id, value in zip(found.passage_ids, found.scores.tolist(), strict=True):
        assert value == pytest.approx(wanted[passage_id], rel=1e-5)


def test_ties_at_the_kth_place_exclusion_and_queries_without_hits() -> None:
    run = bm25_run(PASSAGES, {"d": "river bridge", "x": "zebra", "empty": ""}, k=1)
    assert (run["d"].passage_ids, run["x"].passage_ids, run["empty"].passage_ids) == (["d"], [], [])
    assert bm25_run(PASSAGES, {"d": "river bridge"}, k=1, exclude_self=True)["d"].passage_ids == ["b"]
    assert bm25_run(PASSAGES, {"c": "mountain storm"}, k=1, exclude_self=True)["c"].passage_ids == ["a"]


def test_passages_without_words_are_refused() -> None:
    with pytest.raises(ValueError, match="2 passages without a single word"):
        bm25_run([("a", ""), ("b", "?")], {"q": "river"})


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("passages", "passage"), ("queries", "query"), ("cells", "cell"), ("class", "class"), ("corpus", "corpus"), ("does", "does"),
        ("trees", "trees"), ("ties", "ty"), ("bodies", "body"), ("is", "is"), ("es", "es"), ("ies", "ies"), ("s", "s"), ("gas", "ga"),
        ("eies", "eies"), ("retrieval", "retrieval"),
    ],
)  # fmt: skip
def test_plurals_lose_their_s(word: str, stem: str) -> None:
    assert plural_stem(word) == stem


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no collections in {DATA}: set BIGBATCH_TEST_DATA")
@pytest.mark.parametrize(("name", "figure"), [("scifact", 0.666), ("cranfield", 0.351), ("med", 0.671)])
def test_the_known_figures(name: str, figure: float) -> None:
    collection = read_beir(DATA / name)
    run = bm25_run(collection.passages("join", " "), collection.queries, 100, exclude_self=True)
    assert measure_run(collection.qrels, run, ["nDCG@10"]).means["nDCG@10"] == pytest.approx(figure, abs=0.005)
