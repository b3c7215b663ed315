"""BM25 against the formula written out, and against its known figure on a real collection."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import bm25s
import numpy as np
import pytest

from eval.collections.collection import read_beir
from eval.engines.bm25 import Bm25, bm25_run, plural_stem
from eval.engines.bm25_index import FILES
from eval.measures import measure_run

DATA = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))

PASSAGES = [
    ("a", "storm river river"),
    ("b", "river bridges"),
    ("c", "storm storm storm mountain village"),
    ("d", "river bridge"),
    ("e", "nothing else here"),
]


def test_scores_are_the_formulas() -> None:
    """Lucene's BM25: idf·tf / (tf + k1(1 - b + b·length/average)), idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 0.9, b
    0.4.
    """
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


@pytest.mark.parametrize(
    ("passages", "queries"),
    [
        (
            ["北京是中华人民共和国的首都。", "上海位于长江入海口,人口众多。", "长城建于明代以前。"],
            ["中国首都北京", "长江入海口", "长城"],
        ),
        (["東京は日本の首都である。", "ラーメンは麺料理です", "富士山は高い"], ["日本の首都", "ラーメン", "富士山"]),
        (["กรุงเทพมหานครเป็นเมืองหลวง", "ข้าวผัดเป็นอาหารไทย", "ช้างเป็นสัตว์ใหญ่"], ["เมืองหลวง", "ข้าวผัด", "ช้าง"]),
        (["mixed北京text", "水", "GPU用の行列"], ["北京 text", "水", "gpu行列"]),
    ],
)
def test_scripts_without_spaces_are_searched_by_bigrams(passages: list[str], queries: list[str]) -> None:
    """The i-th query asks for the i-th passage."""
    run = bm25_run(
        ((str(i), text) for i, text in enumerate(passages)), {str(i): text for i, text in enumerate(queries)}, k=1
    )
    assert [run[str(i)].passage_ids for i in range(3)] == [["0"], ["1"], ["2"]]


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


@pytest.fixture(scope="module")
def collection() -> tuple[list[str], list[str]]:
    """(passages, queries): words of unequal frequency, passages over more than one batch, some without a word."""
    draw, words = random.Random(0), [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    weights = [1 / (i + 1) for i in range(400)]
    passages = [" ".join(draw.choices(words, weights, k=draw.randrange(0, 30))) for _ in range(5000)]
    return passages, [" ".join(draw.choices(words, k=draw.randrange(0, 6))) for _ in range(40)]


def test_an_index_from_a_stream_scores_as_bm25s_itself(collection: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """Bit by bit, for all passages and for some, with what bm25s makes of all the texts at once."""
    passages, queries = collection
    Bm25.build(iter(passages), tmp_path)
    index, whole = Bm25(tmp_path), bm25s.BM25(k1=0.9, b=0.4)
    whole.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    rows, hits = np.random.default_rng(1).integers(0, len(passages), 300), 0
    for query in queries:
        words = query.split()
        expected = whole.get_scores(words) if words else np.zeros(len(passages), dtype=np.float32)
        assert index.scores(query).tobytes() == expected.tobytes()
        assert index.scores_of(query, rows).tobytes() == expected[rows].tobytes()
        hits += int(np.count_nonzero(expected))
    assert hits > 10_000
    assert {file.name for file in tmp_path.iterdir()} == set(FILES)


def test_threads_change_nothing(collection: tuple[list[str], list[str]]) -> None:
    passages, queries = [(str(i), text) for i, text in enumerate(collection[0])], dict(enumerate(collection[1]))
    named = {str(i): text for i, text in queries.items()}
    runs = [bm25_run(passages, named, 50, threads=threads) for threads in (1, 4)]
    assert list(runs[0]) == list(runs[1]) == list(named)
    for one, four in zip(*(run.values() for run in runs), strict=True):
        assert one.passage_ids == four.passage_ids and one.scores.tobytes() == four.scores.tobytes()


def test_an_index_has_the_same_bytes_in_every_process(collection: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """Sets of words have another order in every process; the numbers of words have not."""
    (tmp_path / "texts").write_text("\n".join(collection[0]))
    code = "import sys; from pathlib import Path; from eval.engines.bm25 import Bm25; Bm25.build(open(sys.argv[1]), Path(sys.argv[2]))"
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", code, str(tmp_path / "texts"), str(tmp_path / seed)]
        subprocess.run(
            command, check=True, cwd=Path(__file__).parents[3], env={**os.environ, "PYTHONHASHSEED": seed}, timeout=60
        )
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
