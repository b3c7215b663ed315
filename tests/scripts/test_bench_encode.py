"""The encoding benchmark's own parts: passages whose lengths are what they are said to be, and a page made of its rows."""

from __future__ import annotations

import numpy as np

from scripts.bench.encode import cosines, markdown
from scripts.bench.passages import random_passages, word_tokenizer
from scripts.bench.tables import Table


def test_random_passages_have_the_lengths_they_are_said_to_have() -> None:
    texts, lengths = random_passages(50, seed=3)
    rows = word_tokenizer()(texts)["input_ids"]
    assert [len(row) for row in rows] == lengths.tolist()
    assert lengths.min() >= 16 and lengths.max() <= 256
    assert len({token for row in rows for token in row[1:-1]}) > 1000 and not any(1 in row for row in rows), "no unknown word"
    assert random_passages(50, seed=3)[0] == texts


def test_cosines_compare_row_by_row() -> None:
    found = cosines(np.array([[1.0, 0], [3, 4]], np.float32), np.array([[2.0, 0], [4, 3]], np.float32))
    np.testing.assert_allclose(found, [1, 0.96], rtol=1e-12)


def test_the_page_names_rates_ratios_and_failures() -> None:
    table = Table("python -m scripts.bench.encode", "0" * 40, "a GPU", {"torch": "2"})
    table.add("texts=4,packed", "bigbatch", "cosine_min", 0.99995, "")
    table.add("texts=8,packed,ids", "bigbatch", "passages_per_s", 40_000, "passages/s")
    table.add("texts=8,packed,ids", "bigbatch", "peak_gib", 3.25, "GiB")
    table.add("texts=8,fused", "bigbatch", "passages_per_s", None, "passages/s", "fails: no such kernel")
    table.add("texts=4,batch=2,text", "sentence-transformers", "passages_per_s", 5_000, "passages/s")
    page = markdown(table)
    assert "| bigbatch | texts=8,packed,ids | 40,000 | 8.0 | 3.2 | 0.999950 |" in page
    assert "| bigbatch | texts=8,fused | fails: no such kernel | — | — | — |" in page
    assert "| sentence-transformers | texts=4,batch=2,text | 5,000 | 1.0 | — | — |" in page
