"""The Triton kernels of a layer's pointwise parts: their mathematics in Triton's interpreter, and that they compile
without spilling.
"""

from __future__ import annotations

import pytest

from kernels.dropout import drop_below
from kernels.layers import gelu, norm
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel
from tests.kernels.interpreting import interpret, needs_interpreter

# Chosen before Triton is imported, hence a process of its own. fp32 alone: the interpreter rounds no bfloat16.
INTERPRETED = """
import numpy, torch
from kernels.layers import gelu
from kernels.layers import norm
from kernels.layers.api import Norm, gelu_forward, norm_backward, norm_forward
from tests.kernels.test_fused_layer import EPS, check_gelu, check_norm, norm_inputs

numpy.seterr(over="ignore")
launched = []
kernels = [getattr(module, name) for module in (norm, gelu) for name in dir(module) if name.endswith("ward")]
kernels = [kernel for kernel in kernels if hasattr(kernel, "run")]
for kernel in kernels:
    run = kernel.run
    kernel.run = lambda *a, run=run, **k: (launched.append(run), run(*a, **k))[1]

for T, D, bias, dropout in ((11, 48, True, 0.3), (5, 100, False, 0.3), (1, 33, True, 0.0)):
    check_norm(norm_inputs(T, D, torch.float32, bias), dropout, torch.tensor([2**40 + 5]), 2e-6, 2e-6)
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
assert len(kernels) == len(set(launched)) == 4, "the kernels did not run"
"""


@needs_interpreter
def test_interpreted() -> None:
    interpret(INTERPRETED)


@pytest.mark.parametrize(
    ("arch", "D", "rounded"),
    [(90, 768, "bf16"), (90, 4096, "bf16"), (90, 1024, None), (80, 768, "fp16"), (100, 384, "bf16")],
)
def test_norm_compiles(arch: int, D: int, rounded: str | None) -> None:
    x = f"*{rounded or 'fp32'}"
    types = dict.fromkeys(("bias", "residual", "weight", "statistics"), "*fp32") | {"x": x, "seed": "*i64"}
    types |= {"T": "i32", "inverse_keep": "fp32"}
    forward = types | {"norm_bias": "*fp32", "normed": "*fp32", "eps": "fp32"} | ({"rounded": x} if rounded else {})
    backward = (
        types
        | dict.fromkeys(("d_normed", "dresidual", "partial"), "*fp32")
        | {"dx": x}
        | ({"d_rounded": x} if rounded else {})
    )
    for kernel, signature, launch in (
        (norm._norm_forward, forward, norm.FORWARD),
        (norm._norm_backward, backward, norm.BACKWARD),
    ):
        rows, block_d, warps = norm.block(launch, D)
        constants = {"D": D, "THRESHOLD": drop_below(0.1), "ROWS": rows, "BLOCK_D": block_d}
        if "STAGES" in kernel.arg_names:
            constants["STAGES"] = launch.stages
        compiles(kernel, signature, constants, arch, warps)


def test_norm_compiles_for_a_float16_stream() -> None:
    types = dict.fromkeys(("bias", "weight", "norm_bias", "statistics"), "*fp32") | dict.fromkeys(
        ("residual", "normed"), "*fp16"
    )
    types |= dict.fromkeys(("x", "rounded"), "*bf16") | {"T": "i32", "eps": "fp32", "inverse_keep": "fp32"}
    rows, block_d, warps = norm.block(norm.FORWARD, 768)
    constants = {"D": 768, "THRESHOLD": 0, "ROWS": rows, "BLOCK_D": block_d}
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


def compiles(kernel: object, types: dict[str, str], constants: dict[str, int], arch: int, warps: int) -> None:
    shared, spilled, ptx = compile_kernel(kernel, types, constants, arch, warps, 3)
    assert shared <= SHARED_LIMIT[arch] and spilled == 0, f"{kernel}: {spilled} bytes of registers spilled"
    assert "ld.global.v4.b32" in ptx, "loads are not 128 bits wide"
