"""A table of tokenised texts: written batch by batch in order, read by rows, cut at either end."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from retriever.data import text_table
from retriever.data.text_table import TextTable, TextTableWriter
from tests.tiny import random_texts, tiny_tokenizer

TEXTS = ["", *random_texts(60, longest=30, seed=5), "", "ocean " * 300]


@pytest.fixture(params=[1, 7, 1000])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextTable:
    """TEXTS in batches of so many."""
    monkeypatch.setattr(text_table, "_BATCH_TEXTS", request.param)
    with TextTableWriter(tmp_path / "table", tiny_tokenizer()) as writer:
        for number, text in enumerate(TEXTS):
            writer.add(f"t{number}", text)
    return TextTable(tmp_path / "table")


def test_a_table_holds_every_text_in_order(table: TextTable, tmp_path: Path) -> None:
    expected = tiny_tokenizer()(TEXTS, add_special_tokens=False)["input_ids"]
    assert [table.tokens(row).tolist() for row in range(len(table))] == expected
    assert table.lengths.tolist() == [len(row) for row in expected]
    assert table.ids.to_pylist() == [f"t{number}" for number in range(len(TEXTS))]
    manifest = json.loads((tmp_path / "table/manifest.json").read_text())
    assert manifest == {"texts": len(TEXTS), "tokens": sum(map(len, expected)), "dtype": "uint16"}


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("limit", [1, 9, 1000])
def test_gathered_rows_are_the_texts_cut(table: TextTable, limit: int, keep_end: bool) -> None:
    """Rows in any order, repeated, empty and longer than the limit."""
    rows = np.array([62, 5, 0, 5, 61, 1, 33])
    expected = [table.tokens(row)[-limit:] if keep_end else table.tokens(row)[:limit] for row in rows]
    tokens, counts = table.gather(rows, limit, keep_end=keep_end)
    assert counts.tolist() == [len(row) for row in expected]
    assert tokens.tolist() == np.concatenate(expected).tolist() and tokens.dtype == np.uint16
    assert table.lengths_of(rows).tolist() == [len(table.tokens(row)) for row in rows]
    tokens, counts = table.gather(rows[:0], limit, keep_end=keep_end)
    assert len(tokens) == len(counts) == 0


def test_what_the_writer_holds_does_not_grow_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the texts, the same peak of memory: no list of lengths, ids or tokens is kept."""
    monkeypatch.setattr(text_table, "_BATCH_TEXTS", 100)
    tokenizer = tiny_tokenizer()

    def peak_bytes(texts: int) -> int:
        tracemalloc.start()
        try:
            with TextTableWriter(tmp_path / str(texts), tokenizer) as writer:
                for number in range(texts):
                    writer.add(str(number), "the river")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(1_000)
    few, many = peak_bytes(2_000), peak_bytes(20_000)
    assert len(TextTable(tmp_path / "20000")) == 20_000
    assert many < few + 100_000, "18,000 lengths alone are 144,000 bytes"


def test_an_error_of_the_tokenizer_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens in a thread, and is raised where the texts are added or the table is finished; no manifest calls the
    table whole.
    """

    def fails(*_: object) -> None:
        raise RuntimeError("no such token")

    monkeypatch.setattr(text_table, "tokenize_flat", fails)
    with (
        pytest.raises(RuntimeError, match="no such token"),
        TextTableWriter(tmp_path / "table", tiny_tokenizer()) as writer,
    ):
        writer.add("t0", "river")
    assert not (tmp_path / "table/manifest.json").exists()
