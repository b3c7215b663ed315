# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of dropout, residual and a norm: one pass over memory forward, one backward.

With z = dropout(x + bias) + residual, x̂ = (z − mean) · rstd and y = weight · x̂ + norm_bias, the gradient at y being
g:

    dz = rstd · (weight·g − mean(weight·g) − x̂ · mean(weight·g · x̂)),    dresidual = dz,    dx = keep · dz / (1 −
    dropout)
    dweight = Σ_rows g · x̂,    dnorm_bias = Σ_rows g,    dbias = Σ_rows dx

RMSNorm has mean = 0 and no term mean(weight·g). Where the stream is z, its gradient is added to dz. Where x + bias goes
through an RMSNorm of its own before it is added, so does dx on its way back.

The backward pass computes z and the mask again from x, residual and the seed. Its programs stay, loop over rows and
keep their sums over rows in registers; these are then added up in a fixed order, without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import persistent_grid
from kernels.dropout import drop_below
from kernels.dropout_triton import kept, mask_keys, mask_words
from kernels.layers.reference import Norm


@dataclass(frozen=True)
class Launch:
    """Launch parameters: rows at a time, elements of a row per warp, and, for persistent programs, their warps on a
    multiprocessor.
    """

    rows: int
    columns_per_warp: int
    warps_per_sm: int = 0
    stages: int = 1


# Tuned on an H100 at T = 65,486, D = 768.
FORWARD = Launch(rows=1, columns_per_warp=128)
FORWARD_HALF = Launch(rows=2, columns_per_warp=256)  # of a residual in half precision
BACKWARD = Launch(rows=1, columns_per_warp=256, warps_per_sm=16, stages=2)
# Of pre-norm streams, tuned on an H200 at T = 62,946, D = 768 and 1,024.
PRE_FORWARD = Launch(rows=1, columns_per_warp=256)
PRE_BACKWARD = Launch(rows=2, columns_per_warp=256, warps_per_sm=16, stages=2)
_MOST_ELEMENTS = 4096  # of a block of rows


@triton.jit
def _added(x, shift, at, inside, added_weight, columns, added_eps, D: tl.constexpr):
    """(what is added, the same before its weight, its reciprocal root mean square [rows, 1]); where there is no
    `added_weight`, x + shift and nothing.
    """
    plain = tl.load(x + at, inside, other=0.0).to(tl.float32) + shift[None, :]
    if added_weight is None:
        return plain, plain, 1.0
    else:
        spread = tl.rsqrt(tl.sum(plain * plain, 1) / D + added_eps)[:, None]
        normalised = plain * spread
        return normalised * _load_row(added_weight, columns, D)[None, :], normalised, spread


@triton.jit
def _dropped_sum(added, residual, at, inside, keep, inverse_keep, THRESHOLD: tl.constexpr):
    if THRESHOLD > 0:
        added = tl.where(keep, added * inverse_keep, 0.0)
    return added + tl.load(residual + at, inside, other=0.0).to(tl.float32)


@triton.jit
def _load_row(pointer, columns, D: tl.constexpr):
    if pointer is None:
        return tl.zeros(columns.shape, tl.float32)
    else:
        return tl.load(pointer + columns, columns < D, other=0.0).to(tl.float32)


@triton.jit
def keep_elements(seed, rows, columns, THRESHOLD: tl.constexpr):
    """Which elements of these rows and columns dropout keeps: [rows, columns], or True where there is none."""
    if THRESHOLD > 0:
        row_key, column_key = mask_keys(seed, 0)
        return kept(mask_words(row_key, rows)[:, None], mask_words(column_key, columns)[None, :], THRESHOLD)
    else:
        return True


@triton.jit
def standardize(z, in_columns, eps, D: tl.constexpr, RMS: tl.constexpr):
    """(mean, reciprocal standard deviation, z less its mean) of the rows of z, which are 0 beyond D; RMS: the mean
    counts as 0.
    """
    level = tl.sum(z, 1) / D
    if RMS:
        level *= 0.0
    centred = tl.where(in_columns[None, :], z - level[:, None], 0.0)
    return level, tl.rsqrt(tl.sum(centred * centred, 1) / D + eps), centred


@triton.jit
def standardize_gradient(g, normalised, weight, spread, D: tl.constexpr, RMS: tl.constexpr):
    """The gradient at z, with g the gradient at weight · normalised [rows, columns]; spread [rows, 1], g is 0 beyond
    D.
    """
    weighted = g * weight[None, :]
    level = tl.sum(weighted, 1) / D
    if RMS:
        level *= 0.0
    along = tl.sum(weighted * normalised, 1) / D
    return spread * (weighted - level[:, None] - normalised * along[:, None])


@triton.jit(do_not_specialize=["T"])
def _norm_forward(
    x,  # [T, D]
    bias,  # [D] or None
    residual,  # [T, D]
    weight,  # [D]
    norm_bias,  # [D] or None
    added_weight,  # [D] or None
    seed,  # [1] int64 or None
    stream,  # out [T, D] in residual's dtype: z if PRE, else y
    rounded,  # out [T, D] in x's dtype: y; or None
    statistics,  # out [2, T]: mean, rstd
    T,
    eps,
    added_eps,
    inverse_keep,
    D: tl.constexpr,
    RMS: tl.constexpr,
    PRE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_rows, in_columns = rows < T - first, columns < D
    inside = in_rows[:, None] & in_columns[None, :]
    at = tl.cast(first, tl.int64) * D + (rows[:, None] * D + columns[None, :])
    keep = keep_elements(seed, first + rows, columns, THRESHOLD)
    added, _, _ = _added(x, _load_row(bias, columns, D), at, inside, added_weight, columns, added_eps, D)
    z = _dropped_sum(added, residual, at, inside, keep, inverse_keep, THRESHOLD)
    level, spread, centred = standardize(z, in_columns, eps, D, RMS)
    y = centred * spread[:, None] * _load_row(weight, columns, D)[None, :] + _load_row(norm_bias, columns, D)[None, :]
    tl.store(stream + at, (z if PRE else y).to(stream.dtype.element_ty), inside)
    if rounded is not None:
        tl.store(rounded + at, y.to(rounded.dtype.element_ty), inside)
    tl.store(statistics + first + rows, level, in_rows)
    tl.store(statistics + T + first + rows, spread, in_rows)


@triton.jit(do_not_specialize=["T"])
def _norm_backward(
    d_stream,  # [T, D] float32 or None
    d_rounded,  # [T, D] in dx's dtype or None
    x,  # None: z is the residual
    bias,
    residual,
    weight,
    added_weight,
    statistics,
    seed,
    dx,  # out [T, D]
    dresidual,  # out [T, D] float32
    partial,  # out [programs, K, D] float32: 2 sums, one more with a bias, one more with a norm of what is added
    T,
    added_eps,
    inverse_keep,
    D: tl.constexpr,
    RMS: tl.constexpr,
    PRE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_columns = columns < D
    shift, w = _load_row(bias, columns, D), _load_row(weight, columns, D)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dnorm_bias = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dadded_weight = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(program * ROWS, T, programs * ROWS, num_stages=STAGES):
        in_rows = rows < T - first
        inside = in_rows[:, None] & in_columns[None, :]
        at = tl.cast(first, tl.int64) * D + (rows[:, None] * D + columns[None, :])
        keep = keep_elements(seed, first + rows, columns, THRESHOLD)
        if x is None:
            z = tl.load(residual + at, inside, other=0.0).to(tl.float32)
        else:
            added, plain, added_spread = _added(x, shift, at, inside, added_weight, columns, added_eps, D)
            z = _dropped_sum(added, residual, at, inside, keep, inverse_keep, THRESHOLD)
        spread = tl.load(statistics + T + first + rows, in_rows, other=0.0)[
            :, None
        ]  # 0 outside of the rows, and so all that follows
        normalised = (z - tl.load(statistics + first + rows, in_rows, other=0.0)[:, None]) * spread
        g = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if d_stream is not None and not PRE:
            g += tl.load(d_stream + at, inside, other=0.0)
        if d_rounded is not None:
            g += tl.load(d_rounded + at, inside, other=0.0).to(tl.float32)
        dz = standardize_gradient(g, normalised, w, spread, D, RMS)
        if d_stream is not None and PRE:
            dz += tl.load(d_stream + at, inside, other=0.0)
        tl.store(dresidual + at, dz, inside)
        if THRESHOLD > 0:
            dz = tl.where(keep, dz * inverse_keep, 0.0)
        if added_weight is not None:
            dadded_weight += tl.sum(dz * plain, 0)
            dz = standardize_gradient(dz, plain, _load_row(added_weight, columns, D), added_spread, D, True)
        tl.store(dx + at, dz.to(dx.dtype.element_ty), inside)
        dweight += tl.sum(g * normalised, 0)
        dnorm_bias += tl.sum(g, 0)
        dbias += tl.sum(dz, 0)
    vectors = 2 + (bias is not None) + (added_weight is not None)
    sums = partial + program * vectors * D + columns
    tl.store(sums, dweight, in_columns)
    tl.store(sums + D, dnorm_bias, in_columns)
    if bias is not None:
        tl.store(sums + 2 * D, dbias, in_columns)
    if added_weight is not None:
        tl.store(sums + (vectors - 1) * D, dadded_weight, in_columns)


def norm_forward(norm: Norm, norm_bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(stream [T, D] like residual, rounded [T, D] like x or None where they are one, statistics [2, T] float32)."""
    x, bias, residual, weight, seed, dropout, rms, pre, added_weight, added_eps = norm
    assert x is not None
    T, D = x.shape
    stream = torch.empty_like(residual)
    rounded = None if x.dtype == stream.dtype and not pre else torch.empty_like(x)
    statistics = residual.new_empty((2, T), dtype=torch.float32)
    use = PRE_FORWARD if pre else FORWARD if residual.element_size() > 2 else FORWARD_HALF
    rows, block_d, warps = block(use, D)
    _norm_forward[(triton.cdiv(T, rows),)](
        x, bias, residual, weight, norm_bias, added_weight, seed, stream, rounded, statistics, T, eps, added_eps,
        1 / (1 - dropout), D,
        RMS=rms, PRE=pre, THRESHOLD=drop_below(dropout), ROWS=rows, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return stream, rounded, statistics


def norm_backward(
    d_stream: Tensor | None, d_rounded: Tensor | None, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, D] in x's dtype, dresidual [T, D] float32, [K, D] float32: dweight, dnorm_bias and, as far as there are
    such, dbias and dadded_weight).
    """
    x, bias, residual, weight, seed, dropout, rms, pre, added_weight, added_eps = norm
    T, D = residual.shape
    dresidual = torch.empty_like(residual)
    dx = torch.empty_like(next(given for given in (x, d_rounded, residual) if given is not None))
    use = PRE_BACKWARD if pre else BACKWARD
    rows, block_d, warps = block(use, D)
    programs = persistent_grid(residual, triton.cdiv(T, rows), use.warps_per_sm / warps)
    partial = residual.new_empty(programs, 2 + (bias is not None) + (added_weight is not None), D)
    _norm_backward[(programs,)](
        d_stream, d_rounded, x, bias, residual, weight, added_weight, statistics, seed, dx, dresidual, partial, T,
        added_eps, 1 / (1 - dropout), D,
        RMS=rms, PRE=pre, THRESHOLD=drop_below(dropout), ROWS=rows, BLOCK_D=block_d, STAGES=use.stages,
        num_warps=warps,
    )  # fmt: skip
    return dx, dresidual, partial.sum(0)


@cache
def block(launch: Launch, D: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program's block: whole rows, each spread over all warps, so that sums over rows stay
    in a thread.
    """
    block_d = triton.next_power_of_2(D)
    rows = max(1, min(launch.rows, _MOST_ELEMENTS // block_d))
    return rows, block_d, max(1, min(16, block_d // launch.columns_per_warp))
