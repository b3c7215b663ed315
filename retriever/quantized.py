"""Embeddings of one byte or one bit a dimension, in the conventions of sentence-transformers and FAISS.

- `int8`: the range of each dimension in a shard is cut into 255 equal steps. A code is the number of its step less 128,
  as in sentence-transformers' `quantize_embeddings`. It is read as the middle of the step, as in FAISS's `SQ8`;
  a dimension of one value is read as that value.
- `binary`: signs, eight to a byte (uint8), as in sentence-transformers' `ubinary` and FAISS's binary indexes. They are
  read as ±1/√D.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

Quantization: TypeAlias = Literal["int8", "binary"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


class Codes:
    """Quantised embeddings [n, D], which may be memory-mapped; what is taken of them is decoded to float32."""

    dtype = np.dtype(np.float32)  # of what is taken

    def __init__(self, codes: np.ndarray, dimension: int, ranges: np.ndarray | None) -> None:
        """`codes`: [n, D] int8 with their `ranges` [2, D] float32 (lowest, highest), or signs [n, ⌈D/8⌉] uint8."""
        self.codes, self.ranges = codes, ranges
        self.shape = (len(codes), dimension)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The embeddings [m, D] float32 of some rows."""
        codes = self.codes[rows]
        if self.ranges is None:
            signs = np.unpackbits(codes, axis=1, count=self.shape[1]).astype(np.float32)
            return (2 * signs - 1) / np.float32(self.shape[1] ** 0.5)
        low, step = self.ranges[0], _steps(self.ranges)
        return low + (codes.astype(np.float32) + np.float32(128.5)) * step

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def quantize(embeddings: np.ndarray, to: Quantization) -> Codes:
    """The codes of embeddings [n, D], finite; of `int8` by the ranges of these n."""
    if to == "binary":
        return Codes(np.packbits(embeddings > 0, axis=1), embeddings.shape[1], None)
    ranges = np.stack([embeddings.min(axis=0), embeddings.max(axis=0)]).astype(np.float32)
    step = _steps(ranges)
    step[step == 0] = 1  # codes of -128, as in sentence-transformers
    codes = np.clip(np.floor((embeddings - ranges[0]) / step), 0, 255) - 128
    return Codes(codes.astype(np.int8), embeddings.shape[1], ranges)


def _steps(ranges: np.ndarray) -> np.ndarray:
    """[D] widths of a step; 0 for a dimension of one value."""
    low, high = ranges
    return (high - low) / 255
