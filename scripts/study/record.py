"""What a study keeps: study.json, written after every run, from which tables and figures are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retriever.errors import RefusedError
from retriever.files import read_object, write_text

FILE = "study.json"
_PARTS: dict[str, type] = {"facts": dict, "runs": list, "queries": dict, "rates": dict}


@dataclass
class Record:
    """The runs so far, and the queries of each collection with the cluster of each."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)  # hardware, versions, data
    runs: list[dict[str, Any]] = field(default_factory=list)
    queries: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # collection -> ids, clusters
    rates: dict[str, dict[str, float]] = field(default_factory=dict)  # arm -> value -> the chosen learning rate

    @classmethod
    def open(cls, folder: Path) -> Record:
        """The record in a folder, or a new one."""
        content = read_object(folder / FILE) or {}
        return cls(folder, *(content.get(name, kind()) for name, kind in _PARTS.items()))

    def begin(self, facts: dict[str, Any]) -> None:
        """Adds runs made under `facts`, as `scripts.study.runs.environment` has them, to those that are here.

        A commit may be another one, and is named too. Raises RefusedError where anything else of it is: such runs
        cannot be compared.
        """
        free = {"commit", "command"}
        if other := sorted(name for name in (self.facts | facts).keys() - free if self._differs(name, facts)):
            raise RefusedError(
                f"{self.folder / FILE} has runs of another {' and '.join(other)}; move it elsewhere, or choose another "
                "output_dir"
            )
        commits = dict.fromkeys([*str(self.facts.get("commit", facts["commit"])).split(", "), str(facts["commit"])])
        self.facts = {**facts, **self.facts, "commit": ", ".join(commits)}

    def _differs(self, name: str, facts: dict[str, Any]) -> bool:
        return bool(self.facts) and self.facts.get(name) != facts.get(name)

    def run(self, digest: str) -> dict[str, Any] | None:
        """The run of a configuration, if it was made."""
        return next((run for run in self.runs if run["digest"] == digest), None)

    def write(self) -> None:
        """Writes the file, a run a line."""
        runs = ",\n".join(json.dumps(run) for run in self.runs)
        parts = {name: getattr(self, name) for name in _PARTS if name != "runs"}
        head = ",\n".join(f'"{name}": {json.dumps(part)}' for name, part in parts.items())
        write_text(self.folder / FILE, f'{{{head},\n"runs": [\n{runs}\n]}}\n')


def scores(run: Mapping[str, Any], collection: str) -> np.ndarray:
    """[Q] the measure of each query of a collection."""
    return np.asarray(run["scores"][collection], dtype=np.float64)
