"""A benchmark's result: rows of (case, method, metric, value, unit) with where they came from, as JSON."""

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
from typing import Any

from retriever.files import write_text


@dataclass(frozen=True)
class Row:
    """One measured figure; `mb` in a metric's name means MiB. `value` None: not measured, `note` says why."""

    case: str
    method: str
    metric: str
    value: float | None
    unit: str
    note: str = ""


@dataclass
class Table:
    """The rows of one run, and the run's command, commit, hardware and versions."""

    command: str
    commit: str
    hardware: str
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    note: str = ""  # what a reader of the page should know besides

    @staticmethod
    def begin(command: str, packages: Sequence[str]) -> Table:
        """An empty table that `command` will fill in this process."""
        return Table(command, _commit(), _hardware(), {"python": platform.python_version(), **_versions(packages)})

    def add(self, case: str, method: str, metric: str, value: float | None, unit: str, note: str = "") -> None:
        """Appends a row and prints it."""
        self.rows.append(Row(case, method, metric, None if value is None else float(f"{value:.6g}"), unit, note))
        print(
            f"{case:32s} {method:22s} {metric:20s} {'—' if value is None else f'{value:.4g}'} {unit} {note}", flush=True
        )

    def get(self, case: str, method: str, metric: str) -> float | None:
        """The value of a row, None where there is none."""
        return next((r.value for r in self.rows if (r.case, r.method, r.metric) == (case, method, metric)), None)

    @contextmanager
    def attempt(self, case: str, method: str, metric: str, unit: str) -> Iterator[None]:
        """What fails inside becomes a row with the reason: one method that does not run must not lose the figures of
        the others.
        """
        try:
            yield
        except Exception as error:
            self.add(case, method, metric, None, unit, f"does not run: {type(error).__name__}: {str(error)[:160]}")

    def save(self, path: Path) -> None:
        """Writes the JSON."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(path: Path) -> Table:
        """A table that `save` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        rows = [Row(**row) for row in content.pop("rows")]
        return Table(**content, rows=rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _commit() -> str:
    """The checkout's commit; BIGBATCH_COMMIT names it where the code was copied without its history."""
    if "BIGBATCH_COMMIT" in os.environ:
        return os.environ["BIGBATCH_COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _hardware() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}"
    properties = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
