# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of `embed_norm`: 6 bytes an element, and the rows of positions, which stay in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.add_norm_triton import block

ROWS = 2  # a program's


@triton.jit(do_not_specialize=["T", "V", "P"])
def _embed_norm(
    ids,  # [T] int64
    positions,  # [T] int64
    words,  # [V, D] float32
    places,  # [P, D] float32
    segment,  # [D] float32
    weight,  # [D] float32
    bias,  # [D] float32
    following,  # out [T, D] float16
    T,
    V,
    P,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_rows, in_columns = rows < T - first, columns < D
    inside = in_rows[:, None] & in_columns[None, :]
    word = tl.load(ids + first + rows, in_rows, other=0)
    place = tl.load(positions + first + rows, in_rows, other=0)
    known = in_rows & (word >= 0) & (word < V) & (place >= 0) & (place < P)
    readable = known[:, None] & in_columns[None, :]
    z = tl.load(words + word[:, None] * D + columns[None, :], readable, other=float("nan"))
    z += tl.load(segment + columns, in_columns, other=0.0)[None, :]
    z += tl.load(places + place[:, None] * D + columns[None, :], readable, other=0.0)
    z = tl.where(in_columns[None, :], z, 0.0)
    centred = tl.where(in_columns[None, :], z - (tl.sum(z, 1) / D)[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    scale, base = tl.load(weight + columns, in_columns, other=0.0), tl.load(bias + columns, in_columns, other=0.0)
    y = centred * spread[:, None] * scale[None, :] + base[None, :]
    tl.store(following + tl.cast(first, tl.int64) * D + (rows[:, None] * D + columns[None, :]), y.to(tl.float16), inside)


def embed_norm(
    ids: Tensor, positions: Tensor, words: Tensor, places: Tensor, segment: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """[T, D] float16; see `kernels.embed_norm`."""
    T, D = len(ids), words.shape[1]
    following = torch.empty(T, D, dtype=torch.float16, device=ids.device)
    block_d, warps = block(D)
    _embed_norm[(triton.cdiv(T, ROWS),)](
        ids, positions, words, places, segment, weight, bias, following, T, len(words), len(places), eps,
        D=D, ROWS=ROWS, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return following
