"""The kernels of packed attention compile for Hopper as they are launched for bf16 and heads of 64 and 128, and fit its
shared memory.

None spills registers but the backward pass of texts of 65 to 128 tokens, whose tile does so for the sake of speed,
within a bound.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.attention import long, short
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel

POINTERS = {name: "*bf16" for name in ("query", "key", "value", "out", "dout", "dquery", "dkey", "dvalue")}
POINTERS |= {"lse": "*fp32", "delta": "*fp32", "starts": "*i32", "seed": "*i64"}
POINTERS |= {"cos": "*fp32", "sin": "*fp32"}
CONSTANTS = {"GROUP", "CAUSAL", "DROP_BELOW", "KEEP_SCALE", "PRECISION", "TEXTS", "BLOCK", "VISITED", "D", "BLOCK_D"}
D = 64
MOST_SPILLED = 1024  # bytes of a thread where its registers are bounded: 824 with the assembler of Triton 3.7


def compiled(
    kernel: Any, warps: int, stages: int, registers: int | None = None, *, turned: bool = False, **constants: Any
) -> tuple[int, int, str]:
    absent = CONSTANTS | {"window"} | (set() if turned else {"cos", "sin"})
    types = {name: POINTERS.get(name, "i32") for name in kernel.arg_names if name not in absent}
    types |= {name: "fp32" for name in ("scale", "scale_log2") if name in types}
    fixed = {
        "GROUP": 1,
        "CAUSAL": False,
        "DROP_BELOW": 429496730,
        "KEEP_SCALE": 1 / 0.9,
        "PRECISION": "ieee",
        "D": D,
        "BLOCK_D": D,
    }
    return compile_kernel(kernel, types, fixed | constants, 90, warps, stages, registers=registers)


@pytest.mark.parametrize(
    ("width", "longest", "texts", "turned"),
    [
        *((64, longest, texts, False) for longest, texts in ((9, 8), (64, 1), (96, 1), (128, 1))),
        *((64, longest, texts, True) for longest, texts in ((9, 8), (96, 1), (128, 1))),
        *((128, longest, 1, False) for longest in (32, 64)),
    ],
)
def test_texts_in_a_tile(width: int, longest: int, texts: int, turned: bool) -> None:
    tile = short.tile_for(torch.empty(1, 12, width, dtype=torch.bfloat16), longest)
    for kernel, warps, registers in (
        (short._forward_tiles, tile.turning_warps if turned else tile.forward_warps, None),
        (short._backward_tiles, tile.backward_warps, tile.backward_registers),
    ):
        shared, spilled, ptx = compiled(
            kernel, warps, 3, registers, turned=turned, TEXTS=texts, BLOCK=tile.block, D=width, BLOCK_D=width
        )
        assert shared <= SHARED_LIMIT[90] and spilled <= (MOST_SPILLED if registers else 0), (kernel, shared, spilled)
        assert (f".maxnreg {registers}" in ptx) == (registers is not None)
        assert "wgmma.mma_async" in ptx or tile.block < 64  # a Hopper product has 64 rows at least


def test_texts_in_blocks() -> None:
    settings = long.settings_for(torch.bfloat16, D)
    for kernel, use in (
        (long._forward_blocks, settings.forward),
        (long._dquery_blocks, settings.dquery),
        (long._dkey_blocks, settings.dkey),
    ):
        shared, spilled, _ = compiled(kernel, use.warps, use.stages, BLOCK=use.kept, VISITED=use.visited)
        assert shared <= SHARED_LIMIT[90] and spilled == 0, (kernel, shared, spilled)
