"""Dropout masks that are a pure function of (seed, head, row, column), in torch; `dropout_hash_triton` draws the same
ones inside kernels.

An element is dropped where its 32-bit hash lies below dropout · 2³². Nothing is stored: the backward pass and a second
forward pass draw the mask again, whatever the tiles they work in. With mix the finaliser of MurmurHash3 (A. Appleby),
and all words of 32 bits,

    key    = mix(mix(mix(seed_high ⊕ golden) ⊕ seed_low) ⊕ head)
    row    = mix(row number ⊕ key),    column = mix(column number ⊕ mix(key ⊕ golden))
    hash   = ((row ⊕ column) · first, its upper half xored onto its lower) · second

so that rows and columns are hashed each once and an element costs six operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
FIRST, SECOND, GOLDEN = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9


def keep_mask(seed: Tensor, rows: Tensor, columns: Tensor, dropout: float, heads: Tensor | None = None) -> Tensor:
    """Which elements dropout keeps: bool [..., R, C], or [..., H, R, C] with heads.

    seed int64 [1]; rows [..., R], columns [..., C] and heads [H] int64, in 0..2³² − 1. `heads` None: as head 0. Two
    uses of dropout need two seeds (or heads): the same seed draws the same mask.
    """
    head = torch.zeros(1, dtype=torch.int64, device=seed.device) if heads is None else heads
    low, high = seed & WORD, (seed >> 32) & WORD
    key = mix(mix(mix(high ^ GOLDEN) ^ low) ^ head)  # [H]
    row_words = mix(rows[..., None, :] ^ key[:, None])  # [..., H, R]
    column_words = mix(columns[..., None, :] ^ mix(key ^ GOLDEN)[:, None])  # [..., H, C]
    word = (row_words[..., :, None] ^ column_words[..., None, :]) * FIRST & WORD  # [..., H, R, C]
    word = (word ^ (word >> 16)) * SECOND & WORD
    kept = word >= drop_below(dropout)
    return kept.squeeze(-3) if heads is None else kept


def drop_below(dropout: float) -> int:
    """The 32-bit word below which an element's hash drops it."""
    return round(dropout * 2**32)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * FIRST & WORD
    x = (x ^ (x >> 13)) * SECOND & WORD
    return x ^ (x >> 16)
