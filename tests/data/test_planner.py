"""The planner: which queries and passages a step holds, and on which rank, from (seed, step, store) and nothing
else.
"""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retriever.config import BatchConfig, Config, ConfigError, DataConfig, SourceConfig
from retriever.data import planner as planner_module
from retriever.data.planner import GlobalBatch, Mixture, Planner
from retriever.data.slices import RankSlice, known_positives, slice_for_rank
from retriever.data.store import Csr


def _csr(rows: list[list[int]]) -> Csr:
    return Csr(
        np.cumsum([0, *map(len, rows)]).astype(np.int64), np.array([p for row in rows for p in row], dtype=np.int64)
    )


def _store(
    *sizes: int, seed: int = 0, passages: int | None = None, most_negatives: int = 9, fingerprint: str = "0f" * 16
) -> Any:
    """What the planner reads of a store: sources of `sizes` queries with 1–3 positives and 0–9 negatives, passages
    shared freely.
    """
    draw, total, first = np.random.default_rng(seed), sum(sizes), np.cumsum([0, *sizes])
    passages = passages or 2 * total + 12
    rows = [
        draw.permutation(passages)[: draw.integers(1, 4) + draw.integers(0, most_negatives + 1)] for _ in range(total)
    ]
    split = [min(len(row), int(draw.integers(1, 4))) for row in rows]
    positives = _csr([sorted(row[:k].tolist()) for row, k in zip(rows, split, strict=True)])
    negatives = _csr([sorted(row[k:].tolist()) for row, k in zip(rows, split, strict=True)])
    sources = tuple(
        SimpleNamespace(name=f"s{i}", first=int(first[i]), last=int(first[i + 1])) for i in range(len(sizes))
    )
    relations = {"positives": positives, "negatives": negatives, "known": positives, "same_text": np.arange(total)}
    return SimpleNamespace(fingerprint=fingerprint, sources=sources, **relations)


def _epoch(planner: Planner, epoch: int) -> list[GlobalBatch]:
    steps = planner.steps_per_epoch
    return [planner.plan(step) for step in range(epoch * steps, (epoch + 1) * steps)]


def _queries(batches: list[GlobalBatch]) -> list[int]:
    return np.concatenate([batch.queries for batch in batches]).tolist()


def _same(a: GlobalBatch, b: GlobalBatch) -> bool:
    arrays = zip((a.queries, a.targets, a.passages), (b.queries, b.targets, b.passages), strict=True)
    return (a.step, a.epoch, a.source) == (b.step, b.epoch, b.source) and all(np.array_equal(x, y) for x, y in arrays)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(2, 17),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 2**63),
)
def test_every_query_once_per_pass_in_even_batches(
    sizes: list[int], queries: int, negatives: int, one_source: bool, seed: int
) -> None:
    """An epoch at weight 1 is a permutation of all queries; a source's batches differ by at most one query and none
    exceeds `queries`.
    """
    store = _store(*sizes)
    planner = Planner(store, queries=queries, negatives=negatives, seed=seed, mixture=Mixture(one_source=one_source))
    for epoch in range(2):
        batches = _epoch(planner, epoch)
        assert {batch.epoch for batch in batches} == {epoch}
        assert sorted(_queries(batches)) == list(range(sum(sizes)))
        for name in {batch.source for batch in batches}:
            counts = [len(batch.queries) for batch in batches if batch.source == name]
            assert max(counts) <= queries and max(counts) - min(counts) <= 1
            assert len(counts) == -(-sum(counts) // queries), "fewer batches would do"
        for batch in batches:
            if one_source:
                source = next(s for s in store.sources if s.name == batch.source)
                assert np.all((batch.queries >= source.first) & (batch.queries < source.last))


@pytest.mark.parametrize("positives", [2, 5])
def test_several_positives_of_a_query(positives: int) -> None:
    """A query stands once for each, with shares that sum to one; they rotate, and one of each is as it always was."""
    store = _store(40)
    one, several = (Planner(store, queries=9, negatives=2, seed=3, positives=most) for most in (1, positives))
    seen: dict[int, set[int]] = {}
    for alone, batch in zip(_epoch(one, 1), _epoch(several, 1), strict=True):
        assert batch.shares is not None and batch.query_count == len(alone.queries) == alone.query_count
        assert np.array_equal(np.unique(batch.queries), np.unique(alone.queries))
        for query in alone.queries:
            rows = np.flatnonzero(batch.queries == query)
            known, drawn = set(store.positives.row(query).tolist()), batch.targets[rows].tolist()
            assert len(set(drawn)) == len(drawn) == min(positives, len(known)) and set(drawn) <= known
            assert np.allclose(batch.shares[rows], 1 / len(drawn))
            seen.setdefault(int(query), set()).update(drawn)
        assert set(batch.targets) <= set(batch.passages)
        part = slice_for_rank(batch, np.ones(len(batch.queries)), np.ones(len(batch.passages)), 1, 2)
        assert part.shares is not None and len(part.shares) == len(part.queries)
    for batch in _epoch(several, 2):
        for query, target in zip(batch.queries.tolist(), batch.targets.tolist(), strict=True):
            seen[query].add(target)
    assert all(len(found) == min(2 * positives, len(store.positives.row(q))) for q, found in seen.items())


def test_sources_mix_in_proportion_where_asked() -> None:
    """With one_source false every batch of a large epoch holds queries of every source, about as many as its share."""
    planner = Planner(_store(300, 100), queries=40, negatives=0, seed=5, mixture=Mixture(one_source=False))
    shares = [np.mean(batch.queries < 300) for batch in _epoch(planner, 0)]
    assert min(shares) > 0.5 and max(shares) < 0.95


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(2, 9), st.integers(0, 5), st.integers(0, 99))
def test_targets_and_passages_of_a_batch(size: int, queries: int, negatives: int, seed: int) -> None:
    """Each target is a positive of its query; the passages are the targets and at most `negatives` of each query's own,
    each once.
    """
    store = _store(size, seed=seed)
    planner = Planner(store, queries=queries, negatives=negatives, seed=seed)
    for batch in _epoch(planner, 3):
        assert batch.queries.dtype == batch.targets.dtype == batch.passages.dtype == np.int64
        assert np.all(np.diff(batch.passages) > 0)
        assert all(t in store.positives.row(q) for q, t in zip(batch.queries, batch.targets, strict=True))
        allowed = set(batch.targets.tolist()) | {int(p) for q in batch.queries for p in store.negatives.row(q)}
        assert set(batch.targets.tolist()) <= set(batch.passages.tolist()) <= allowed
        expected = sum(min(negatives, len(store.negatives.row(q))) for q in batch.queries)
        assert len(batch.passages) <= len(set(batch.targets.tolist())) + expected


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 5), st.integers(3, 40), st.integers(0, 99))
@example(3, 2, 3, 17)  # the last query's passages have all come before
def test_a_pool_has_at_most_so_many_passages(size: int, negatives: int, pool: int, seed: int) -> None:
    """A pool holds `pool` passages at most; it has the passages that its queries are the first to bring, perhaps none.
    The batch is the one without pools.
    """
    arguments: dict[str, Any] = {"queries": size, "negatives": negatives, "seed": seed}
    plain = Planner(_store(size, seed=seed), **arguments).plan(0)
    batch = Planner(_store(size, seed=seed), **arguments, pool=max(pool, 2 + 2 * negatives)).plan(0)
    assert _same(plain, batch) and batch.query_pools is not None and batch.passage_pools is not None
    counts = np.bincount(batch.passage_pools)
    assert counts.max() <= max(pool, 2 + 2 * negatives)
    assert np.all(np.diff(batch.query_pools) >= 0), "queries next to each other share a pool"
    first_of = {target: pool for target, pool in zip(batch.targets[::-1], batch.query_pools[::-1], strict=True)}
    own = dict(zip(batch.passages, batch.passage_pools, strict=True))
    assert first_of == {target: own[target] for target in first_of}


@pytest.mark.parametrize("negatives", [1, 2, 3, 20])
def test_negatives_and_positives_rotate(negatives: int) -> None:
    """min(k, c) different negatives of each query in every pass; after ceil(c / k) passes all were seen. Positives take
    turns alike.
    """
    disjoint = [[100 + 20 * q + i for i in range(c)] for q, c in enumerate([0, 1, 2, 3, 5, 7, 8])]
    store = _store(7)
    store.negatives = _csr(
        disjoint
    )  # no two queries share a negative, and none is a positive: a batch shows who drew what
    store.positives = _csr([[10 * q + i for i in range(1 + q % 3)] for q in range(7)])
    planner = Planner(store, queries=7, negatives=negatives, seed=2)
    drawn = [
        [set(batch.passages.tolist()) & set(own) for own in disjoint]
        for batch in (planner.plan(step) for step in range(20))
    ]
    targets = [
        dict(zip(batch.queries.tolist(), batch.targets.tolist(), strict=True)) for batch in map(planner.plan, range(20))
    ]
    for query, own in enumerate(disjoint):
        assert all(len(step[query]) == min(negatives, len(own)) for step in drawn)
        turns = -(-len(own) // negatives)
        for start in range(20 - turns):
            assert set().union(*(step[query] for step in drawn[start : start + turns])) == set(own)
        positives = set(store.positives.row(query).tolist())
        assert all(
            {step[query] for step in targets[start : start + len(positives)]} == positives for start in range(17)
        )


@pytest.mark.parametrize(("one_source", "named"), [(True, "s0"), (False, "the mixture of all sources")])
def test_batches_of_one_query_need_negatives(one_source: bool, named: str) -> None:
    """Three queries in batches of at most two are a batch of two and one of one, whose loss without negatives would be
    nothing.
    """

    def planner(drawn: int, *sizes: int, **relations: Any) -> Planner:
        sources = tuple(SourceConfig(path=str(i)) for i in range(len(sizes)))
        data, batch = DataConfig(train=sources, negatives=drawn), BatchConfig(queries=2, one_source=one_source)
        store = _store(*sizes)
        vars(store).update({"negatives": _csr([[90 + q] for q in range(sum(sizes))]), **relations})
        return Planner.from_config(store, Config(data=data, batch=batch))

    with pytest.raises(ConfigError, match=f"{named} gives batches of one query, and 3 queries of it without negatives"):
        planner(0, 3)
    with pytest.raises(ConfigError, match=f"{named} gives batches of one query, and 1 query of it without negatives"):
        planner(1, 3, negatives=_csr([[90], [], [91]]))
    with pytest.raises(ConfigError, match=f"{named} gives batches of one query, and 4 queries"):
        planner(0, 4, same_text=np.zeros(4, np.int64))
    with pytest.raises(ConfigError, match=f"{named} gives batches of one passage, and 4 queries"):
        planner(0, 4, positives=_csr([[7]] * 4))
    assert planner(1, 3).steps_per_epoch == planner(0, 4).steps_per_epoch == 2
    assert one_source or planner(0, 1, 1).steps_per_epoch == 1  # together they are a batch of two


@pytest.mark.parametrize("one_source", [True, False])
def test_a_weight_is_passes_per_epoch(one_source: bool) -> None:
    """Weight 0.5 visits a fresh half every epoch, weight 2 every query twice, weight 1 once, in every epoch."""
    planner = Planner(_store(20, 6, 10), queries=8, negatives=1, seed=4, mixture=Mixture([10, 12, 10], one_source))
    epochs = [Counter(_queries(_epoch(planner, epoch))) for epoch in range(4)]
    for counts in epochs:
        assert [counts[q] for q in range(20, 36)] == [2] * 6 + [1] * 10
        assert sum(counts[q] for q in range(20)) == 10 and max(counts[q] for q in range(20)) == 1
    for first, second in (epochs[:2], epochs[2:]):
        assert all(first[q] + second[q] == 1 for q in range(20))
    assert any(epochs[0][q] != epochs[2][q] for q in range(20)), "the halves are drawn anew"


def test_a_plan_depends_on_seed_step_and_store_alone() -> None:
    """Order of calls and earlier calls change nothing; seed, fingerprint, epoch and step do."""
    arguments: dict[str, Any] = {"queries": 8, "negatives": 2, "mixture": Mixture([40, 22])}
    store, other = _store(40, 15), _store(40, 15, fingerprint="f0" * 16)
    walked = [planner.plan(step) for planner in [Planner(store, seed=1, **arguments)] for step in range(40)]
    fresh = Planner(store, seed=1, **arguments)
    assert all(_same(fresh.plan(step), walked[step]) for step in reversed(range(40)))
    for changed in (Planner(store, seed=2, **arguments), Planner(other, seed=1, **arguments)):
        assert not any(_same(changed.plan(step), walked[step]) for step in range(40))
    steps = fresh.steps_per_epoch
    first, second = ([(b.source, *b.queries.tolist()) for b in walked[start : start + steps]] for start in (0, steps))
    assert first != second and sorted(first) != sorted(second), "an epoch repeats neither the order nor the batches"


@pytest.mark.parametrize("one_source", [True, False])
def test_resuming_costs_the_same_at_any_step(monkeypatch: pytest.MonkeyPatch, one_source: bool) -> None:
    """Step 10**9 is planned with as many shuffles as step 0, a handful, and is what a planner on its way gets."""
    shuffle = Mock(wraps=planner_module.hashed_order)
    monkeypatch.setattr(planner_module, "hashed_order", shuffle)
    arguments: dict[str, Any] = {"queries": 8, "negatives": 2, "seed": 1, "mixture": Mixture(one_source=one_source)}
    far = Planner(_store(50, 30), **arguments).plan(10**9)
    assert 0 < shuffle.call_count <= 5
    walking = Planner(_store(50, 30), **arguments)
    assert _same([walking.plan(step) for step in range(10**9 - 3, 10**9 + 1)][-1], far)


def test_a_source_without_queries_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="s1 has no query"):
        Planner(_store(5, 0), queries=4, negatives=1, seed=0)


def _slices(
    batch: GlobalBatch, ranks: int, draw: np.random.Generator
) -> tuple[list[RankSlice], np.ndarray, np.ndarray]:
    query_lengths = np.clip(draw.lognormal(np.log(8), 0.35, len(batch.queries)), 4, 32).astype(np.int64)
    passage_lengths = np.clip(draw.lognormal(np.log(70), 0.42, len(batch.passages)), 16, 256).astype(np.int64)
    slices = [slice_for_rank(batch, query_lengths, passage_lengths, rank, ranks) for rank in range(ranks)]
    return slices, query_lengths, passage_lengths


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.sampled_from([1, 2, 3, 8]), st.integers(0, 99))
def test_the_ranks_share_one_global_batch(size: int, passages: int, ranks: int, seed: int) -> None:
    """For any number of ranks the slices are a partition of the same batch, and a query lives on the rank that holds
    its target.
    """
    batch = Planner(_store(size, seed=seed, passages=passages), queries=30, negatives=2, seed=seed).plan(0)
    slices, _, _ = _slices(batch, ranks, np.random.default_rng(seed))
    assert sorted(np.concatenate([s.passages for s in slices]).tolist()) == batch.passages.tolist()
    expected = sorted(zip(batch.queries.tolist(), batch.targets.tolist(), strict=True))
    assert (
        sorted((int(q), int(s.passages[t])) for s in slices for q, t in zip(s.queries, s.targets, strict=True))
        == expected
    )
    assert all(np.all(np.diff(s.passages) > 0) for s in slices)


def _imbalance(pairs: int, negatives: int, seed: int) -> float:
    """Tokens of the largest of 4 ranks over their mean."""
    batch = Planner(_store(pairs, seed=seed), queries=pairs, negatives=negatives, seed=seed).plan(0)
    slices, query_lengths, passage_lengths = _slices(batch, 4, np.random.default_rng(seed))
    tokens = [
        query_lengths[np.isin(batch.queries, s.queries)].sum()
        + passage_lengths[np.isin(batch.passages, s.passages)].sum()
        for s in slices
    ]
    return float(max(tokens) / np.mean(tokens))


@pytest.mark.parametrize("negatives", [0, 7])
def test_slices_are_balanced_by_tokens(negatives: int) -> None:
    """Lognormal lengths on 4 ranks: 2,000 pairs within 1.05 of the mean always, as few as 64 on average."""
    assert _imbalance(2000, negatives, 0) <= 1.05
    assert np.mean([_imbalance(64, negatives, seed) for seed in range(10)]) <= 1.05


def test_known_positives_follow_the_mask_setting() -> None:
    """Masked: all known positives of each query of the slice; else its target alone."""
    store = _store(12)
    batch = Planner(store, queries=12, negatives=1, seed=0).plan(0)
    part = slice_for_rank(batch, np.ones(12), np.ones(len(batch.passages)), 1, 2)
    assert len(part.queries)
    masked, bare = known_positives(store, part, True), known_positives(store, part, False)
    assert [masked.row(i).tolist() for i in range(len(part.queries))] == [
        store.known.row(q).tolist() for q in part.queries
    ]
    assert [bare.row(i).tolist() for i in range(len(part.queries))] == [
        [p] for p in part.passages[part.targets].tolist()
    ]
    assert len(masked.ids) > len(bare.ids)


def test_a_batch_of_200_000_queries_is_planned_in_seconds() -> None:
    """No Python loop runs over queries or passages: planning and slicing stay far below a step's time."""
    store = _store(10)
    draw, n = np.random.default_rng(0), 200_000
    store.sources = (SimpleNamespace(name="large", first=0, last=n),)
    store.positives = store.known = Csr(np.arange(n + 1), draw.permutation(n))
    store.same_text = np.arange(n)
    store.negatives = Csr(20 * np.arange(n + 1), draw.integers(n, 3 * n, 20 * n))
    planner = Planner(store, queries=n, negatives=7, seed=0)
    started = time.process_time()
    batch = planner.plan(12)
    sliced = slice_for_rank(batch, np.full(n, 9), np.full(len(batch.passages), 70), 3, 8)
    elapsed = time.process_time() - started
    assert len(batch.queries) == n and len(sliced.queries) > n // 10
    assert elapsed < 5, f"{elapsed:.1f} s"
