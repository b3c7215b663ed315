"""The arithmetic of a plan: its chunks are the loader's, its retention the gradient cache's, its peak that of a step played through."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retriever.capacity import ChunkCost, Cost
from retriever.config import ModelConfig
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.encoder.dual_encoder import DualEncoder
from retriever.forecast import SIDES, Forecast, Memory, Workload, costs_of, most_retained, scaled_loss, settled_size
from retriever.gradcache import encode_without_graph
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE, random_store
from tests.tiny import save_tiny_model

MEMORY = Memory(weights=100, gradients=90, optimizer=180, representations=40, loss=300)
LENGTHS = {"query": np.arange(4, 20), "passage": np.arange(10, 60)}


def _costs(count: int, seed: int = 0) -> list[ChunkCost]:
    """Random costs whose peaks hold what they must hold."""
    draw = random.Random(seed)
    costs = []
    for _ in range(count):
        tokens, kept = draw.randint(10, 99), draw.uniform(50, 400)
        seconds = [draw.uniform(0.1, 1.0) for _ in range(3)]
        costs.append(ChunkCost(tokens, *seconds, kept, draw.uniform(5, 50), kept + draw.uniform(0, 60), kept + draw.uniform(0, 90)))
    return costs


def _forecast(count: int = 7, retain: int = 0, seed: int = 0, memory: Memory = MEMORY) -> Forecast:
    return Forecast(Workload(16, LENGTHS, 64, packed=True), _costs(count, seed), 0.25, 0.125, memory, retain)


def _played_peak(forecast: Forecast) -> float:
    """The step as the trainer does it, event by event: what is alive is added up after each."""
    part, budget = forecast.memory, forecast.retain
    alive = {"weights": part.weights, "optimizer": part.optimizer, "representations": part.representations}
    peak, kept = sum(alive.values()), []
    for i, cost in enumerate(forecast.costs):
        budget -= cost.tokens
        if budget >= 0:
            peak = max(peak, sum(alive.values()) + cost.forward_bytes)
            alive[f"graph {i}"] = cost.kept_bytes
            kept.append(i)
        else:
            peak = max(peak, sum(alive.values()) + cost.first_bytes)
    peak = max(peak, sum(alive.values()) + part.loss)
    alive["representations' gradients"] = part.representations
    alive["gradients"] = part.gradients
    for i, cost in enumerate(forecast.costs):
        alive.pop(f"graph {i}", None)
        peak = max(peak, sum(alive.values()) + cost.backward_bytes, sum(alive.values()) + (0 if i in kept else cost.forward_bytes))
    return peak


@pytest.mark.parametrize("seed", range(5))
def test_the_peak_is_that_of_the_step_played_through(seed: int) -> None:
    peaks = set()
    for retain in (0, 30, 100, 250, 10_000):
        for loss in (0.0, 300.0, 5000.0):
            forecast = _forecast(retain=retain, seed=seed, memory=replace(MEMORY, loss=loss))
            assert forecast.peak_bytes == pytest.approx(_played_peak(forecast), rel=1e-12)
            peaks.add(round(forecast.peak_bytes, 6))
    assert len(peaks) > 5


def test_a_step_takes_what_its_parts_take() -> None:
    forecast = _forecast(retain=sum(cost.tokens for cost in _costs(7)[:3]))
    kept, replayed = forecast.costs[:3], forecast.costs[3:]
    expected = sum(c.forward_s + c.backward_s for c in kept) + sum(c.first_s + c.forward_s + c.backward_s for c in replayed)
    assert forecast.step_s == pytest.approx(expected + 0.25 + 0.125)
    assert forecast.pairs_per_s == pytest.approx(16 / forecast.step_s)
    assert forecast.retained_share == pytest.approx(sum(c.tokens for c in kept) / sum(c.tokens for c in forecast.costs))
    assert replace(forecast, retain=10_000).step_s < forecast.step_s < replace(forecast, retain=0).step_s


@pytest.mark.parametrize("seed", range(5))
def test_as_much_is_retained_as_fits_and_no_more(seed: int) -> None:
    nothing = _forecast(seed=seed)
    sums = np.cumsum([cost.tokens for cost in nothing.costs])
    everything = replace(nothing, retain=int(sums[-1])).peak_bytes
    for usable in np.linspace(0.9 * nothing.peak_bytes, 1.1 * everything, 23):
        retain = most_retained(nothing, usable)
        chosen = replace(nothing, retain=retain)
        assert chosen.peak_bytes <= usable or (retain == 0 and replace(nothing, retain=int(sums[0])).peak_bytes > usable)
        if chosen.kept < len(sums):
            assert replace(nothing, retain=int(sums[chosen.kept])).peak_bytes > usable
    assert most_retained(nothing, 1.1 * everything) > sums[-1]  # a later batch may be larger
    room = 0.5 * nothing.costs[3].kept_bytes  # for half of the fourth chunk: a later batch's first three may be a few tokens longer
    assert most_retained(nothing, replace(nothing, retain=int(sums[2])).peak_bytes + room) > sums[2]


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
    costs = [ChunkCost(tokens, *[0.0] * 7) for _, tokens, _ in expected]
    for retain in (0, expected[0][1], expected[0][1] + expected[1][1] - 1, 900, 10_000):
        _, first = encode_without_graph(encoder, batch, retain)
        kept = [True] * len(first.kept) + [False] * len(first.states)
        assert kept == [i < Forecast(workload, costs, 0, 0, MEMORY, retain).kept for i in range(len(kept))]


def test_costs_of_chunks_that_were_not_measured_lie_between_those_that_were() -> None:
    workload = Workload(16, LENGTHS, 64, packed=True)
    measured = {}
    for side, per_token in (("query", 2.0), ("passage", 3.0)):
        places = workload.measured_places(side)  # type: ignore[arg-type]
        sizes = {place: workload.computed(workload.chunks[side][place]) for place in places}  # type: ignore[index]
        factors = dict(zip(places, (2.0, 1.0, 1.0), strict=False))  # the longest texts cost twice as much by token
        measured[side] = {place: ChunkCost(n, *[per_token * factors[place] * n] * 7) for place, n in sizes.items()}
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
