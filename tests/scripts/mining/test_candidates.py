"""Embeddings that candidates are searched by: those of one way of computing, however often their encoding was
interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retriever.encode_shards import encode_to_shards
from retriever.shards import open_shards
from scripts.mine_negatives import main
from tests.commands import assert_refused
from tests.scripts.mining.workplace import make_workplace, mined, read, words
from tests.tiny import random_texts


def test_an_encoding_goes_on_in_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun padded, as on a CPU, and ended packed, as on a GPU: a stage's inputs do not tell the two apart, and shards
    do.
    """
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


def test_no_positive_of_the_same_text_becomes_a_negative(tmp_path: Path) -> None:
    """Rows that repeat a query in a format without ids, in other capitals; blank passages are no positives either."""
    texts = random_texts(60, shortest=6, longest=16, seed=5)
    rows = [
        {"query": texts[i // 3].upper() if i % 3 else texts[i // 3], "pos": [f"{texts[i // 3]} {i}", " "], "neg": []}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--output-dir",
        str(tmp_path / "mined"),
        "--retrievers",
        "bm25",
    ]
    main([*arguments, "--ranks", "1", "20", "--negatives", "3", "--pick", "top"])
    records = read(tmp_path / "mined")
    assert len(records) == 60 and sum(len(record["negative_passages"]) for record in records) > 60
    for record in records:
        assert [passage["text"].strip() != "" for passage in record["positive_passages"]] == [True]
        assert not any(
            passage["text"].startswith(f"{record['query'].lower()} ") for passage in record["negative_passages"]
        )
