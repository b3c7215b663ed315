"""What `auto` becomes: by rule on a CPU, by measuring where memory is limited, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retriever.config import BatchConfig, Config, ConfigError, LossConfig, ModelConfig, OptimConfig, RunConfig
from retriever.data.planner import Planner
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.plan import step_plan
from retriever.plan.forecast import Forecast
from retriever.plan.measure import ChunkCost, Cost
from retriever.plan.step_plan import StepPlanner
from retriever.retention import EVERYTHING, Retention
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE, random_store
from tests.tiny import save_tiny_model

CPU = World(torch.device("cpu"))
QUERIES = 1500  # around 130,000 tokens
KEPT, WORKING = 1000, 1500  # bytes a token


class Unequal(World):
    """Another rank counts a bound's negative as `other`."""

    def __init__(self, other: int) -> None:
        super().__init__(CPU.device)
        self.other = other

    def max(self, x: Tensor) -> Tensor:
        return torch.maximum(x, torch.tensor(-self.other))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return random_store(tmp_path_factory.mktemp("plan") / "store", QUERIES, vocabulary=150)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)
    return DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=PASSAGE_MAX_TOKENS))


def _config(queries: int = QUERIES, preflight: str = "auto", **batch: Any) -> Config:
    model = ModelConfig("tiny", query_max_tokens=QUERY_MAX_TOKENS, passage_max_tokens=PASSAGE_MAX_TOKENS, attention="padded", fused=False)
    return Config(RunConfig(preflight=preflight), model, batch=BatchConfig(queries, **batch), loss=LossConfig(workspace_mib=1))  # type: ignore[arg-type]


def _decide(store: Store, encoder: DualEncoder, config: Config, world: World = CPU) -> tuple[BatchConfig, Forecast | None]:
    objective = ContrastiveObjective(config.loss, block_rows=512 if config.batch.offload else None, unit=True)
    planner = Planner(store, queries=config.batch.queries, negatives=0, seed=0)
    decided, forecast = StepPlanner(config, encoder, objective, store, planner, TEMPLATE, world).decide()
    assert replace(decided, batch=config.batch) == config
    return decided.batch, forecast


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Memory is limited to so many bytes; chunks cost by token what they are said to."""

    def limit(usable: float, *, fits: int = 10**9, dearer_below: int = 0, dearer: float = 1.5, products: int = 0) -> None:
        def measure(encoder: DualEncoder, side: str, tokens: Any) -> ChunkCost:
            n = tokens.input_ids.numel()
            if n > fits:
                raise torch.cuda.OutOfMemoryError(f"{n} tokens")
            second = 1e-6 * n * (dearer if n < dearer_below else 1.0)
            return ChunkCost(n, second, second, 0.7 * second, second, products * n, KEPT * n, 100 * n, (KEPT + 100) * n, WORKING * n)

        monkeypatch.setattr(step_plan, "usable_bytes", lambda device: usable)
        monkeypatch.setattr(step_plan, "measure_chunk", measure)

    return limit


def test_a_cpu_keeps_the_rule_and_measures_when_asked(store: Store, encoder: DualEncoder) -> None:
    assert _decide(store, encoder, _config()) == (BatchConfig(QUERIES, tokens_per_chunk=8192, retain=0, retain_products=0), None)
    batch, forecast = _decide(store, encoder, _config(queries=20, preflight="only", retain=700, tokens_per_chunk=400))
    assert (batch.tokens_per_chunk, batch.retain) == (400, 700)
    assert forecast is not None and forecast.step_s > 0 and forecast.workload.queries == 20
    assert 1 <= forecast.count("graph") < len(forecast.costs)
    assert all(p.grad is None for p in encoder.parameters())


def test_true_false_and_numbers_stay(store: Store, encoder: DualEncoder) -> None:
    for given, tokens in ((True, EVERYTHING), (False, 0), (123, 123)):
        batch, _ = _decide(store, encoder, _config(retain=given, retain_products=False))
        assert batch.retain is given and Retention.from_config(batch) == (tokens, 0)


def test_the_size_is_the_smallest_that_is_as_fast_and_fits(store: Store, encoder: DualEncoder, limited: Callable[..., None]) -> None:
    limited(1e12)
    assert _decide(store, encoder, _config())[0].tokens_per_chunk == 16_384
    limited(1e12, dearer_below=24_000)
    assert _decide(store, encoder, _config())[0].tokens_per_chunk == 32_768
    limited(1e12, dearer_below=24_000, fits=20_000)
    assert _decide(store, encoder, _config())[0].tokens_per_chunk == 16_384
    limited(WORKING * 5000)
    assert _decide(store, encoder, _config())[0].tokens_per_chunk == 4096
    limited(WORKING * 500)
    with pytest.raises(ConfigError, match="not even chunks of 1,024 tokens fit"):
        _decide(store, encoder, _config())
    limited(1e12, fits=300)
    with pytest.raises(ConfigError, match="batch.tokens_per_chunk: 5,000 tokens do not fit"):
        _decide(store, encoder, _config(tokens_per_chunk=5000))


def test_what_memory_is_left_is_for_graphs(store: Store, encoder: DualEncoder, limited: Callable[..., None]) -> None:
    limited(KEPT * 60_000)
    batch, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192))
    assert forecast is not None and forecast.peak_bytes <= KEPT * 60_000 and 0 < forecast.count("graph") < len(forecast.costs)
    assert batch.retain == forecast.retention.graphs and 35_000 < int(batch.retain) < 60_000
    limited(1e12)
    batch, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192))
    assert forecast is not None and forecast.share("graph") == 1
    assert _decide(store, encoder, _config(tokens_per_chunk=8192, retain=False))[1].share("graph") == 0  # type: ignore[union-attr]


def test_all_or_an_error_that_says_by_how_much(store: Store, encoder: DualEncoder, limited: Callable[..., None]) -> None:
    limited(1e12)
    assert _decide(store, encoder, _config(retain=True))[0].retain is True
    limited(KEPT * 60_000)
    with pytest.raises(ConfigError, match=r"batch\.retain: true, but keeping all graphs takes 0\.\d GiB more"):
        _decide(store, encoder, _config(retain=True, tokens_per_chunk=8192))


def _that_keeps_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DualEncoder, "keeps_products", True)


def test_products_go_before_graphs(
    store: Store, encoder: DualEncoder, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for products alone, for products and a few graphs, and where the configuration says otherwise."""
    _that_keeps_products(monkeypatch)
    limited(KEPT * 20_000, products=100)
    few, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192))
    assert forecast is not None and forecast.peak_bytes <= KEPT * 20_000 and forecast.retention == (few.retain, few.retain_products)
    assert few.retain == 0 and 0 < forecast.count("products") < len(forecast.costs)
    limited(KEPT * 60_000, products=100)
    more, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192))
    assert forecast is not None and forecast.peak_bytes <= KEPT * 60_000
    assert forecast.count("graph") > 0 and forecast.count("nothing") == 0
    graphs, _ = _decide(store, encoder, _config(tokens_per_chunk=8192, retain_products=False))
    assert graphs.retain_products is False and int(graphs.retain) > int(more.retain)
    products, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192, retain=False, retain_products=True))
    assert products.retain_products is True and forecast is not None and forecast.share("products") == 1
    limited(KEPT * 15_000, products=100)
    with pytest.raises(ConfigError, match=r"batch\.retain_products: true, but keeping all products takes 0\.\d GiB more"):
        _decide(store, encoder, _config(tokens_per_chunk=8192, retain=False, retain_products=True))


def test_products_make_room_for_smaller_chunks(
    store: Store, encoder: DualEncoder, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger chunk would cost 8% less by itself, but leaves room for fewer products."""
    _that_keeps_products(monkeypatch)
    limited(WORKING * 70_000, dearer_below=40_000, dearer=1.08, products=600)
    assert _decide(store, encoder, _config(retain=False, retain_products=False))[0].tokens_per_chunk == 65_536
    assert _decide(store, encoder, _config(retain=False))[0].tokens_per_chunk == 16_384


def test_layers_that_keep_no_products_are_told(store: Store, encoder: DualEncoder) -> None:
    with pytest.raises(ConfigError, match=r"batch\.retain_products: true, but only fused layers"):
        _decide(store, encoder, _config(retain_products=True))
    assert _decide(store, encoder, _config(retain_products=False))[0].retain_products is False


def test_representations_in_host_memory_take_none_of_a_gpus(
    store: Store, encoder: DualEncoder, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes of each number, 4 of it rounded, 2 as it is copied and 4 of its gradient are in host memory; the loss does not grow."""
    limited(1e12)
    monkeypatch.setattr(step_plan, "measure_loss", lambda *given: Cost(1.0, 2.0**24))
    monkeypatch.setitem(step_plan._MEASURED_PAIRS, ("cpu", True), 2**16)
    there, here = (_decide(store, encoder, _config(tokens_per_chunk=8192, offload=offload))[1] for offload in (True, False))
    assert there is not None and here is not None
    rows = sum(len(lengths) for lengths in there.workload.lengths.values())
    assert (there.memory.representations, there.memory.host) == (0, rows * 32 * 14)
    assert (here.memory.representations, here.memory.host) == (rows * 32 * 4, 0)
    assert there.memory.loss == 2**24 < here.memory.loss and min(there.loss_s, here.loss_s) > 10


@pytest.mark.parametrize(
    ("changes", "factor"), [({}, 8 / 6), ({"workspace_mib": 64}, 1), ({"symmetric": True}, 1), ({"strategy": "dense"}, 1)]
)
def test_a_larger_loss_may_take_two_passes(
    store: Store, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], factor: float
) -> None:
    """Measured over 256 pairs, for which 1 MiB of exponentials does in one pass where both directions are not asked for."""
    monkeypatch.setattr(step_plan, "measure_loss", lambda *given: Cost(1.0, 2.0**24))
    monkeypatch.setattr(step_plan, "_MEASURED_PAIRS", {("cpu", True): 2**16, ("cpu", False): 2**16})
    config = _config(preflight="only")
    _, forecast = _decide(store, encoder, replace(config, loss=replace(config.loss, **changes)))
    assert forecast is not None
    assert forecast.loss_s == pytest.approx(factor * (QUERIES / 256) ** 2, rel=0.02)


def test_more_than_the_host_holds_is_refused(store: Store, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ranks of this machine together."""
    there = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * QUERIES * 32 * 14}
    monkeypatch.setattr(step_plan.os, "sysconf", there.get)
    _decide(store, encoder, _config(offload=True))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="batch.offload: .*lower batch.queries"):
        _decide(store, encoder, _config(offload=True))


def test_ranks_take_the_smallest(store: Store, encoder: DualEncoder, limited: Callable[..., None]) -> None:
    limited(1e12)
    batch, forecast = _decide(store, encoder, _config(), Unequal(9000))
    assert (batch.tokens_per_chunk, batch.retain) == (9000, 9000)
    assert forecast is not None and forecast.retention == (9000, 0)


def test_ranks_take_the_fewest_products(
    store: Store, encoder: DualEncoder, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another rank's 9,000 tokens of graphs, and then as many of products."""
    _that_keeps_products(monkeypatch)
    limited(1e12, products=100)
    batch, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192), Unequal(9000))
    assert (batch.retain, batch.retain_products) == (9000, 9000)
    assert forecast is not None and (forecast.count("graph"), forecast.count("products")) == (1, 1)


def test_products_ask_for_measuring_only_where_there_can_be_some(
    store: Store, encoder: DualEncoder, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(1e12, products=100)
    given = _config(preflight="off", tokens_per_chunk=8192, retain=77)
    assert _decide(store, encoder, given)[1] is None
    _that_keeps_products(monkeypatch)
    assert _decide(store, encoder, given)[1] is not None
    assert _decide(store, encoder, replace(given, batch=replace(given.batch, retain_products=0)))[1] is None


def test_one_token_is_not_true(store: Store, encoder: DualEncoder, limited: Callable[..., None]) -> None:
    limited(KEPT * 30_000)
    batch, forecast = _decide(store, encoder, _config(tokens_per_chunk=8192, retain=1))
    assert batch.retain == 1 and forecast is not None and forecast.retention.graphs == 1


def test_nothing_is_measured_where_everything_is_given(
    store: Store, encoder: DualEncoder, limited: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(1e12, fits=0)
    given = _config(preflight="off", tokens_per_chunk=5000, retain=77, retain_products=0)
    assert _decide(store, encoder, given) == (given.batch, None)


def test_adafactor_keeps_less() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(8, 16)), torch.nn.Parameter(torch.zeros(5))]
    assert step_plan._state_bytes(OptimConfig(), parameters) == 2 * 4 * (128 + 5)
    assert step_plan._state_bytes(OptimConfig(name="adafactor"), parameters) == 4 * (8 + 16 + 5)
    state = torch.optim.Adafactor(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    state.step()
    held = sum(t.nbytes for p in parameters for name, t in state.state[p].items() if name != "step")
    assert step_plan._state_bytes(OptimConfig(name="adafactor"), parameters) == held
