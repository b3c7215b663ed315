"""docs/models.md says what the architectures do."""

from __future__ import annotations

from pathlib import Path

import pytest

from retriever.encoder.architectures import DECODERS, ENCODERS
from tests.models_page import PAGE, present, row


@pytest.mark.parametrize("architecture", sorted(ENCODERS | DECODERS))
def test_a_row_is_what_is_found(architecture: str, tmp_path: Path) -> None:
    cells, refusals = row(architecture, tmp_path)
    assert present(architecture) == cells, "run python -m tests.models_page"
    written = [line for line in PAGE.read_text().splitlines() if line.startswith(f"- {architecture}, ")]
    assert [line for line in written if ", ONNX: " not in line] == refusals
    assert all(cells)
