"""The Triton kernels of a layer's pointwise parts: their mathematics in Triton's interpreter, and that they compile without spilling."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import triton

from kernels import column_sum_triton, fused_gelu_triton, fused_norm_triton
from kernels.dropout_hash import drop_below
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel

# Chosen before Triton is imported, hence a process of its own. fp32 alone: the interpreter rounds no bfloat16.
INTERPRETED = """
import numpy, torch
from kernels import column_sum_triton, fused_gelu_triton, fused_norm_triton
from kernels.fused_layer import bias_gelu, column_sum, dropout_add_norm
from tests.kernels.test_fused_layer import EPS, norm_by_definition, norm_inputs, relative_error

numpy.seterr(over="ignore")
launched = []
for kernel in (fused_norm_triton._norm_forward, fused_norm_triton._norm_backward, fused_gelu_triton._gelu_backward):
    run = kernel.run
    kernel.run = lambda *a, run=run, **k: (launched.append(run), run(*a, **k))[1]

for T, D, bias, dropout in ((37, 48, True, 0.3), (5, 100, False, 0.3), (1, 33, True, 0.0), (0, 32, True, 0.1)):
    inputs, seed = norm_inputs((T,), D, torch.float32, bias), torch.tensor([2**40 + 5])
    y, low = dropout_add_norm(*inputs, eps=EPS, dropout=dropout, seed=seed)
    want, leaves = norm_by_definition(inputs, dropout, seed)
    weights = torch.randn(T, D)
    (weights * y).sum().backward()
    (weights * want).sum().backward()
    for got, expected in zip((y, *(v.grad for v in inputs if v is not None)), (want, *(v.grad for v in leaves)), strict=True):
        if T:
            assert expected.norm() > 0 and relative_error(got, expected) < 2e-6, (T, D, relative_error(got, expected))
        else:
            assert got.shape == expected.shape and not got.any()

x = torch.linspace(-13, 13, 37 * 700).view(37, 700)[:, torch.randperm(700)].contiguous().requires_grad_()
bias, weights = torch.randn(700, requires_grad=True), torch.randn(37, 700)
leaves = [v.detach().double().requires_grad_() for v in (x, bias)]
out, u = bias_gelu(x, bias), leaves[0] + leaves[1]
want = 0.5 * u * torch.erfc(-u / 2**0.5)
close = (x + bias).detach() > -12  # beyond, float32 has nothing left of it
torch.testing.assert_close(out[close].double(), want[close], rtol=3e-5, atol=0)  # u² in the exponent costs its rounding times u²
near = (x + bias).detach().abs() < 3
torch.testing.assert_close(out[near].double(), want[near], rtol=2e-6, atol=0)
(out * weights).sum().backward()
(want * weights).sum().backward()
assert relative_error(x.grad, leaves[0].grad) < 5e-7 and relative_error(bias.grad, leaves[1].grad) < 1e-6
assert relative_error(column_sum(x.detach()), leaves[0].sum(0)) < 1e-6
partial = torch.randn(600, 2, 21)
assert relative_error(column_sum_triton.add_partials(partial), partial.double().sum(0)) < 1e-6
assert len(set(launched)) == 3, "the kernels did not run"
"""


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 turns one-element arrays into scalars, which NumPy 2.4 refuses",
)
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("arch", "D", "low"), [(90, 768, "bf16"), (90, 4096, "bf16"), (90, 1024, None), (80, 768, "fp16"), (100, 384, "bf16")]
)
def test_norm_compiles(arch: int, D: int, low: str | None) -> None:
    x = f"*{low or 'fp32'}"
    types = dict.fromkeys(("bias", "residual", "weight", "mean", "rstd"), "*fp32") | {"x": x, "seed": "*i64"}
    types |= {"T": "i32", "inverse_keep": "fp32"}
    forward = types | {"norm_bias": "*fp32", "normed": "*fp32", "eps": "fp32"} | ({"low": x} if low else {})
    backward = types | dict.fromkeys(("d_normed", "dresidual", "partial"), "*fp32") | {"dx": x} | ({"d_low": x} if low else {})
    for kernel, signature, launch in (
        (fused_norm_triton._norm_forward, forward, fused_norm_triton.FORWARD),
        (fused_norm_triton._norm_backward, backward, fused_norm_triton.BACKWARD),
    ):
        rows, block_d, warps = fused_norm_triton._block(launch, D)
        constants = {"D": D, "THRESHOLD": drop_below(0.1), "ROWS": rows, "BLOCK_D": block_d}
        if "STAGES" in kernel.arg_names:
            constants["STAGES"] = launch.stages
        compiles(kernel, signature, constants, arch, warps)


@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
def test_gelu_and_column_sums_compile(arch: int) -> None:
    forward = {"x": "*bf16", "bias": "*fp32", "out": "*bf16", "T": "i32"}
    backward = {"dout": "*bf16", "x": "*bf16", "bias": "*fp32", "dx": "*bf16", "partial": "*fp32", "T": "i32"}
    for kernel, types, launch in (
        (fused_gelu_triton._gelu_forward, forward, fused_gelu_triton.FORWARD),
        (fused_gelu_triton._gelu_backward, backward, fused_gelu_triton.BACKWARD),
    ):
        compiles(kernel, types, {"F": 3072, "ROWS": launch.rows, "BLOCK_F": launch.columns}, arch, launch.warps)
    sums = {"x": "*bf16", "partial": "*fp32", "T": "i32"}
    compiles(column_sum_triton._column_sums, sums, {"F": 2304, "ROWS": 8, "BLOCK_F": 512}, arch, 4)
    partials = {"partial": "*fp32", "out": "*fp32", "P": "i32", "M": "i32"}
    compiles(column_sum_triton._add_partials, partials, {"BLOCK_P": 256, "BLOCK_M": 16}, arch, 4)


def compiles(kernel: object, types: dict[str, str], constants: dict[str, int], arch: int, warps: int) -> None:
    shared, spilled, ptx = compile_kernel(kernel, types, constants, arch, warps, 3)
    assert shared <= SHARED_LIMIT[arch] and spilled == 0, f"{kernel}: {spilled} bytes of registers spilled"
    assert kernel is column_sum_triton._add_partials or "ld.global.v4.b32" in ptx, "loads are not 128 bits wide"
