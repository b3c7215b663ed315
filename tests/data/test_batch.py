"""A rank's batch: the tokens inference would see, targets that point at the right columns, the same from any number of
ranks.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from retriever.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, SourceConfig
from retriever.data.batch import Batch, BatchLoader
from retriever.data.layout import Padded
from retriever.data.planner import Planner
from retriever.data.store import Store, build_or_open
from retriever.data.targets import Targets
from retriever.data.tokens import TokenTemplate
from retriever.parallel.world import World
from tests.tiny import random_texts, tiny_tokenizer

MODEL = ModelConfig(query_prompt="query: ", passage_prompt="passage: ", query_max_tokens=12, passage_max_tokens=24)
BUDGET = 100
STEPS = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """50 queries with one or two positives and negatives; every fifth shares a positive with its neighbour."""
    folder = tmp_path_factory.mktemp("store")
    texts = random_texts(200, longest=30, seed=8)
    lines = []
    for i, text in enumerate(texts[:50]):
        positives = [f"{texts[50 + i - (i % 5 == 1)]} p", f"{text} second"][: 1 + i % 2]
        lines.append(
            {"query": f"{text} {i}", "pos": positives, "neg": [f"{t} n" for t in texts[100 + i : 101 + i + i % 2]]}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig(path=str(folder / "train.jsonl"), format="flagembedding")
    config = Config(model=MODEL, data=DataConfig(train=(source,), cache_dir=str(folder / "cache")))
    return build_or_open(config, tiny_tokenizer(), progress=False)


def _loader(
    store: Store,
    *,
    rank: int = 0,
    world_size: int = 1,
    masked: bool = True,
    even_chunks: bool = False,
    packed: bool = False,
) -> BatchLoader:
    config = Config(
        model=replace(MODEL, attention="packed" if packed else "padded"),
        batch=BatchConfig(tokens_per_chunk=BUDGET),
        loss=LossConfig(exchange="gather", mask_known_positives=masked),
    )
    world = World(torch.device("cpu"))
    world.rank, world.size, world.sharded = rank, world_size, even_chunks  # no collective is called
    planner = Planner(store, queries=16, negatives=2, seed=3)
    return BatchLoader(store, planner, TokenTemplate.from_tokenizer(tiny_tokenizer()), config, world)


def _rows(batch: Batch, side: str) -> list[list[int]]:
    """Token ids of every row of one side, in the batch's order, without padding."""
    found: dict[int, list[int]] = {}
    for chunk in batch.chunks:
        assert chunk.tokens.input_ids.numel() <= BUDGET
        if chunk.side == side:
            assert isinstance(chunk.tokens, Padded)
            for row, ids, mask in zip(
                chunk.rows.tolist(), chunk.tokens.input_ids, chunk.tokens.attention_mask, strict=True
            ):
                assert row not in found
                found[row] = ids[mask.bool()].tolist()
    return [found[i] for i in range(len(found))]


def _pairs(batch: Batch) -> set[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """(query's tokens, its positive's tokens, its positive's id)."""
    queries, passages, targets = _rows(batch, "query"), _rows(batch, "passage"), batch.targets
    return {
        (tuple(query), tuple(passages[column]), int(targets.passage_ids[column]))
        for query, column in zip(queries, targets.positives.tolist(), strict=True)
    }


def test_chunks_hold_what_the_tokenizer_gives_at_inference(store: Store) -> None:
    """Each query's and passage's row is tokenizer(prompt + text, truncation=True, max_length) of its side; sizes and
    tokens count them.
    """
    tokenizer, cut, whole = tiny_tokenizer(), 0, 0
    sides = {"query": (store.queries, MODEL.query_max_tokens), "passage": (store.passages, MODEL.passage_max_tokens)}
    planner = Planner(store, queries=16, negatives=2, seed=3)
    for step in range(planner.steps_per_epoch):
        batch, plan = _loader(store).load(step), planner.plan(step)
        for (side, (table, limit)), rows in zip(sides.items(), (plan.queries, plan.passages), strict=True):
            texts = tokenizer.batch_decode([table.tokens(row).tolist() for row in rows])
            assert texts[0].startswith(f"{side} :")
            expected = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
            assert _rows(batch, side) == expected
            cut += sum(len(row) == limit for row in expected)
            whole += sum(len(row) < limit for row in expected)
        assert batch.sizes == (len(plan.queries), len(plan.passages))
        assert batch.tokens == sum(len(row) for side in sides for row in _rows(batch, side))
    assert cut > 20 and whole > 20, "one of truncated and whole texts is missing: this proves little"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_batches_make_up_one_batch(store: Store, world_size: int) -> None:
    """Over all ranks: the same pairs as on one rank, each passage id once, the same number of global queries
    everywhere.
    """
    for step in range(STEPS):
        alone = _loader(store).load(step)
        parts = [_loader(store, rank=rank, world_size=world_size).load(step) for rank in range(world_size)]
        assert set().union(*map(_pairs, parts)) == _pairs(alone)
        assert sum(part.sizes[0] for part in parts) == alone.sizes[0] == alone.targets.global_queries
        assert {part.targets.global_queries for part in parts} == {alone.targets.global_queries}
        ids = torch.cat([part.targets.passage_ids for part in parts]).tolist()
        assert sorted(ids) == sorted(set(ids)) == sorted(alone.targets.passage_ids.tolist())


@pytest.mark.parametrize("packed", [False, True])
def test_even_chunks_are_the_same_number_on_every_rank(store: Store, packed: bool) -> None:
    """Each side has as many as on the rank with most, its own ones first, then fillers of one token and no rows."""
    filled = 0
    for step in range(STEPS):
        plain = [list(_loader(store, rank=rank, world_size=3, packed=packed).load(step).chunks) for rank in range(3)]
        even = [
            list(_loader(store, rank=rank, world_size=3, packed=packed, even_chunks=True).load(step).chunks)
            for rank in range(3)
        ]
        for side in ("query", "passage"):
            own = [[chunk for chunk in chunks if chunk.side == side] for chunks in plain]
            most = max(map(len, own))
            for chunks, real in zip(even, own, strict=True):
                found = [chunk for chunk in chunks if chunk.side == side]
                assert len(found) == most
                assert all(torch.equal(a.rows, b.rows) for a, b in zip(found, real, strict=False))
                assert all(
                    len(filler.rows) == 0 and filler.tokens.input_ids.numel() == 1 for filler in found[len(real) :]
                )
                filled += most - len(real)
        assert [[chunk.side for chunk in chunks] for chunks in even] == [[chunk.side for chunk in even[0]]] * 3
    assert filled > 0, "the ranks have equally many chunks anyway: this proves little"


@pytest.mark.parametrize(
    ("loss", "offload", "ranks", "expected"),
    [
        ({}, False, 1, True),
        ({"exchange": "gather"}, False, 2, True),
        ({"exchange": "ring"}, False, 1, True),
        ({"exchange": "ring"}, False, 2, False),
        ({"strategy": "dense"}, False, 2, False),
        ({}, True, 1, False),
    ],
)
def test_known_pairs_are_looked_up_where_the_loss_reads_them(
    store: Store, loss: dict[str, Any], offload: bool, ranks: int, expected: bool
) -> None:
    batch = BatchConfig(queries=16, tokens_per_chunk=BUDGET, offload=offload)
    config = Config(model=MODEL, data=DataConfig(negatives=2), batch=batch, loss=LossConfig(**loss))
    world = World(torch.device("cpu"))
    world.size = ranks  # no collective is called
    planner = Planner(store, queries=16, negatives=2, seed=3)
    loader = BatchLoader(store, planner, TokenTemplate.from_tokenizer(tiny_tokenizer()), config, world)
    assert (loader.load(0).targets.known_pairs is not None) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_known_pairs_are_looked_up_among_all_ranks_passages(store: Store, world_size: int) -> None:
    """Pair by pair: a row's known passages, its target aside, at their place when the ranks' passages stand one behind
    another.
    """
    found = 0
    for step in range(STEPS):
        parts = [_loader(store, rank=rank, world_size=world_size).load(step).targets for rank in range(world_size)]
        ids = torch.cat([part.passage_ids for part in parts]).tolist()
        for rank, targets in enumerate(parts):
            assert targets.known_pairs is not None and targets.to(torch.device("cpu")).ignores is False
            assert targets.known_pairs.counts == tuple(len(part.passage_ids) for part in parts)
            expected = []
            for i, column in enumerate(targets.positives.tolist()):
                known = set(targets.known_ids[targets.known_ptr[i] : targets.known_ptr[i + 1]].tolist())
                expected += [(i, ids.index(k)) for k in known - {int(targets.passage_ids[column])} if k in ids]
            pairs = targets.known_pairs.pairs
            assert pairs.rows.tolist() == sorted(pairs.rows.tolist()), f"rank {rank}: rows do not ascend"
            assert sorted(zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True)) == sorted(expected)
            found += len(expected)
    assert found > 0, "no query knows a second passage of its batch: this proves little"


def test_targets_know_whether_rows_are_ignored() -> None:
    """Asked once, on the way to the device; a positive that is no column is an error."""
    ids = torch.arange(3)
    for positives, ignores in (([0, 2], False), ([0, -1], True), ([], False)):
        ptr = torch.zeros(len(positives) + 1, dtype=torch.int64)
        moved = Targets(torch.tensor(positives, dtype=torch.int64), ids, ptr, ids[:0], 2).to(torch.device("cpu"))
        assert moved.ignores is ignores and moved.to(torch.device("cpu")).ignores is ignores
    for wrong in (3, -2):
        with pytest.raises(ValueError, match="between -1 and 2 .*received"):
            Targets(torch.tensor([0, wrong]), ids, torch.zeros(3, dtype=torch.int64), ids[:0], 2).to(
                torch.device("cpu")
            )


def test_known_positives_of_a_batch(store: Store) -> None:
    """The target is always among a row's known ids; masking adds the others that the store knows."""
    counts = []
    for masked in (True, False):
        targets = _loader(store, masked=masked).load(0).targets
        counts.append(len(targets.known_ids))
        for i, column in enumerate(targets.positives.tolist()):
            known = targets.known_ids[targets.known_ptr[i] : targets.known_ptr[i + 1]].tolist()
            assert int(targets.passage_ids[column]) in known
        tensors = (targets.positives, targets.passage_ids, targets.known_ptr, targets.known_ids)
        assert {t.dtype for t in tensors} == {torch.int64}
    assert counts[0] > counts[1] == len(targets.positives)


def test_batches_prepared_ahead_are_those_loaded_one_by_one(store: Store) -> None:
    """`batches(first, last)` gives the steps first … last − 1 in order; leaving early stops its thread."""
    loader = _loader(store)
    ahead = list(loader.batches(2, STEPS))
    assert [batch.step for batch in ahead] == list(range(2, STEPS))
    for batch in ahead:
        again = _loader(store).load(batch.step)
        assert _pairs(batch) == _pairs(again) and (batch.epoch, batch.source) == (again.epoch, again.source)
        assert torch.equal(batch.targets.known_ids, again.targets.known_ids)
    assert list(loader.batches(3, 3)) == []
    for _ in loader.batches(0, 10**6):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith(("plan", "chunks"))]


def test_waiting_for_a_plan_counts_as_waiting(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = _loader(store)
    load = loader.load

    def slow(step: int) -> Batch:
        time.sleep(0.2)
        return load(step)

    monkeypatch.setattr(loader, "load", slow)
    assert min([batch.chunks.waited_s for batch in loader.batches(0, 2)]) > 0.1


def test_an_error_while_planning_ahead_reaches_the_reader(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing step's own exception is raised when its turn comes, not swallowed in the thread."""
    loader = _loader(store)
    load = loader.load

    def failing(step: int) -> Batch:
        if step == 2:
            raise OSError("the store went away")
        return load(step)

    monkeypatch.setattr(loader, "load", failing)
    seen = []
    with pytest.raises(OSError, match="went away"):
        for batch in loader.batches(0, 5):
            seen.append(batch.step)
    assert seen == [0, 1]
