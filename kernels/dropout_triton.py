# mypy: disable-error-code="no-untyped-def"
"""The masks of `dropout` for Triton kernels, bit by bit the same.

In a kernel: `row_key, column_key = mask_keys(seed, head)` once; `mask_words(row_key, rows)` and `mask_words(column_key,
columns)` once a row and column; then `kept(row_words[:, None], column_words[None, :], THRESHOLD)` with THRESHOLD =
`dropout.drop_below(dropout)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import dropout

FIRST = tl.constexpr(dropout.FIRST)
SECOND = tl.constexpr(dropout.SECOND)
GOLDEN = tl.constexpr(dropout.GOLDEN)


@triton.jit
def mix(x):
    """A bijection of uint32 in which every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 13)) * SECOND
    return x ^ (x >> 16)


@triton.jit
def mask_keys(seed, head):
    """The (row key, column key) of a head, uint32; `seed` points at one int64, head is a number ≥ 0."""
    word = tl.load(seed)
    high, low = (word >> 32).to(tl.uint32), word.to(tl.uint32)
    key = mix(mix(mix(high ^ GOLDEN) ^ low) ^ tl.cast(head, tl.uint32))
    return key, mix(key ^ GOLDEN)


@triton.jit
def mask_words(key, numbers):
    """The words of rows or columns with these numbers, under the key for rows or columns."""
    return mix(numbers.to(tl.uint32) ^ key)


@triton.jit
def kept(row_words, column_words, THRESHOLD: tl.constexpr):
    """Whether dropout keeps the elements at these rows and columns (shapes broadcast)."""
    word = (row_words ^ column_words) * FIRST
    return (word ^ (word >> 16)) * SECOND >= THRESHOLD
