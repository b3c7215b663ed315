"""The cost model against figures worked out by hand, and the choice it makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retriever.config import BatchConfig, Config, ConfigError, DataConfig, LossConfig
from retriever.parallel.cost import (
    Estimate,
    Machine,
    Workload,
    choose,
    exchange_for,
    gather_cost,
    ring_cost,
)
from retriever.parallel.world import World

# 1 TFLOP/s, 1 GB/s inside and half between nodes of two ranks, no time for launches.
MACHINE = Machine(ranks_per_node=2, tflops=1.0, inside_gb_s=1.0, between_gb_s=0.5, block_ms=0.0, call_ms=0.0)
WORK = Workload(queries=4000, passages=8000, dim=100, ranks=2, workspace_mib=40)  # room for 2,621 rows of 8,000 columns
MEASURED = [
    Path(__file__).resolve().parents[2] / "docs" / "bench" / name for name in ("ring.json", "ring_exchanges.json")
]  # the later one last


def _about(estimate: Estimate, compute_ms: float, transfer_ms: float, exposed_ms: float, mib: float) -> None:
    found = (estimate.compute_ms, estimate.transfer_ms, estimate.exposed_ms, estimate.mib)
    assert found == pytest.approx((compute_ms, transfer_ms, exposed_ms, mib), rel=1e-9)


def test_gathering_in_a_node() -> None:
    """6 · 2,000 · 8,000 · 100 operations; 4,000 rows of 600 bytes arrive; 8,000 of 600 are received, 6,000 of 400
    result.
    """
    _about(gather_cost(WORK, MACHINE), 9.6, 2.4, 2.4, (4_800_000 + 2_400_000) / 2**20 + 40)


def test_a_small_workspace_takes_two_passes() -> None:
    """8 operations instead of 6 where it holds fewer rows than one pass is worth."""
    assert gather_cost(replace(WORK, workspace_mib=10), MACHINE).compute_ms == pytest.approx(12.8)
    assert gather_cost(replace(WORK, queries=1000, workspace_mib=10), MACHINE).compute_ms == pytest.approx(2.4), (
        "all rows fit"
    )


def test_a_ring_in_a_node() -> None:
    """8 · 2,000 · 4,000 · 100 operations a block; one hop of 800 kB over 1.6 ms of work, one of 1.6 MB over 4.8 ms."""
    _about(ring_cost(WORK, MACHINE), 12.8, 2.4, 0.0, (4000 * 100 * (2 + 12) + 2000 * 400) / 2**20 + 40)


def test_exposed_hops() -> None:
    """At a hundredth of the bandwidth: 80 ms over 1.6 of work and 160 ms over 4.8."""
    slow = replace(MACHINE, inside_gb_s=0.01)
    estimate = ring_cost(WORK, slow)
    assert (estimate.transfer_ms, estimate.exposed_ms) == pytest.approx((240.0, 240.0 - 6.4))
    assert estimate.total_ms == pytest.approx(12.8 + 240.0 - 6.4)


def test_between_nodes_a_ring_has_one_card_and_a_collective_all() -> None:
    """Four ranks, two nodes: 4,000 rows of 600 bytes enter a node by two cards; a hop of 2,000 rows leaves by one."""
    work = replace(WORK, ranks=4)
    assert gather_cost(work, MACHINE).transfer_ms == pytest.approx(3.6)  # inside: 6,000 rows of 600 bytes at 1 GB/s
    assert gather_cost(work, replace(MACHINE, between_gb_s=0.1)).transfer_ms == pytest.approx(12.0)
    assert ring_cost(work, MACHINE).transfer_ms == pytest.approx((3 * 400 + 800 + 2 * 1200) / 500)


def test_a_ring_needs_the_same_memory_on_any_number_of_ranks() -> None:
    """For the same rows a rank; what is gathered grows with the ranks."""
    sizes = [replace(WORK, ranks=w, queries=1000 * w, passages=2000 * w, workspace_mib=1) for w in (3, 8, 1024)]
    assert len({ring_cost(work, MACHINE).mib for work in sizes}) == 1
    assert gather_cost(sizes[2], MACHINE).mib > 50 * gather_cost(sizes[0], MACHINE).mib > 0


@pytest.mark.parametrize(("ranks", "precision"), [(8, "bf16"), (64, "bf16"), (64, "fp32")])
def test_a_ring_hides_its_transfers_from_some_batch_on(ranks: int, precision: str) -> None:
    small, large = (Workload(size, size, 768, ranks, precision=precision) for size in (128 * ranks, 65_536 * ranks))
    assert ring_cost(small, Machine()).exposed_ms > 0
    assert ring_cost(large, Machine()).exposed_ms == 0 < ring_cost(large, Machine()).transfer_ms


def test_the_symmetric_loss_costs_the_gathered_exchange_as_much_work_as_the_ring() -> None:
    both = replace(WORK, symmetric=True)
    assert gather_cost(both, MACHINE).compute_ms == pytest.approx(ring_cost(both, MACHINE).compute_ms)
    assert choose(both, MACHINE, budget_mib=1e9) == "ring", "equal work, and its transfers are hidden"


def test_the_faster_exchange_that_fits_is_chosen() -> None:
    assert gather_cost(WORK, MACHINE).total_ms < ring_cost(WORK, MACHINE).total_ms
    assert choose(WORK, MACHINE, budget_mib=gather_cost(WORK, MACHINE).mib) == "gather"
    assert choose(WORK, MACHINE, budget_mib=gather_cost(WORK, MACHINE).mib - 1) == "ring"


@pytest.mark.parametrize("direction", ["", ",symmetric"])
def test_the_choice_is_what_was_measured_to_be_faster(direction: str) -> None:
    """On the machine of the benchmark; within 3 % either will do. From 65,536 on, the model's times are within 7 % of
    the measured.
    """
    read = [row for path in MEASURED for row in json.loads(path.read_text())["rows"] if row["method"] == "bigbatch"]
    rows = {(row["case"], row["metric"]): row["value"] for row in read}
    compared = 0
    for b in (16384, 65536, 131072, 262144, 1048576):
        keys = {name: (f"b={b},W=2,{name}{direction}", "forward_backward_ms") for name in ("gather", "ring")}
        if not rows.keys() >= set(keys.values()):
            continue
        times = {name: rows[key] for name, key in keys.items()}
        work = Workload(b, b, 768, 2, symmetric=bool(direction))
        chosen = choose(work, Machine(ranks_per_node=2), budget_mib=1e9)
        assert times[chosen] <= 1.03 * min(times.values()), (b, times)
        costs = {"gather": gather_cost(work, Machine()), "ring": ring_cost(replace(work, workspace_mib=256), Machine())}
        assert b < 65536 or all(
            cost.total_ms == pytest.approx(times[name], rel=0.07) for name, cost in costs.items()
        ), (b, times, costs)
        compared += 1
    assert compared >= 3


class _Ranks(World):
    """Several ranks of which only the number counts."""

    def __init__(self, size: int, fewest: int | None = None) -> None:
        self.device, self.rank, self.size, self._fewest = torch.device("cpu"), 0, size, fewest

    def max(self, x: Tensor) -> Tensor:
        return x if self._fewest is None else x.clamp(min=-self._fewest)


def test_nodes_of_unequal_size_settle_on_one_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' own sizes would have one gather and the other pass on; every rank reckons with the smallest node's."""
    config = Config(loss=LossConfig(symmetric=True), batch=BatchConfig(queries=131072), data=DataConfig(negatives=0))
    alone, together = set(), set()
    for own in ("4", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", own)
        alone.add(exchange_for(config, 768, _Ranks(6)))
        together.add(exchange_for(config, 768, _Ranks(6, fewest=2)))
    assert len(alone) == 2 and len(together) == 1


def test_the_setting_is_settled_before_step_1() -> None:
    config = Config(loss=LossConfig(symmetric=True), batch=BatchConfig(queries=65536), data=DataConfig(negatives=0))
    assert exchange_for(config, 768, _Ranks(2)) == "ring"
    assert exchange_for(replace(config, loss=replace(config.loss, symmetric=False)), 768, _Ranks(2)) == "gather"
    assert exchange_for(config, 768, _Ranks(1)) == "gather", "alone there is nothing to exchange"
    assert exchange_for(replace(config, loss=replace(config.loss, strategy="dense")), 768, _Ranks(2)) == "gather"
    for asked, ranks in (("ring", 2), ("gather", 2), ("ring", 1)):
        assert exchange_for(replace(config, loss=replace(config.loss, exchange=asked)), 768, _Ranks(ranks)) == asked  # type: ignore[arg-type]
    offload = replace(config, batch=replace(config.batch, offload=True))
    assert {exchange_for(offload, 768, _Ranks(ranks)) for ranks in (1, 2)} == {"ring"}, (
        "blocks in host memory are gathered nowhere"
    )
    with pytest.raises(
        ConfigError, match="loss.exchange: 'ring' is for loss.strategy=tiled; received loss.strategy=dense"
    ):
        exchange_for(replace(config, loss=LossConfig(exchange="ring", strategy="dense")), 768, _Ranks(2))
