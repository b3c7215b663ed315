# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of BERT's embeddings: one pass over memory each way; a row of z is gathered again going backward.

With z = words[id] + segment + places[position], x̂ = (z − mean) · rstd, y = dropout(weight · x̂ + bias) and g the
gradient at y, dropped:

    dz = rstd · (weight·g − mean(weight·g) − x̂ · mean(weight·g · x̂)),    dsegment = Σ_rows dz
    dweight = Σ_rows g · x̂,    dbias = Σ_rows g
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import persistent_grid
from kernels.dropout import drop_below
from kernels.layers import norm
from kernels.layers.norm import keep_elements, standardize, standardize_gradient

ROWS = 2  # a program's, forward
_COLUMNS_PER_WARP = 256


@triton.jit
def _gather(ids, positions, words, places, segment, first, rows, columns, T, V, P, D: tl.constexpr):
    """z of some rows [ROWS, BLOCK_D], 0 beyond D; NaN where an id is outside its table."""
    in_rows, in_columns = rows < T - first, columns < D
    word = tl.load(ids + first + rows, in_rows, other=0)
    place = tl.load(positions + first + rows, in_rows, other=0)
    known = in_rows & (word >= 0) & (word < V) & (place >= 0) & (place < P)
    readable = known[:, None] & in_columns[None, :]
    z = tl.load(words + word[:, None] * D + columns[None, :], readable, other=float("nan"))
    z += tl.load(segment + columns, in_columns, other=0.0)[None, :]
    z += tl.load(places + place[:, None] * D + columns[None, :], readable, other=0.0)
    return tl.where(in_columns[None, :], z, 0.0)


@triton.jit(do_not_specialize=["T", "V", "P"])
def _embed_norm(
    ids,  # [T] int64
    positions,  # [T] int64
    words,  # [V, D] float32
    places,  # [P, D] float32
    segment,  # [D] float32
    weight,  # [D] float32
    bias,  # [D] float32
    seed,  # [1] int64 or None
    out,  # [T, D] float32
    statistics,  # out [2, T] float32: mean, rstd
    T,
    V,
    P,
    eps,
    inverse_keep,
    D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_rows, in_columns = rows < T - first, columns < D
    z = _gather(ids, positions, words, places, segment, first, rows, columns, T, V, P, D)
    level, spread, centred = standardize(z, in_columns, eps, D, False)
    scale, base = tl.load(weight + columns, in_columns, other=0.0), tl.load(bias + columns, in_columns, other=0.0)
    y = centred * spread[:, None] * scale[None, :] + base[None, :]
    if THRESHOLD > 0:
        y = tl.where(keep_elements(seed, first + rows, columns, THRESHOLD), y * inverse_keep, 0.0)
    at = tl.cast(first, tl.int64) * D + (rows[:, None] * D + columns[None, :])
    tl.store(out + at, y, in_rows[:, None] & in_columns[None, :])
    tl.store(statistics + first + rows, level, in_rows)
    tl.store(statistics + T + first + rows, spread, in_rows)


@triton.jit(do_not_specialize=["T", "V", "P"])
def _embed_norm_backward(
    dout,  # [T, D] float32
    ids,
    positions,
    words,
    places,
    segment,
    weight,
    statistics,
    seed,
    dz_out,  # out [T, D] float32
    partial,  # out [programs, 3, D] float32: dweight, dbias, dsegment
    T,
    V,
    P,
    inverse_keep,
    D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_columns = columns < D
    scale = tl.load(weight + columns, in_columns, other=0.0)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dsegment = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(program * ROWS, T, programs * ROWS, num_stages=STAGES):
        in_rows = rows < T - first
        inside = in_rows[:, None] & in_columns[None, :]
        at = tl.cast(first, tl.int64) * D + (rows[:, None] * D + columns[None, :])
        g = tl.load(dout + at, inside, other=0.0)
        if THRESHOLD > 0:
            g = tl.where(keep_elements(seed, first + rows, columns, THRESHOLD), g * inverse_keep, 0.0)
        z = _gather(ids, positions, words, places, segment, first, rows, columns, T, V, P, D)
        spread = tl.load(statistics + T + first + rows, in_rows, other=0.0)[:, None]
        normalised = (z - tl.load(statistics + first + rows, in_rows, other=0.0)[:, None]) * spread
        normalised = tl.where(inside, normalised, 0.0)
        dz = tl.where(inside, standardize_gradient(g, normalised, scale, spread, D, False), 0.0)
        tl.store(dz_out + at, dz, inside)
        dweight += tl.sum(g * normalised, 0)
        dbias += tl.sum(g, 0)
        dsegment += tl.sum(dz, 0)
    sums = partial + program * 3 * D + columns
    tl.store(sums, dweight, in_columns)
    tl.store(sums + D, dbias, in_columns)
    tl.store(sums + 2 * D, dsegment, in_columns)


def block(D: int) -> tuple[int, int]:
    """(columns, warps) of a program of the forward pass."""
    columns = triton.next_power_of_2(D)
    return columns, max(1, min(16, columns // _COLUMNS_PER_WARP))


def embed_norm(
    ids: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    eps: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], statistics [2, T] for the backward pass), float32; tables: words, places, segment, weight and bias."""
    words, places, segment, weight, bias = tables
    T, D = len(ids), words.shape[1]
    out, statistics = words.new_empty(T, D), words.new_empty(2, T)
    block_d, warps = block(D)
    _embed_norm[(triton.cdiv(T, ROWS),)](
        ids, positions, words, places, segment, weight, bias, seed, out, statistics, T, len(words), len(places), eps,
        1 / (1 - dropout),
        D=D, THRESHOLD=drop_below(dropout), ROWS=ROWS, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return out, statistics


def embed_norm_backward(
    dout: Tensor,
    ids: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    statistics: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(dz [T, D], [3, D]: dweight, dbias, dsegment), float32; tables: words, places, segment and weight.

    The sums are added in a fixed order, without atomics.
    """
    words, places, segment, weight = tables
    T, D = dout.shape
    dz = torch.empty_like(dout)
    rows, block_d, warps = norm.block(norm.BACKWARD, D)
    programs = persistent_grid(dout, triton.cdiv(T, rows), norm.BACKWARD.warps_per_sm / warps)
    partial = dout.new_empty(programs, 3, D)
    _embed_norm_backward[(programs,)](
        dout, ids, positions, words, places, segment, weight, statistics, seed, dz, partial, T, len(words),
        len(places), 1 / (1 - dropout),
        D=D, THRESHOLD=drop_below(dropout), ROWS=rows, BLOCK_D=block_d, STAGES=norm.BACKWARD.stages, num_warps=warps,
    )  # fmt: skip
    return dz, partial.sum(0)
