"""A teacher's scores in batches: groups and dropped false negatives against the records that the store was built
from.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from retriever.config import (
    BatchConfig,
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
)
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store, build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.parallel.world import World
from tests.tiny import random_texts, tiny_tokenizer

Records = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Records, Path]:
    """60 queries with one or two positives and up to six negatives shared among them; every seventh has no scores."""
    folder, draw = tmp_path_factory.mktemp("taught"), random.Random(5)
    queries, passages = random_texts(60, longest=6, seed=1), random_texts(90, shortest=9, longest=14, seed=2)
    records = {}
    for i, query in enumerate(queries):
        chosen = draw.sample(passages[:30] if i % 2 else passages, draw.randint(2, 7))
        positives = draw.randint(1, min(2, len(chosen) - 1))
        record: dict[str, Any] = {"query_id": f"q{i}", "query": f"{query} {i}"}
        for side, texts in (("positive", chosen[:positives]), ("negative", chosen[positives:])):
            record[f"{side}_passages"] = [{"docid": text, "title": "", "text": text} for text in texts]
            if i % 7:
                record[f"{side}_scores"] = [round(draw.gauss(1.0 if side == "positive" else 0.0, 1), 3) for _ in texts]
        records[record["query_id"]] = record
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    return build_or_open(_config(folder), tiny_tokenizer(), progress=False), records, folder


def _config(folder: Path, **loss: Any) -> Config:
    return Config(
        run=RunConfig(seed=2),
        model=ModelConfig(name_or_path="unused", query_max_tokens=16, passage_max_tokens=32),
        data=DataConfig(
            train=(SourceConfig(path=str(folder / "train.jsonl")),), negatives=2, cache_dir=str(folder / "cache")
        ),
        batch=BatchConfig(queries=20, tokens_per_chunk=64),
        loss=LossConfig(**loss),
    )


def _loader(store: Store, folder: Path, rank: int = 0, ranks: int = 1, **loss: Any) -> BatchLoader:
    config = _config(folder, **loss)
    world = World(torch.device("cpu"))
    world.rank, world.size = rank, ranks  # no collective is called
    return BatchLoader(
        store, Planner.from_config(store, config), TokenTemplate.from_tokenizer(tiny_tokenizer()), config, world
    )


def _groups(store: Store, loader: BatchLoader, step: int) -> dict[str, list[tuple[str, float]]]:
    """Query id -> its group as (passage id, score)."""
    targets = loader.load(step).targets
    assert targets.groups is not None
    ptr, ids, scores = targets.groups
    by_target = {int(targets.passage_ids[c]): i for i, c in enumerate(targets.positives.tolist())}
    found = {}
    for i, query in enumerate(_queries(store, loader, step)):
        rows = range(int(ptr[i]), int(ptr[i + 1]))
        found[query] = [(str(store.passages.ids[int(ids[r])].as_py()), round(float(scores[r]), 3)) for r in rows]
        assert not len(rows) or int(ids[rows[0]]) == int(targets.passage_ids[targets.positives[i]])
    assert by_target
    return found


def _queries(store: Store, loader: BatchLoader, step: int) -> list[str]:
    from retriever.data.slices import slice_for_rank

    whole = loader._planner.plan(step)
    lengths = loader._queries.lengths(whole.queries), loader._passages.lengths(whole.passages)
    return [
        str(store.queries.ids[q].as_py())
        for q in slice_for_rank(whole, *lengths, loader._world.rank, loader._world.size).queries
    ]


def _scores(record: dict[str, Any], side: str) -> dict[str, float]:
    return dict(zip((p["docid"] for p in record[f"{side}_passages"]), record.get(f"{side}_scores", []), strict=False))


@pytest.mark.parametrize("margin", [None, 0.3])
def test_a_group_is_the_target_and_the_scored_negatives_in_the_batch(
    built: tuple[Store, Records, Path], margin: float | None
) -> None:
    """As the records say, whoever brought a negative into the batch; with a margin without those scored above the
    target less it.
    """
    store, records, folder = built
    loader, empty, dropped = _loader(store, folder, kl_weight=1.0, teacher_margin=margin), 0, 0
    for step in range(3):
        present = {str(store.passages.ids[int(i)].as_py()) for i in loader.load(step).targets.passage_ids}
        for query, group in _groups(store, loader, step).items():
            positive, negative = (_scores(records[query], side) for side in ("positive", "negative"))
            if not positive:
                assert group == []
                empty += 1
                continue
            target, score = group[0]
            assert positive[target] == score
            expected = {p: s for p, s in negative.items() if p in present}
            kept = {p: s for p, s in expected.items() if margin is None or s <= score - margin}
            dropped += len(expected) - len(kept)
            assert dict(group[1:]) == kept
    assert empty > 0 and (dropped > 10) == (margin is not None)


def test_false_negatives_by_teacher_are_known(built: tuple[Store, Records, Path]) -> None:
    """With a margin alone, what the teacher scores too high is no negative of its query, and nothing else changes."""
    store, records, folder = built
    plain, dropped = _loader(store, folder), 0
    loader = _loader(store, folder, teacher_margin=0.3)
    for step in range(3):
        before, after = plain.load(step).targets, loader.load(step).targets
        assert after.groups is None and torch.equal(before.passage_ids, after.passage_ids)
        present = {str(store.passages.ids[int(i)].as_py()) for i in before.passage_ids}
        for i, query in enumerate(_queries(store, loader, step)):
            known = [t.known_ids[t.known_ptr[i] : t.known_ptr[i + 1]].tolist() for t in (before, after)]
            target = str(store.passages.ids[int(before.passage_ids[before.positives[i]])].as_py())
            line = _scores(records[query], "positive").get(target, float("nan")) - 0.3
            false = {p for p, s in _scores(records[query], "negative").items() if s > line and p in present}
            assert {str(store.passages.ids[p].as_py()) for p in set(known[1]) - set(known[0])} == false
            assert known[1] == sorted(known[1]) and len(known[1]) == len(known[0]) + len(false)
            dropped += len(false)
    assert dropped > 10


def test_the_ranks_groups_are_the_one_ranks(built: tuple[Store, Records, Path]) -> None:
    """A group does not depend on where its passages live."""
    store, _, folder = built
    for step in range(3):
        alone = _groups(store, _loader(store, folder, margin_mse_weight=1.0), step)
        parts = [_groups(store, _loader(store, folder, rank, 3, margin_mse_weight=1.0), step) for rank in range(3)]
        assert {query: group for part in parts for query, group in part.items()} == alone
        assert sum(map(len, parts)) == len(alone)


def test_data_without_scores_are_refused(built: tuple[Store, Records, Path], tmp_path: Path) -> None:
    """Asked to distil from data that no teacher has scored, the loader names the keys and the command."""
    _, records, _ = built
    bare = [{key: value for key, value in record.items() if not key.endswith("scores")} for record in records.values()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    store = build_or_open(_config(tmp_path), tiny_tokenizer(), progress=False)
    losses: list[dict[str, Any]] = [{"kl_weight": 1.0}, {"teacher_margin": 0.1}]
    for loss in losses:
        with pytest.raises(ConfigError, match="need a teacher's scores"):
            _loader(store, tmp_path, **loss)


def test_scored_pairs_need_no_scored_negatives(built: tuple[Store, Records, Path]) -> None:
    """CoSENT takes the pairs that have a score, and refuses data without any."""
    store, records, folder = built
    positives_alone = copy.copy(store)
    positives_alone.negative_scores = None
    groups = _groups(positives_alone, _loader(positives_alone, folder, cosent_weight=1.0), 0)
    assert any(groups.values())
    for query, group in groups.items():
        scores = _scores(records[query], "positive")
        assert all(scores[passage] == score for passage, score in group) and len(group) <= 1
        assert bool(group) == bool(scores)
    with pytest.raises(ConfigError, match="need a teacher's scores"):
        _loader(positives_alone, folder, kl_weight=1.0)
    positives_alone.positive_scores = None
    with pytest.raises(ConfigError, match="cosent_weight needs scores of the positives"):
        _loader(positives_alone, folder, cosent_weight=1.0)


def test_own_negatives_are_those_in_the_batch(built: tuple[Store, Records, Path]) -> None:
    """Whichever query brought them, and only where the loss asks for them."""
    store, records, folder = built
    assert _loader(store, folder).load(0).targets.own is None
    loader, brought_by_others = _loader(store, folder, hardness="own", hardness_strength=5.0), 0
    for step in range(3):
        targets = loader.load(step).targets
        assert targets.own is not None
        present = {str(store.passages.ids[int(i)].as_py()) for i in targets.passage_ids}
        for i, query in enumerate(_queries(store, loader, step)):
            ids = targets.own.ids[targets.own.ptr[i] : targets.own.ptr[i + 1]].tolist()
            negatives = {passage["docid"] for passage in records[query]["negative_passages"]}
            assert {str(store.passages.ids[p].as_py()) for p in ids} == negatives & present and len(set(ids)) == len(
                ids
            )
            brought_by_others += len(ids) > 2
    assert brought_by_others > 0
