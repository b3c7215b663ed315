"""A training loop of one's own over `Run`, as the documentation shows it."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from retriever.config_file import load
from retriever.errors import Stopped
from retriever.run import Run
from retriever.step import train_step
from tests.workplace import ROOT, make_workplace, metrics


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("run"))


def test_the_documented_loop_trains_saves_and_records(workplace: Path) -> None:
    """The block of docs/run.md as it stands, with this configuration in place of MS MARCO's."""
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None and code[1].count("\n") <= 20
    settings = [f"run.output_dir={workplace / 'own'}", "train.max_steps=20", "run.trackers=[]"]
    named = 'load("configs/msmarco.yaml", ["batch.queries=8192", "run.output_dir=runs/own"])'
    assert named in code[1]
    exec(code[1].replace(named, f"load({str(workplace / 'run.yaml')!r}, {settings!r})"), {})
    lines = metrics(workplace / "own")
    assert [line["step"] for line in lines if "own/mean_loss" in line] == [10, 20]
    assert [line["step"] for line in lines if "eval/MRR@10" in line] == [10, 20]
    assert (workplace / "own" / "best" / "model.safetensors").exists()
    assert (workplace / "own" / "checkpoints" / "step-00000020").is_dir()


def test_a_loop_that_ends_early_leaves_a_run_that_goes_on(workplace: Path) -> None:
    """Leaving the loop closes what is open: the lock is free, and the saved steps are not done again."""
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'early'}", "eval=null", "train.eval_every=0"])
    for first, last in ((0, 2), (2, 4)):
        with Run(config) as run:
            assert run.done == first
            for batch in run.batches():
                run.log(train_step(run.encoder, run.objective, batch, run.optimizer, run.world, run.config.run.seed))
                if run.done == last:
                    run.save()
                    break
        assert not (workplace / "early" / ".lock").exists()
        assert (workplace / "early" / "checkpoints" / f"step-{last:08d}").is_dir()


def test_an_evaluation_saves_first_and_a_stopped_loop_is_saved(workplace: Path) -> None:
    """By a loop that never calls `save`, and leaves itself when a signal came."""
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'unsaved'}", "train.eval_every=2"])
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"), Run(config) as run:
        for batch in run.batches():
            report = train_step(run.encoder, run.objective, batch, run.optimizer, run.world, run.config.run.seed)
            with pytest.raises(ValueError, match="expected the report of step"):
                run.log(replace(report, step=report.step + 1))
            if run.done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # a thread reads it
            run.log(report)
            if run.due("evaluate"):
                run.record(run.evaluate())
            if run.done == 3:
                break
        with pytest.raises(ValueError, match="other names than step"):
            run.record({"step": 1.0})
    folder = workplace / "unsaved"
    assert (folder / "best" / "model.safetensors").exists()
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert saved == ["step-00000002", "step-00000003"]


def test_an_error_in_the_loop_ends_the_run_and_is_raised(workplace: Path) -> None:
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'failed'}", "run.trackers=[]"])
    with pytest.raises(ZeroDivisionError), Run(config) as run:
        for _ in run.batches():
            raise ZeroDivisionError
    assert not (workplace / "failed" / ".lock").exists()
    assert not (workplace / "failed" / "report.html").exists()
