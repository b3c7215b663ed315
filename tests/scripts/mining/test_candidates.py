"""Embeddings that candidates are searched by: those of one way of computing, however often their encoding was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retriever.encode_shards import encode_to_shards
from retriever.shards import open_shards
from scripts.mine_negatives import main
from tests.commands import assert_refused
from tests.scripts.mining.workplace import make_workplace, mined, words


def test_an_encoding_goes_on_in_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun padded, as on a CPU, and ended packed, as on a GPU: a stage's inputs do not tell the two apart, and shards do."""
    workplace = make_workplace(tmp_path)

    def stopped(bundle: Any, texts: Any, side: str, *given: Any, **named: Any) -> Path:
        if side == "passage":
            raise KeyboardInterrupt
        return encode_to_shards(bundle, texts, side, *given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("scripts.mining.candidates.encode_to_shards", stopped)
        assert_refused(main, words(workplace, "mined", "--attention", "padded"), "interrupted", 130)
    embeddings = workplace.folder / "mined.work" / "embeddings"
    assert open_shards(embeddings / "query").manifest["mode"] == "padded"
    records = mined(workplace, "mined", "--attention", "packed")
    assert [open_shards(embeddings / side).manifest["mode"] for side in ("query", "passage")] == ["packed", "packed"]
    assert records == mined(workplace, "whole", "--attention", "packed")
