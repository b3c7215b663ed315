"""The benchmark of accuracy tells its methods apart by their gradients, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from scripts.bench.accuracy import main
from scripts.bench.report import markdown
from scripts.bench.tables import Table
from tests.workplace import make_workplace


def test_methods_differ_by_their_gradients_and_are_measured_once(tmp_path: Path) -> None:
    workplace, output = make_workplace(tmp_path / "w"), tmp_path / "accuracy.json"
    settings = ["train.max_steps=2", "optim.precision=fp32", "loss.precision=fp32", 'eval.metrics=["nDCG@10"]']
    command = ["--config", str(workplace / "run.yaml"), "--sizes", "24", "--small", "8", "--output", str(output)]
    command += ["--errors", "--settings", *settings, "--methods", "replayed", "redrawn", "accumulated", "contaccum"]
    command += ["--seeds", "0"]
    assert main(command) == 0
    table = Table.load(output)

    def figure(method: str, metric: str, case: str = "b=24") -> float:
        value = table.get(case, method, metric)
        assert value is not None
        return value

    assert figure("replayed", "gradient_error") < 1e-5
    assert figure("redrawn", "gradient_error") > 0.05 and figure("redrawn", "other_masks") > 0.05
    assert all(0 < figure(name, "nDCG@10") <= 1 for name in ("replayed", "redrawn", "accumulated", "contaccum"))
    assert figure("accumulated", "nDCG@10") != figure("replayed", "nDCG@10")
    rows = [row for row in table.rows if "seed=0" in row.case]
    rows += [replace(row, case="b=24,seed=1", value=0.5) for row in rows if row.metric == "nDCG@10"]
    table.rows = rows
    table.save(output)
    assert main([*command, "1"]) == 0
    table = Table.load(output)
    assert [row for row in table.rows if "seed" in row.case] == rows, "measured again"
    assert abs(figure("redrawn", "nDCG@10") - (figure("redrawn", "nDCG@10", "b=24,seed=0") + 0.5) / 2) < 1e-5
    assert "over 2 seeds" in markdown(table)
