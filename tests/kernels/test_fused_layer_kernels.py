"""The Triton kernels of a layer's pointwise parts: their mathematics in Triton's interpreter, and that they compile
without spilling.
"""

from __future__ import annotations

from typing import Any

import pytest

from kernels.dropout import drop_below
from kernels.layers import gated, gelu, norm, rotary
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel
from tests.kernels.interpreting import interpret, needs_interpreter

# Chosen before Triton is imported, hence a process of its own. fp32 alone: the interpreter rounds no bfloat16.
INTERPRETED = """
import numpy, torch
from kernels.layers import gated, gelu, norm, rotary
from kernels.layers.api import Norm, gelu_forward, norm_backward, norm_forward
from tests.kernels.test_fused_layer import EPS, check_gated, check_gelu, check_norm, check_rotary, norm_inputs

numpy.seterr(over="ignore")
launched = []
kernels = [getattr(module, name) for module in (norm, gelu, gated, rotary) for name in dir(module) if name.endswith("ward")]
kernels = [kernel for kernel in kernels if hasattr(kernel, "run")]
for kernel in kernels:
    run = kernel.run
    kernel.run = lambda *a, run=run, **k: (launched.append(run), run(*a, **k))[1]

for T, D, bias, dropout in ((11, 48, True, 0.3), (5, 100, False, 0.3), (1, 33, True, 0.0)):
    check_norm(norm_inputs(T, D, torch.float32, bias), dropout, torch.tensor([2**40 + 5]), 2e-6, 2e-6)
for modes in ({"rms": True, "pre": True}, {"pre": True}, {"rms": True}):
    check_norm(norm_inputs(11, 48, torch.float32), 0.3, torch.tensor([2**40 + 5]), 2e-6, 2e-6, **modes)
for bias in (True, False):
    check_norm(norm_inputs(5, 100, torch.float32, bias), 0.3, torch.tensor([5]), 2e-6, 2e-6, True, rms=True, pre=True)
norm.FORWARD = norm.BACKWARD = norm.Launch(4, 64, warps_per_sm=3)  # several rows at a time
check_norm(norm_inputs(37, 48, torch.float32), 0.3, torch.tensor([5]), 2e-6, 2e-6)
x, bias, residual, weight, norm_bias = norm_inputs(0, 32, torch.float32)
y, low, statistics = norm_forward(Norm(x, bias, residual, weight), norm_bias, EPS)
dx, dresidual, sums = norm_backward(y, low, Norm(x, bias, residual, weight), statistics)
assert y.shape == dx.shape == dresidual.shape == (0, 32) and not sums.any()

x = torch.linspace(-13, 13, 37 * 700).view(37, 700)[:, torch.randperm(700)].contiguous()
out, u = gelu_forward(x), x.double()
want = 0.5 * u * torch.erfc(-u / 2**0.5)
close = x > -12  # beyond, float32 has nothing left of it
torch.testing.assert_close(out[close].double(), want[close], rtol=3e-5, atol=0)  # u² in the exponent costs its rounding times u²
near = x.abs() < 3
torch.testing.assert_close(out[near].double(), want[near], rtol=2e-6, atol=0)
check_gelu(x, 5e-7, 1e-6)
for activation in ("gelu", "gelu_tanh", "silu"):
    check_gated(3 * torch.randn(7, 1202), activation, 1e-6)
check_rotary(torch.randn(130, 6, 16), 2, 2, False, (1e-6, 1e-6))
check_rotary(torch.randn(130, 6, 24), 4, 1, True, (1e-6, 1e-6))
assert len(kernels) == len(set(launched)) == 8, "the kernels did not run"
"""


@needs_interpreter
def test_interpreted() -> None:
    interpret(INTERPRETED)


@pytest.mark.parametrize(
    ("arch", "D", "rounded", "pre", "own"),
    [
        (90, 768, "bf16", False, False),
        (90, 768, "bf16", True, False),
        (90, 768, "bf16", True, True),
        (90, 4096, "bf16", True, False),
        (90, 4096, "bf16", True, True),
        (90, 1024, None, False, False),
        (80, 768, "fp16", False, False),
        (100, 384, "bf16", False, False),
    ],
)
def test_norm_compiles(arch: int, D: int, rounded: str | None, pre: bool, own: bool) -> None:
    x = f"*{rounded or 'fp32'}"
    types = dict.fromkeys(("bias", "residual", "weight", "statistics"), "*fp32") | {"x": x, "seed": "*i64"}
    types |= {"T": "i32", "inverse_keep": "fp32", "added_eps": "fp32"} | ({"added_weight": "*fp32"} if own else {})
    forward = types | {"norm_bias": "*fp32", "stream": "*fp32", "eps": "fp32"} | ({"rounded": x} if rounded else {})
    backward = (
        types
        | dict.fromkeys(("d_stream", "dresidual", "partial"), "*fp32")
        | {"dx": x}
        | ({"d_rounded": x} if rounded else {})
    )
    for kernel, signature, launch in (
        (norm._norm_forward, forward, norm.PRE_FORWARD if pre else norm.FORWARD),
        (norm._norm_backward, backward, norm.PRE_BACKWARD if pre else norm.BACKWARD),
    ):
        rows, block_d, warps = norm.block(launch, D)
        constants = {"D": D, "THRESHOLD": drop_below(0.1), "ROWS": rows, "BLOCK_D": block_d, "RMS": pre, "PRE": pre}
        if "STAGES" in kernel.arg_names:
            constants["STAGES"] = launch.stages
        compiles(kernel, signature, constants, arch, warps)


def test_norm_compiles_for_a_float16_stream() -> None:
    types = dict.fromkeys(("bias", "weight", "norm_bias", "statistics"), "*fp32") | dict.fromkeys(
        ("residual", "stream"), "*fp16"
    )
    types |= dict.fromkeys(("x", "rounded"), "*bf16") | {"T": "i32"}
    types |= dict.fromkeys(("eps", "added_eps", "inverse_keep"), "fp32")
    rows, block_d, warps = norm.block(norm.FORWARD, 768)
    constants = {"D": 768, "THRESHOLD": 0, "ROWS": rows, "BLOCK_D": block_d, "RMS": False, "PRE": False}
    compiles(norm._norm_forward, types, constants, 90, warps)


@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
def test_gelu_compiles(arch: int) -> None:
    forward = {"u": "*bf16", "out": "*bf16", "T": "i32"}
    backward = {"dout": "*bf16", "u": "*bf16", "partial": "*fp32", "T": "i32"}
    for kernel, types, launch in (
        (gelu._gelu_forward, forward, gelu.FORWARD),
        (gelu._gelu_backward, backward, gelu.BACKWARD),
    ):
        compiles(kernel, types, {"F": 3072, "ROWS": launch.rows, "BLOCK_F": launch.columns}, arch, launch.warps)


@pytest.mark.parametrize(("F", "activation"), [(1152, "gelu"), (3072, "silu")])
def test_gates_compile(F: int, activation: str) -> None:
    types, use = {"gate_up": "*bf16", "out": "*bf16", "T": "i32"}, gated.launch_for(F)
    constants = {"F": F, "ACTIVATION": activation, "ROWS": use.rows, "BLOCK_F": use.columns}
    compiles(gated._gated_forward, types, constants, 90, use.warps)
    types = {"dout": "*bf16", "gate_up": "*bf16", "dgate_up": "*bf16", "T": "i32"}
    compiles(gated._gated_backward, types, constants, 90, use.warps)


@pytest.mark.parametrize(("queries", "keys", "d", "normed"), [(12, 12, 64, False), (16, 8, 128, True)])
def test_rotations_compile(queries: int, keys: int, d: int, normed: bool) -> None:
    types = {"heads": "*bf16", "cos": "*fp32", "sin": "*fp32", "T": "i32", "eps": "fp32"}
    types |= {"query_weight": "*fp32", "key_weight": "*fp32"} if normed else {}
    constants = {"HEADS": queries + 2 * keys, "QUERIES": queries, "KEYS": keys, "D": d, "HALF": d // 2}
    forward, backward = (elements // (d // 2) for elements in (rotary.FORWARD_ELEMENTS, rotary.BACKWARD_ELEMENTS))
    written = {"OUT_HEADS": queries + (1 if normed else 2) * keys, "ROWS": forward}
    compiles(rotary._rotate_forward, types | {"out": "*bf16"}, constants | written, 90, rotary.WARPS)
    types |= {"dheads": "*bf16", "blocks": "i32"} | ({"partial": "*fp32"} if normed else {})
    compiles(rotary._rotate_backward, types, constants | {"ROWS": backward}, 90, rotary.WARPS)


def compiles(kernel: object, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int) -> None:
    shared, spilled, ptx = compile_kernel(kernel, types, constants, arch, warps, 3)
    assert shared <= SHARED_LIMIT[arch] and spilled == 0, f"{kernel}: {spilled} bytes of registers spilled"
    assert "ld.global.v4.b32" in ptx, "loads are not 128 bits wide"
