"""Replays at full depth: a row for each model and precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench import replay
from scripts.bench.replay import main
from scripts.bench.tables import Table


def test_each_model_and_precision_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tiny", "--pairs", "6", "--precisions", "fp32", "bf16", "--output", str(tmp_path / "replay.json")]
    seen = []
    replays = replay.replays_bitwise

    def watched(trainer: replay.Trainer, pairs: int) -> bool:
        seen.append((trainer.encoder.training, trainer.encoder.keeps_products))
        return replays(trainer, pairs)

    monkeypatch.setattr(replay, "replays_bitwise", watched)
    assert main(arguments) == 0
    rows = Table.load(tmp_path / "replay.json").rows
    assert {row.case.split(",")[0] for row in rows} == {"modernbert-base", "qwen3-0.6b"}
    assert len(rows) == 4 and all(row.value == 1.0 for row in rows) and seen == [(True, True)] * 4
