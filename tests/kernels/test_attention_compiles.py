"""The kernels of packed attention compile for Hopper with their pinned settings, fit its shared memory and spill little."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attention_long, attention_long_backward, attention_triton
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel

POINTERS = {name: "*bf16" for name in ("query", "key", "value", "out", "dout", "dquery", "dkey", "dvalue")}
POINTERS |= {"lse": "*fp32", "delta": "*fp32", "starts": "*i32", "seed": "*i64"}
CONSTANTS = {"GROUP", "CAUSAL", "DROP_BELOW", "KEEP_SCALE", "PRECISION", "TEXTS", "BLOCK", "VISITED", "D", "BLOCK_D"}
D = 64


def compiled(kernel: Any, warps: int, stages: int, **constants: Any) -> tuple[int, int, str]:
    types = {name: POINTERS.get(name, "i32") for name in kernel.arg_names if name not in CONSTANTS and name != "window"}
    types |= {name: "fp32" for name in ("scale", "scale_log2") if name in types}
    fixed = {"GROUP": 1, "CAUSAL": False, "DROP_BELOW": 429496730, "KEEP_SCALE": 1 / 0.9, "PRECISION": "ieee", "D": D, "BLOCK_D": D}
    return compile_kernel(kernel, types, fixed | constants, 90, warps, stages)


@pytest.mark.parametrize("longest", [9, 64, 128])
def test_texts_in_a_tile(longest: int) -> None:
    tile = attention_triton.tile_for(torch.empty(1, 12, D, dtype=torch.bfloat16), longest)
    texts = {9: 8, 64: 1, 128: 1}[longest]
    for kernel, warps in ((attention_triton._forward_tiles, tile.forward_warps), (attention_triton._backward_tiles, tile.backward_warps)):
        shared, spilled, ptx = compiled(kernel, warps, 3, TEXTS=texts, BLOCK=tile.block)
        assert shared <= SHARED_LIMIT[90] and spilled == 0, (kernel, shared, spilled)
        assert "wgmma.mma_async" in ptx


def test_texts_in_blocks() -> None:
    settings = attention_long.settings_for(torch.bfloat16, D)
    for kernel, use in (
        (attention_long._forward_blocks, settings.forward),
        (attention_long_backward._dquery_blocks, settings.dquery),
        (attention_long_backward._dkey_blocks, settings.dkey),
    ):
        shared, spilled, _ = compiled(kernel, use.warps, use.stages, BLOCK=use.kept, VISITED=use.visited)
        assert shared <= SHARED_LIMIT[90] and spilled == 0, (kernel, shared, spilled)
