"""A sweep over settings and seeds: every run is an ordinary one, done once; the best mean on dev is chosen."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from retriever import run as run_module
from retriever.config import ConfigError
from scripts import sweep
from tests.commands import assert_refused
from tests.workplace import make_workplace, metrics


def test_a_grid_is_every_combination() -> None:
    assert sweep.grid(["a.b=1,2", "c=[x,y],{z: 1, w: 2}"]) == [
        {"a.b": "1", "c": "[x,y]"},
        {"a.b": "1", "c": "{z: 1, w: 2}"},
        {"a.b": "2", "c": "[x,y]"},
        {"a.b": "2", "c": "{z: 1, w: 2}"},
    ]
    assert sweep.grid([]) == [{}]
    for wrong in ("a.b", "a.b="):
        with pytest.raises(ConfigError, match=f"--grid {wrong}: expected key.sub=value,value"):
            sweep.grid([wrong])
    with pytest.raises(ConfigError, match="--grid: expected each setting once"):
        sweep.grid(["a=1", "a=2"])


def test_a_sweep_trains_once_chooses_by_dev_and_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are those of the runs' own logs; a run that diverges is named and the others count."""
    work, output = make_workplace(tmp_path), tmp_path / "sweep"
    (work / "data" / "qrels" / "test.tsv").write_text((work / "data" / "qrels" / "dev.tsv").read_text())
    entered: list[str] = []
    as_ever = run_module.Run.__enter__

    def counted(self: run_module.Run) -> run_module.Run:
        entered.append(Path(self.config.run.output_dir).name)
        return as_ever(self)

    monkeypatch.setattr(run_module.Run, "__enter__", counted)
    settings = ["train.max_steps=2", "train.eval_every=2", "run.trackers=[]"]
    command = ["--config", str(work / "run.yaml"), "--output", str(output), "--set", *settings, "--seeds", "0", "1"]
    assert sweep.main([*command, "--grid", "optim.lr=1e-3"]) == 0
    assert sweep.main([*command, "--grid", "optim.lr=1e-3,1e30", "--test", "test"]) == 0
    assert entered == [f"lr={lr}_seed={seed}" for lr in ("1e-3", "1e30") for seed in (0, 1)]
    said, summary, page = capsys.readouterr().out, *((output / f"sweep.{kind}").read_text() for kind in ("json", "md"))
    lines = [line for seed in (0, 1) for line in metrics(output / f"lr=1e-3_seed={seed}")]
    best = [line["eval/MRR@10"] for line in lines if "eval/MRR@10" in line]
    mean = statistics.fmean(best)
    assert (
        f"| `optim.lr=1e-3` | {mean:.4f} | {statistics.stdev(best):.4f} | 2 |" in page
        and "chosen  optim.lr=1e-3" in said
    )
    tested = json.loads(summary)["test"]["test"]
    assert tested["MRR@10"] == pytest.approx(mean, abs=2e-3), "the same queries"
    assert "`optim.lr=1e30`, seed 1, failed: step 2: " in page
    assert (output / "sweep.png").stat().st_size > 1000


def test_the_best_mean_over_seeds_is_chosen() -> None:
    """Not the best run: a setting of which one run failed is out."""
    figures = {"a": (0.5, 0.5), "b": (0.9, 0.0), "c": (0.9, None)}
    results = [
        {
            "settings": {"x": x},
            "seed": seed,
            "seconds": 1.0,
            **({"failed": "nan"} if v is None else {"measures": {"m": v}}),
        }
        for x, values in figures.items()
        for seed, v in enumerate(values)
    ]
    assert sweep.best_setting(results) == {"x": "a"}
    assert [row["settings"]["x"] for row in sweep.rows_of(results)] == ["a", "b"]
    with pytest.raises(FloatingPointError, match="every setting has a run that failed, the last one: nan"):
        sweep.best_setting(results[-1:])


def test_a_sweep_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    work = make_workplace(tmp_path)
    command = [
        "--config",
        str(work / "run.yaml"),
        "--output",
        str(tmp_path / "s"),
        "--set",
        "eval=null",
        "train.eval_every=0",
    ]
    assert_refused(sweep.main, command, "eval: expected a section")
