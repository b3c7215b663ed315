"""From stored tokens to chunks: which texts go together, and how each chunk is laid out when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from retriever.data.chunks import Chunk, plan_chunks
from retriever.data.layout import Packed, Padded
from retriever.data.text_table import TokenRows
from retriever.data.tokens import Side, TokenTemplate


def chunk_builders(
    side: Side,
    texts: TokenRows,
    rows: np.ndarray,
    template: TokenTemplate,
    *,
    max_tokens: int,
    tokens_per_chunk: int,
    packed: bool,
) -> list[Callable[[], Chunk]]:
    """One function a chunk of the texts in `rows` [n] int64, longest first (`plan_chunks`), which reads and lays it
    out.

    Texts are cut to `max_tokens`, special tokens included; a chunk's own `rows` are positions in `rows`.
    Raises ValueError where a single text is longer than `tokens_per_chunk`.
    """
    lengths = template.lengths(texts.lengths_of(rows), max_tokens)
    plan = plan_chunks(lengths, tokens_per_chunk, packed=packed)
    return [
        partial(_build, side, texts, positions, rows[positions], template, max_tokens, packed) for positions in plan
    ]


def _build(
    side: Side,
    texts: TokenRows,
    positions: np.ndarray,
    rows: np.ndarray,
    template: TokenTemplate,
    max_tokens: int,
    packed: bool,
) -> Chunk:
    tokens, counts = texts.gather(rows, max_tokens - template.special_tokens, keep_end=template.keep_end)
    layout: Padded | Packed
    if packed:
        input_ids, starts, places = template.pack_rows(tokens, counts)
        longest = int(counts.max()) + template.special_tokens
        layout = Packed(torch.from_numpy(input_ids), torch.from_numpy(places), torch.from_numpy(starts), longest)
    else:
        layout = Padded(*map(torch.from_numpy, template.wrap_rows(tokens, counts)))
    return Chunk(side, torch.from_numpy(positions), layout)
