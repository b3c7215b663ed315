"""Chunks of stored tokens: each text wrapped, cut and laid out as the tokenizer would have it, whatever goes
together.
"""

from __future__ import annotations

import numpy as np
import pytest

from retriever.data.chunk_builders import chunk_builders
from retriever.data.layout import Packed
from retriever.data.text_table import TokenRows
from retriever.data.tokens import TokenTemplate, tokenize_flat
from tests.tiny import random_texts, tiny_tokenizer

TEXTS = [*random_texts(40, longest=50, seed=9), "", "ocean " * 80]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_hold_every_text_once_as_the_tokenizer_gives_it(packed: bool, side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = side
    tokens, counts = tokenize_flat(tokenizer, TEXTS)
    table = TokenRows(tokens, np.concatenate([[0], counts]).cumsum())
    rows = np.array([41, 3, 40, *range(10, 30), 3])
    builders = chunk_builders(
        "passage",
        table,
        rows,
        TokenTemplate.from_tokenizer(tokenizer),
        max_tokens=30,
        tokens_per_chunk=100,
        packed=packed,
    )
    found: dict[int, list[int]] = {}
    for chunk in (build() for build in builders):
        laid = chunk.tokens
        assert chunk.side == "passage" and len(laid) == len(chunk.rows) and laid.input_ids.numel() <= 100
        if isinstance(laid, Packed):
            texts = [laid.input_ids[a:b].tolist() for a, b in zip(laid.starts[:-1], laid.starts[1:], strict=True)]
            assert laid.longest == max(map(len, texts))
        else:
            texts = [row[mask.bool()].tolist() for row, mask in zip(laid.input_ids, laid.attention_mask, strict=True)]
        found |= dict(zip(chunk.rows.tolist(), texts, strict=True))
    assert isinstance(laid, Packed) == packed and len(builders) > 3
    expected = tokenizer([TEXTS[row] for row in rows], truncation=True, max_length=30)["input_ids"]
    assert [found[position] for position in range(len(rows))] == expected
    assert sum(len(text) for text in expected) == sum(map(len, found.values()))
