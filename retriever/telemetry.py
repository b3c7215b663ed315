"""The output of a run for people: a progress bar, a line of JSON per logged step, trackers."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from retriever.callbacks import Callback
from retriever.config import ConfigError
from retriever.files import append_text, json_value, write_text
from retriever.plan.forecast import Forecast
from retriever.step import StepReport
from retriever.wording import counted

_DESCRIPTION = "train"
_SETTLING_STEPS = 2  # compile, tune and allocate
_COMPARED_STEPS = 5
_NOTABLE = 0.1  # relative difference between what was expected and what is


class Telemetry(Callback):
    """Reports a run's steps on the first rank."""

    def __init__(self, accelerator: Accelerator, metrics: Path, forecast: Forecast | None = None) -> None:
        """`forecast`: is held against the first steps once they have settled."""
        self._accelerator, self._metrics, self._forecast = accelerator, metrics, forecast
        self._first = accelerator.is_main_process
        self._applied = False  # whether a step made an update; fp16 leaves out those whose gradient overflows
        self._told = False
        self._step_seconds = list[float]()
        self._reports = list[StepReport]()  # of the steps not logged yet, which began at `_since`

    def on_train_begin(self, run: Any) -> None:
        """Shows the bar, and drops what was logged of steps that are done again."""
        self._begun_at = run.done
        self._bar = tqdm(
            total=run.total,
            initial=run.done,
            desc=_DESCRIPTION,
            unit=" steps",
            disable=not self._first or run.done == run.total,
            dynamic_ncols=True,
        )
        self._since = self._step_started = time.perf_counter()
        if self._first:
            _forget_after(self._metrics, run.done)

    def on_step_end(self, run: Any, report: StepReport) -> None:
        """Advances the bar, and logs every `train.log_every` steps."""
        now = time.perf_counter()
        self._compare(now - self._step_started)
        self._step_started = now
        self._reports.append(report)
        self._applied = self._applied or math.isfinite(report.grad_norm)
        if report.grad_norm == 0 and not self._told and self._first:
            self._told = True
            cause = _cause(report.loss)
            self._bar.write(f"warning: step {run.done}: the gradient is 0, so nothing is learned: {cause}")
        elapsed = now - self._since
        speed = sum(step.queries for step in self._reports) / elapsed
        waited = sum(step.waited_s for step in self._reports) / elapsed
        self._bar.set_postfix_str(
            f"loss {report.loss:.4f}, {speed:,.{0 if speed >= 10 else 1}f} pairs/s, {waited:.1%} waiting for data",
            refresh=False,
        )
        self._bar.update()
        if run.done % run.config.train.log_every and run.done != run.total:
            return
        values = {
            "loss": report.loss,
            "grad_norm": report.grad_norm if math.isfinite(report.grad_norm) else None,  # an fp16 step that was skipped
            "lr": report.lr,
            "temperature": report.temperature,
            "pairs_per_s": speed,
            "tokens_per_s": sum(step.tokens for step in self._reports) / elapsed,  # of this rank
            "waited_share": waited,
        }
        if report.accuracy is not None:  # not in batches of few passages
            values["accuracy"] = report.accuracy
        if torch.cuda.is_available():
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        run.record({f"train/{name}": value for name, value in values.items()})
        self._since, self._reports = time.perf_counter(), []

    def _compare(self, seconds: float) -> None:
        """Says once, where the first settled steps took notably more or less than was forecast, by how much."""
        if self._forecast is None or not self._first:
            return
        self._step_seconds.append(seconds)
        if len(self._step_seconds) < _SETTLING_STEPS + _COMPARED_STEPS:
            return
        found = [("a step takes", statistics.median(self._step_seconds[_SETTLING_STEPS:]), self._forecast.step_s, "s")]
        if self._forecast.working_bytes:
            found.append(
                ("memory peaks at", torch.cuda.max_memory_allocated() / 2**30, self._forecast.peak_bytes / 2**30, "GiB")
            )
        for what, measured, expected, unit in found:
            if abs(measured / expected - 1) > _NOTABLE:
                self._bar.write(f"plan    {what} {measured:.3g} {unit}, where {expected:.3g} {unit} were expected")
        self._forecast = None

    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        """Writes `metrics.jsonl` and the trackers."""
        line = {"step": run.done, "epoch": round(run.epoch, 4), "time": round(time.time(), 3), **values}
        append_text(self._metrics, json.dumps(line) + "\n")
        self._accelerator.log(values, step=run.done)

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Time inside does not count into pairs/s; the bar says what it goes to."""
        started = time.perf_counter()
        self._bar.set_description_str(doing)
        yield
        self._bar.set_description_str(_DESCRIPTION)
        inside = time.perf_counter() - started
        self._since, self._step_started = self._since + inside, self._step_started + inside

    def on_train_end(self, run: Any) -> None:
        """Ends the bar, and says where the model is if the run is finished.

        Raises FloatingPointError where no step of the run made an update.
        """
        self._bar.close()
        if run.done < run.total:
            return
        if not self._begun_at and not self._applied:
            raise FloatingPointError(
                f"no update was made in {counted(run.total, 'step')}: the gradients overflowed in fp16; "
                "set optim.precision=bf16, or train for more steps"
            )
        export, report = self._metrics.with_name("export"), self._metrics.with_name("report.html")
        self._accelerator.print(f"finished {counted(run.total, 'step')}: model in {export}, curves in {report}")


def _cause(loss: float) -> str:
    """Why a gradient is exactly 0."""
    if loss == 0:
        return "no query of the batch has a negative (data.train, data.negatives, loss.false_negative_margin)"
    equal = "all embeddings are equal: the texts are, once cut at their length, or the model has collapsed"
    return f"{equal} (optim.lr, model.*_max_tokens)"


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that a kill cut short. Raises ConfigError where another line is
    none of ours.
    """
    if not metrics.exists():
        return []
    records, lines = [], metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json_value(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{metrics}:{number} is damaged ({error}); remove the line, and the run goes on"
            ) from error
        records.append(record)
    return records


def _forget_after(metrics: Path, step: int) -> None:
    """Drops lines of steps that a resumed run does again, and a last line that a kill cut short."""
    if metrics.exists():
        kept = [record for record in read_metrics(metrics) if record["step"] <= step]
        write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))
