"""What a study keeps: study.json, written after every run, from which tables and figures are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retriever.files import read_object, write_text

FILE = "study.json"


@dataclass
class Record:
    """The runs so far, and the queries of each collection with the cluster of each."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)  # hardware, versions, data
    runs: list[dict[str, Any]] = field(default_factory=list)
    queries: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # collection -> ids, clusters

    @classmethod
    def open(cls, folder: Path) -> Record:
        """The record in a folder, or a new one."""
        content = read_object(folder / FILE) or {}
        return cls(folder, content.get("facts", {}), content.get("runs", []), content.get("queries", {}))

    def run(self, digest: str) -> dict[str, Any] | None:
        """The run of a configuration, if it was made."""
        return next((run for run in self.runs if run["digest"] == digest), None)

    def write(self) -> None:
        """Writes the file, a run a line."""
        runs = ",\n".join(json.dumps(run) for run in self.runs)
        head = f'"facts": {json.dumps(self.facts)},\n"queries": {json.dumps(self.queries)}'
        write_text(self.folder / FILE, f'{{{head},\n"runs": [\n{runs}\n]}}\n')


def scores(run: Mapping[str, Any], collection: str) -> np.ndarray:
    """[Q] the measure of each query of a collection."""
    return np.asarray(run["scores"][collection], dtype=np.float64)
