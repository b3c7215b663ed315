"""The arithmetic of a plan: its chunks are the loader's, its retention the gradient cache's, its peak that of a step
played through.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retriever.config import BatchConfig, Config, ModelConfig
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.tokens import SIDES, Side
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import encode_without_graph
from retriever.parallel.world import World
from retriever.plan.forecast import Forecast, Memory, Workload, most_retained
from retriever.plan.measure import COST_FIELDS, ChunkCost, Cost
from retriever.retention import EVERYTHING, NOTHING, Keeps, Retention
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE, random_store

ALONE = World(torch.device("cpu"))
WORKLOAD = Workload(16, {"query": np.arange(4, 20), "passage": np.arange(10, 60)}, 64, packed=True)


def _forecast(
    seed: int = 0, products: float = 0.1, loss: float = 300.0, tokens: int | None = None, first: float = 50.0
) -> Forecast:
    """Seven random costs whose peaks hold what they must hold; products spare more than a graph, and take `products`
    times its memory.
    """
    draw = random.Random(seed)
    costs = []
    for _ in range(7):
        kept, forward = draw.uniform(50, 400), draw.uniform(0.5, 1.0)
        seconds = draw.uniform(0.1, 0.2), forward, 0.5 * forward, draw.uniform(0.1, 1.0)
        peaks = draw.uniform(5, first), kept + draw.uniform(0, 60), kept + draw.uniform(0, 90)
        costs.append(ChunkCost(tokens or draw.randint(10, 99), *seconds, products * kept, kept, *peaks))
    memory = Memory(weights=100, gradients=90, optimizer=180, representations=40)
    return Forecast(WORKLOAD, np.rec.fromrecords(costs, dtype=COST_FIELDS), Cost(0.25, loss), 0.125, memory)


def _keeping(forecast: Forecast, graphs: int, products: int = 0) -> Forecast:
    """The first `graphs` chunks keep their graphs, the next `products` their products."""
    sums = [0, *forecast.costs.tokens.cumsum().astype(int).tolist()]
    return replace(
        forecast, retention=Retention(sums[graphs], sums[min(graphs + products, len(sums) - 1)] - sums[graphs])
    )


def _played_peak(forecast: Forecast) -> float:
    """The step as the trainer does it, event by event: what is alive is added up after each."""
    part, (graphs, products) = forecast.memory, forecast.retention
    alive = {"weights": part.weights, "optimizer": part.optimizer, "representations": part.representations}
    peak, kept = sum(alive.values()), []
    for i, cost in enumerate(forecast.costs):
        graphs -= cost.tokens
        if graphs >= 0:
            peak = max(peak, sum(alive.values()) + cost.forward_bytes)
            alive[f"kept {i}"] = cost.kept_bytes
            kept.append(i)
            continue
        products -= cost.tokens
        if products >= 0:
            alive[f"kept {i}"] = cost.products_bytes
        peak = max(peak, sum(alive.values()) + cost.first_bytes)
    peak = max(peak, sum(alive.values()) + forecast.loss.peak_bytes)
    alive["representations' gradients"] = part.representations
    alive["gradients"] = part.gradients
    for i, cost in enumerate(forecast.costs):
        alive.pop(f"kept {i}", None)  # they are part of the graph from here on
        peak = max(
            peak,
            sum(alive.values()) + cost.backward_bytes,
            sum(alive.values()) + (0 if i in kept else cost.forward_bytes),
        )
    return peak


@pytest.mark.parametrize("seed", range(5))
def test_the_peak_is_that_of_the_step_played_through(seed: int) -> None:
    peaks = set()
    for graphs, products, loss in itertools.product((0, 30, 100, 250, 10_000), (0, 150, 10_000), (0.0, 300.0, 5000.0)):
        for share, first in ((0.1, 50), (0.9, 50), (0.5, 900)):
            forecast = replace(_forecast(seed, share, loss, first=first), retention=Retention(graphs, products))
            assert forecast.peak_bytes == pytest.approx(_played_peak(forecast), rel=1e-12)
            peaks.add(round(forecast.peak_bytes, 6))
    assert len(peaks) > 5


def test_a_step_takes_what_its_parts_take() -> None:
    forecast = _keeping(_forecast(), 2, 3)
    costs: Any = forecast.costs  # numpy declares a slice of a record array as a plain one
    kept, begun, replayed = costs[:2], costs[2:5], costs[5:]
    expected = sum(c.forward_s + c.backward_s for c in kept) + sum(c.first_s + c.again_s + c.backward_s for c in begun)
    expected += sum(c.first_s + c.forward_s + c.backward_s for c in replayed)
    assert forecast.step_s == pytest.approx(expected + 0.25 + 0.125)
    assert forecast.pairs_per_s == pytest.approx(16 / forecast.step_s)
    parts: list[tuple[Keeps, np.recarray]] = [("graph", kept), ("products", begun), ("nothing", replayed)]
    for keeps, part in parts:
        assert forecast.count(keeps) == len(part)
        assert forecast.share(keeps) == pytest.approx(part.tokens.sum() / forecast.costs.tokens.sum())
    assert forecast.retained_bytes.sum() == pytest.approx(kept.kept_bytes.sum() + begun.products_bytes.sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("products", [0.0, 0.1])
def test_as_much_is_retained_as_fits_and_no_more(seed: int, products: float) -> None:
    """As many chunks as can be keep products; where all do, as many of them as can be keep graphs instead."""
    nothing = _forecast(seed, products, tokens=50)
    count = len(nothing.costs)
    seen = set()
    for usable in np.linspace(0.9 * nothing.peak_bytes, 1.1 * _keeping(nothing, count).peak_bytes, 23):
        retention = most_retained(nothing, usable, (None, None), ALONE)
        chosen = replace(nothing, retention=retention)
        graphs, begun = chosen.count("graph"), chosen.count("products")
        seen.add((graphs > 0, begun > 0))
        assert chosen.peak_bytes <= usable or retention == NOTHING
        if products and graphs + begun < count:
            assert graphs == 0 and _keeping(nothing, 0, begun + 1).peak_bytes > usable
        elif graphs < count:
            assert _keeping(nothing, graphs + 1, count if products else 0).peak_bytes > usable
    assert seen == (
        {(False, False), (False, True), (True, True), (True, False)} if products else {(False, False), (True, False)}
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_that_is_much_larger_keeps_no_more_than_fits(seed: int) -> None:
    """Only the first batch is measured, and another source's texts may be longer."""
    nothing = _forecast(seed)
    costs: Any = nothing.costs
    larger = [replace(nothing, costs=costs[[*range(7), *range(more)]]) for more in (7, 3)]
    floor = max(forecast.peak_bytes for forecast in larger)
    for usable in np.linspace(floor, 1.2 * _keeping(nothing, 7).peak_bytes, 23):
        retention = most_retained(nothing, usable, (None, None), ALONE)
        assert all(replace(forecast, retention=retention).peak_bytes <= usable for forecast in larger), retention


def test_what_is_given_stays_and_half_the_room_is_for_larger_batches() -> None:
    """Of the kind that is not given as many chunks as fit, and half of the tokens that there is room for besides."""
    nothing = _forecast()
    one = _keeping(nothing, 1).retention.graphs
    cases = [
        ((2, 0), (None, 0), "kept_bytes"),
        ((0, 2), (0, None), "products_bytes"),
        ((1, 2), (one, None), "products_bytes"),
    ]
    for chunks, given, own in cases:
        kept, dearest = _keeping(nothing, *chunks), (nothing.costs[own] / nothing.costs.tokens).max()
        expected = [tokens + (fixed is None) for tokens, fixed in zip(kept.retention, given, strict=True)]
        assert list(most_retained(nothing, kept.peak_bytes + 3 * dearest, given, ALONE)) == expected
    assert most_retained(nothing, 1e9, (0, 0), ALONE) == NOTHING
    assert most_retained(nothing, 1e9, (None, None), ALONE) == (
        sum(nothing.costs.tokens) + WORKLOAD.tokens_per_chunk,
        0,
    )


def test_products_that_spare_no_time_are_not_kept() -> None:
    nothing = _forecast()
    useless = replace(nothing, costs=nothing.costs.copy())
    useless.costs.again_s = useless.costs.forward_s
    roomy = _keeping(nothing, 4).peak_bytes
    assert most_retained(nothing, roomy, (None, None), ALONE).products > 0
    found = most_retained(useless, roomy, (None, None), ALONE)
    assert found == most_retained(useless, roomy, (None, 0), ALONE) and found.graphs > 0


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_and_retention_are_those_of_the_run(one_layer: Path, tmp_path: Path, packed: bool) -> None:
    """The chunks of the loader's first batch, in order and size; and the same first ones keep their graphs."""
    store = random_store(tmp_path / "store", 40, vocabulary=150)
    planner = Planner(store, queries=24, negatives=0, seed=0)
    config = ModelConfig(str(one_layer), query_max_tokens=QUERY_MAX_TOKENS, passage_max_tokens=PASSAGE_MAX_TOKENS)
    run = Config(
        model=replace(config, attention="packed" if packed else "padded"), batch=BatchConfig(tokens_per_chunk=300)
    )
    loader = BatchLoader(store, planner, TEMPLATE, run, ALONE)
    batch, whole = loader.load(0), planner.plan(0)
    lengths: dict[Side, np.ndarray] = {"query": store.queries.lengths_of(whole.queries) + 2}
    lengths["passage"] = store.passages.lengths_of(whole.passages) + 2
    workload = Workload(24, lengths, 300, packed)
    one = ChunkCost(10, *[20.0] * 9)
    costs = workload.costs({side: dict.fromkeys(workload.measured_places(side), one) for side in SIDES})
    assert costs.tokens.tolist() == [chunk.tokens.input_ids.numel() for chunk in batch.chunks] and len(costs) > 6
    assert [len(texts) for side in SIDES for texts in workload.chunks[side]] == [
        len(chunk.tokens) for chunk in batch.chunks
    ]
    assert workload.tokens == batch.tokens and costs.again_s == pytest.approx(2.0 * costs.tokens)

    encoder = DualEncoder.from_pretrained(config)
    if packed:
        encoder.pack()
        encoder.fuse_layers()
    first, second = costs.tokens[:2].astype(int)
    forecast = replace(_forecast(), workload=workload, costs=costs)
    for graphs in (0, first, first + second - 1, 900, EVERYTHING):
        for products in (0, 500, EVERYTHING) if packed else (0,):
            _, passes = encode_without_graph(encoder, batch, Retention(graphs, products))
            kept = ["graph"] * len(passes.kept) + ["products"] * len(passes.partial) + ["nothing"] * len(passes.states)
            assert kept == replace(forecast, retention=Retention(graphs, products)).keeps.tolist()


def test_costs_of_chunks_that_were_not_measured_lie_between_those_that_were() -> None:
    chunks = WORKLOAD.chunks["passage"]
    half, last = (len(chunks) - 1) // 2, len(chunks) - 1
    by_token = {0: 6.0, half: 3.0, last: 7.0}
    measured = {side: dict.fromkeys(WORKLOAD.measured_places(side), ChunkCost(1, *[2.0] * 9)) for side in SIDES}
    measured["passage"] = {place: ChunkCost(9, *[9 * rate] * 9) for place, rate in by_token.items()}
    costs = WORKLOAD.costs(measured)
    assert costs.tokens.tolist() == [chunk.sum() for side in SIDES for chunk in WORKLOAD.chunks[side]]
    found = (costs.forward_s / costs.tokens)[len(WORKLOAD.chunks["query"]) :]
    assert found == pytest.approx([*np.linspace(6, 3, half + 1), *[3.0] * (last - half - 1), 7.0]) and half > 2
