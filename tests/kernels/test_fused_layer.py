"""Dropout + residual + LayerNorm, and GELU, on a CPU, against plain torch and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from kernels.dropout import keep_mask
from kernels.layers.api import Norm, gelu_backward, gelu_forward, norm_backward, norm_forward
from tests.kernels.oracle import relative_error

EPS = 1e-5

NormInputs: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]


def norm_inputs(T: int, D: int, dtype: torch.dtype, bias: bool = True, device: str = "cpu") -> NormInputs:
    """x, bias, residual, weight and norm_bias."""
    generator = torch.Generator().manual_seed(D)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, residual = draw(T, D).to(dtype), 2 * draw(T, D) + 0.5
    vectors = [v.to(device, wide) for v in (draw(D), 1 + 0.3 * draw(D), draw(D))]
    return x.to(device), vectors[0] if bias else None, residual.to(device, wide), vectors[1], vectors[2]


def norm_by_definition(inputs: NormInputs, dropout: float, seed: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """(y, leaves) of the same inputs in float64, by torch's operations; leaves: x, residual, weight, norm_bias and any
    bias.
    """
    x, bias, residual, weight, norm_bias = (None if v is None else v.detach().double().requires_grad_() for v in inputs)
    assert x is not None and residual is not None and weight is not None and norm_bias is not None
    z = x if bias is None else x + bias
    if seed is not None and dropout > 0:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
        z = z * keep_mask(seed, rows, columns, dropout) / (1 - dropout)
    leaves = [x, residual, weight, norm_bias] + ([] if bias is None else [bias])
    return layer_norm(z + residual, z.shape[-1:], weight, norm_bias, EPS), leaves


def check_norm(inputs: NormInputs, dropout: float, seed: Tensor | None, bound: float, sums_bound: float) -> None:
    """Results, gradients from either and from both, dtypes and shapes: relative errors below the bounds (of x's dtype,
    of sums).
    """
    x, _, residual, *_ = inputs
    norm = Norm(*inputs[:4], seed, dropout)
    y, low, statistics = norm_forward(norm, inputs[4], EPS)
    want, leaves = norm_by_definition(inputs, dropout, seed)
    assert y.dtype == residual.dtype and relative_error(y, want) < sums_bound
    assert low is None if x.dtype == y.dtype else low is not None and torch.equal(low, y.to(x.dtype))
    d_normed, d_rounded = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1)).to(residual).unbind()
    d_rounded = d_rounded.to(x.dtype)
    given: list[tuple[Tensor | None, Tensor | None]] = [(d_normed, d_rounded), (d_normed, None), (None, d_rounded)]
    for pair in given:
        dout = torch.stack([d.double() for d in pair if d is not None]).sum(0)
        expected = torch.autograd.grad(want, leaves, dout, retain_graph=True)
        dx, dresidual, sums = norm_backward(*pair, norm, statistics)
        assert dx.dtype == x.dtype and dresidual.dtype == residual.dtype and sums.shape == (len(leaves) - 2, x.shape[1])
        for got, target in zip((dx, dresidual, *sums), expected, strict=True):
            if x.shape[1] == 1:  # a row of one element is its own mean: little depends on it
                assert (got.double() - target).abs().max() < 1e-4
            else:
                assert target.norm() > 0 and relative_error(got, target) < (bound if got is dx else sums_bound)


def check_gelu(u: Tensor, bound: float, sums_bound: float) -> None:
    """The result, and the gradient, which takes the place of dout, and its sums."""
    leaf = u.double().requires_grad_()
    out, want = gelu_forward(u), gelu(leaf)
    assert out.dtype == u.dtype and relative_error(out, want) < bound
    dout = torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u)
    (expected,) = torch.autograd.grad(want, leaf, dout.double())
    du, sums = gelu_backward(dout, u)
    assert du is dout and sums.dtype == torch.promote_types(u.dtype, torch.float32)
    for got, target, most in ((du, expected, bound), (sums, expected.sum(0), sums_bound)):
        assert target.norm() > 0 and relative_error(got, target) < most


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.4])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
def test_norm_matches_torch(dtype: torch.dtype, bound: float, dropout: float, bias: bool) -> None:
    check_norm(norm_inputs(41, 24, dtype, bias), dropout, torch.tensor([3]), bound, min(bound, 1e-6))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_gelu_matches_torch(dtype: torch.dtype, bound: float) -> None:
    check_gelu(torch.linspace(-9, 9, 3000, dtype=torch.float64).view(50, 60).to(dtype), bound, min(bound, 1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"x": a["x"].T.contiguous().T},
            r"x floating \[T, D\], D in 1..4096, contiguous, received torch.bfloat16 \[3, 8\]",
        ),
        (lambda a: a | {"x": a["x"][None]}, r"x floating \[T, D\]"),
        (lambda a: a | {"x": a["x"].long()}, "x floating"),
        (
            lambda a: a | {"residual": a["residual"][:2]},
            r"residual floating \[3, 8\], contiguous, received torch.float32 \[2, 8\]",
        ),
        (lambda a: a | {"residual": a["residual"].T.contiguous().T}, r"residual floating \[3, 8\], contiguous"),
        (lambda a: a | {"bias": a["bias"][:5]}, r"bias floating \[8\]"),
        (lambda a: a | {"bias": a["bias"].long()}, r"bias floating \[8\]"),
        (lambda a: a | {"weight": torch.ones(16)[::2]}, r"weight floating \[8\], contiguous"),
        (lambda a: a | {"dropout": 1.0}, "dropout in 0..1"),
        (lambda a: a | {"seed": None}, "received 0.1 and no seed"),
        (lambda a: a | {"seed": torch.tensor(3)}, r"seed int64 \[1\]"),
    ],
)
def test_what_does_not_fit_is_an_error(change: Callable[[dict], dict], message: str) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(3, 8, torch.bfloat16)
    norm = Norm(x, bias, residual, weight, torch.tensor([3]), 0.1)
    norm_forward(norm, norm_bias, EPS)
    with pytest.raises(ValueError, match=message):
        norm_forward(Norm(**change(norm._asdict())), norm_bias, EPS)


def test_gradients_that_do_not_fit_are_errors() -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(3, 8, torch.bfloat16)
    norm = Norm(x, bias, residual, weight)
    y, low, statistics = norm_forward(norm, norm_bias, EPS)
    with pytest.raises(
        ValueError,
        match=r"d_normed torch.float32 \[3, 8\], contiguous, received torch.float32 \[3, 8\] with strides \[0, 0\]",
    ):
        norm_backward(torch.ones(()).expand(3, 8), None, norm, statistics)
    with pytest.raises(ValueError, match=r"d_rounded torch.bfloat16 \[3, 8\]"):
        norm_backward(None, y, norm, statistics)
    with pytest.raises(ValueError, match=r"statistics \[2, 3\]"):
        norm_backward(y, None, norm, statistics[0])
    with pytest.raises(ValueError, match=r"dout torch.bfloat16 \[3, 8\]"):
        gelu_backward(y, x)
    with pytest.raises(ValueError, match=r"u floating \[T, D\], D of at least 1"):
        gelu_forward(x.T)
