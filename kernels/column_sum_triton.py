# mypy: disable-error-code="no-untyped-def"
"""Sums over rows in Triton: each of a fixed number of programs sums its rows, then the programs' sums are added up in their order.

No atomics: repeated runs give the same bits on the same GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_F, _ROWS, _WARPS, _PROGRAMS_PER_SM = 512, 8, 4, 8


@triton.jit(do_not_specialize=["T"])
def _column_sums(
    x,  # [T, F]
    partial,  # out [programs, F] float32
    T,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for first in tl.range(program * ROWS, T, programs * ROWS):
        inside = (rows < T - first)[:, None] & (columns < F)[None, :]
        at = tl.cast(first, tl.int64) * F + (rows[:, None] * F + columns[None, :])
        total += tl.load(x + at, inside, other=0.0).to(tl.float32)
    tl.store(partial + program * F + columns, tl.sum(total, 0), columns < F)


@triton.jit(do_not_specialize=["P"])
def _add_partials(
    partial,  # [P, M]
    out,  # [M] float32
    P,
    M,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for first in range(0, P, BLOCK_P):
        programs = first + tl.arange(0, BLOCK_P)
        inside = (programs < P)[:, None] & (columns < M)[None, :]
        total += tl.load(partial + programs[:, None] * M + columns[None, :], inside, other=0.0)
    tl.store(out + columns, tl.sum(total, 0), columns < M)


def column_sum(x: Tensor) -> Tensor:
    """Σ over the rows of x [T, F], contiguous; [F] float32."""
    T, F = x.shape
    tiles = triton.cdiv(F, _BLOCK_F)
    programs = persistent_programs(x, triton.cdiv(T, _ROWS), _PROGRAMS_PER_SM / tiles)
    partial = x.new_empty(programs, F, dtype=torch.float32)
    _column_sums[(programs, tiles)](x, partial, T, F, ROWS=_ROWS, BLOCK_F=_BLOCK_F, num_warps=_WARPS)
    return add_partials(partial)


def add_partials(partial: Tensor) -> Tensor:
    """Σ over the programs of their sums, in a fixed order: partial [P, ...] float32, contiguous, to [...]."""
    out = partial.new_empty(partial.shape[1:])
    _add_partials[(triton.cdiv(out.numel(), 16),)](partial, out, len(partial), out.numel(), BLOCK_P=256, BLOCK_M=16, num_warps=4)
    return out


def persistent_programs(x: Tensor, blocks: int, per_sm: float) -> int:
    """How many programs share `blocks` blocks of rows: `per_sm` for each multiprocessor, at least one, so that every sum is written."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return max(1, min(blocks, int(processors * per_sm)))
