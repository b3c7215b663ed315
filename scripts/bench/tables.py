"""The result of a benchmark as JSON: rows of (case, method, metric, value, unit), and what they were measured with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from retriever.files import write_text
from retriever.parallel.world import World

_SAVED = ("command", "commit", "hardware", "versions", "rows", "note")


@dataclass(frozen=True)
class Row:
    """One figure. `mb` in a metric's name means MiB. If `value` is None it was not measured, and `note` says why."""

    case: str
    method: str
    metric: str
    value: float | None
    unit: str
    note: str = ""


@dataclass
class Table:
    """The rows of one run, with the run's command, commit, hardware and versions.

    Every new row is saved to `output`, so a run that is cut short keeps what it measured. With `world` a row holds the
    largest value of all ranks, and only the first rank keeps, prints and saves it.
    """

    command: str
    commit: str
    hardware: str
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    note: str = ""  # what a reader of the page should know besides
    output: Path | None = None
    world: World | None = None

    @staticmethod
    def begin(
        command: str, packages: Sequence[str], output: Path | None = None, *, world: World | None = None
    ) -> Table:
        """An empty table for `command`, run in this process."""
        versions = {"python": platform.python_version(), **{name: _version(name) for name in packages}}
        return Table(command, _commit(), _hardware(), versions, output=output, world=world)

    def add(self, case: str, method: str, metric: str, value: float | None, unit: str, note: str = "") -> None:
        """Appends a row, prints it and saves the table."""
        if self.world is not None:
            if value is not None:
                value = float(self.world.max(torch.tensor(value, dtype=torch.float64, device=self.world.device)))
            if not self.world.is_first:
                return
        self.rows.append(Row(case, method, metric, None if value is None else float(f"{value:.6g}"), unit, note))
        shown = "—" if value is None else f"{value:.4g}"
        print(f"{case:32s} {method:22s} {metric:20s} {shown} {unit} {note}", flush=True)
        if self.output is not None:
            self.save(self.output)

    def get(self, case: str, method: str, metric: str) -> float | None:
        """The value of a row; None if there is no such row."""
        return next((r.value for r in self.rows if (r.case, r.method, r.metric) == (case, method, metric)), None)

    @contextmanager
    def attempt(self, case: str, method: str, metric: str, unit: str) -> Iterator[None]:
        """Turns an error inside into a row that gives the reason, so that the other methods are still measured."""
        try:
            yield
        except Exception as error:  # a peer may fail in any way, and the table says how
            self.add(case, method, metric, None, unit, f"does not run: {type(error).__name__}: {str(error)[:160]}")

    def save(self, path: Path) -> None:
        """Writes the JSON."""
        content = {name: getattr(self, name) for name in _SAVED}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=asdict) + "\n")

    @staticmethod
    def load(path: Path) -> Table:
        """A table written by `save`."""
        content = json.loads(path.read_text())
        return Table(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def _commit() -> str:
    """The commit of the checkout. BIGBATCH_COMMIT names it where the code was copied without its history."""
    if "BIGBATCH_COMMIT" in os.environ:
        return os.environ["BIGBATCH_COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _hardware() -> str:
    if not torch.cuda.is_available():
        return f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}"
    properties = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
