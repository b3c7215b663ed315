"""Every setting is explained beside itself, and the page of settings and the command print that."""

from __future__ import annotations

import subprocess
import sys

import pytest

from retriever.config import Config, flat
from retriever.config_help import page, sections
from retriever.train import main
from tests.workplace import ROOT


def test_every_setting_has_a_meaning() -> None:
    found = {setting.key: setting for section in sections() for setting in section.settings}
    assert flat(Config()).keys() - {"eval"} <= found.keys()
    assert {"eval.split", "model.lora.r", "data.train.0.weight"} <= found.keys()
    assert [key for key, setting in found.items() if len(setting.meaning) < 15] == []
    assert (found["batch.queries"].kind, found["batch.queries"].default) == ("a whole number of at least 2", "1024")
    assert "Queries of one optimizer step" in found["batch.queries"].meaning


def test_the_page_of_settings_is_current() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), "write retriever.config_help.page() to docs/settings.md"


def test_the_command_prints_a_section_before_torch_is_imported() -> None:
    code = "import sys; from retriever.train import main; status = main(sys.argv[1:]); sys.exit(8 if 'torch' in sys.modules else status)"
    asked = [sys.executable, "-c", code, "--help-settings", "model"]
    ended = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("## model\n")
    assert "- `model.lora.r` (a whole number of at least 1; default: 16). Rank of an adapter." in ended.stdout
    assert "loss.temperature" not in ended.stdout


def test_an_unknown_section_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help-settings", "modle"]) == 2
    assert "expected a section among run, model, model.lora, data" in capsys.readouterr().err
