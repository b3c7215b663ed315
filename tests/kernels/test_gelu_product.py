"""A product with its GELU, forward and backward, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from kernels.layers.gelu_product import gelu_product, gelu_product_backward
from tests.kernels.oracle import relative_error


def draw(T: int, D: int, F: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], weight [F, D] and bias [F] that give u a variance of about 3, and dy [T, D]."""
    generator = torch.Generator().manual_seed(T + D)
    shapes = ((T, D), 1.0), ((F, D), 1.5 * D**-0.5), ((F,), 1.0), ((T, D), 1.0)
    x, weight, bias, dy = (
        size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape, size in shapes
    )
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype), dy.to(device, dtype)


def check(T: int, D: int, F: int, dtype: torch.dtype, bound: float, sums_bound: float, device: str = "cpu") -> None:
    """Every result within its bound of float64's; bits are the same whether u is kept or not."""
    x, weight, bias, dy = draw(T, D, F, dtype, device)
    exact = linear(x.double(), weight.double(), bias.double())
    u, out = gelu_product(x, weight, bias, keep=True)
    assert u is not None and u.dtype == out.dtype == dtype
    assert exact.norm() > 0 and relative_error(u, exact) < bound and relative_error(out, gelu(exact)) < bound
    none, again = gelu_product(x, weight, bias, keep=False)
    assert none is None and torch.equal(again, out)
    leaf = u.double().clone().requires_grad_()
    (want,) = torch.autograd.grad(gelu(leaf), leaf, dy.double() @ weight.double().T)
    du, sums = gelu_product_backward(dy, weight, u)
    assert du.dtype == dtype and sums.dtype == torch.promote_types(dtype, torch.float32)
    assert want.norm() > 0 and relative_error(du, want) < bound and relative_error(sums, want.sum(0)) < sums_bound


@pytest.mark.parametrize(
    ("dtype", "bound", "sums_bound"),
    [
        (torch.float64, 1e-14, 1e-14),
        (torch.float32, 1e-6, 1e-6),
        (torch.bfloat16, 8e-3, 8e-3),
        (torch.float16, 1e-3, 1e-3),
    ],
)
def test_matches_float64(dtype: torch.dtype, bound: float, sums_bound: float) -> None:
    check(41, 24, 56, dtype, bound, sums_bound)
