"""The encoding benchmark's own parts: passages whose lengths are what they are said to be, and a row for each way to
encode.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.bench.encode import main, worst_cosine
from scripts.bench.passages import random_passages, word_tokenizer
from scripts.bench.tables import Table


def test_random_passages_have_the_lengths_they_are_said_to_have() -> None:
    texts, lengths = random_passages(50, seed=3)
    rows = word_tokenizer()(texts)["input_ids"]
    assert [len(row) for row in rows] == lengths.tolist()
    assert lengths.min() >= 16 and lengths.max() <= 256
    assert len({token for row in rows for token in row[1:-1]}) > 1000 and not any(1 in row for row in rows), (
        "no unknown word"
    )
    assert random_passages(50, seed=3)[0] == texts


def test_cosines_compare_row_by_row() -> None:
    found, expected = np.array([[1.0, 0], [3, 4]], np.float32), np.array([[2.0, 0], [4, 3]], np.float32)
    assert abs(worst_cosine(found, expected) - 0.96) < 1e-12
    assert worst_cosine(found, found) == 1


def test_ways_to_encode_and_peers_have_their_rows(tmp_path: Path) -> None:
    """Of another model than BERT. On a CPU flash attention is named with the reason why it does not run."""
    output = tmp_path / "encode.json"
    sizes = [
        "--model",
        "modernbert-base",
        "--layers",
        "1",
        "--texts",
        "30",
        "--distinct",
        "20",
        "--peer-texts",
        "10",
        "--peer-batches",
        "4",
    ]
    assert (
        main(
            [
                *sizes,
                "--modes",
                "packed,fused",
                "--text-modes",
                "packed,fused",
                "--device",
                "cpu",
                "--output",
                str(output),
            ]
        )
        == 0
    )
    table = Table.load(output)
    for case in ("texts=80,packed,fused,ids", "texts=30,packed,fused,text"):
        assert (table.get(case, "bigbatch", "passages_per_s") or 0) > 0
    assert (table.get("texts=10,batch=4,text", "sentence-transformers", "passages_per_s") or 0) > 0
    assert all((row.value or 0) > 0.999 for row in table.rows if row.metric == "cosine_min")
    (flash,) = (row for row in table.rows if row.method == "sentence-transformers-flash")
    assert flash.value is None and "FlashAttention2 is not available on CPU" in flash.note
