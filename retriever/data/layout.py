"""How the texts of a chunk lie in memory: one a row with padding behind it, or one behind another without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Padded:
    """n texts, one a row; padded on the right (for decoders on either side)."""

    input_ids: Tensor  # [n, width] int64
    attention_mask: Tensor  # [n, width] int64: 1 at a text's tokens

    def __len__(self) -> int:
        return len(self.input_ids)

    def map(self, function: Callable[[Tensor], Tensor]) -> Padded:
        """The same texts with every tensor replaced by `function` of it."""
        return Padded(function(self.input_ids), function(self.attention_mask))


@dataclass(frozen=True)
class Packed:
    """n texts, one behind another: text i is input_ids[starts[i] : starts[i + 1]]."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64: of each token in its text, from 0
    starts: Tensor  # [n + 1] int32
    longest: int  # tokens of the longest text

    def __len__(self) -> int:
        return len(self.starts) - 1

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        """The same texts with every tensor replaced by `function` of it."""
        return Packed(function(self.input_ids), function(self.positions), function(self.starts), self.longest)


def pad_rows(rows: Sequence[np.ndarray], pad_id: int) -> Padded:
    """Texts of the given tokens, padded on the right with `pad_id` to the longest."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0))[None, :] < lengths[:, None]  # [n, width]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(rows) if len(rows) else []
    return Padded(torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64)))


def pack_rows(rows: Sequence[np.ndarray]) -> Packed:
    """Texts of the given tokens, one behind another."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    starts = np.concatenate([[0], lengths.cumsum()])
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    positions = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)
    return Packed(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(starts.astype(np.int32)),
        int(lengths.max(initial=0)),
    )
