"""The output of a run for people: a progress bar, a line of JSON per logged step, trackers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from retriever.callbacks import Callback
from retriever.history import HISTOGRAMS, History, LoggedRun
from retriever.plan.forecast import Forecast
from retriever.screen import Bar, is_json, say
from retriever.step import StepReport
from retriever.wording import counted

_DESCRIPTION = "train"
_SETTLING_STEPS = 2  # compile, tune and allocate
_COMPARED_STEPS = 5
_NOTABLE_WAIT = 0.01  # share of the time
_NOTABLE = 0.1  # relative difference between what was expected and what is


class Telemetry(Callback):
    """Reports a run's steps on the first rank."""

    def __init__(self, accelerator: Accelerator, history: History, forecast: Forecast | None = None) -> None:
        """`forecast`: is held against the first steps once they have settled."""
        self._accelerator, self._history, self._forecast = accelerator, history, forecast
        self._planned_bytes = forecast.peak_bytes if forecast is not None and forecast.working_bytes else None
        self._first = accelerator.is_main_process
        self._applied = False  # whether a step made an update; fp16 leaves out those whose gradient overflows
        self._told = False
        self._shown = dict[str, float | None]()  # behind the bar
        self._score = ""  # the last and the best evaluation, there too
        self._step_seconds = list[float]()
        self._reports = list[StepReport]()  # of the steps not logged yet, which began at `_since`
        self._histograms = dict[str, list[int]]()  # of the line that is being logged

    def on_train_begin(self, run: Any) -> None:
        """Shows the bar, and drops what was logged of steps that are done again."""
        self._begun_at = run.done
        hidden = not self._first or run.done == run.total
        self._bar = Bar(total=run.total, initial=run.done, desc=_DESCRIPTION, unit=" steps", delay=0, disable=hidden)
        self._since = self._step_started = time.perf_counter()
        if self._first:
            self._history.forget_after(run.done)
            self._score = _score(self._history.logged)

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
            say(f"warning: step {run.done}: the gradient is 0, so nothing is learned: {cause}", "warning")
        self._shown = values = self._values(now - self._since)
        self._bar.set_postfix_str(self._postfix(values), refresh=False)
        self._bar.update()
        if run.done % run.config.train.log_every and run.done != run.total:
            return
        if run.config.model.normalize:
            self._histograms = _added([report.similarities for report in self._reports if report.similarities])
        run.record({f"train/{name}": value for name, value in values.items()})
        self._since, self._reports, self._histograms = time.perf_counter(), [], {}

    def _values(self, elapsed: float) -> dict[str, float | None]:
        """What a line says of the steps since the last one: means, and the last learning rate and temperature."""
        reports = self._reports
        norms = [report.grad_norm for report in reports if math.isfinite(report.grad_norm)]
        values = {
            "loss": statistics.fmean(report.loss for report in reports),
            "grad_norm": statistics.fmean(norms) if norms else None,  # fp16 skips steps whose gradient overflows
            "lr": reports[-1].lr,
            "temperature": reports[-1].temperature,
            "pairs_per_s": sum(report.queries for report in reports) / elapsed,
            "tokens_per_s": sum(report.tokens for report in reports) / elapsed,  # of this rank
            "waited_share": sum(report.waited_s for report in reports) / elapsed,
        }
        if reports[-1].candidates:
            values["candidates"] = statistics.fmean(report.candidates for report in reports)
        accuracies = [report.accuracy for report in reports if report.accuracy is not None]
        if accuracies:  # not in batches of few passages
            values["accuracy"] = statistics.fmean(accuracies)
        if torch.cuda.is_available():
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self._planned_bytes is not None:
                values["planned_gib"] = self._planned_bytes / 2**30
        return values

    def _postfix(self, values: dict[str, float | None]) -> str:
        """What stands behind the bar, the more important first: a narrow terminal cuts the rest off."""
        speed, norm, waited = values["pairs_per_s"] or 0.0, values["grad_norm"], values["waited_share"] or 0.0
        parts = [f"loss {values['loss']:.4f}", f"{speed:,.{0 if speed >= 10 else 1}f} pairs/s"]
        if self._score:
            parts.append(self._score)
        if "accuracy" in values:
            parts.append(f"accuracy {values['accuracy']:.0%}")
        parts.append("no update" if norm is None else f"gradient {norm:.3g}")
        parts.append(f"temperature {values['temperature']:.3g}")
        if "peak_gib" in values:
            parts.append(f"{values['peak_gib']:.1f} GiB")
        if waited >= _NOTABLE_WAIT:
            parts.append(f"{waited:.1%} waiting for data")
        return ", ".join(parts)

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
                say(f"plan    {what} {measured:.3g} {unit}, where {expected:.3g} {unit} were expected")
        self._forecast = None

    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        """Writes `metrics.jsonl` and the trackers."""
        when = {"step": run.done, "epoch": round(run.epoch, 4), "time": round(time.time(), 3)}
        line = {**when, **values, **self._histograms}
        self._history.append(line)
        if is_json():
            say(f"step {run.done:,}", "step", **line)
        self._accelerator.log(values, step=run.done)

    def on_evaluate(self, run: Any, measures: Mapping[str, float]) -> None:
        """Shows the measure in the bar, too."""
        if self._first:
            self._score = _score(self._history.logged)
        if self._shown:
            self._bar.set_postfix_str(self._postfix(self._shown))

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Time inside does not count into pairs/s; the bar says what it goes to."""
        started = time.perf_counter()
        self._bar.set_description_str(doing)
        yield
        self._bar.set_description_str(_DESCRIPTION)
        inside = time.perf_counter() - started
        self._bar.leave_out(inside)
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
        if self._first:
            export, report = (self._history.path.with_name(name) for name in ("export", "report.html"))
            say(f"finished {counted(run.total, 'step')}: model in {export}, curves in {report}", "end")


def _score(logged: LoggedRun) -> str:
    """The last evaluation and the best one; nothing before the first."""
    if (best := logged.best) is None:
        return ""
    last = next(reversed(logged.trained.values()))[best.measure]
    return f"{best.measure} {last:.4f} (best {best.value:.4f} at {best.step:,})"


def _added(histograms: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    """Histograms of the similarities of targets, and of hardest candidates, over several steps."""
    each = zip(HISTOGRAMS, zip(*histograms, strict=True), strict=False)
    return {name: [sum(counts) for counts in zip(*of_steps, strict=True)] for name, of_steps in each}


def _cause(loss: float) -> str:
    """Why a gradient is exactly 0."""
    if loss == 0:
        return "no query of the batch has a negative (data.train, data.negatives, loss.false_negative_margin)"
    equal = "all embeddings are equal: the texts are, once cut at their length, or the model has collapsed"
    return f"{equal} (optim.lr, model.*_max_tokens)"
