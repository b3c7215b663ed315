"""The token store: what it holds equals what the tokenizer and plain dictionaries say, and a second run reuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from retriever.config import Config, DataConfig, ModelConfig, SourceConfig
from retriever.data import store as store_module
from retriever.data import text_table
from retriever.data.formats import DataError
from retriever.data.store import Csr, Store, TextTable, build_or_open
from retriever.data.text_table import TextTableWriter
from tests.beir import write_beir
from tests.commands import change_unseen
from tests.tiny import random_texts, tiny_tokenizer


def write(path: Path, *records: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(tmp_path: Path, *sources: SourceConfig | str, **data: Any) -> Config:
    train = tuple(source if isinstance(source, SourceConfig) else SourceConfig(path=source) for source in sources)
    model = ModelConfig(query_prompt="find: ", passage_prompt="text: ")
    return Config(model=model, data=DataConfig(train=train, cache_dir=str(tmp_path / "cache"), **data))


def built(tmp_path: Path, *sources: SourceConfig | str, **data: Any) -> Store:
    return build_or_open(config(tmp_path, *sources, **data), tiny_tokenizer(), progress=False)


def texts_of(table: TextTable, rows: Any = None) -> list[tuple[int, ...]]:
    return [tuple(table.tokens(row).tolist()) for row in (range(len(table)) if rows is None else rows)]


def token_ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def related(relation: Csr, store: Store, query: int) -> set[tuple[int, ...]]:
    return set(texts_of(store.passages, relation.row(query)))


def passages(*texts: str) -> set[tuple[int, ...]]:
    return {token_ids(f"text: {text}") for text in texts}


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """40 queries on 60 documents, 20 of which nothing refers to; every third document has a title."""
    folder, texts = tmp_path / "beir", random_texts(100, longest=60, seed=3)
    titles = [["", "", "river storm"][i % 3] for i in range(60)]
    corpus = ({"_id": f"d{i}", "title": titles[i], "text": f"{texts[i]} {i}"} for i in range(60))
    queries = {f"q{i}": f"{texts[60 + i]} {i}" for i in range(40)}
    return write_beir(
        folder, corpus, queries, train={f"q{i}": {f"d{i}": 1, f"d{(i + 1) % 40}": i % 2} for i in range(40)}
    )


@pytest.mark.parametrize("title", ["join", "drop"])
def test_tokens_equal_the_tokenizers_own(
    tmp_path: Path, beir: Path, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_table, "_BATCH_TEXTS", 7)  # many batches and a rest
    store = built(tmp_path, str(beir), title=title, title_separator=" - ")
    documents = {d["_id"]: d for d in map(json.loads, (beir / "corpus.jsonl").read_text().splitlines())}
    queries = {q["_id"]: q["text"] for q in map(json.loads, (beir / "queries.jsonl").read_text().splitlines())}
    assert (len(store.queries), len(store.passages)) == (40, 40)  # the 20 that nothing refers to are left out
    for row, tokens in enumerate(texts_of(store.queries)):
        assert (
            tokens
            == token_ids("find: " + queries[store.queries.ids[row].as_py()])
            == tuple(store.queries.tokens(row).tolist())
        )
    for row, tokens in enumerate(texts_of(store.passages)):
        document = documents[store.passages.ids[row].as_py()]
        joined = (
            f"{document['title']} - {document['text']}" if title == "join" and document["title"] else document["text"]
        )
        assert tokens == token_ids("text: " + joined)
    assert store.passages.lengths.tolist() == [len(tokens) for tokens in texts_of(store.passages)]
    some = np.array([39, 0, 7, 7])
    assert store.passages.lengths_of(some).tolist() == [len(tokens) for tokens in texts_of(store.passages, some)]
    assert store.passages.lengths_of(some).dtype == np.int64 and store.passages.tokens(0).dtype == np.uint16
    assert not store.passages.tokens(0).flags.writeable


def test_relations_equal_the_judgments(tmp_path: Path, beir: Path) -> None:
    store = built(tmp_path, str(beir))
    ids = store.passages.ids.to_pylist()
    for i in range(40):
        row = store.queries.ids.to_pylist().index(f"q{i}")
        second = f"d{(i + 1) % 40}"
        assert {ids[p] for p in store.positives.row(row)} == ({f"d{i}", second} if i % 2 else {f"d{i}"})
        assert {ids[p] for p in store.negatives.row(row)} == (set() if i % 2 else {second})
        assert store.known.row(row).tolist() == store.positives.row(row).tolist() == sorted(store.positives.row(row))


def test_take_equals_row_by_row(tmp_path: Path, beir: Path) -> None:
    store = built(tmp_path, str(beir))
    rows = np.array([5, 0, 39, 5, 6])
    for relation in (store.positives, store.negatives):
        taken = relation.take(rows)
        assert [taken.row(i).tolist() for i in range(5)] == [relation.row(row).tolist() for row in rows]
        assert taken.ptr[-1] == len(taken.ids) > 0
        empty = relation.take(np.empty(0, np.int64))
        assert empty.ptr.tolist() == [0] and len(empty.ids) == 0


def test_equal_final_texts_are_one_passage_across_sources_and_formats(tmp_path: Path) -> None:
    columns = write(tmp_path / "c.jsonl", {"anchor": "who", "positive": "city river", "negative": "storm"})
    passage = {"docid": "77", "title": "city", "text": "river"}
    tevatron = write(
        tmp_path / "t.jsonl", {"query_id": 0, "query": "who", "positive_passages": [passage], "negative_passages": []}
    )
    joined = built(tmp_path, columns, tevatron)
    assert [(s.name, s.format, s.first, s.last) for s in joined.sources] == [
        ("c.jsonl", "columns", 0, 1),
        ("t.jsonl", "tevatron", 1, 2),
    ]
    assert set(texts_of(joined.passages)) == passages("city river", "storm")
    assert joined.positives.row(0).tolist() == joined.positives.row(1).tolist()
    dropped = built(tmp_path, columns, tevatron, title="drop")
    assert set(texts_of(dropped.passages)) == passages("city river", "storm", "river")


def test_queries_merge_by_id_within_a_source_and_never_by_text(tmp_path: Path) -> None:
    rows = [
        {"query_id": "x", "anchor": "who", "positive": "a river", "negative": ["storm", "a city", "storm"]},
        {"query_id": "y", "anchor": "who", "positive": "ocean", "negative": []},
        {"query_id": "x", "anchor": "who", "positive": ["a city", "a river"], "negative": ["summer"]},
    ]
    path, again = write(tmp_path / "c.jsonl", *rows), write(tmp_path / "d.jsonl", rows[0])
    store = built(tmp_path, path, again)
    assert store.queries.ids.to_pylist() == ["x", "y", "x"]
    assert store.equal == {"queries": 2, "passages": 0}
    assert related(store.positives, store, 0) == passages("a river", "a city")
    assert related(store.negatives, store, 0) == passages("storm", "summer")  # a city is a positive by the third row
    assert related(store.positives, store, 2) == passages("a river")
    assert related(store.negatives, store, 2) == passages("storm")  # a city is a positive of the same text elsewhere
    assert store.same_text.tolist() == [0, 0, 0]
    assert related(store.known, store, 0) == passages("a river", "a city", "ocean")
    with pytest.raises(DataError, match=r"'c\.jsonl': query id 'x' stands for two texts, the second 'where'"):
        built(tmp_path, write(tmp_path / "c.jsonl", rows[0], {**rows[2], "anchor": "where"}))


def test_a_passage_that_is_the_querys_own_text_is_known_and_no_negative(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"anchor": "a river", "positive": "ocean", "negative": ["a river", "storm"]},
        {"anchor": "storm", "positive": "a city", "negative": "ocean"},
    ]
    store = built(tmp_path, write(tmp_path / "c.jsonl", *rows))
    assert related(store.known, store, 0) == passages("ocean", "a river")
    assert related(store.negatives, store, 0) == passages("storm")
    assert related(store.known, store, 1) == passages("a city", "storm")  # though only the other query names it
    assert related(store.positives, store, 1) == passages("a city")


def test_prompt_of_a_record_and_scores_follow_their_passages(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "query": "who",
            "pos": ["storm", "city"],
            "neg": ["ocean", "city", "river"],
            "pos_scores": [3, 2],
            "neg_scores": [1, 9, 0.5],
        },
        {"query": "who", "pos": ["city"], "neg": ["ocean"], "prompt": "search "},
    ]
    store = built(tmp_path, write(tmp_path / "f.jsonl", *rows))
    assert texts_of(store.queries) == [token_ids("find: who"), token_ids("search who")]
    expected = (
        (store.positives, store.positive_scores, {"storm": 3, "city": 2}),
        (store.negatives, store.negative_scores, {"ocean": 1, "river": 0.5}),
    )
    for relation, scores, wanted in expected:
        assert scores is not None
        found = dict(zip(texts_of(store.passages, relation.row(0)), scores[: relation.ptr[1]].tolist(), strict=True))
        assert found == {token_ids(f"text: {text}"): score for text, score in wanted.items()}
        assert np.isnan(scores[relation.ptr[1] :]).all() and len(scores) == relation.ptr[2]
    assert built(tmp_path, write(tmp_path / "g.jsonl", rows[1])).positive_scores is None


def test_queries_without_a_positive_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": "where", "pos": [], "neg": ["city"]}, {"query": "who", "pos": ["river"]}]
    store = built(tmp_path, write(tmp_path / "f.jsonl", *rows))
    said = capsys.readouterr().out
    assert (
        "f.jsonl: 1 of 2 queries left out, without a positive passage" in said
        and "with the text of an earlier one" not in said
    )
    assert texts_of(store.queries) == [token_ids("find: who")] and store.sources[0].left_out == 1
    assert related(store.positives, store, 0) == passages("river") and len(store.negatives.ids) == 0
    with pytest.raises(DataError, match=r"none of its queries \(1\) has a positive"):
        built(tmp_path, write(tmp_path / "f.jsonl", rows[0]))


def test_first_figures_of_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths have prompt and special tokens; a text that another source brought is a repeated one."""
    words = random_texts(12, longest=60, seed=5)
    first = [{"anchor": words[i], "positive": words[6 + i % 4]} for i in (0, 1, 2, 3, 3, 4)]
    second = {"query": words[5], "pos": [words[6]], "neg": [words[10], words[11], words[10]]}
    sources = write(tmp_path / "pairs.jsonl", *first), write(tmp_path / "f.jsonl", second)
    asked = config(tmp_path, *sources)
    asked = replace(asked, model=replace(asked.model, query_max_tokens=24, passage_max_tokens=15))
    store = build_or_open(asked, tiny_tokenizer(), progress=True)
    found = json.loads((store.folder / "manifest.json").read_text())["statistics"]
    queries, passages = (
        np.array([len(tiny_tokenizer()(prompt + words[i])["input_ids"]) for i in rows])
        for prompt, rows in (("find: ", (0, 1, 2, 3, 3, 4)), ("text: ", (6, 7, 8, 9)))
    )
    assert 0 < (queries > 24).mean() < 1 and 0 < (passages > 15).mean() < 1
    assert found[0] == {
        "queries": 6,
        "repeated_queries": 1,
        "positives": 6,
        "negatives": 0,
        "passages": 6,
        "repeated_passages": 2,
        "query_tokens": queries.mean(),
        "passage_tokens": passages.mean(),
        "queries_cut": (queries > 24).mean(),
        "passages_cut": (passages > 15).mean(),
    }
    assert {name: found[1][name] for name in ("positives", "negatives", "passages", "repeated_passages")} == {
        "positives": 1,
        "negatives": 2,
        "passages": 4,
        "repeated_passages": 2,
    }
    said = capsys.readouterr().out
    assert f"pairs.jsonl: 6 queries of {queries.mean():.1f} tokens ({(queries > 24).mean():.1%} cut at 24)" in said


def test_an_id_that_the_corpus_lacks_is_named(tmp_path: Path, beir: Path) -> None:
    with (beir / "qrels/train.tsv").open("a") as qrels:
        qrels.write("q3\tgone\t1\nq4\tlost\t0\n")
    with pytest.raises(
        DataError, match=r"'beir': 2 passage ids are not in its corpus; the first is 'gone', a positive of query 'q3'"
    ):
        built(tmp_path, str(beir))
    assert not list((tmp_path / "cache").glob(".*"))
    record = {"query_id": 1, "query": "who", "positive_passages": [{"docid": "5", "title": ""}]}
    with pytest.raises(DataError, match=r"the first is '5', a positive of query '1'"):
        built(tmp_path, write(tmp_path / "t.jsonl", record))


def test_wide_vocabularies_take_four_bytes_and_an_id_is_never_cut() -> None:
    tokenizer = tiny_tokenizer()
    assert text_table.token_dtype(tokenizer) == np.uint16
    tokenizer.add_tokens([f"added{i}" for i in range(70_000)])
    assert text_table.token_dtype(tokenizer) == np.uint32


def test_a_second_run_builds_nothing(tmp_path: Path, beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(tmp_path, str(beir))
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}

    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(store_module, "StoreBuilder", refuse)
    same = config(tmp_path, SourceConfig(path=str(beir), weight=0.5))
    tokenizer = tiny_tokenizer()
    tokenizer(["a river", "storm"], padding=True, truncation=True, max_length=3)  # leaves traces in the backend
    second = build_or_open(same, tokenizer, progress=False)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == before
    others = [
        replace(same, data=replace(same.data, title="drop")),
        replace(same, model=replace(same.model, query_prompt="")),
        replace(same, model=replace(same.model, passage_prompt="")),
        replace(same, data=replace(same.data, train=(SourceConfig(path=str(beir), limit=3),))),
    ]
    for other in others:
        with pytest.raises(AssertionError, match="built again"):
            build_or_open(other, tiny_tokenizer(), progress=False)
    with pytest.raises(AssertionError, match="built again"):
        build_or_open(same, tiny_tokenizer("roberta"), progress=False)


def test_a_damaged_store_is_built_again(tmp_path: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file cut short, missing or full of zeros, a changed bit, a manifest that is none."""
    store = built(tmp_path, str(beir))
    whole, folder = texts_of(store.passages), store.folder
    contents = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def flipped(content: bytes) -> bytes:
        return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]

    damages: dict[str, tuple[Callable[[bytes], bytes] | None, ...]] = {
        "passages/tokens.npy": (lambda c: c[:-2], flipped, lambda c: bytes(len(c)), None),
        "known.ids.npy": (flipped,),
        "manifest.json": (
            lambda c: b"[]",
            lambda c: b"{}",
            lambda c: b"\xff",
            lambda c: b'{"files": 3}',
            flipped,
            None,
        ),
        "checksums.json": (lambda c: b"{",),
    }
    for name, how in ((name, how) for name, several in damages.items() for how in several):
        file = folder / name
        if how is None:
            file.unlink()
        else:
            file.write_bytes(how(contents[file]))
        assert texts_of(built(tmp_path, str(beir)).passages) == whole
        said = [line for line in capsys.readouterr().out.splitlines() if "built again" in line]
        assert len(said) == 1 and said[0].startswith(f"{file} is ") and said[0].endswith(" and is built again"), said
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == contents


def test_a_store_is_verified_again_on_request(tmp_path: Path, beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that changes without the file's time is found by `data.verify`."""
    tokens = built(tmp_path, str(beir)).folder / "passages/tokens.npy"
    built(tmp_path, str(beir))
    content = change_unseen(tokens, monkeypatch)
    built(tmp_path, str(beir))
    assert tokens.read_bytes() != content
    built(tmp_path, str(beir), verify=True)
    assert tokens.read_bytes() == content


def test_an_empty_text_under_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path) -> None:
    """It would have no token to embed; with special tokens around it, it has."""
    tokenizer = tiny_tokenizer()
    with TextTableWriter(tmp_path / "wrapped", tokenizer) as writer:
        writer.add("p1", "")
    assert TextTable(tmp_path / "wrapped").lengths.tolist() == [0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    with pytest.raises(DataError, match="'p2' has no token"), TextTableWriter(tmp_path / "bare", tokenizer) as writer:
        writer.add("p1", "river")
        writer.add("p2", "")
