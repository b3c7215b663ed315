"""Mined data: what no negative may be, windows and filters against scores taken pair by pair, and the same bytes after
interruptions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eval.engines.bm25 import bm25_run
from retriever.config import Config, DataConfig, ModelConfig, SourceConfig
from retriever.data.store import build_or_open
from retriever.encoder.bundle import load_encoder
from retriever.parallel.world import World
from scripts.mine_negatives import main, mine
from scripts.mining import candidates as candidates_module
from scripts.mining import scores as scores_module
from scripts.mining.settings import MiningSettings
from scripts.mining.teacher import CrossEncoder
from tests.commands import assert_refused
from tests.distributed.processes import run_on_ranks
from tests.scripts.mining.workplace import QUERIES, Workplace, make_workplace, mined, read, words
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("mining"))


@pytest.fixture(scope="module")
def similarities(workplace: Workplace) -> np.ndarray:
    """[QUERIES, passages] float64: the model's inner products, text by text."""
    bundle = load_encoder(workplace.folder / "model", device="cpu")
    queries, passages = (
        bundle.encode(list(workplace.queries.values()), "query"),
        bundle.encode(list(workplace.texts.values()), "passage"),
    )
    return queries.astype(np.float64) @ passages.astype(np.float64).T


@pytest.fixture(scope="module")
def teacher_logit(workplace: Workplace) -> Any:
    """The teacher's score of one pair, alone in its batch."""
    model = AutoModelForSequenceClassification.from_pretrained(workplace.folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(workplace.folder / "teacher")

    def score(query: str, passage: str) -> float:
        with torch.no_grad():
            return model(**tokenizer(query, passage, truncation=True, max_length=64, return_tensors="pt")).logits.item()

    return score


def _negatives(record: dict[str, Any]) -> list[str]:
    return [passage["text"] for passage in record["negative_passages"]]


def test_no_negative_is_known_positive_repeated_or_the_query_itself(workplace: Workplace) -> None:
    """With the window over the whole collection, texts that are a positive's (under any id) or the query's own stay
    out.
    """
    records = mined(workplace, "all", "--retrievers", "model", "bm25", "--ranks", "1", "80", "--negatives", "80")
    assert [record["query_id"] for record in records] == list(workplace.queries)
    for record in records:
        found, forbidden = _negatives(record), {workplace.texts[p] for p in workplace.positives[record["query_id"]]}
        own = record["query"] in workplace.texts.values()
        assert own == (record["query_id"] == "q5")
        assert len(found) == len(set(found)) == 80 - len(forbidden) - own, "everything else is a candidate"
        assert not set(found) & (forbidden | {record["query"]})
        assert [p["docid"] for p in record["positive_passages"]] == workplace.positives[record["query_id"]]


def test_the_window_of_ranks_is_the_searchs(workplace: Workplace, similarities: np.ndarray) -> None:
    """`top` takes ranks FIRST to LAST of the similarities over distinct texts, without the known."""
    for record, row in zip(mined(workplace, "top", "--pick", "top", "--ranks", "4", "12"), similarities, strict=True):
        best = {text: score for text, score in zip(workplace.texts.values(), row, strict=True)}
        ranked = sorted(best, key=best.__getitem__, reverse=True)[3:12]
        known = {workplace.texts[p] for p in workplace.positives[record["query_id"]]} | {record["query"]}
        assert _negatives(record) == [text for text in ranked if text not in known][:5]


def test_bm25_candidates_are_bm25s(workplace: Workplace) -> None:
    """Every mined negative is among BM25's ranks of the window; queries differ in what they get."""
    records = mined(workplace, "bm25", "--retrievers", "bm25", "--ranks", "2", "9")
    distinct = {text: i for i, text in reversed(workplace.texts.items())}
    run = bm25_run([(i, text) for text, i in reversed(distinct.items())], workplace.queries, 9)
    for record in records:
        window = {workplace.texts[i] for i in run[record["query_id"]].passage_ids[1:]}
        assert set(_negatives(record)) <= window
    assert len({text for record in records for text in _negatives(record)}) > 40


@pytest.mark.parametrize(("option", "value"), [("--margin", 0.05), ("--percentage", 0.9)])
def test_filters_by_the_models_similarities(
    workplace: Workplace, similarities: np.ndarray, option: str, value: float
) -> None:
    """Kept negatives score at most the lowest positive's similarity less the margin (or the share of it); above it none
    is left.
    """
    records = mined(workplace, f"filtered{option}", option, str(value), "--negatives", "80", "--ranks", "1", "80")
    column, dropped = {text: i for i, text in enumerate(workplace.texts.values())}, 0
    for record, row in zip(records, similarities, strict=True):
        positive = min(row[column[workplace.texts[p]]] for p in workplace.positives[record["query_id"]])
        line = positive - value if option == "--margin" else positive * value if positive > 0 else positive / value
        known = {workplace.texts[p] for p in workplace.positives[record["query_id"]]} | {record["query"]}
        allowed = {text for text in column if row[column[text]] <= line and text not in known}
        assert set(_negatives(record)) == allowed
        dropped += 80 - len(known & column.keys()) - len(allowed)
    manifest = json.loads((workplace.folder / f"filtered{option}" / "manifest.json").read_text())
    assert manifest["counts"]["dropped by score"] == dropped > 100


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--margin", "100"], "every candidate scores too close to a positive; lower --margin or raise --percentage"),
        (["--ranks", "5000", "6000"], "--ranks begins at 5,000, and there are only 80 passages"),
    ],
)
def test_a_mining_without_negatives_names_the_cause(
    workplace: Workplace, options: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = mined(workplace, f"none{options[0]}", *options)
    assert not any(_negatives(record) for record in records)
    assert f"none{options[0]}: no negative: {cause}" in capsys.readouterr().out


def test_teacher_scores_are_written_and_read_into_the_store(workplace: Workplace, teacher_logit: Any) -> None:
    """Scores equal the cross-encoder's of each pair alone, filter by them, and stand beside their passages in the token
    store.
    """
    records = mined(
        workplace, "taught", "--teacher", str(workplace.folder / "teacher"), "--margin", "0.5", "--judged", "20"
    )
    spread = []
    for record in records:
        for side in ("positive", "negative"):
            scores = record[f"{side}_scores"]
            expected = [teacher_logit(record["query"], passage["text"]) for passage in record[f"{side}_passages"]]
            assert scores == pytest.approx(expected, abs=2e-4)
            spread += expected
        assert max(record["negative_scores"], default=-np.inf) <= min(record["positive_scores"]) - 0.5 + 1e-6
    assert np.std(spread) > 0.1, "the teacher scores everything alike: this proves little"

    source = SourceConfig(path=str(workplace.folder / "taught"))
    config = Config(model=ModelConfig(), data=DataConfig(train=(source,), cache_dir=str(workplace.folder / "cache")))
    store = build_or_open(config, tiny_tokenizer(), progress=False)
    assert store.sources[0].format == "tevatron" and len(store.queries) == QUERIES
    assert store.positive_scores is not None and store.negative_scores is not None
    written = np.array([s for record in records for s in record["negative_scores"]], dtype=np.float32)
    assert sorted(store.negative_scores) == sorted(written) and len(written) > 50


def test_several_teachers_are_standardised_and_averaged(workplace: Workplace) -> None:
    """Each teacher's scores have mean 0 and variance 1 over a query's positives and candidates before their mean is
    taken.
    """
    teachers = [str(workplace.folder / "teacher"), "bm25", "model"]
    options = ("--negatives", "6")
    alone = [mined(workplace, f"by{i}", "--teacher", name, *options) for i, name in enumerate(teachers)]
    together = mined(workplace, "by-all", "--teacher", *teachers, *options)
    for row, record in enumerate(together):
        parts = []
        for records in alone:
            assert records[row]["negative_passages"] == record["negative_passages"]
            scores = np.array([*records[row]["positive_scores"], *records[row]["negative_scores"]])
            assert scores.std() > 1e-3
            parts.append((scores - scores.mean()) / scores.std())
        found = [*record["positive_scores"], *record["negative_scores"]]
        assert found == pytest.approx(np.mean(parts, axis=0), abs=1e-4)


def test_bm25_as_a_teacher_gives_its_own_scores(workplace: Workplace) -> None:
    """As its run has them: the first rankings' scores of the same pairs, 0 for a passage that shares no word."""
    records = mined(workplace, "by-bm25", "--teacher", "bm25")
    texts = dict(enumerate(dict.fromkeys(workplace.texts.values())))
    run = bm25_run(
        ((str(n), text) for n, text in texts.items()), {r["query_id"]: r["query"] for r in records}, k=len(texts)
    )
    for record in records:
        ranked = run[record["query_id"]]
        by_text = dict(zip((texts[int(n)] for n in ranked.passage_ids), ranked.scores.tolist(), strict=True))
        for side in ("positive", "negative"):
            expected = [by_text.get(passage["text"], 0.0) for passage in record[f"{side}_passages"]]
            assert record[f"{side}_scores"] == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_mining_ends_with_the_same_bytes(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it encodes, searches, scores and writes; each start does only what is left, and the data are those
    of one go.
    """
    arguments = (
        "--teacher",
        str(workplace.folder / "teacher"),
        "--percentage",
        "0.95",
        "--retrievers",
        "model",
        "bm25",
    )
    monkeypatch.setattr(scores_module, "_QUERIES_A_PART", 7)
    mined(workplace, "whole", *arguments)
    scored: list[int] = []
    score = CrossEncoder.score

    def counting(self: CrossEncoder, queries: Any, passages: Any, tokens: int) -> np.ndarray:
        if len(scored) == 2:
            scored.append(0)
            raise KeyboardInterrupt
        scored.append(len(queries))
        return score(self, queries, passages, tokens)

    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(CrossEncoder, "score", counting)
    for place in ("search", "in_threads"):
        with monkeypatch.context() as broken:
            broken.setattr(f"scripts.mining.candidates.{place}", interrupted)
            assert_refused(main, words(workplace, "stopped", *arguments), "interrupted: the same command goes on", 130)
    assert_refused(main, words(workplace, "stopped", *arguments), "interrupted", 130)  # in the third part of the scores
    with monkeypatch.context() as broken:
        broken.setattr("scripts.mining.mine._described", interrupted)  # while the data are written
        assert_refused(main, words(workplace, "stopped", *arguments), "interrupted", 130)
    assert len(scored) - 1 == -(-QUERIES // 7), "a part was scored twice, or not at all"
    mined(workplace, "stopped", *arguments)
    found, expected = (workplace.folder / name / "train.jsonl" for name in ("stopped", "whole"))
    assert found.read_bytes() == expected.read_bytes()
    manifests = [json.loads((path.parent / "manifest.json").read_text()) for path in (found, expected)]
    assert manifests[0] == manifests[1]


def test_what_is_done_is_not_done_again(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finds its output; another number of negatives uses the embeddings and the search; another seed
    differs.
    """
    first = mined(workplace, "again")
    capsys.readouterr()
    with monkeypatch.context() as broken:
        broken.setattr("scripts.mining.mine.encode", None)
        assert mined(workplace, "again") == first
    assert "mine: reused" in capsys.readouterr().out
    other = mined(workplace, "again", "--negatives", "3")
    assert "search by model: reused" in capsys.readouterr().out
    assert [_negatives(record)[:3] for record in first] == [_negatives(record) for record in other]
    assert mined(workplace, "again", "--seed", "1") != first
    shutil.rmtree(workplace.folder / "again.work")
    assert mined(workplace, "again") == first


def test_inline_sources_are_mined_from_their_own_passages(workplace: Workplace, tmp_path: Path) -> None:
    """FlagEmbedding records: the pool is all their passages, prompts go along, old negatives are candidates like the
    rest.
    """
    texts = list(workplace.texts.values())[:60]
    lines = [
        {"query": workplace.queries[f"q{i}"], "pos": [texts[i]], "neg": [texts[i + 20]], "prompt": "find: "}
        for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = mined(
        workplace, "inline", "--data", str(tmp_path / "pairs.jsonl"), "--retrievers", "bm25", "--ranks", "1", "60"
    )
    assert all(record["prompt"] == "find: " for record in records)
    assert {text for record in records for text in _negatives(record)} <= set(texts[:40])
    assert max(len(_negatives(record)) for record in records) == 5
    assert read(workplace.folder / "inline") == records


_BOTH = ("--retrievers", "model", "bm25")


def _mine_on_rank(world: World, folder: Path) -> None:
    """As the command does under a launcher, in small parts, so that each rank has some of each kind of work."""
    scores_module._QUERIES_A_PART = candidates_module._QUERIES_AT_ONCE = candidates_module._BM25_QUERIES = 7
    arguments = ["--data", str(folder / "data"), "--model", str(folder / "model"), "--teacher", str(folder / "teacher")]
    args = main.parser.parse_args(
        [*arguments, "--teacher-max-tokens", "64", "--ranks", "1", "30", "--output-dir", str(folder / "ranks"), *_BOTH]
    )
    mine(args, world)


def test_two_ranks_mine_what_one_mines(workplace: Workplace) -> None:
    """The same negatives; scores differ by rounding at most."""
    run_on_ranks(_mine_on_rank, 2, workplace.folder)
    together = read(workplace.folder / "ranks")
    alone = mined(workplace, "alone", "--teacher", str(workplace.folder / "teacher"), "--negatives", "8", *_BOTH)
    for found, expected in zip(together, alone, strict=True):
        for side in ("positive", "negative"):
            assert found.pop(f"{side}_scores") == pytest.approx(expected.pop(f"{side}_scores"), abs=2e-4)
        assert found == expected and len(found["negative_passages"]) == 8
    parts = sorted((workplace.folder / "ranks.work" / "search-bm25").glob("*.npy"))
    assert len(parts) == -(-QUERIES // 7)
    whole = np.load(workplace.folder / "alone.work" / "search-bm25" / "00000.npy")
    assert np.concatenate([np.load(part) for part in parts]).tobytes() == whole.tobytes()


def test_a_score_that_is_no_number_is_refused(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow would drop every candidate of its query in silence."""
    monkeypatch.setattr(
        CrossEncoder, "score", lambda self, queries, *_: np.full(len(queries), np.nan, dtype=np.float32)
    )
    arguments = words(workplace, "nan", "--teacher", str(workplace.folder / "teacher"))
    assert_refused(main, arguments, "the score of query 'q0' with passage 'p0' is not finite")


def test_filters_need_scores(workplace: Workplace) -> None:
    """BM25's candidates have no score to be filtered by: a model or a teacher is asked for."""
    arguments = [
        "--data",
        str(workplace.data),
        "--retrievers",
        "bm25",
        "--margin",
        "0.1",
        "--output-dir",
        str(workplace.folder / "none"),
    ]
    assert_refused(main, arguments, "--model: expected a model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "9", "3"], "--ranks"),
        (["--negatives", "0"], "--negatives"),
        (["--percentage", "1.5"], "--percentage"),
        (["--judged", "2"], "--judged"),
        (["--teacher", "/nowhere/teacher"], "model /nowhere/teacher: there is no such folder"),
        (["--data", "/nowhere/data"], "/nowhere/data"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(workplace: Workplace, arguments: list[str], message: str) -> None:
    assert_refused(main, words(workplace, "wrong", *arguments), message)


def test_the_line_below_a_positive() -> None:
    """Margins subtract; a share of a score below zero lies below it too; of both the lower counts."""
    assert MiningSettings(margin=0.5).line(2.0) == 1.5
    assert MiningSettings(percentage=0.5).line(2.0) == 1.0
    assert MiningSettings(percentage=0.5).line(-2.0) == -4.0
    assert MiningSettings(percentage=0.5, margin=0.1).line(2.0) == 1.0
    assert MiningSettings().line(2.0) == float("inf")
