"""A development split: nothing is lost, nothing is on both sides, and the same seed draws the same queries."""

from __future__ import annotations

from pathlib import Path

import pytest

from retriever.data.formats import read_corpus, read_qrels, read_queries
from scripts.hold_out import main
from tests.beir import write_beir
from tests.commands import assert_refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BEIR folder of 20 training queries, two judgments each."""
    judged = {f"q{i}": {f"p{i}": 2, f"p{i + 1}": 1} for i in range(20)}
    return write_beir(tmp_path / "source", [{"_id": "p", "text": "x"}], {"q": "x"}, train=judged, test={"t": {"p": 1}})


def test_fit_and_dev_are_the_split_divided(source: Path, tmp_path: Path) -> None:
    found = {}
    for output, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["--data", str(source), "--output", str(tmp_path / output), "--queries", "6", "--seed", seed])
        found[output] = [read_qrels(tmp_path / output / "qrels" / f"{name}.tsv") for name in ("fit", "dev")]
    fit, dev = found["a"]
    assert (len(fit), len(dev)) == (14, 6) and fit | dev == read_qrels(source / "qrels" / "train.tsv")
    assert found["b"] == found["a"] and found["c"] != found["a"]
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        assert (tmp_path / "a" / file).read_bytes() == (source / file).read_bytes()
    assert not (tmp_path / "a" / "qrels" / "train.tsv").exists(), "training on it would be training on dev"


def test_a_corpus_of_shards_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "corpus").mkdir()
    (source / "corpus.jsonl").rename(source / "corpus" / "00000.jsonl")
    main(["--data", str(source), "--output", str(tmp_path / "out"), "--queries", "6"])
    assert [passage.id for passage in read_corpus(tmp_path / "out")] == ["p"]


@pytest.mark.parametrize("name", ["dev.tsv", "fit.tsv", "dev.jsonl"])
def test_a_split_of_the_source_is_not_overwritten(source: Path, tmp_path: Path, name: str) -> None:
    (source / "qrels" / name).write_text("query-id\tcorpus-id\tscore\nofficial\tp\t1\n")
    assert_refused(
        main, ["--data", str(source), "--output", str(tmp_path / "out"), "--queries", "6"], f"its qrels/ holds {name}"
    )


def test_dev_itself_can_be_divided(source: Path, tmp_path: Path) -> None:
    (source / "qrels" / "train.tsv").rename(source / "qrels" / "dev.tsv")
    main(["--data", str(source), "--output", str(tmp_path / "out"), "--split", "dev", "--queries", "6"])
    assert len(read_qrels(tmp_path / "out" / "qrels" / "dev.tsv")) == 6


def test_queries_of_one_text_stay_on_one_side(source: Path, tmp_path: Path) -> None:
    """Each text stands under two ids, in other capitals and white space; three fall together with one that --queries
    has no room for.
    """
    texts = [f"Query {i // 2}" if i % 2 else f" query  {i // 2}" for i in range(20)]
    (source / "queries.jsonl").write_text(
        "".join(f'{{"_id": "q{i}", "text": "{text}"}}\n' for i, text in enumerate(texts))
    )
    for seed in range(5):
        main(["--data", str(source), "--output", str(tmp_path / f"out{seed}"), "--queries", "7", "--seed", str(seed)])
        dev = read_qrels(tmp_path / f"out{seed}" / "qrels" / "dev.tsv")
        assert len(dev) == 6 and {int(query[1:]) ^ 1 for query in dev} == {int(query[1:]) for query in dev}
    message = "--queries 1: expected at least as many as train has of the text of one query"
    assert_refused(main, ["--data", str(source), "--output", str(tmp_path / "one"), "--queries", "1"], message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--queries", "20"], "--queries: expected from 1 to 19"),
        (["--output", "."], "exists already"),
        (["--split", "valid"], "qrels"),
    ],
)
def test_what_is_wrong_is_said(source: Path, tmp_path: Path, more: list[str], message: str) -> None:
    assert_refused(main, ["--data", str(source), "--output", str(tmp_path / "out"), *more], message)


def test_a_file_of_pairs_becomes_a_folder_to_train_and_evaluate_on(tmp_path: Path) -> None:
    """Under other column names, with a hard negative, and with a passage and a query that come twice."""
    rows = ["question,answer,wrong", *(f"Query {i // 2},Passage {i % 7},Passage {(i + 1) % 7}" for i in range(20))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    columns = ["--columns", "question", "answer", "wrong"]
    given = ["--data", str(tmp_path / "pairs.csv"), "--output", str(tmp_path / "out"), "--queries", "4"]
    assert main([*given, *columns]) == 0
    fit, dev = (read_qrels(tmp_path / "out" / "qrels" / f"{name}.tsv") for name in ("fit", "dev"))
    passages = {passage.id: passage.text for passage in read_corpus(tmp_path / "out")}
    texts = dict(read_queries(tmp_path / "out"))
    assert (len(fit), len(dev), len(passages)) == (6, 4, 7)
    found = {(texts[q], passages[p]): grade for q, judged in (fit | dev).items() for p, grade in judged.items()}
    expected = {(f"Query {i // 2}", f"Passage {(i + 1) % 7}"): 0 for i in range(20)}
    assert found == expected | {(f"Query {i // 2}", f"Passage {i % 7}"): 1 for i in range(20)}


def test_what_a_folder_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scored.jsonl"
    file.write_text('{"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [0.5]}\n')
    arguments = ["--data", str(file), "--output", str(tmp_path / "out"), "--queries", "1"]
    assert_refused(main, arguments, "scored.jsonl: expected pairs without scores and prompts")
    assert not (tmp_path / "out").exists()
