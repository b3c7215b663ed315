"""Residual and LayerNorm for encoding: by definition in float64, in Triton's interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import add_norm_triton
from kernels.add_norm import add_norm
from tests.kernels.compiling import SHARED_LIMIT, compile_kernel

INTERPRETED = """
import torch
from kernels import add_norm_triton
from tests.kernels.test_add_norm import check, inputs

launched, run = [], add_norm_triton._add_norm.run
add_norm_triton._add_norm.run = lambda *a, **k: (launched.append(k), run(*a, **k))[1]
for T, D in ((37, 48), (1, 100), (4, 768)):  # float16 alone: the interpreter rounds no bfloat16
    check(inputs(T, D, torch.float16))
assert len(launched) == 6, "the kernel did not run"
"""


def inputs(T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, bias, stream, weight and norm_bias, far from zero mean."""
    draw = torch.Generator().manual_seed(T)
    x, stream = (torch.randn(T, D, generator=draw) + 3 for _ in range(2))
    bias, weight, norm_bias = (torch.randn(D, generator=draw) for _ in range(3))
    return x.to(dtype), bias, stream.half(), weight, norm_bias


def check(given: tuple[Tensor, ...]) -> None:
    """Both results are within one rounding of the definition."""
    x, bias, stream, weight, norm_bias = given
    z = x.double() + bias.double() + stream.double()
    centred = z - z.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double() + norm_bias.double()
    results = [*add_norm(*given, eps=1e-5), *add_norm(*given, eps=1e-5, last=True)]
    for found, dtype in zip(results, (torch.float16, x.dtype, torch.float32, torch.float32), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_results_are_the_definition_rounded_once(dtype: torch.dtype) -> None:
    for T, D in ((37, 48), (1, 1), (0, 32), (3, 768)):
        check(inputs(T, D, dtype))


def test_the_kernel_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("arch", "D", "x"), [(90, 768, "*bf16"), (80, 1024, "*fp16"), (100, 4096, "*bf16")])
def test_the_kernel_compiles_without_spilling(arch: int, D: int, x: str) -> None:
    types = dict.fromkeys(("bias", "weight", "norm_bias"), "*fp32") | dict.fromkeys(("stream", "following"), "*fp16")
    types |= {"x": x, "T": "i32", "eps": "fp32"} | ({"low": x} if x == "*bf16" else {})
    columns, warps = add_norm_triton.block(D)
    constants = {"D": D, "ROWS": add_norm_triton.ROWS, "BLOCK_D": columns}
    shared, spilled, ptx = compile_kernel(add_norm_triton._add_norm, types, constants, arch, warps, 3)
    assert shared <= SHARED_LIMIT[arch] and spilled == 0 and "ld.global.v4.b32" in ptx


def test_what_does_not_fit_is_refused() -> None:
    x, bias, stream, weight, norm_bias = inputs(3, 8, torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected x \[T, D\] bfloat16 or float16, .*float32"):
        add_norm(x.float(), bias, stream, weight, norm_bias, eps=1e-5)
    with pytest.raises(ValueError, match=r"expected stream \[3, 8\] torch.float16 .*torch.float32"):
        add_norm(x, bias, stream.float(), weight, norm_bias, eps=1e-5)
    with pytest.raises(ValueError, match=r"expected weight \[8\] .*received \[7\]"):
        add_norm(x, bias, stream, weight[:7], norm_bias, eps=1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        add_norm(x.T.contiguous().T, bias, stream, weight, norm_bias, eps=1e-5)
