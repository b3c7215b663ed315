"""A stage is worked on once for its inputs: again after a change or a loss, from where it stopped after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retriever.config import ConfigError
from scripts.stages import model_fingerprint, run_stage


class Work:
    """Writes `out.txt`, and notes what it found in the folder each time it is called."""

    def __init__(self, text: str = "done", interrupted: bool = False) -> None:
        self.text, self.interrupted = text, interrupted
        self.found: list[list[str]] = []

    def __call__(self, folder: Path) -> list[str]:
        self.found.append(sorted(f.name for f in folder.iterdir()))
        (folder / "part").write_text("half")
        if self.interrupted:
            raise KeyboardInterrupt
        (folder / "out.txt").write_text(self.text)
        return ["out.txt"]


def _run(folder: Path, work: Work, **inputs: Any) -> dict[str, str]:
    return dict(run_stage("stage", folder, {"data": "a", **inputs}, work))


def test_the_same_inputs_are_worked_on_once(tmp_path: Path) -> None:
    """The second time the outputs' hashes come from the manifest; tuples and lists are the same inputs."""
    work = Work()
    first = _run(tmp_path / "s", work, ranks=(1, 2))
    assert _run(tmp_path / "s", work, ranks=[1, 2]) == first
    assert len(work.found) == 1
    assert _run(tmp_path / "t", Work("other"))["out.txt"] != first["out.txt"]


def test_an_interrupted_stage_finds_what_it_left(tmp_path: Path) -> None:
    work = Work(interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "s", work)
    work.interrupted = False
    _run(tmp_path / "s", work)
    assert work.found == [["job.json"], ["job.json", "part"]]


def test_other_inputs_start_from_an_empty_folder(tmp_path: Path) -> None:
    """What another job left, folders too, is gone before the work begins."""
    work = Work()
    _run(tmp_path / "s", work)
    (tmp_path / "s" / "folder").mkdir()
    _run(tmp_path / "s", work, seed=1)
    assert work.found == [["job.json"], ["job.json"]]


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_lost_output_is_made_again(tmp_path: Path, damage: str) -> None:
    work = Work()
    first, output = _run(tmp_path / "s", work), tmp_path / "s" / "out.txt"
    if damage == "missing":
        output.unlink()
    else:
        output.write_text("d")
    assert _run(tmp_path / "s", work) == first
    assert len(work.found) == 2 and output.read_text() == "done"


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not of a stage"):
        _run(tmp_path, Work())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_models_fingerprint_is_its_content(tmp_path: Path) -> None:
    """The same files elsewhere are the same model, a README is no part of it, and other weights are another model."""
    for name, weights in (("a", "w"), ("b", "w"), ("c", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(weights)
        (tmp_path / name / "README.md").write_text(name)
    a, b, c = (model_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert model_fingerprint("org/model") == "org/model"
