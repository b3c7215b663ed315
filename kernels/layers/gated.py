# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of a gated activation (SwiGLU, GeGLU): one pass over memory forward, one backward.

With gate and up the halves of a row and activation(g) = g σ(g): out = activation(gate) · up,

    dgate = dout · up · (σ + gate σ′),    dup = dout · activation(gate)

σ is the logistic function for SiLU, the normal distribution for GELU, and for GELU's tanh form the logistic function of
2 √(2/π) (g + 0.044715 g³). The backward pass also computes `out` again, so that nothing but the product is kept.
(Shazeer 2020, arXiv:2002.05202)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layers.gelu import normal
from kernels.layers.reference import Activation


@dataclass(frozen=True)
class Launch:
    """The tile of a program."""

    rows: int
    columns: int
    warps: int


# Tuned on an H200 at T = 62,946, F = 1,152 and 3,072. Columns that a row does not have are work for nothing.
LAUNCHES = Launch(rows=4, columns=512, warps=8), Launch(rows=8, columns=128, warps=4)


@triton.jit
def _share(gate, ACTIVATION: tl.constexpr):
    """(σ, σ′) of the activation gate · σ(gate)."""
    if ACTIVATION == "gelu":
        share, bell = normal(gate)
        return share, bell * 0.3989422804014327  # 1 / √(2π)
    elif ACTIVATION == "silu":
        share = tl.sigmoid(gate)
        return share, share * (1.0 - share)
    else:
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 √(2/π)
        return share, share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)


@triton.jit
def _tile(T, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """Offsets of a program's tile in [T, F] and in [T, 2 F], and the mask of its valid elements."""
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (rows < T - first)[:, None] & (columns < F)[None, :]
    begin = tl.cast(first, tl.int64) * F
    at = rows[:, None] * F + columns[None, :]
    return begin + at, 2 * begin + at + rows[:, None] * F, inside


@triton.jit(do_not_specialize=["T"])
def _gated_forward(
    gate_up,  # [T, 2 F]
    out,  # [T, F]
    T,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    at, at_gate, inside = _tile(T, F, ROWS, BLOCK_F)
    gate = tl.load(gate_up + at_gate, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_gate + F, inside, other=0.0).to(tl.float32)
    share, _ = _share(gate, ACTIVATION)
    tl.store(out + at, (gate * share * up).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T"])
def _gated_backward(
    dout,  # [T, F], overwritten by activation(gate) · up
    gate_up,  # [T, 2 F]
    dgate_up,  # out [T, 2 F]
    T,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    at, at_gate, inside = _tile(T, F, ROWS, BLOCK_F)
    gate = tl.load(gate_up + at_gate, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_gate + F, inside, other=0.0).to(tl.float32)
    g = tl.load(dout + at, inside, other=0.0).to(tl.float32)
    share, slope = _share(gate, ACTIVATION)
    tl.store(dgate_up + at_gate, (g * up * (share + gate * slope)).to(dgate_up.dtype.element_ty), inside)
    tl.store(dgate_up + at_gate + F, (g * gate * share).to(dgate_up.dtype.element_ty), inside)
    tl.store(dout + at, (gate * share * up).to(dout.dtype.element_ty), inside)


def gated_forward(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) · up [T, F] in the dtype of gate_up [T, 2 F], contiguous."""
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(T, F)
    use = launch_for(F)
    _gated_forward[_grid(T, F, use)](
        gate_up, out, T, F, activation, ROWS=use.rows, BLOCK_F=use.columns, num_warps=use.warps
    )
    return out


def gated_backward_(dout: Tensor, gate_up: Tensor, activation: Activation) -> Tensor:
    """dgate_up [T, 2 F]; dout [T, F], contiguous, becomes activation(gate) · up."""
    T, F = dout.shape
    dgate_up = torch.empty_like(gate_up)
    use = launch_for(F)
    _gated_backward[_grid(T, F, use)](
        dout, gate_up, dgate_up, T, F, activation, ROWS=use.rows, BLOCK_F=use.columns, num_warps=use.warps
    )
    return dgate_up


def launch_for(F: int) -> Launch:
    """The pinned tile for rows of F numbers."""
    return LAUNCHES[0] if F % LAUNCHES[0].columns == 0 else LAUNCHES[1]


def _grid(T: int, F: int, use: Launch) -> tuple[int, int]:
    return triton.cdiv(T, use.rows), triton.cdiv(F, use.columns)
