"""What `auto` becomes: by rule on a CPU, by measuring where memory is limited, the same on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever.config import BatchConfig, Config, ConfigError, LossConfig, ModelConfig, OptimConfig, RunConfig
from retriever.data.planner import Planner
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.plan import sizes
from retriever.plan.forecast import Forecast
from retriever.plan.measure import ChunkCost, Cost
from retriever.plan.sizes import StepPlanner
from retriever.retention import EVERYTHING, Retention
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE, random_store

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


class Run:
    """A run on this CPU, whose memory `limit` may limit."""

    def __init__(self, store: Store, encoder: DualEncoder, patch: pytest.MonkeyPatch) -> None:
        self.store, self.encoder, self.patch = store, encoder, patch

    def decide(
        self,
        queries: int = QUERIES,
        preflight: str = "auto",
        *,
        world: World = CPU,
        loss: dict[str, Any] | None = None,
        **batch: Any,
    ) -> tuple[BatchConfig, Forecast | None]:
        """The sizes where `batch` and `loss` are given, and their forecast."""
        model = ModelConfig(
            "tiny", query_max_tokens=QUERY_MAX_TOKENS, passage_max_tokens=PASSAGE_MAX_TOKENS, attention="padded"
        )
        run, loss_config = RunConfig(preflight=preflight), LossConfig(**{"workspace_mib": 1, **(loss or {})})  # type: ignore[arg-type]
        config = Config(run, model, batch=BatchConfig(queries, **batch), loss=loss_config)
        objective = ContrastiveObjective(config.loss, block_rows=512 if config.batch.offload else None, unit_norm=True)
        planner = Planner(self.store, queries=queries, negatives=0, seed=0)
        decided, forecast = StepPlanner(config, self.encoder, objective, self.store, planner, TEMPLATE, world).decide()
        assert replace(decided, batch=config.batch) == config
        return decided.batch, forecast

    def measured(self, **batch: Any) -> tuple[BatchConfig, Forecast]:
        """The same where something is measured, in chunks of 8,192 tokens."""
        decided, forecast = self.decide(**{"tokens_per_chunk": 8192, **batch})
        assert forecast is not None and forecast.retention == Retention.from_config(decided)
        return decided, forecast

    def limit(
        self,
        usable: float,
        *,
        fits: int = 10**9,
        dearer_below: int = 0,
        dearer: float = 1.5,
        products: int | None = None,
    ) -> None:
        """Memory is limited to `usable` bytes; chunks cost by token what they are said to."""

        def measure(encoder: DualEncoder, side: str, lengths: np.ndarray) -> ChunkCost:
            n = len(lengths) * int(lengths.max())
            if n > fits:
                raise torch.cuda.OutOfMemoryError(f"{n} tokens")
            second = 1e-6 * n * (dearer if n < dearer_below else 1.0)
            kept = (products or 0) * n
            return ChunkCost(
                n, second, second, 0.7 * second, second, kept, KEPT * n, 100 * n, (KEPT + 100) * n, WORKING * n
            )

        self.patch.setattr(sizes, "usable_bytes", lambda device: usable)
        self.patch.setattr(sizes, "measure_chunk", measure)
        self.patch.setattr(DualEncoder, "keeps_products", products is not None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return random_store(tmp_path_factory.mktemp("plan") / "store", QUERIES, vocabulary=150)


@pytest.fixture(scope="module")
def encoder(one_layer: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(ModelConfig(str(one_layer), passage_max_tokens=PASSAGE_MAX_TOKENS))


@pytest.fixture
def run(store: Store, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(store, encoder, monkeypatch)


def test_a_cpu_keeps_the_rule_and_measures_when_asked(run: Run) -> None:
    assert run.decide() == (BatchConfig(QUERIES, tokens_per_chunk=8192, retain=0, retain_products=0), None)
    batch, forecast = run.measured(queries=20, preflight="only", retain=700, tokens_per_chunk=400)
    assert (batch.tokens_per_chunk, batch.retain) == (400, 700)
    assert (
        forecast.step_s > 0 and forecast.workload.queries == 20 and 1 <= forecast.count("graph") < len(forecast.costs)
    )
    assert all(p.grad is None for p in run.encoder.parameters())


def test_true_false_and_numbers_stay(run: Run) -> None:
    for given, tokens in ((True, EVERYTHING), (False, 0), (123, 123)):
        batch, _ = run.decide(retain=given, retain_products=False)
        assert batch.retain is given and batch.retain_products is False and Retention.from_config(batch) == (tokens, 0)
    run.limit(KEPT * 30_000)
    assert run.measured(retain=1)[0].retain == 1  # a token is not `true`


def test_the_size_is_the_smallest_that_is_as_fast_and_fits(run: Run) -> None:
    run.limit(1e12)
    assert run.decide()[0].tokens_per_chunk == 16_384
    run.limit(1e12, dearer_below=24_000)
    assert run.decide()[0].tokens_per_chunk == 32_768
    run.limit(1e12, dearer_below=24_000, fits=20_000)
    assert run.decide()[0].tokens_per_chunk == 16_384
    run.limit(WORKING * 5000)
    assert run.decide()[0].tokens_per_chunk == 4096
    run.limit(WORKING * 500)
    with pytest.raises(ConfigError, match="not even chunks of 1,024 tokens fit"):
        run.decide()
    run.limit(1e12, fits=300)
    with pytest.raises(ConfigError, match="batch.tokens_per_chunk: 5,000 tokens do not fit"):
        run.decide(tokens_per_chunk=5000)


def test_what_memory_is_left_is_for_graphs(run: Run) -> None:
    run.limit(KEPT * 60_000)
    batch, forecast = run.measured()
    assert forecast.peak_bytes <= KEPT * 60_000 and 0 < forecast.count("graph") < len(forecast.costs)
    assert 35_000 < int(batch.retain) < 60_000
    with pytest.raises(ConfigError, match=r"batch\.retain: true, but keeping all graphs takes 0\.\d GiB more"):
        run.decide(retain=True, tokens_per_chunk=8192)
    run.limit(1e12)
    assert run.decide(retain=True)[0].retain is True
    assert run.measured()[1].share("graph") == 1 and run.measured(retain=False)[1].share("graph") == 0


def test_products_go_before_graphs(run: Run) -> None:
    """Where there is room for products alone, for products and a few graphs, and where the configuration says
    otherwise.
    """
    run.limit(KEPT * 20_000, products=100)
    few, forecast = run.measured()
    assert (
        forecast.peak_bytes <= KEPT * 20_000
        and few.retain == 0
        and 0 < forecast.count("products") < len(forecast.costs)
    )
    run.limit(KEPT * 60_000, products=100)
    more, forecast = run.measured()
    assert forecast.peak_bytes <= KEPT * 60_000 and forecast.count("graph") > 0 and forecast.count("nothing") == 0
    graphs, _ = run.measured(retain_products=False)
    assert graphs.retain_products is False and int(graphs.retain) > int(more.retain)
    products, forecast = run.measured(retain=False, retain_products=True)
    assert products.retain_products is True and forecast.share("products") == 1
    run.limit(KEPT * 15_000, products=100)
    with pytest.raises(
        ConfigError, match=r"batch\.retain_products: true, but keeping all products takes 0\.\d GiB more"
    ):
        run.measured(retain=False, retain_products=True)


def test_products_make_room_for_smaller_chunks(run: Run) -> None:
    """A larger chunk would cost 8% less by itself, but leaves room for fewer products."""
    run.limit(WORKING * 70_000, dearer_below=40_000, dearer=1.08, products=600)
    assert run.decide(retain=False, retain_products=False)[0].tokens_per_chunk == 65_536
    assert run.decide(retain=False)[0].tokens_per_chunk == 16_384


def test_layers_that_keep_no_products_are_told(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"batch\.retain_products: true, but only fused layers"):
        run.decide(retain_products=True)


def test_representations_in_host_memory_take_none_of_a_gpus(run: Run) -> None:
    """4 bytes of each number, 4 of it rounded, 2 as it is copied and 4 of its gradient are in host memory; the loss
    does not grow.
    """
    run.limit(1e12)
    run.patch.setattr(sizes, "measure_loss", lambda *given: Cost(1.0, 2.0**24))
    run.patch.setitem(sizes._MEASURED_PAIRS, ("cpu", True), 2**16)
    there, here = (run.measured(offload=offload)[1] for offload in (True, False))
    rows = sum(len(lengths) for lengths in there.workload.lengths.values())
    assert (there.memory.representations, there.memory.host) == (0, rows * 32 * 14)
    assert (here.memory.representations, here.memory.host) == (rows * 32 * 4, 0)
    assert there.loss.peak_bytes == 2**24 and min(there.loss.seconds, here.loss.seconds) > 10


def test_a_bank_is_counted_as_when_it_is_full(run: Run) -> None:
    """2 bytes of each number of its three steps, 4 of this rank's share of them and of the batch beside it; and a loss
    over as many more texts.
    """
    run.limit(1e12)
    run.patch.setattr(sizes, "measure_loss", lambda *given: Cost(1.0, 2.0**24))
    run.patch.setitem(sizes._MEASURED_PAIRS, ("cpu", True), 2**16)
    plain, moco, both = (run.measured(loss={"bank": b, "bank_steps": 3})[1] for b in ("none", "moco", "contaccum"))
    queries, passages = (len(plain.workload.lengths[side]) for side in ("query", "passage"))
    batch = 32 * 4 * (queries + passages)
    assert plain.memory.bank == 0
    assert moco.memory.bank == 32 * 3 * passages * (2 + 4) + batch
    assert both.memory.bank == 32 * 3 * (queries + passages) * (2 + 4) + batch
    assert both.peak_bytes > plain.peak_bytes + both.memory.bank
    assert moco.loss.seconds > 3 * plain.loss.seconds and both.loss.seconds > 12 * plain.loss.seconds


@pytest.mark.parametrize(
    ("changes", "operations", "fixed_mib"),
    [({}, 8 / 6, 1), ({"workspace_mib": 64}, 1, 16), ({"symmetric": True}, 1, 1), ({"strategy": "dense"}, 1, None)],
)
def test_a_larger_loss_takes_more(run: Run, changes: dict[str, Any], operations: float, fixed_mib: int | None) -> None:
    """Measured over 256 pairs, for which 1 MiB of exponentials does in one pass where both directions are not asked
    for.

    A larger one may take two. Its memory beyond the workspace grows by rows, that of a matrix of similarities by pairs.
    """
    run.limit(1e12)
    run.patch.setattr(sizes, "measure_loss", lambda *given: Cost(1.0, 2.0**24))
    run.patch.setattr(sizes, "_MEASURED_PAIRS", {("cpu", True): 2**16, ("cpu", False): 2**16})
    _, forecast = run.measured(preflight="only", loss=changes)
    rows = len(forecast.workload.lengths["passage"]) / 256
    assert forecast.loss.seconds == pytest.approx(operations * rows**2, rel=0.02)
    expected_mib = 16 * rows**2 if fixed_mib is None else fixed_mib + (16 - fixed_mib) * rows
    assert forecast.loss.peak_bytes == pytest.approx(expected_mib * 2**20, rel=0.02)


def test_more_than_the_host_holds_is_refused(run: Run) -> None:
    """Of all ranks of this machine together."""
    there = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * QUERIES * 32 * 14}
    run.patch.setattr(sizes.os, "sysconf", there.get)
    run.decide(offload=True)
    run.patch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="batch.offload: .*lower batch.queries"):
        run.decide(offload=True)


def test_ranks_take_the_smallest(run: Run) -> None:
    """Of another rank's 9,000 tokens of a chunk and of graphs, and then as many of products."""
    run.limit(1e12, products=100)
    batch, _ = run.decide(world=Unequal(9000))
    assert (batch.tokens_per_chunk, batch.retain, batch.retain_products) == (9000, 9000, 9000)
    _, forecast = run.measured(world=Unequal(9000))
    assert (forecast.count("graph"), forecast.count("products")) == (1, 1)


def test_nothing_is_measured_where_everything_is_given(run: Run) -> None:
    """Products need not be where layers keep none."""
    given = {"preflight": "off", "tokens_per_chunk": 8192, "retain": 77}
    run.limit(1e12, products=100)
    assert run.measured(**given)
    assert run.decide(**given, retain_products=0)[1] is None  # type: ignore[arg-type]
    run.limit(1e12, fits=0)
    assert run.decide(**given) == (BatchConfig(QUERIES, tokens_per_chunk=8192, retain=77, retain_products=0), None)  # type: ignore[arg-type]


def test_adafactor_keeps_less() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(8, 16)), torch.nn.Parameter(torch.zeros(5))]
    assert sizes._state_bytes(OptimConfig(), parameters) == 2 * 4 * (128 + 5)
    state = torch.optim.Adafactor(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    state.step()
    held = sum(t.nbytes for p in parameters for name, t in state.state[p].items() if name != "step")
    assert sizes._state_bytes(OptimConfig(name="adafactor"), parameters) == held == 4 * (8 + 16 + 5)
