"""Every kernel compiles for Ampere, Hopper and Blackwell, fits their shared memory and spills no register."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.experimental.gluon import language as gl

from kernels.infonce import rows, tiles, tiles_hopper
from kernels.layers import gelu_hopper
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel

ARCHITECTURES = sorted(SHARED_LIMIT)
INTEGERS = ("B", "N", "D", "G", "row_start", "column_start", "pair_stride")
PAIRS = {"pair_ptr": "*i32", "pair_rows": "*i32", "pair_columns": "*i32"}
OWN = PAIRS | {"pair_term": "*fp32", "own_factor": "fp32"}
ROWS, COLUMNS = {"row_shift": "*fp32", "row_out": "*fp32"}, {"column_out": "*fp32"}

TILE_VARIANTS: dict[str, tuple[str, dict[str, str], list[str], dict[str, Any]]] = {
    "row sums, written": ("bf16", ROWS, ["bf16"], {}),
    "row and column sums": ("fp16", ROWS | COLUMNS | {"threshold": "*fp32"} | PAIRS, [], {"CLAMP": True}),
    "gradient of both": ("bf16", {"row_shift": "*fp32", "column_shift": "*fp32"}, ["bf16"], {"FACTORED": True}),
    "maxima": ("bf16", {"row_out": "*fp32"} | COLUMNS, [], {"MAXIMUM": True, "RAGGED_COLUMNS": True}),
    "guide": ("bf16", ROWS | {"guide_limit": "*fp32"} | OWN, ["bf16"], {}),
    "guide, fp32": ("fp32", ROWS | {"guide_limit": "*fp32"}, ["fp32"], {}),
    "high": ("bf16", ROWS, ["bf16", "bf16"], {"CHUNK": 256}),
    "high of fp32": ("fp32", ROWS, ["bf16", "bf16"], {"CHUNK": 256, "PRECISION": "tf32x3"}),
    "fp32": ("fp32", ROWS, ["fp32"], {}),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", TILE_VARIANTS)
def test_tile_pass(variant: str, arch: int) -> None:
    dtype, arguments, written, constants = TILE_VARIANTS[variant]
    tile = tiles.tile_for(torch.float32 if dtype == "fp32" else torch.bfloat16, arch // 10)
    types = dict.fromkeys(INTEGERS, "i32") | {"targets": "*i32", "scale_log2": "fp32", "offset": "fp32"} | arguments
    sides = {"": dtype, "guide_": "fp16"} if "guide_limit" in arguments else {"": dtype}
    for name, kind in sides.items():
        types[f"{name}queries"] = f"tensordesc<{kind}[{tile.rows},{tile.inner}]>"
        types[f"{name}passages"] = f"tensordesc<{kind}[{tile.columns},{tile.inner}]>"
    types |= {
        name: f"tensordesc<{kind}[{tile.rows},{tile.columns}]>"
        for name, kind in zip(("written", "residual"), written, strict=False)
    }
    fixed = {
        "FACTORED": False,
        "MAXIMUM": False,
        "CLAMP": False,
        "RAGGED_COLUMNS": False,
        "PRECISION": "ieee",
        "PROGRAMS": 132,
    }
    fixed |= {
        "BLOCK_B": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_D": tile.inner,
        "GROUP": 16,
    }
    shared, spilled, _ = compile_kernel(tiles._tile_pass, types, fixed | constants, arch, tile.warps, tile.stages)
    assert shared <= SHARED_LIMIT[arch]
    assert spilled == 0, f"{spilled} bytes"


HOPPER_VARIANTS = {
    "row sums": (ROWS, False, {}),
    "row sums, written": (ROWS | {"threshold": "*fp32"} | PAIRS, True, {}),
    "row sums, written, own negatives": (ROWS | OWN, True, {}),
    "row and column sums": (ROWS | COLUMNS | PAIRS, False, {"RAGGED_COLUMNS": True}),
    "gradient of both": ({"row_shift": "*fp32", "column_shift": "*fp32"}, True, {}),
    "gradient of both, factored": ({"row_shift": "*fp32", "column_shift": "*fp32"} | PAIRS, True, {"FACTORED": True}),
}


@pytest.mark.parametrize("variant", HOPPER_VARIANTS)
def test_hopper_tile_pass(variant: str) -> None:
    arguments, written, constants = HOPPER_VARIANTS[variant]
    layout = repr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    types = dict.fromkeys(INTEGERS, "i32") | {"targets": "*i32", "scale_log2": "fp32", "offset": "fp32"} | arguments
    del types["G"]
    types |= {"queries": f"tensordesc<bf16[64, 64],{layout}>", "passages": f"tensordesc<bf16[256, 64],{layout}>"}
    if written:
        types["written"] = f"tensordesc<bf16[64, 128],{layout}>"
    fixed = {"FACTORED": False, "RAGGED_COLUMNS": False}
    shared, spilled, ptx = compile_kernel(
        tiles_hopper._tile_pass_hopper, types, fixed | constants, 90, 4, 3, gluon=True
    )
    assert shared <= SHARED_LIMIT[90]
    assert spilled == 0, f"{spilled} bytes"
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["forward", "forward, u kept", "backward"])
def test_gelu_product(variant: str, dtype: str) -> None:
    layout = repr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    square, wide = f"tensordesc<{dtype}[64, 64],{layout}>", f"tensordesc<{dtype}[256, 64],{layout}>"
    types = {"x": square, "weight": wide, "out": square, "T": "i32"}
    types |= {"u": square, "sums": "*fp32"} if variant == "backward" else {"bias": f"*{dtype}"}
    if variant == "forward, u kept":
        types["u_out"] = square
    shared, spilled, ptx = compile_kernel(gelu_hopper._gelu_product, types, {"F": 3072, "D": 768}, 90, 4, 3, gluon=True)
    assert shared <= SHARED_LIMIT[90]
    assert spilled == 0, f"{spilled} bytes"
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx


def test_gelu_product_does_the_same_arithmetic_whether_u_is_kept_or_not() -> None:
    """The bits of the gradient cache's two passes depend on it: the compiler might make other operations of a product
    and a sum.
    """
    layout = repr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    square = f"tensordesc<bf16[64, 64],{layout}>"
    types = {"x": square, "weight": f"tensordesc<bf16[256, 64],{layout}>", "out": square, "T": "i32", "bias": "*bf16"}
    counts = []
    for more in ({}, {"u_out": square}):
        *_, ptx = compile_kernel(gelu_hopper._gelu_product, types | more, {"F": 3072, "D": 768}, 90, 4, 3, gluon=True)
        counts.append([ptx.count(name) for name in ("fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "ex2.approx")])
    assert counts[0] == counts[1] and counts[0][0] >= 256 * 7, counts


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_passes_over_rows(arch: int) -> None:
    blocks = {"BLOCK_B": 8, "BLOCK_D": 256}
    strides = {"B": "i32", "D": "i32", "query_stride": "i32", "passage_stride": "i32"}
    vectors = {"queries": "*bf16", "passages": "*bf16", "targets": "*i64"}
    weigh = dict.fromkeys(("similarity", "partial", "shift", "weights", "row_sum", "coefficient"), "*fp32")
    weigh |= {"queries": "*bf16", "weighted": "*bf16", "residual": "*bf16"} | dict.fromkeys(
        ("scale", "scale_log2", "smallest", "largest"), "fp32"
    )
    weigh |= dict.fromkeys(("B", "D", "column_tiles", "query_stride", "weighted_stride"), "i32")
    finish = {"dpassages": "*fp32", "queries": "*bf16", "by_target": "*i64", "first": "*i64", "target_weight": "*fp32"}
    outputs = dict.fromkeys(("dqueries", "coefficient", "target_weight", "along"), "*fp32")
    kernels = [
        (rows._target_similarities, vectors | strides | {"out": "*fp32"}, blocks, 4),
        (rows._weigh_rows, weigh, blocks | {"BLOCK_T": 64}, 4),
        (rows._finish_queries, vectors | strides | outputs, blocks | {"BLOCK_B": 4}, 4),
        (rows._finish_passages, finish | {"D": "i32", "query_stride": "i32"}, {"BLOCK_D": 256}, 1),
    ]
    for kernel, types, constants, warps in kernels:
        shared, spilled, _ = compile_kernel(kernel, types, constants, arch, warps, 3)
        assert shared <= SHARED_LIMIT[arch] and spilled == 0, kernel
