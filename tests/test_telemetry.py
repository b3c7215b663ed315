"""What is logged of steps: speeds since the last line, pauses left out, waits counted; and the forecast held against
the first steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retriever import screen
from retriever import telemetry as module
from retriever.config import Config, TrainConfig
from retriever.history import History
from retriever.step import StepReport
from retriever.telemetry import Telemetry


class Clock:
    """Time that passes only when told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


class Accelerator:
    is_main_process = True

    def log(self, values: dict[str, Any], step: int) -> None:
        pass

    def print(self, message: str) -> None:
        pass


class Expected:
    """A forecast of steps of two seconds."""

    step_s, working_bytes, peak_bytes = 2.0, 0, 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> pytest.CaptureFixture[str]:
    """What is written is captured, and bars take it for a terminal."""
    monkeypatch.setattr(screen, "is_terminal", lambda: True)
    return capsys


def _report(step: int, waited_s: float = 0.0) -> StepReport:
    return StepReport(
        step, loss=1.5, grad_norm=2.0, lr=1e-3, temperature=0.02, queries=64, tokens=5000, waited_s=waited_s
    )


class Run:
    """A run of 40 steps that logs every second one."""

    total, config, epoch = 40, Config(train=TrainConfig(log_every=2)), 0.25

    def __init__(self, folder: Path, forecast: Any = None, done: int = 0) -> None:
        self.done = done
        self.telemetry = Telemetry(Accelerator(), History(folder / "metrics.jsonl"), forecast)
        self.telemetry.on_train_begin(self)

    def step(self, report: StepReport) -> None:
        self.done = report.step + 1
        self.telemetry.on_step_end(self, report)

    def record(self, values: dict[str, Any]) -> None:
        self.telemetry.on_log(self, values)

    def close(self) -> None:
        self.telemetry.on_train_end(self)


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_speeds_are_those_since_the_last_line(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path)
    for step, seconds in enumerate((1.0, 3.0, 0.5, 0.5)):
        clock.now += seconds
        run.step(_report(step, waited_s=0.1))
    run.close()
    first, second = _lines(tmp_path)
    assert (first["step"], second["step"]) == (2, 4) and first["epoch"] == 0.25
    assert (first["time"], second["time"]) == (1e9 + 104, 1e9 + 105)
    assert (first["train/pairs_per_s"], second["train/pairs_per_s"]) == (32, 128)
    assert (first["train/tokens_per_s"], second["train/tokens_per_s"]) == (2500, 10_000)
    assert first["train/waited_share"] == pytest.approx(0.05) and second["train/waited_share"] == pytest.approx(0.2)


def test_pauses_are_left_out(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path)
    for step in range(2):
        clock.now += 1.0
        run.step(_report(step))
        with run.telemetry.paused("evaluate"):
            clock.now += 50
    clock.now += 4.0
    run.step(_report(2))
    run.step(_report(3))
    assert [line["train/pairs_per_s"] for line in _lines(tmp_path)] == [64, 32]


def test_the_bar_says_how_much_was_waited(tmp_path: Path, clock: Clock, terminal: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    clock.now += 1.0
    run.step(_report(0, waited_s=0.125))
    run.close()
    said = terminal.readouterr().err
    assert "loss 1.5000, 64 pairs/s, gradient 2, temperature 0.02, 12.5% waiting for data" in said


def test_the_bar_says_what_a_pause_is_for(tmp_path: Path, clock: Clock, terminal: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    clock.now += 1.0
    run.step(_report(0))
    with run.telemetry.paused("write checkpoint and export"):
        assert "\rwrite checkpoint and export: " in terminal.readouterr().err
    run.close()
    assert "\rtrain: " in terminal.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.1, ""), (2.5, "a step takes 2.5 s, where 2 s were expected"), (1.7, "takes 1.7 s")]
)
def test_a_forecast_that_is_off_is_said_once(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], seconds: float, said: str
) -> None:
    """The first two steps, slow as they are, do not count, nor does a pause."""
    run = Run(tmp_path, Expected())
    for step in range(20):
        clock.now += 30.0 if step < 2 else seconds
        run.step(_report(step))
        with run.telemetry.paused("evaluate"):
            clock.now += 7
    out = capsys.readouterr().out
    assert (said in out and out.count("were expected") == 1) if said else "expected" not in out


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "a": 1}\n{"step": 4, "a": 1}\n{"step": 6, "tra')
    Run(tmp_path, done=3)
    assert _lines(tmp_path) == [{"step": 2, "a": 1}]


@pytest.mark.parametrize(
    ("loss", "cause"), [(0.0, "no query of the batch has a negative"), (4.16, "all embeddings are equal")]
)
def test_a_gradient_of_0_is_told_once_with_its_cause(
    loss: float, cause: str, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    clock.now += 1
    run.step(_report(0))
    assert "warning" not in capsys.readouterr().err
    for step in (1, 2):
        clock.now += 1
        run.step(replace(_report(step), loss=loss, grad_norm=0.0))
    run.close()
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning: step 2: the gradient is 0, so nothing is learned: " + cause) == 1
    assert (said.out + said.err).count("warning") == 1


def test_a_run_without_an_update_is_refused_at_its_end(tmp_path: Path, clock: Clock) -> None:
    """One update is enough."""
    for norms, refused in (((math.inf, 2.0, math.inf), False), ((math.inf, math.inf), True)):
        run = Run(tmp_path)
        for step, norm in enumerate(norms):
            clock.now += 1
            run.step(replace(_report(step), grad_norm=norm))
        run.done = run.total
        with pytest.raises(FloatingPointError, match="no update was made") if refused else nullcontext():
            run.close()


def test_a_line_has_the_means_of_its_steps(tmp_path: Path, clock: Clock) -> None:
    """A step whose gradient overflowed counts for the loss only."""
    run = Run(tmp_path)
    for step, (loss, norm, accuracy) in enumerate(
        ((3.0, 2.0, 0.5), (2.0, math.inf, None), (1.0, 4.0, None), (0.5, 1.0, None))
    ):
        clock.now += 1
        run.step(replace(_report(step), loss=loss, grad_norm=norm, accuracy=accuracy))
    run.close()
    first, second = _lines(tmp_path)
    assert (first["train/loss"], first["train/grad_norm"], first["train/accuracy"]) == (2.5, 2.0, 0.5)
    assert (second["train/loss"], second["train/grad_norm"]) == (0.75, 2.5) and "train/accuracy" not in second


def test_the_bar_names_the_last_and_the_best_evaluation(
    tmp_path: Path, clock: Clock, terminal: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    for step, value in enumerate((0.25, 0.75, 0.5)):
        clock.now += 1
        run.step(replace(_report(step), accuracy=0.625))
        run.record({"eval/nDCG@10": value, "eval/MRR@10": 0.9})
        run.telemetry.on_evaluate(run, {})
    run.close()
    said = terminal.readouterr().err.rsplit("\r", 1)[-1]
    assert "pairs/s, nDCG@10 0.5000 (best 0.7500 at 2), accuracy 62%, gradient 2" in said
