"""The configurations that the project comes with: each can be run as it stands, and says in its header how and with
what result.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from retriever.config_file import load
from scripts.study.config import load_study

FOLDER = Path(__file__).resolve().parents[1] / "configs"
TRAININGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith(("loop_", "study_")))


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_a_training_configuration_is_valid(path: Path) -> None:
    assert load(path).run.output_dir.startswith("runs/")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("study_*.yaml")), ids=lambda path: path.stem)
def test_a_study_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    assert load_study(path, []).output_dir.startswith("runs/")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_header_names_command_hardware_and_result(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "result"):
        assert any(line.startswith(f"#   {word}") for line in header), f"{path.name} does not say its {word}"
