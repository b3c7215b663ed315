"""Dropout + residual + LayerNorm, bias + GELU and column sums on a CPU, against plain torch and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from kernels.dropout_hash import keep_mask
from kernels.fused_layer import bias_gelu, column_sum, dropout_add_norm

EPS = 1e-5


NormInputs: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]


def norm_inputs(rows: tuple[int, ...], D: int, dtype: torch.dtype, bias: bool = True) -> NormInputs:
    """x, bias, residual, weight and norm_bias, to be differentiated."""
    generator = torch.Generator().manual_seed(D)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, residual = draw(*rows, D), 2 * draw(*rows, D) + 0.5
    vectors = draw(D) if bias else None, 1 + 0.3 * draw(D), draw(D)
    made = x.to(dtype), vectors[0], residual, vectors[1], vectors[2]
    return tuple(None if v is None else v.to(dtype if i == 0 else wide).requires_grad_() for i, v in enumerate(made))  # type: ignore[return-value]


def norm_by_definition(inputs: tuple[Tensor | None, ...], dropout: float, seed: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """(y, leaves in float64) of the same inputs, by torch's own operations."""
    leaves = [None if v is None else v.detach().double().requires_grad_() for v in inputs]
    x, bias, residual, weight, norm_bias = leaves
    z = x if bias is None else x + bias  # type: ignore[operator]
    if seed is not None and dropout > 0:
        D = z.shape[-1]
        kept = keep_mask(seed, torch.arange(z.numel() // D, device=z.device), torch.arange(D, device=z.device), dropout)
        z = z * kept.view(z.shape) / (1 - dropout)
    return layer_norm(z + residual, z.shape[-1:], weight, norm_bias, EPS), [v for v in leaves if v is not None]


@pytest.mark.parametrize(("bias", "dropout"), [(True, 0.0), (True, 0.4), (False, 0.4)])
def test_norm_passes_gradcheck(bias: bool, dropout: float) -> None:
    inputs, seed = norm_inputs((3, 2), 5, torch.float64, bias), torch.tensor([7])

    def outputs(*leaves: Tensor | None) -> Tensor:
        return dropout_add_norm(*leaves, eps=EPS, dropout=dropout, seed=seed)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(outputs, inputs)


def test_gelu_passes_gradcheck() -> None:
    x = torch.linspace(-6, 6, 24, dtype=torch.float64).view(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(bias_gelu, (x, torch.randn(4, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_norm_matches_torch(dtype: torch.dtype, bound: float, dropout: float, bias: bool) -> None:
    inputs, seed = norm_inputs((41,), 24, dtype, bias), torch.tensor([3])
    y, low = dropout_add_norm(*inputs, eps=EPS, dropout=dropout, seed=seed)
    want, leaves = norm_by_definition(inputs, dropout, seed)
    assert y.dtype == inputs[2].dtype and low.dtype == dtype and torch.equal(low, y.to(dtype))
    assert relative_error(y, want) < min(bound, 1e-6)
    weights = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(1))
    ((weights[0] * y).sum() + (weights[1].to(dtype) * low).sum()).backward()
    ((weights[0] + weights[1].to(dtype)) * want).sum().backward()
    for got, leaf in zip((v for v in inputs if v is not None), leaves, strict=True):
        assert got.grad is not None and got.grad.dtype == got.dtype and leaf.grad is not None and leaf.grad.norm() > 0
        assert relative_error(got.grad, leaf.grad) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_gelu_matches_torch(dtype: torch.dtype, bound: float) -> None:
    x = torch.linspace(-9, 9, 3000, dtype=torch.float64).view(50, 60).to(dtype).requires_grad_()
    bias = torch.linspace(-1, 1, 60, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    weights = torch.randn(50, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [v.detach().double().requires_grad_() for v in (x, bias)]
    out, want = bias_gelu(x, bias), gelu(wide[0] + wide[1])
    assert out.dtype == dtype and relative_error(out, want) < bound
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    for got, leaf in zip((x, bias), wide, strict=True):
        assert got.grad is not None and got.grad.dtype == got.dtype and leaf.grad is not None and leaf.grad.norm() > 0
        assert relative_error(got.grad, leaf.grad) < bound


def test_column_sum_adds_in_float32() -> None:
    x = torch.randn(7, 300, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert column_sum(x).dtype == torch.float32 and column_sum(x.double()).dtype == torch.float64
    assert relative_error(column_sum(x), x.double().sum((0, 1))) < 1e-6


def test_forward_is_the_same_without_a_graph() -> None:
    inputs, seed = norm_inputs((9,), 16, torch.bfloat16), torch.tensor([3])
    with_graph = dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=seed)
    with torch.no_grad():
        without = dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=seed)
    with torch.inference_mode():
        inference = dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=seed)
    for a, b, c in zip(with_graph, without, inference, strict=True):
        assert a.requires_grad and not b.requires_grad and torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_alone_has_its_gradient(used: int) -> None:
    inputs = norm_inputs((9,), 16, torch.bfloat16)
    dropout_add_norm(*inputs, eps=EPS)[used].float().square().sum().backward()
    want, leaves = norm_by_definition(inputs, 0.0, None)
    want.square().sum().backward()
    for got, leaf in zip(inputs, leaves, strict=True):
        assert got is not None and got.grad is not None and leaf.grad is not None
        assert relative_error(got.grad, leaf.grad) < 2e-2


def test_no_row_and_one_row() -> None:
    for rows in (0, 1):
        inputs = norm_inputs((rows,), 8, torch.bfloat16)
        sum(out.sum() for out in dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=torch.tensor([1]))).backward()  # type: ignore[union-attr]
        assert all(v is not None and v.grad is not None and v.grad.shape == v.shape and v.grad.isfinite().all() for v in inputs)
        x, bias = torch.ones(rows, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        bias_gelu(x, bias).sum().backward()
        assert x.grad is not None and bias.grad is not None and bias.grad.any() == (rows > 0)
        assert torch.equal(column_sum(x.detach()), torch.full((8,), float(rows)))


def test_the_operators_are_what_they_claim_to_be() -> None:
    """torch's own check of schemas, fake implementations, autograd and traced gradients."""
    inputs, seed = norm_inputs((3,), 4, torch.float32), torch.tensor([3])
    torch.library.opcheck(torch.ops.bigbatch.dropout_add_norm.default, (*inputs, seed, EPS, 0.1))
    torch.library.opcheck(torch.ops.bigbatch.bias_gelu.default, (inputs[0], inputs[1]))
    torch.library.opcheck(torch.ops.bigbatch.column_sum.default, (torch.randn(3, 4),))


def test_a_compiled_layer_is_one_graph_and_the_same() -> None:
    inputs, seed = norm_inputs((6,), 16, torch.bfloat16), torch.tensor([3])

    def layer(x: Tensor, *others: Tensor) -> Tensor:
        y, low = dropout_add_norm(x, *others, eps=EPS, dropout=0.1, seed=seed)  # type: ignore[arg-type]
        return y + bias_gelu(low, others[0])

    gradients = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = run(*inputs)  # type: ignore[arg-type]
        gradients.append([out, *torch.autograd.grad(out.square().sum(), inputs)])  # type: ignore[arg-type]
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"residual": a["residual"][:2]}, "x and residual"),
        (lambda a: a | {"residual": a["residual"].double()}, "residual torch.float32"),
        (lambda a: a | {"weight": a["weight"].bfloat16()}, "weight torch.float32"),
        (lambda a: a | {"bias": a["bias"][:5]}, r"bias \[8\]"),
        (lambda a: a | {"bias": a["bias"].long()}, "bias of a floating dtype"),
        (lambda a: a | {"x": a["x"].T.contiguous().T}, "x floating and contiguous"),
        (lambda a: a | {"residual": a["residual"].T.contiguous().T}, r"residual \[3, 8\], contiguous"),
        (lambda a: a | {"dropout": 1.0}, "dropout in 0..1"),
        (lambda a: a | {"seed": None}, "a seed where it is above 0"),
        (lambda a: a | {"seed": torch.tensor(3)}, r"seed \[1\] int64"),
    ],
)
def test_what_does_not_fit_is_an_error(change: Callable[[dict], dict], message: str) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs((3,), 8, torch.bfloat16)
    arguments = {"x": x, "bias": bias, "residual": residual, "weight": weight, "norm_bias": norm_bias}
    arguments |= {"eps": EPS, "dropout": 0.1, "seed": torch.tensor([3])}  # type: ignore[dict-item]
    dropout_add_norm(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        dropout_add_norm(**change(arguments))


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
