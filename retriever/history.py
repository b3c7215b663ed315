"""What a run logged: the lines of `metrics.jsonl`, its curves, its evaluations and the best of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from retriever.config import ConfigError
from retriever.files import append_text, json_value, write_text

RECORDED = {"step", "epoch", "time"}  # when the other values of a line were recorded
HISTOGRAMS = ("similarity of positives", "similarity of hardest negatives")  # counts of queries, in bins from -1 to 1
ABOVE_CHANCE = "loss - log(candidates)"  # 0 where a model cannot tell passages apart
_MEASURE = "eval/"


class Best(NamedTuple):
    """The best evaluation of a run: the first of equal ones."""

    step: int
    measure: str  # the one that chooses
    value: float

    def __str__(self) -> str:
        return f"{self.measure} {self.value:.4f} at step {self.step:,}"


@dataclass(frozen=True)
class LoggedRun:
    """The lines that a run logged, under the name that a page shows."""

    name: str
    lines: Sequence[Mapping[str, Any]]

    @cached_property
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Each logged quantity: its name -> (step, value), in the order of the lines; only finite values."""
        found = dict[str, list[tuple[float, float]]]()
        for line in self.lines:
            for key, value in line.items():
                if key not in RECORDED and isinstance(value, (int, float)) and math.isfinite(value):
                    found.setdefault(key, []).append((line["step"], value))
            loss, candidates = line.get("train/loss"), line.get("train/candidates")
            if loss is not None and candidates:
                found.setdefault(ABOVE_CHANCE, []).append((line["step"], loss - math.log(candidates)))
        return found

    @cached_property
    def histograms(self) -> dict[str, list[tuple[int, list[int]]]]:
        """Each histogram of `HISTOGRAMS` that was logged: (step, counts), in the order of the lines."""
        each = {name: [(line["step"], line[name]) for line in self.lines if name in line] for name in HISTOGRAMS}
        return {name: found for name, found in each.items() if found}

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> measures of the evaluation after it, without `eval/`; the first measure chooses the best."""
        found = {}
        for line in self.lines:
            named = ((key, value) for key, value in line.items() if key.startswith(_MEASURE))
            measures = {k.removeprefix(_MEASURE): v for k, v in named if isinstance(v, (int, float))}
            if measures:
                found[line["step"]] = measures
        return found

    @cached_property
    def trained(self) -> dict[int, dict[str, float]]:
        """The evaluations after a step, in the order of steps: not that of the model before training."""
        return {step: measures for step, measures in sorted(self.evaluations.items()) if step > 0}

    @cached_property
    def best(self) -> Best | None:
        """The best evaluation of a step, by its first measure."""
        firsts = [Best(step, *next(iter(measures.items()))) for step, measures in self.trained.items()]
        return max(firsts, key=lambda found: found.value) if firsts else None

    @property
    def since_best(self) -> int:
        """How many evaluations came after the best one."""
        return len(self.trained) - 1 - list(self.trained).index(self.best.step) if self.best is not None else 0


class History:
    """A run's `metrics.jsonl`, which is read once and then extended."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where a line is none of ours."""
        self.path = path
        self._lines = read_metrics(path)
        self._logged = LoggedRun("", ())

    @property
    def logged(self) -> LoggedRun:
        """Everything so far. Any thread may ask."""
        logged = self._logged
        if len(logged.lines) != len(self._lines):
            logged = self._logged = LoggedRun("", tuple(self._lines))
        return logged

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line, with a `step`, to the file."""
        append_text(self.path, json.dumps(line) + "\n")
        self._lines.append(line)

    def forget_after(self, step: int) -> None:
        """Drops lines of steps that a resumed run does again, and a last line that a kill cut short."""
        if self.path.exists():
            self._lines = [line for line in self._lines if line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self._lines))


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for a last line that a kill cut short. Raises ConfigError where another line is
    none of ours.
    """
    if not metrics.exists():
        return []
    records, lines = [], metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json_value(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("expected an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{metrics}:{number} is damaged ({error}); remove the line, and the run goes on"
            ) from error
        records.append(record)
    return records
