"""One vector per text out of one vector per token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PoolingMode = Literal["cls", "mean", "last"]
MODES = ("cls", "mean", "last")


def pool(hidden: Tensor, attention_mask: Tensor, mode: str) -> Tensor:
    """The first real token's vector (`cls`), the last one's (`last`), or the mean over real tokens (`mean`).

    hidden [n, T, H], attention_mask [n, T] of 0 and 1 with at least one 1 a row, padding on either side.
    Returns [n, H] float32 (float64 for float64), whatever autocast says: half precision sums 100 tokens badly.
    Raises ValueError for another mode.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    real = attention_mask.bool()  # [n, T]
    with torch.autocast(hidden.device.type, enabled=False):
        if mode == "mean":
            kept = hidden.masked_fill(~real[..., None], 0)
            return kept.sum(dim=1, dtype=dtype) / real.sum(dim=1, keepdim=True)  # [n, H]
        if mode == "cls":
            position = real.int().argmax(dim=1)
        elif mode == "last":
            position = real.shape[1] - 1 - real.flip(1).int().argmax(dim=1)
        else:
            raise ValueError(f"pooling is {mode!r}; expected one of {', '.join(MODES)} (model.pooling)")
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), position].to(dtype)  # [n, H]


def pool_packed(hidden: Tensor, starts: Tensor, mode: str) -> Tensor:
    """As `pool`, for texts one behind another: hidden [T, H], starts [n + 1], each text of at least one token. [n, H].

    A text's vectors are added in their order, so that the same texts give the same bits every time.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        if mode == "mean":
            # `unsafe` skips a check of the offsets that would make the host wait for the device.
            return torch.segment_reduce(hidden.to(dtype), "mean", offsets=starts, axis=0, unsafe=True)  # [n, H]
        if mode == "cls":
            position = starts[:-1]
        elif mode == "last":
            position = starts[1:] - 1
        else:
            raise ValueError(f"pooling is {mode!r}; expected one of {', '.join(MODES)} (model.pooling)")
        return hidden[position].to(dtype)  # [n, H]


def unit_norm(vectors: Tensor) -> Tensor:
    """x / ‖x‖ row by row, in the vectors' own precision; a zero row stays zero."""
    with torch.autocast(vectors.device.type, enabled=False):
        return F.normalize(vectors, dim=-1)
