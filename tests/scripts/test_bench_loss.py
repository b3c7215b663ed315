"""The benchmarks of the loss, small and on CPUs: they run to the end, agree with float64, and time nothing that is
wrong.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from retriever.loss import tiled
from retriever.loss.problem import Problem
from retriever.parallel.world import World
from scripts.bench import loss, ring
from scripts.bench.loss_methods import methods, ring_methods
from scripts.bench.measure import Silent
from scripts.bench.tables import Table
from tests.starts import start

PEERS = ("inf-cl", "memeff", "cce", "liger", "quack")


def _right(table: Table, case: str, method: str) -> bool:
    errors = [table.get(case, method, metric) for metric in ("gradient_error", "loss_error")]
    return all(error is not None and error < (2e-2 if "bf16" in case else 1e-5) for error in errors)


def test_every_loss_of_one_device(tmp_path: Path) -> None:
    output = tmp_path / "loss.json"
    sizes = "--sizes 70 130 --accuracy-sizes 33 --check 66 --dim 16 --seconds 0.01"
    assert loss.main([*sizes.split(), "--output", str(output)]) == 0
    table = Table.load(output)
    for method in methods():
        conditions = f",{method.condition}" if method.condition else ""
        if method.name in PEERS:
            (row,) = (row for row in table.rows if (row.case, row.method) == (f"b=66{conditions}", method.name))
            assert row.value is None and row.note.startswith("does not run: ModuleNotFoundError")
            continue
        assert _right(table, f"b=66{conditions}", method.name), method
        for b in (70, 130):
            times = [
                table.get(f"b={b}{conditions}", method.name, metric) for metric in ("forward_backward_ms", "forward_ms")
            ]
            assert all(time is not None and time > 0 for time in times), method
    assert _right(table, "b=33,t=0.01,cosine=0.4,high", "bigbatch")


def test_every_loss_of_two_ranks(tmp_path: Path) -> None:
    arguments = [
        "--output",
        "ring.json",
        "--sizes",
        "64",
        "--exposed-sizes",
        "64",
        "--check",
        "68",
        "--dim",
        "32",
        "--seconds",
        "0.02",
    ]
    done = start(tmp_path, arguments, command="scripts.bench.ring", ranks=2).wait()
    assert done.finished, done.said
    table = Table.load(tmp_path / "ring.json")
    for method in ring_methods():
        condition = f",{method.condition}" if method.condition else ""
        if method.name in PEERS:
            assert table.get(f"b=68,W=2{condition}", method.name, "gradient_error") is None
            continue
        assert _right(table, f"b=68,W=2{condition}", method.name), method
        assert (table.get(f"b=64,W=2{condition}", method.name, "forward_backward_ms") or 0) > 0
    assert table.get("b=64,W=2,ring", "bigbatch", "predicted_ms") is not None
    assert table.get("b=64,W=2,gather", "bigbatch", "exposed_share") is not None


@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_wrong_gradients_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = tiled.offloaded

    def offloaded(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
        losses, dqueries, dpassages = right(problem, world)
        return losses, dqueries, dpassages * factor

    monkeypatch.setattr(tiled, "offloaded", offloaded)
    output = tmp_path / "ring.json"
    chosen = ["--methods", "bigbatch gather", "bigbatch offload", "--parts", "methods", "--ranks", "1"]
    assert ring.main([*chosen, "--sizes", "100", "--check", "64", "--dim", "16", "--output", str(output)]) == 0
    timed = [(row.case, row.note) for row in Table.load(output).rows if row.metric == "forward_backward_ms"]
    assert timed == [("b=100,W=1,gather", ""), ("b=64,W=1,offload", "not timed: wrong")]


def test_silent_ranks_do_the_same_work() -> None:
    """Their neighbours' rows have the right numbers, and ids that no two ranks share."""
    world, ids = Silent(torch.device("cpu"), rank=1, size=4), torch.arange(3)
    gathered = world.gather_rows(ids)
    assert gathered.rows[gathered.own].equal(ids) and len(gathered.rows.unique()) == 12
    first = world.pass_on(ids, torch.empty_like(ids), 1).wait()
    second = world.pass_on(first, torch.empty_like(ids), 1).wait()
    assert len(torch.cat([ids, first, second]).unique()) == 9
    assert world.reduce_rows(torch.arange(12.0)[:, None], (3,) * 4).flatten().tolist() == [3.0, 4.0, 5.0]
