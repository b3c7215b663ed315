"""A sweep over settings and seeds: every run is an ordinary one, done once; the best mean on dev is chosen."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from retriever import run as run_module
from retriever.config import Config, ConfigError
from retriever.lock import LOCK, LockedError, locked
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
    seconds = [run["seconds"] for run in json.loads(summary)["runs"] if run["settings"]["optim.lr"] == "1e30"]
    assert f"sweep   {sum(seconds):.1f} s in runs, " in said, "those of this command"
    tested = json.loads(summary)["test"]["test"]
    assert tested["MRR@10"] == pytest.approx(mean, abs=2e-3), "the same queries"
    assert "`optim.lr=1e30`, seed 1, failed: step 2: " in page
    assert (output / "sweep.png").stat().st_size > 1000


def test_another_grid_keeps_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its seconds, also after an interruption at a value that was put first."""
    work, output, trained = make_workplace(tmp_path), tmp_path / "sweep", list[str]()

    def train(config: Config) -> dict[str, Any]:
        with pytest.raises(LockedError), locked(output / LOCK, "the sweep"):
            pass
        trained.append(config.run.output_dir.rpartition("/")[2])
        if "lr=5" in trained[-1]:
            raise KeyboardInterrupt
        done: dict[str, Any] = {"folder": config.run.output_dir, "config": sweep.digest(config), "seconds": 60.0}
        return done | ({"failed": "nan"} if "lr=2" in trained[-1] else {"measures": {"m": 0.5}})

    monkeypatch.setattr(sweep, "_trained", train)
    command = ["--config", str(work / "run.yaml"), "--output", str(output), "--grid"]
    sweep.main([*command, "optim.lr=1,2"])
    sweep.main([*command, "optim.lr=3"])
    sweep.main([*command, "optim.lr=4,5,1,2"])
    summary = json.loads((output / "sweep.json").read_text())
    assert [run["settings"] for run in summary["runs"]] == [{"optim.lr": "4"}]
    assert sweep.main([*command, "optim.lr=3,2,1"]) == 0
    assert trained == [f"lr={lr}_seed=0" for lr in (1, 2, 3, 4, 5)]
    page = (output / "sweep.md").read_text()
    assert page.count("| 60.0 |") == 2 and "`optim.lr=2`, seed 0, failed: nan" in page


@pytest.mark.parametrize("name", ["sweep.json", "sweep.md", "sweep.png"])
def test_a_file_that_no_sweep_wrote_is_left_alone(tmp_path: Path, name: str) -> None:
    work, mine = make_workplace(tmp_path), tmp_path / "s" / name
    mine.parent.mkdir()
    mine.write_text('{"runs": 5}')
    command = ["--config", str(work / "run.yaml"), "--output", str(mine.parent)]
    assert_refused(sweep.main, command, f"{mine} was not written by a sweep; move it elsewhere")
    assert [*mine.parent.iterdir()] == [mine] and mine.read_text() == '{"runs": 5}'


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


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    run = {"folder": "a", "config": "x", "settings": {"a": "1"}, "seed": 0, "seconds": 1.0, "measures": {"MRR@10": 0.5}}
    sweep.write_summary(tmp_path, [run], {})
    assert "| `a=1` | 0.5000 | – | 1 | 1.0 |" in (tmp_path / "sweep.md").read_text()
