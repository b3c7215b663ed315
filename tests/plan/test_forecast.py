"""The arithmetic of a plan: its chunks are the loader's, its retention the gradient cache's, its peak that of a step played through."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retriever.config import ModelConfig
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import encode_without_graph
from retriever.plan.forecast import (
    SIDES,
    Forecast,
    Memory,
    Workload,
    costs_like,
    costs_of,
    filled,
    most_retained,
    scaled_loss,
    settled_size,
)
from retriever.plan.measure import ChunkCost, Cost
from retriever.retention import EVERYTHING, NOTHING, Keeps, Retention
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE, random_store
from tests.tiny import save_tiny_model

MEMORY = Memory(weights=100, gradients=90, optimizer=180, representations=40, loss=300)
LENGTHS = {"query": np.arange(4, 20), "passage": np.arange(10, 60)}


def _costs(count: int, seed: int = 0, products: float = 0.1) -> list[ChunkCost]:
    """Random costs whose peaks hold what they must hold; products spare more than a graph, and take `products` times its memory."""
    draw = random.Random(seed)
    costs = []
    for _ in range(count):
        tokens, kept = draw.randint(10, 99), draw.uniform(50, 400)
        forward = draw.uniform(0.5, 1.0)
        seconds = draw.uniform(0.1, 0.2), forward, 0.5 * forward, draw.uniform(0.1, 1.0)
        peaks = draw.uniform(5, 50), kept + draw.uniform(0, 60), kept + draw.uniform(0, 90)
        costs.append(ChunkCost(tokens, *seconds, products * kept, kept, *peaks))
    return costs


def _forecast(count: int = 7, retention: Retention = NOTHING, seed: int = 0, memory: Memory = MEMORY, products: float = 0.1) -> Forecast:
    return Forecast(Workload(16, LENGTHS, 64, packed=True), _costs(count, seed, products), 0.25, 0.125, memory, retention)


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
    peak = max(peak, sum(alive.values()) + part.loss)
    alive["representations' gradients"] = part.representations
    alive["gradients"] = part.gradients
    for i, cost in enumerate(forecast.costs):
        alive.pop(f"kept {i}", None)  # they are part of the graph from here on
        peak = max(peak, sum(alive.values()) + cost.backward_bytes, sum(alive.values()) + (0 if i in kept else cost.forward_bytes))
    return peak


@pytest.mark.parametrize("seed", range(5))
def test_the_peak_is_that_of_the_step_played_through(seed: int) -> None:
    peaks = set()
    for graphs, products, loss in itertools.product((0, 30, 100, 250, 10_000), (0, 150, 10_000), (0.0, 300.0, 5000.0)):
        for share in (0.1, 0.9):
            forecast = _forecast(retention=Retention(graphs, products), seed=seed, memory=replace(MEMORY, loss=loss), products=share)
            assert forecast.peak_bytes == pytest.approx(_played_peak(forecast), rel=1e-12)
            peaks.add(round(forecast.peak_bytes, 6))
    assert len(peaks) > 5


def test_a_step_takes_what_its_parts_take() -> None:
    sums = np.cumsum([cost.tokens for cost in _costs(7)]).tolist()
    forecast = _forecast(retention=Retention(sums[1], sums[4] - sums[1]))
    kept, begun, replayed = forecast.costs[:2], forecast.costs[2:5], forecast.costs[5:]
    expected = sum(c.forward_s + c.backward_s for c in kept) + sum(c.first_s + c.again_s + c.backward_s for c in begun)
    expected += sum(c.first_s + c.forward_s + c.backward_s for c in replayed)
    assert forecast.step_s == pytest.approx(expected + 0.25 + 0.125)
    assert forecast.pairs_per_s == pytest.approx(16 / forecast.step_s)
    parts: list[tuple[Keeps, list[ChunkCost]]] = [("graph", kept), ("products", begun), ("nothing", replayed)]
    for keeps, costs in parts:
        assert forecast.count(keeps) == len(costs)
        assert forecast.share(keeps) == pytest.approx(sum(c.tokens for c in costs) / sums[-1])
    assert sum(forecast.retained_bytes) == pytest.approx(sum(c.kept_bytes for c in kept) + sum(c.products_bytes for c in begun))


def _fits(forecast: Forecast, usable: float, graphs: int, products: int) -> bool:
    """Whether so many chunks keep graphs, and so many behind them products, within `usable` bytes."""
    sums = [0, *np.cumsum([cost.tokens for cost in forecast.costs]).tolist()]
    kept = Retention(sums[graphs], sums[min(graphs + products, len(forecast.costs))] - sums[graphs])
    return replace(forecast, retention=kept).peak_bytes <= usable


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("products", [0.0, 0.1])
def test_as_much_is_retained_as_fits_and_no_more(seed: int, products: float) -> None:
    """As many chunks as can be keep products; where all do, as many of them as can be keep graphs instead."""
    nothing = _forecast(seed=seed, products=products)
    nothing = replace(nothing, costs=[replace(cost, tokens=50) for cost in nothing.costs])
    count = len(nothing.costs)
    everything = replace(nothing, retention=Retention(graphs=EVERYTHING)).peak_bytes
    seen = set()
    for usable in np.linspace(0.9 * nothing.peak_bytes, 1.1 * everything, 23):
        retention = most_retained(nothing, usable)
        chosen = replace(nothing, retention=retention)
        graphs, begun = chosen.count("graph"), chosen.count("products")
        seen.add((graphs > 0, begun > 0))
        assert chosen.peak_bytes <= usable or retention == NOTHING
        if products and graphs + begun < count:
            assert graphs == 0 and not _fits(nothing, usable, 0, begun + 1)
        elif graphs < count:
            assert not _fits(nothing, usable, graphs + 1, count if products else 0)
    assert seen == ({(False, False), (False, True), (True, True), (True, False)} if products else {(False, False), (True, False)})


@pytest.mark.parametrize("products", [0.0, 0.1])
def test_a_batch_may_be_a_little_larger_than_the_one_measured(products: float) -> None:
    nothing = _forecast(products=products)
    sums = np.cumsum([cost.tokens for cost in nothing.costs]).tolist()
    three = Retention(products=sums[2]) if products else Retention(graphs=sums[2])
    room = 0.5 * nothing.costs[3].kept_bytes * (products or 1.0)  # for half of what the fourth chunk keeps
    found = most_retained(nothing, replace(nothing, retention=three).peak_bytes + room)
    assert (found.products if products else found.graphs) > sums[2] and 0 in found
    assert most_retained(nothing, 1e9).graphs > sums[-1]


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_that_is_much_larger_keeps_no_more_than_fits(seed: int) -> None:
    """Only the first batch is measured, and another source's texts may be longer."""
    nothing = _forecast(seed=seed)
    larger = [replace(nothing, costs=nothing.costs * 2), replace(nothing, costs=[*nothing.costs, *nothing.costs[:3]])]
    floor = max(forecast.peak_bytes for forecast in larger)
    for usable in np.linspace(floor, 1.2 * replace(nothing, retention=Retention(graphs=EVERYTHING)).peak_bytes, 23):
        retention = most_retained(nothing, usable)
        assert all(replace(forecast, retention=retention).peak_bytes <= usable for forecast in larger), retention


def test_the_first_pass_may_be_the_peak() -> None:
    """Chunks that take most while they are encoded without a graph: by then all products before them, and their own, are there."""
    costs = [
        ChunkCost(10, 1, 1, 1, 1, products_bytes=n, kept_bytes=50, first_bytes=1000, forward_bytes=60, backward_bytes=70) for n in (3, 5)
    ]
    forecast = Forecast(Workload(16, LENGTHS, 64, packed=True), costs, 0.25, 0.125, replace(MEMORY, loss=0), Retention(products=20))
    assert forecast.peak_bytes == MEMORY.weights + MEMORY.optimizer + MEMORY.representations + 3 + 5 + 1000


def test_half_the_room_that_is_left_is_for_larger_batches() -> None:
    nothing = _forecast()
    tokens = sum(cost.tokens for cost in nothing.costs[:2])
    usable = replace(nothing, retention=Retention(graphs=tokens)).peak_bytes + 30
    dearest = max(cost.kept_bytes / cost.tokens for cost in nothing.costs)
    assert filled(nothing, usable, None, 0) == (tokens + int(15 / dearest), 0) and int(15 / dearest) > 0


def test_products_that_spare_no_time_are_not_kept() -> None:
    nothing = _forecast()
    roomy = replace(nothing, retention=Retention(graphs=sum(cost.tokens for cost in nothing.costs[:4]))).peak_bytes
    useless = replace(nothing, costs=[replace(cost, again_s=cost.forward_s) for cost in nothing.costs])
    assert most_retained(nothing, roomy).products > 0
    assert most_retained(useless, roomy) == most_retained(useless, roomy, None, 0) and most_retained(useless, roomy).graphs > 0


def test_what_is_given_stays_and_the_other_kind_takes_the_room() -> None:
    nothing = _forecast()
    sums = np.cumsum([cost.tokens for cost in nothing.costs]).tolist()
    roomy = replace(nothing, retention=Retention(sums[2], 0)).peak_bytes
    assert most_retained(nothing, roomy, 0, 0) == NOTHING
    assert most_retained(nothing, roomy, None, 0).graphs >= sums[2]
    found = most_retained(nothing, roomy, sums[0], None)
    assert found.graphs == sums[0] and replace(nothing, retention=found).count("products") > 2
    assert most_retained(nothing, 1e9, sums[0], None).products >= sums[-1] - sums[0]


def test_costs_like_one_chunks_are_its_by_token() -> None:
    workload = Workload(16, LENGTHS, 64, packed=True)
    costs = costs_like(workload, ChunkCost(10, *[20.0] * 9))
    assert [cost.tokens for cost in costs] == [workload.computed(chunk) for side in SIDES for chunk in workload.chunks[side]]
    assert all(cost == ChunkCost(cost.tokens, *[pytest.approx(2.0 * cost.tokens)] * 9) for cost in costs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forecast")


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_and_retention_are_those_of_the_run(folder: Path, packed: bool) -> None:
    """The chunks of the loader's first batch, in order and size; and the same first ones keep their graphs."""
    store = random_store(folder / f"store-{packed}", 40, vocabulary=150)
    planner = Planner(store, queries=24, negatives=0, seed=0)
    model = save_tiny_model(folder / "model", num_hidden_layers=1)
    config = ModelConfig(str(model), query_max_tokens=QUERY_MAX_TOKENS, passage_max_tokens=PASSAGE_MAX_TOKENS)
    loader = BatchLoader(
        store, planner, TEMPLATE, config, tokens_per_chunk=300, packed=packed, mask_known_positives=True, device=torch.device("cpu")
    )
    batch, whole = loader.load(0), planner.plan(0)
    lengths = {"query": store.queries.lengths_of(whole.queries) + 2, "passage": store.passages.lengths_of(whole.passages) + 2}
    workload = Workload(24, lengths, 300, packed)  # type: ignore[arg-type]
    expected = [(side, workload.computed(chunk), len(chunk)) for side in SIDES for chunk in workload.chunks[side]]
    assert expected == [(chunk.side, chunk.tokens.input_ids.numel(), len(chunk.tokens)) for chunk in batch.chunks]
    assert workload.tokens == batch.tokens and len(expected) > 6

    encoder = DualEncoder.from_pretrained(config)
    if packed:
        encoder.pack()
        encoder.fuse_layers()
    costs = [ChunkCost(tokens, *[0.0] * 9) for _, tokens, _ in expected]
    for graphs in (0, expected[0][1], expected[0][1] + expected[1][1] - 1, 900, 10_000):
        for products in (0, 500, 10_000) if packed else (0,):
            _, first = encode_without_graph(encoder, batch, Retention(graphs, products))
            kept = ["graph"] * len(first.kept) + ["products"] * len(first.begun) + ["nothing"] * len(first.states)
            assert kept == [keeps for _, keeps in Forecast(workload, costs, 0, 0, MEMORY, Retention(graphs, products)).kept_by_chunk]


def test_costs_of_chunks_that_were_not_measured_lie_between_those_that_were() -> None:
    workload = Workload(16, LENGTHS, 64, packed=True)
    measured = {}
    for side, per_token in (("query", 2.0), ("passage", 3.0)):
        places = workload.measured_places(side)  # type: ignore[arg-type]
        sizes = {place: workload.computed(workload.chunks[side][place]) for place in places}  # type: ignore[index]
        factors = dict(zip(places, (2.0, 1.0, 1.0), strict=False))  # the longest texts cost twice as much by token
        measured[side] = {place: ChunkCost(n, *[per_token * factors[place] * n] * 9) for place, n in sizes.items()}
    costs = costs_of(workload, measured)  # type: ignore[arg-type]
    assert [cost.tokens for cost in costs] == [workload.computed(chunk) for side in SIDES for chunk in workload.chunks[side]]
    by_token = [cost.forward_s / cost.tokens for cost in costs[len(workload.chunks["query"]) :]]
    half = (len(by_token) - 1) // 2
    assert by_token[:half] == pytest.approx(np.linspace(6, 3, half + 1)[:-1]) and by_token[half:] == pytest.approx(
        [3.0] * (len(by_token) - half)
    )


def test_the_smallest_size_that_costs_no_more_is_chosen() -> None:
    assert settled_size([(65_536, 1.00), (32_768, 1.01), (16_384, 1.10)]) == 32_768
    assert settled_size([(65_536, 1.00), (32_768, 1.10), (16_384, 1.00)]) == 16_384
    assert settled_size([(4_096, 7.0)]) == 4_096


def test_a_loss_is_scaled_by_pairs_and_its_memory_by_rows() -> None:
    found = scaled_loss(Cost(2.0, 1000.0), (10, 20), (40, 80), linear_memory=True, fixed_bytes=400)
    assert (found.seconds, found.peak_bytes) == (32.0, 400 + 4 * 600)
    assert scaled_loss(Cost(2.0, 1000.0), (10, 20), (40, 80), linear_memory=False, fixed_bytes=0).peak_bytes == 16_000
    assert scaled_loss(Cost(2.0, 1000.0), (10, 20), (10, 20), linear_memory=True, fixed_bytes=5000) == Cost(2.0, 1000.0)
