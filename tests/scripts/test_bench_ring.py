"""The benchmark of the loss over several ranks, small and on CPUs: it runs to the end, agrees with float64 and reports what it found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench import ring_report
from scripts.bench.ranks import Silent
from scripts.bench.tables import Table

ROOT = Path(__file__).parents[2]


def test_a_small_run_and_its_report(tmp_path: Path) -> None:
    output = tmp_path / "ring.json"
    sizes = "--sizes 64 --exposed-sizes 64 --ablation-sizes 64 --scaling-size 64 --largest-size 128 --check 64 --dim 32 --ranks 2"
    command = [sys.executable, "-m", "scripts.bench.ring", "--output", str(output), *sizes.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = Table.load(output)
    errors = [row for row in table.rows if row.metric == "gradient_error" and row.method in ("bigbatch", "dense", "local", "disco")]
    assert len(errors) == 8 and all(row.value is not None and row.value < (2e-2 if "bf16" in row.case else 2e-6) for row in errors)
    differences = [row.value for row in table.rows if row.metric == "loss_difference"]
    assert len(differences) == 3 and all(value is not None and value < 1e-6 for value in differences)
    page = ring_report.markdown(table)
    for metric in ("forward_backward_ms", "predicted_ms", "exposed_share", "scaling"):
        assert any(row.metric == metric and row.value is not None for row in table.rows), metric
    assert page.count("\n| 64 | ") == 3 and "| bigbatch ring |" in page and "times the rate of one of these GPUs" in page


def test_silent_ranks_do_the_same_work() -> None:
    """Their neighbours' rows have the right numbers, and ids that no two ranks share."""
    world, ids = Silent.__new__(Silent), torch.arange(3)
    world.device, world.rank, world.size = torch.device("cpu"), 1, 4
    gathered = world.gather_rows(ids)
    assert gathered.rows[gathered.own].equal(ids) and len(gathered.rows.unique()) == 12
    first = world.pass_on(ids, torch.empty_like(ids), 1).wait()
    second = world.pass_on(first, torch.empty_like(ids), 1).wait()
    assert len(torch.cat([ids, first, second]).unique()) == 9
    assert world.reduce_rows(torch.arange(12.0)[:, None], (3,) * 4).flatten().tolist() == [3.0, 4.0, 5.0]


def test_the_forecast_of_the_docs_is_the_model_s() -> None:
    page = (ROOT / "docs" / "ring.md").read_text(encoding="utf-8")
    assert "\n".join(ring_report.forecast()) in page, "python -m scripts.bench.ring_report --forecast"


def test_a_case_is_read_back() -> None:
    row = Table("", "", "", {})
    row.add("b=131072,W=2,ring,symmetric", "bigbatch", "forward_backward_ms", 1.0, "ms")
    assert ring_report.place(row.rows[0]) == (131072, 2, "ring,symmetric")


@pytest.mark.parametrize("method", ["inf-cl", "memeff"])
def test_a_method_that_does_not_run_is_named_with_the_reason(method: str) -> None:
    table = Table("", "", "", {})
    table.add("b=4096,W=2,ring", method, "gradient_error", None, "", "does not run: ImportError")
    assert f"| {method} ring | — | — | does not run: ImportError |" in "\n".join(ring_report.methods(table))
