"""What trackers are told of a run: its name, its project, the resolved settings, and every logged value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retriever import trackers
from retriever.config import Config, RunConfig
from retriever.train import main
from tests.workplace import make_workplace, metrics, training_arguments


def test_tensorboard_has_the_run_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And on the screen, each remark, logged step and evaluation is a line of JSON."""
    make_workplace(tmp_path)
    short = ["train.max_steps=4", "train.eval_every=2", "train.log_every=1", "eval.at_start=true"]
    assert main([*training_arguments(tmp_path, "mine", *short), "--log-json"]) == 0
    (board,) = (tmp_path / "mine" / "logs").iterdir()
    assert board.name == "mine"
    events = EventAccumulator(str(board)).Reload()
    logged = metrics(tmp_path / "mine")
    losses = [line["train/loss"] for line in logged if "train/loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "workspace_mib: 1024" in text, "auto, resolved"
    told = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [line["train/loss"] for line in told if line["kind"] == "step" and "train/loss" in line] == losses
    evaluated = [(line["step"], line["best"] and line["best"]["step"]) for line in told if line["kind"] == "evaluation"]
    assert [step for step, _ in evaluated] == [0, 2, 4] and evaluated[:2] == [(0, None), (2, 2)]
    assert [line["kind"] for line in told[-2:]] == ["end", "end"]


def test_trackers_of_projects_have_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    accelerator: Any = type(
        "Accelerator", (), {"is_main_process": True, "init_trackers": lambda self, *a: seen.append(a)}
    )()
    for name, called in ((None, "b"), ("other", "other")):
        config = Config(run=RunConfig("runs/a/../b", project="search", name=name))
        trackers.start(accelerator, config)
        project, settings, named = seen.pop()
        assert project == "search" and settings["optim.lr"] == 2e-5
        assert named["wandb"] == named["trackio"] == {"name": called} and named["mlflow"] == {"run_name": called}
