"""Layouts of a chunk's texts: padded, one text a row; or packed, one text after another without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


class OfTensors:
    """A dataclass whose fields are tensors, tuples or dataclasses of tensors, or anything else; it moves as a whole."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with every tensor replaced by `function` of it."""
        return _mapped(self, function)

    def to(self, device: torch.device) -> Self:
        """A copy on `device`; the host does not wait for it where the memory is pinned."""
        return self.map(lambda t: t.to(device, non_blocking=device.type != "cpu"))

    def pinned(self) -> Self:
        """A copy in page-locked host memory."""
        return self.map(Tensor.pin_memory)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), function) for f in fields(value)})
    if isinstance(value, tuple):
        items = [_mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@dataclass(frozen=True)
class Padded(OfTensors):
    """n texts, one a row; padded on the right (for decoders on either side)."""

    input_ids: Tensor  # [n, width] int64
    attention_mask: Tensor  # [n, width] int64: 1 at a text's tokens

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Packed(OfTensors):
    """n texts, one behind another: text i is input_ids[starts[i] : starts[i + 1]]."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64: of each token in its text, from 0
    starts: Tensor  # [n + 1] int32
    longest: int  # tokens of the longest text

    def __len__(self) -> int:
        return len(self.starts) - 1


def pad(tokens: np.ndarray, lengths: np.ndarray, pad_id: int) -> Padded:
    """Texts of `lengths` [n] tokens, which stand one behind another in `tokens` [sum], padded with `pad_id`."""
    mask = np.arange(lengths.max(initial=0))[None, :] < lengths[:, None]  # [n, width]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = tokens
    return Padded(torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64)))


def pack(tokens: np.ndarray, lengths: np.ndarray) -> Packed:
    """Texts of `lengths` [n] tokens, which stand one behind another in `tokens` [sum] int64."""
    starts = np.concatenate([[0], np.cumsum(lengths)])  # [n + 1]
    positions = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)  # [sum]
    input_ids, position_ids, begins = map(torch.from_numpy, (tokens, positions, starts.astype(np.int32)))
    return Packed(input_ids, position_ids, begins, int(lengths.max(initial=0)))


def pad_rows(rows: Sequence[np.ndarray], pad_id: int) -> Padded:
    """Texts of the tokens in `rows`, padded on the right with `pad_id` to the longest."""
    return pad(*_joined(rows), pad_id)


def pack_rows(rows: Sequence[np.ndarray]) -> Packed:
    """Texts of the tokens in `rows`, one behind another."""
    return pack(*_joined(rows))


def _joined(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    return tokens, np.array([len(row) for row in rows], dtype=np.int64)
