"""Texts that the encoder cannot tell apart are one text: no passage is a negative beside a positive of the same
tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.config import Config, DataConfig, ModelConfig, SourceConfig
from retriever.data import encoded, slices
from retriever.data.encoded import first_of_equal
from retriever.data.planner import Mixture, Planner
from retriever.data.slices import known_positives, slice_for_rank
from retriever.data.store import Store, build_or_open
from retriever.data.text_table import TokenRows
from tests.beir import write_beir
from tests.tiny import tiny_tokenizer


def built(
    folder: Path, *sources: Sequence[Mapping[str, Any]], model: ModelConfig | None = None, title: Any = "join"
) -> Store:
    """A store of the sources' records, under an uncased tokenizer."""
    paths = [folder / f"{number}.jsonl" for number in range(len(sources))]
    for path, records in zip(paths, sources, strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(
        tuple(SourceConfig(path=str(path)) for path in paths), title=title, cache_dir=str(folder / "cache")
    )
    return build_or_open(Config(model=model or ModelConfig(), data=data), tiny_tokenizer(), progress=False)


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def related(store: Store, relation: str, query: int) -> set[tuple[int, ...]]:
    return {tuple(store.passages.tokens(row).tolist()) for row in getattr(store, relation).row(query)}


ROWS = st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    room=st.integers(1, 4),
    keep_end=st.booleans(),
    block=st.sampled_from([1, 7, 1 << 15]),
    weak=st.booleans(),
)
def test_the_first_of_equal_rows_is_that_of_a_dictionary(
    rows: list[list[int]], room: int, keep_end: bool, block: int, weak: bool
) -> None:
    """Also where different rows have one hash."""
    offsets = np.cumsum([0, *map(len, rows)])
    texts = TokenRows(np.array([token for row in rows for token in row], np.uint16), offsets)
    seen: dict[tuple[int, ...], int] = {}
    expected = [
        seen.setdefault(tuple(row[-room:] if keep_end else row[:room]), number) for number, row in enumerate(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "_BLOCK_ROWS", block)
        if weak:
            patch.setattr(encoded, "_hashes", lambda tokens, counts: counts.astype(np.uint64))
        found = first_of_equal(texts, room, keep_end=keep_end).tolist()
    # Among rows of one hash that are not all equal, each that is not the first's equal stands for itself.
    assert (
        found == expected
        if not weak
        else all(f in (e, i) for i, (f, e) in enumerate(zip(found, expected, strict=True)))
    )


def test_a_passage_of_the_positives_tokens_is_no_negative(tmp_path: Path) -> None:
    """White space, capitals and truncation make equal rows; a longer limit tells the last two apart again."""
    long = "river " * 40
    records: list[dict[str, Any]] = [
        {"query": "who", "pos": ["The river 3 runs"], "neg": ["The river 3 runs ", "the  RIVER 3 runs", "storm"]},
        {"query": "what", "pos": [long + "ocean"], "neg": [long + "storm", "Storm"]},
    ]
    store = built(tmp_path, records, model=ModelConfig(passage_max_tokens=20))
    assert store.equal == {"queries": 0, "passages": 4}
    assert related(store, "negatives", 0) == related(store, "negatives", 1) == {ids("storm")}
    assert related(store, "positives", 1) == {ids(long + "ocean")}
    batch = Planner(store, queries=2, negatives=7, seed=0).plan(0)
    assert len(batch.passages) == 3, "two targets and storm"
    longer = built(tmp_path, records)
    assert longer.equal["passages"] == 3 and related(longer, "negatives", 1) == {ids(long + "storm"), ids("storm")}


def test_of_equal_passages_a_score_that_is_there_counts(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {
            "query": "who",
            "pos": ["River"],
            "neg": ["storm", "a city", "A City"],
            "pos_scores": [9],
            "neg_scores": [1, 2, 3],
        },
        {"query": "why", "pos": ["A city", "a city"], "neg": ["river"]},
    ]
    store = built(tmp_path, records)
    assert store.negative_scores is not None and store.positive_scores is not None
    found = dict(
        zip(
            map(tuple, map(store.passages.tokens, store.negatives.row(0))),
            store.negative_scores[:2].tolist(),
            strict=True,
        )
    )
    assert found == {ids("storm"): 1, ids("a city"): 2}
    assert store.positive_scores[0] == 9 and np.isnan(store.positive_scores[1:]).all()


@pytest.mark.parametrize("many", [0, 64])
def test_queries_of_one_text_know_the_positives_of_all_over_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """In formats without query ids, and whatever their source; a prompt of its own makes it another query."""
    monkeypatch.setattr(slices, "_MANY_KNOWN", many)
    pairs = [{"query": "who ", "pos": [f"river {i}"], "neg": ["river 1", "ocean", "storm"]} for i in range(3)]
    other = [{"anchor": "Who", "positive": "storm"}, {"anchor": "what", "positive": "ocean"}]
    prompted = [{"query": "who", "pos": ["bridge"], "neg": ["river 2"], "prompt": "find: "}]
    store = built(tmp_path, pairs, other, prompted)
    assert store.equal == {"queries": 3, "passages": 0} and store.same_text.tolist() == [0, 0, 0, 0, 4, 5]
    known = {ids(text) for text in ("river 0", "river 1", "river 2", "storm")}
    assert related(store, "known", 0) == known
    for query in range(3):
        assert related(store, "negatives", query) == {ids("ocean")}
        assert related(store, "positives", query) == {ids(f"river {query}")}
    assert related(store, "negatives", 5) == {ids("river 2")}
    batch = Planner(store, queries=6, negatives=0, seed=0, mixture=Mixture(one_source=False)).plan(0)
    part = slice_for_rank(batch, np.ones(6), np.ones(len(batch.passages)), 0, 1)
    found = known_positives(store, part, True)
    for row, query in enumerate(part.queries.tolist()):
        in_batch = {tuple(store.passages.tokens(p).tolist()) for p in found.row(row)}
        assert in_batch == (known if query < 4 else related(store, "positives", query))


def test_blank_passages_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positives and negatives with their scores; a title makes a text of a blank one where it is joined."""
    records: list[dict[str, Any]] = [
        {"query": "who", "pos": ["", "river"], "neg": [" \n", "storm"], "pos_scores": [1, 2], "neg_scores": [3, 4]},
        {"query": "what", "pos": ["\u3000"], "neg": ["storm"]},
    ]
    store = built(tmp_path, records)
    said = capsys.readouterr().out
    assert (
        "0.jsonl: 3 passages left out, without a text" in said and "1 of 2 queries left out, without a positive" in said
    )
    assert len(store.queries) == 1 and len(store.passages) == 2
    assert store.positive_scores is not None and store.negative_scores is not None
    assert (store.positive_scores.tolist(), store.negative_scores.tolist()) == ([2.0], [4.0])
    passages = [{"docid": "1", "title": "city", "text": ""}, {"docid": "2", "title": "", "text": "ocean"}]
    tevatron = [{"query_id": 1, "query": "who", "positive_passages": passages, "negative_passages": []}]
    assert len(built(tmp_path, tevatron).passages) == 2
    assert len(built(tmp_path, tevatron, title="drop").passages) == 1


def test_blank_passages_of_a_corpus_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = [{"_id": "d1", "text": "river"}, {"_id": "d2", "text": " ", "title": ""}]
    judged = {"q1": {"d1": 1, "d2": 1}, "q2": {"d2": 1}}
    write_beir(tmp_path / "set", corpus, {"q1": "who", "q2": "what"}, train=judged)
    data = DataConfig((SourceConfig(path=str(tmp_path / "set")),), cache_dir=str(tmp_path / "cache"))
    store = build_or_open(Config(data=data), tiny_tokenizer(), progress=False)
    assert "set: 1 passage left out, without a text" in capsys.readouterr().out
    assert (len(store.queries), len(store.passages), store.sources[0].left_out) == (1, 1, 1)


def test_other_lengths_need_no_new_store(tmp_path: Path) -> None:
    records = [{"query": "who", "pos": ["river"], "neg": ["River", "storm"]}]
    store = built(tmp_path, records)
    again = built(tmp_path, records, model=replace(ModelConfig(), passage_max_tokens=4))
    assert again.folder == store.folder and len(list((tmp_path / "cache").glob("encoded-*"))) == 2


def test_a_cache_that_is_only_read_takes_other_lengths_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the user's own cache, once; as where several people share a store."""
    records = [{"query": "who", "pos": ["river"], "neg": ["River", "storm"]}]
    short, cache = replace(ModelConfig(), passage_max_tokens=4), tmp_path / "cache"
    built(tmp_path, records)
    expected = built(tmp_path, records, model=short)
    for entry in sorted(cache.rglob("*encoded-*-2*"), reverse=True):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    before = sorted(cache.rglob("*"))
    monkeypatch.setenv("BIGBATCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache)
    capsys.readouterr()
    for _ in range(2):
        store = built(tmp_path, records, model=short)
        assert [store.known.row(0).tolist(), store.equal] == [expected.known.row(0).tolist(), expected.equal]
    assert sorted(cache.rglob("*")) == before
    said = capsys.readouterr().out
    assert (
        said.count(f"data.cache_dir={cache} is read-only: encoded-") == 1
        and f"is made in {tmp_path}/own/encoded" in said
    )
