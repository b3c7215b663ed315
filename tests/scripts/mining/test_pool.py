"""The pool of a mining: numbers, equal texts and positives against dictionaries, its errors, and the memory that
reading and BM25 take.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from retriever.config import SourceConfig
from retriever.data.formats import DataError, Passage, open_source
from retriever.parallel.world import World
from scripts.mine_negatives import main
from scripts.mining import pool as pool_module
from scripts.mining.pool import Passages, Pool, write_passages
from tests.beir import write_beir
from tests.commands import RankAlone
from tests.tiny import random_texts


def _pool(folder: Path, work: Path, **options: Any) -> Pool:
    return Pool(open_source(SourceConfig(path=str(folder), **options)), "join", " ", work, World(torch.device("cpu")))


def test_passages_are_read_back_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_BATCH_ROWS", 7)
    written = [
        Passage(f"p{i}" if i % 3 else None, f"text {i} – {'é' * i}", "title" if i % 2 else "") for i in range(30)
    ]
    write_passages(tmp_path / "passages.arrow", written)
    passages = Passages(tmp_path / "passages.arrow")
    assert list(passages) == written and [passages[row] for row in (29, 0, 6, 7, 13, 14)] == [
        written[row] for row in (29, 0, 6, 7, 13, 14)
    ]


def test_equal_texts_are_one_passage_whatever_their_ids(tmp_path: Path) -> None:
    """Numbers follow the corpus, a title and a text joined are compared; a query knows its own text even where it is no
    positive.
    """
    corpus = [
        {"_id": "a", "title": "red", "text": "fox"},
        {"_id": "b", "title": "", "text": "grey goose"},
        {"_id": "c", "title": "", "text": "red fox"},
        {"_id": "d", "title": "", "text": "blue whale"},
        {"_id": "e", "title": "", "text": "grey goose"},
    ]
    queries = {"x": "which fox", "y": "blue whale", "z": "unjudged", "w": "which fox"}
    folder = write_beir(tmp_path / "data", corpus, queries, train={"x": {"c": 1, "a": 1}, "y": {"e": 1}, "w": {"d": 1}})
    pool = _pool(folder, tmp_path / "pool")
    assert list(pool.texts()) == ["red fox", "grey goose", "blue whale"] == [pool.text(number) for number in range(3)]
    assert [passage.id for passage in pool.passages] == ["a", "b", "d"]
    assert [(query.id, query.positives, query.own) for query in pool.queries] == [
        ("x", [0], None),
        ("y", [1], 2),
        ("w", [2], None),
    ]


def test_passages_of_examples_come_behind_the_corpus(tmp_path: Path) -> None:
    """Their texts may be the corpus's under another id; a query whose examples lie apart; one without positives is left
    out.
    """
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"docid": f"p{i}", "text": f"passage {i}"}) + "\n" for i in range(3))
    )
    with (tmp_path / "train.jsonl").open("w") as stream:
        for query, positives, negatives in (
            ("1", ["new"], ["passage 1", "old"]),
            ("2", [], ["old"]),
            ("1", ["passage 2"], []),
        ):
            sides = {"positive_passages": positives, "negative_passages": negatives}
            listed = {name: [{"docid": text, "text": text} for text in texts] for name, texts in sides.items()}
            stream.write(json.dumps({"query_id": query, "query": f"query {query}"} | listed) + "\n")
    pool = _pool(tmp_path / "train.jsonl", tmp_path / "pool", corpus=str(tmp_path / "corpus.jsonl"), format="tevatron")
    texts = list(pool.texts())
    assert texts == [f"passage {i}" for i in range(3)] + ["new", "old"]
    assert [(q.id, q.positives) for q in pool.queries] == [("1", [3, 2])] and pool.left_out == 1


@pytest.mark.parametrize(
    ("corpus", "positives", "message"),
    [
        ([("a", "one"), ("b", "two"), ("a", "three")], ["b"], "passage id 'a' stands for two texts in the corpus"),
        (
            [("a", "one"), ("b", "two"), ("a", "one")],
            ["b", "nowhere"],
            "passage 'nowhere', a positive of query 'q', is not",
        ),
        ([("a", "one")], ["a", "b", "c"], "passage 'b', a positive of query 'q', is not in its corpus"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused(
    tmp_path: Path, corpus: list[tuple[str, str]], positives: list[str], message: str
) -> None:
    folder = write_beir(
        tmp_path / "data",
        [{"_id": i, "text": text} for i, text in corpus],
        {"q": "query"},
        train={"q": dict.fromkeys(positives, 1)},
    )
    with pytest.raises(DataError, match=message):
        _pool(folder, tmp_path / "pool")


def test_other_ranks_read_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_beir(tmp_path / "data", [{"_id": "a", "text": "one"}], {"q": "query"}, train={"q": {"a": 1}})
    first = _pool(folder, tmp_path / "pool")
    monkeypatch.setattr("scripts.mining.pool.PoolReader", None)
    source = open_source(SourceConfig(path=str(folder)))
    second = Pool(source, "join", " ", tmp_path / "pool", RankAlone(1, 2))
    assert second.queries == first.queries and list(second.passages) == list(first.passages)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """28 MiB of text are read, indexed, searched, scored by BM25 and written as negatives within half of that."""
    draw = random.Random(1)
    words = [f"{word}{'x' * 600}{i}" for i, word in enumerate(random_texts(300, shortest=1, longest=1, seed=5))]
    corpus = ({"_id": f"p{i}", "text": " ".join(draw.choices(words, k=8))} for i in range(6_000))
    queries = {f"q{i}": " ".join(draw.choices(words, k=3)) for i in range(64)}
    folder = write_beir(tmp_path / "data", corpus, queries, train={f"q{i}": {f"p{i}": 1} for i in range(64)})
    total = (folder / "corpus.jsonl").stat().st_size
    arguments = ["--data", str(folder), "--retrievers", "bm25", "--teacher", "bm25", "--threads", "1"]
    main(
        [*arguments, "--limit", "2", "--output-dir", str(tmp_path / "imports")]
    )  # code that is loaded now is not counted
    tracemalloc.start()
    try:
        main([*arguments, "--output-dir", str(tmp_path / "mined")])
        peak = tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory()
    finally:
        tracemalloc.stop()
    records = [json.loads(line) for line in (tmp_path / "mined" / "train.jsonl").read_text().splitlines()]
    assert len(records) == 64 and all(len(record["negative_passages"]) == 8 for record in records)
    print(f"texts {total / 2**20:.1f} MiB, peak {peak / 2**20:.1f} MiB")
    assert total > 27 * 2**20 and peak < total / 2
