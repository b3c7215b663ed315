# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of GELU: one pass over memory forward, one backward, which also sums the gradient over rows: that of a
bias.

With Φ the normal distribution and φ its density, out = u Φ(u) and du = dout · (Φ(u) + u φ(u)).

Both need e^(−u²/2), so Φ is built on it: the upper tail Φ(−|u|) is e^(−u²/2) times a polynomial in t = 1 / (1 + p |u|),
a minimax fit of degree 8 to ½ erfcx(|u| / √2) on 0..12 with a relative error of 2e-7 (4e-7 in float32), in the tail as
well, where 1 + erf cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import persistent_grid


@dataclass(frozen=True)
class Launch:
    """Launch parameters of a program, and the number of persistent programs."""

    rows: int
    columns: int
    warps: int
    programs_per_sm: int = 1


# Tuned on an H100 at T = 65,486, F = 3,072. The backward's programs just fill a multiprocessor: 16 of 4 warps.
FORWARD = Launch(rows=8, columns=512, warps=8)
BACKWARD = Launch(rows=2, columns=1024, warps=4, programs_per_sm=16)


@triton.jit
def normal(u):
    """(Φ(u), e^(−u²/2))."""
    size = tl.abs(u)
    t = 1.0 / (1.0 + 0.41 * size)
    polynomial = -0.04040767737725761 * t + 0.19504855487642506
    polynomial = polynomial * t - 0.33750197794537506
    polynomial = polynomial * t + 0.1881200502298141
    polynomial = polynomial * t + 0.020630784860833737
    polynomial = polynomial * t + 0.14824473218284812
    polynomial = polynomial * t + 0.16223900476193265
    polynomial = polynomial * t + 0.16362659566767207
    bell = tl.exp2(u * u * -0.7213475204444817)  # log₂e / 2
    tail = polynomial * t * bell
    return tl.where(u > 0, 1.0 - tail, tail), bell


@triton.jit(do_not_specialize=["T"])
def _gelu_forward(
    u,  # [T, F]
    out,  # [T, F]
    T,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (rows < T - first)[:, None] & (columns < F)[None, :]
    at = tl.cast(first, tl.int64) * F + (rows[:, None] * F + columns[None, :])
    value = tl.load(u + at, inside, other=0.0).to(tl.float32)
    cdf, _ = normal(value)
    tl.store(out + at, (value * cdf).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T"])
def _gelu_backward(
    dout,  # [T, F], overwritten by du
    u,  # [T, F]
    partial,  # out [programs, F] float32
    T,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows, columns = tl.arange(0, ROWS), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sums = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for first in tl.range(program * ROWS, T, programs * ROWS):
        inside = (rows < T - first)[:, None] & (columns < F)[None, :]
        at = tl.cast(first, tl.int64) * F + (rows[:, None] * F + columns[None, :])
        value = tl.load(u + at, inside, other=0.0).to(tl.float32)
        cdf, bell = normal(value)
        g = tl.load(dout + at, inside, other=0.0).to(tl.float32) * (
            cdf + value * bell * 0.3989422804014327
        )  # 1 / √(2π)
        tl.store(dout + at, g.to(dout.dtype.element_ty), inside)
        sums += g
    tl.store(partial + program * F + columns, tl.sum(sums, 0), columns < F)


def gelu_forward(u: Tensor) -> Tensor:
    """gelu(u), [T, F] in u's dtype; u [T, F] contiguous."""
    T, F = u.shape
    out = torch.empty_like(u)
    grid = (triton.cdiv(T, FORWARD.rows), triton.cdiv(F, FORWARD.columns))
    _gelu_forward[grid](u, out, T, F, ROWS=FORWARD.rows, BLOCK_F=FORWARD.columns, num_warps=FORWARD.warps)
    return out


def gelu_backward_(dout: Tensor, u: Tensor) -> Tensor:
    """Σ_rows du [F] float32; dout [T, F] becomes du. Each program sums its rows, then the sums are added in a fixed
    order: no atomics.
    """
    T, F = u.shape
    tiles = triton.cdiv(F, BACKWARD.columns)
    programs = persistent_grid(u, triton.cdiv(T, BACKWARD.rows), BACKWARD.programs_per_sm / tiles)
    partial = u.new_empty(programs, F, dtype=torch.float32)
    _gelu_backward[(programs, tiles)](
        dout, u, partial, T, F, ROWS=BACKWARD.rows, BLOCK_F=BACKWARD.columns, num_warps=BACKWARD.warps
    )
    return partial.sum(0)
