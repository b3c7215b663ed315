"""Embeddings that candidates are searched by: those of one way of computing, however often their encoding was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retriever.encode import encode_to_shards
from retriever.shards import open_shards
from tests.scripts.mining.workplace import make_workplace, mined


def test_an_encoding_goes_on_in_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun padded, as on a CPU, and ended packed, as on a GPU: a stage's inputs do not tell the two apart, and shards do."""
    workplace = make_workplace(tmp_path)

    def stopped(bundle: Any, texts: Any, side: str, *given: Any, **named: Any) -> Path:
        if side == "passage":
            raise KeyboardInterrupt
        return encode_to_shards(bundle, texts, side, *given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr("scripts.mining.candidates.encode_to_shards", stopped)
        mined(workplace, "mined", "--attention", "padded")
    embeddings = workplace.folder / "mined.work" / "embeddings"
    assert open_shards(embeddings / "query").manifest["mode"] == "padded"
    records = mined(workplace, "mined", "--attention", "packed")
    assert [open_shards(embeddings / side).manifest["mode"] for side in ("query", "passage")] == ["packed", "packed"]
    assert records == mined(workplace, "whole", "--attention", "packed")
