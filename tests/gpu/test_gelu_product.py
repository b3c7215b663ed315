"""A product with its GELU, on Hopper in one kernel: against float64, against itself, at sizes that fill no tile and
beyond 2³¹ elements.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from kernels.layers import gelu_product as module
from kernels.layers.gelu_product import gelu_product, gelu_product_backward
from tests.gpu.devices import toy
from tests.kernels.oracle import relative_error
from tests.kernels.test_gelu_product import check, draw

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="the fused kernel is written for Hopper",
)
# Relative errors of results and of the bias's gradient. One kernel rounds once; the CPU rounds the product and its
# GELU, and sums rounded numbers.
BOUNDS = {
    ("cuda", torch.bfloat16): (2.5e-3, 5e-5),
    ("cuda", torch.float16): (3.5e-4, 5e-5),
    ("cpu", torch.bfloat16): (8e-3, 8e-3),
    ("cpu", torch.float16): (1e-3, 1e-3),
}


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FUSED_FROM", 0)


@pytest.mark.parametrize(
    ("T", "D", "F", "dtype"),
    [
        (4097, 768, 3072, torch.bfloat16),
        (1, 768, 3072, torch.bfloat16),
        (65, 40, 328, torch.bfloat16),
        (70_000, 40, 328, torch.bfloat16),
    ],
)
def test_matches_float64(T: int, D: int, F: int, dtype: torch.dtype, device: str) -> None:
    check(*toy(device, T, D, F), dtype, *BOUNDS[device, dtype], device)


def test_every_size_of_half_a_tile(device: str) -> None:
    for T in (0, 2, 63, 64, 66, 127, 128, 200):
        if T:
            check(T, 40, 328, torch.bfloat16, *BOUNDS[device, torch.bfloat16], device)
        else:
            x, weight, bias, dy = draw(0, 40, 328, torch.bfloat16, device)
            u, out = gelu_product(x, weight, bias, keep=True)
            assert u is not None and out.shape == (0, 328) and not gelu_product_backward(dy, weight, u)[1].any()


def test_tails(device: str) -> None:
    """u alone decides: an x of one column, a weight of one row's ones. Far below zero half precision has nothing left
    of it.
    """
    u = torch.linspace(-12, 12, 4096, device=device).half()
    x, weight = torch.zeros(4096, 8, device=device).half(), torch.zeros(8, 8, device=device).half()
    x[:, 0], weight[0, 0] = u, 1
    kept, out = gelu_product(x, weight, torch.zeros(8, device=device).half(), keep=True)
    want = u.double() * torch.special.erfc(-u.double() / 2**0.5) / 2
    assert kept is not None and torch.equal(kept[:, 0], u)
    torch.testing.assert_close(
        out[:, 0].double(), want, rtol=6e-4, atol=6e-8
    )  # half of float16's spacing, and of its smallest numbers
    leaf = u.double().requires_grad_()
    (slope,) = torch.autograd.grad(gelu(leaf).sum(), leaf)
    x[:, 0] = 1
    du, _ = gelu_product_backward(x, weight, kept)
    torch.testing.assert_close(du[:, 0].double(), slope, rtol=6e-4, atol=3e-5)


def test_repeats_give_the_same_bits(device: str) -> None:
    x, weight, bias, dy = draw(*toy(device, 5000, 768, 3072), torch.bfloat16, device)
    runs = []
    for _ in range(3):
        u, out = gelu_product(x, weight, bias, keep=True)
        assert u is not None
        runs.append((u, out, *gelu_product_backward(dy, weight, u)))
    assert all(a.any() and torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*runs, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    T, last = 2**31 // 3072 + 100, slice(-50, None)
    _, weight, bias, _ = draw(1, 768, 3072, torch.bfloat16, "cuda")
    x = torch.zeros(T, 768, device="cuda", dtype=torch.bfloat16)
    x[last] = torch.randn(50, 768, device="cuda")
    u, out = gelu_product(x, weight, bias, keep=True)
    few, few_out = gelu_product(x[last].contiguous(), weight, bias, keep=True)
    assert (
        u is not None
        and few is not None
        and torch.equal(u[last], few)
        and torch.equal(out[last], few_out)
        and few_out.any()
    )
    du, sums = gelu_product_backward(x, weight, u)
    few_du, few_sums = gelu_product_backward(x[last].contiguous(), weight, few)
    assert torch.equal(du[last], few_du) and few_du.any()
    assert relative_error(sums, few_sums) < 1e-6  # all other rows are zero
