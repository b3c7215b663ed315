"""The pointwise parts of a layer on a GPU: against float64, against themselves, under torch.compile and beyond 2³¹ elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from kernels.fused_layer import bias_gelu, column_sum, dropout_add_norm
from tests.kernels.test_fused_layer import EPS, norm_by_definition, norm_inputs, relative_error

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def on_gpu(leaves: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v.detach().cuda().requires_grad_() for v in leaves)


@pytest.mark.parametrize(
    ("T", "D", "dtype", "dropout", "bias"),
    [
        (1001, 768, torch.bfloat16, 0.1, True),
        (1001, 768, torch.bfloat16, 0.0, False),
        (1001, 768, torch.float16, 0.7, True),
        (1001, 768, torch.float32, 0.1, True),
        (1, 768, torch.bfloat16, 0.1, True),
        (3000, 384, torch.bfloat16, 0.1, False),
        (33, 1024, torch.bfloat16, 0.1, True),
        (257, 100, torch.float32, 0.1, False),
        (257, 100, torch.float16, 0.0, True),
        (129, 4096, torch.bfloat16, 0.1, True),
        (40, 1, torch.float32, 0.0, True),
    ],
)
def test_norm_matches_float64(T: int, D: int, dtype: torch.dtype, dropout: float, bias: bool) -> None:
    inputs, seed = on_gpu(norm_inputs((T,), D, dtype, bias)), torch.tensor([2**40 + 3], device="cuda")
    y, low = dropout_add_norm(*inputs, eps=EPS, dropout=dropout, seed=seed)  # type: ignore[arg-type]
    want, leaves = norm_by_definition(inputs, dropout, seed)
    assert y.dtype == torch.float32 and low.dtype == dtype and torch.equal(low, y.to(dtype))
    assert relative_error(y, want) < 2e-6
    weights = torch.randn(2, T, D, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    ((weights[0] * y).sum() + (weights[1].to(dtype) * low).sum()).backward()
    ((weights[0] + weights[1].to(dtype)) * want).sum().backward()
    for got, leaf in zip((v for v in inputs if v is not None), leaves, strict=True):
        assert got.grad is not None and got.grad.dtype == got.dtype and leaf.grad is not None
        if D == 1:  # a row of one element is its own mean
            assert (got.grad - leaf.grad).abs().max() < 1e-4
        else:
            assert leaf.grad.norm() > 0 and relative_error(got.grad, leaf.grad) < (BOUNDS[dtype] if got is inputs[0] else 2e-6)


@pytest.mark.parametrize(
    ("T", "F", "dtype"),
    [
        (1001, 3072, torch.bfloat16),
        (1001, 3072, torch.float16),
        (1001, 3072, torch.float32),
        (1, 3072, torch.bfloat16),
        (3000, 1536, torch.bfloat16),
        (257, 100, torch.float16),
        (40, 1, torch.float32),
    ],
)
def test_gelu_matches_float64(T: int, F: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(F)
    x = (3 * torch.randn(T, F, device="cuda", generator=generator)).to(dtype).requires_grad_()
    bias = torch.randn(F, device="cuda", generator=generator, requires_grad=True)
    weights = torch.randn(T, F, device="cuda", generator=generator).to(dtype)
    leaves = [v.detach().double().requires_grad_() for v in (x, bias)]
    out, want = bias_gelu(x, bias), gelu(leaves[0] + leaves[1])
    assert out.dtype == dtype and relative_error(out, want) < BOUNDS[dtype]
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    assert x.grad is not None and bias.grad is not None and leaves[1].grad is not None and leaves[1].grad.norm() > 0
    assert relative_error(x.grad, leaves[0].grad) < BOUNDS[dtype]  # type: ignore[arg-type]
    assert relative_error(bias.grad, leaves[1].grad) < 2e-6
    assert relative_error(column_sum(weights), weights.double().sum(0)) < 2e-6


def test_gelu_is_accurate_in_the_tails() -> None:
    u = torch.linspace(-12, 12, 100_000, device="cuda").view(-1, 100)
    want = u.double() * torch.special.ndtr(u.double())
    torch.testing.assert_close(bias_gelu(u, torch.zeros(100, device="cuda")).double(), want, rtol=3e-5, atol=0)
    near = u.abs() < 3
    torch.testing.assert_close(bias_gelu(u, torch.zeros(100, device="cuda")).double()[near], want[near], rtol=3e-6, atol=0)


def test_no_row_is_no_error() -> None:
    inputs = on_gpu(norm_inputs((0,), 768, torch.bfloat16))
    sum(out.sum() for out in dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=torch.tensor([1]).cuda())).backward()  # type: ignore
    assert all(v is not None and v.grad is not None and v.grad.shape == v.shape and not v.grad.any() for v in inputs)
    x, bias = torch.ones(0, 8, device="cuda", requires_grad=True), torch.ones(8, device="cuda", requires_grad=True)
    bias_gelu(x, bias).sum().backward()
    assert bias.grad is not None and not bias.grad.any() and not column_sum(x.detach()).any()


def test_repeats_and_passes_without_a_graph_give_the_same_bits() -> None:
    inputs, seed = on_gpu(norm_inputs((5000,), 768, torch.bfloat16)), torch.tensor([3], device="cuda")
    runs = []
    for _ in range(2):
        outputs = dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=seed)  # type: ignore[arg-type]
        activated = bias_gelu(outputs[1], inputs[1])  # type: ignore[arg-type]
        gradients = torch.autograd.grad(activated.float().square().sum() + outputs[0].sin().sum(), inputs)  # type: ignore[arg-type]
        runs.append((*outputs, activated, *gradients))
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with torch.no_grad():
        outputs = dropout_add_norm(*inputs, eps=EPS, dropout=0.1, seed=seed)  # type: ignore[arg-type]
        assert torch.equal(outputs[0], runs[0][0]) and torch.equal(outputs[1], runs[0][1])
        assert torch.equal(bias_gelu(outputs[1], inputs[1]), runs[0][2])  # type: ignore[arg-type]


def test_a_compiled_layer_is_the_same() -> None:
    inputs, seed = on_gpu(norm_inputs((700,), 768, torch.bfloat16)), torch.tensor([3], device="cuda")

    def layer(x: Tensor, *others: Tensor) -> Tensor:
        y, low = dropout_add_norm(x, *others, eps=EPS, dropout=0.1, seed=seed)  # type: ignore[arg-type]
        return y + bias_gelu(low, others[0])

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        out = run(*inputs)  # type: ignore[arg-type]
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))  # type: ignore[arg-type]
    for a, b in zip(*results, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


def last_rows(out: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The last 50 rows of `out` and of the gradient at `leaf` of ½ ‖out‖²."""
    (gradient,) = torch.autograd.grad(out, leaf, out.detach())
    return out[-50:].detach().clone(), gradient[-50:].clone()


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows are what they are on their own: addresses are 64 bits wide."""
    T, D = 2**31 // 3072 + 100, 3072
    x, residual = torch.zeros(T, D, device="cuda", dtype=torch.bfloat16), torch.zeros(T, D, device="cuda")
    x[-50:], residual[-50:] = torch.randn(2, 50, D, device="cuda")
    bias, weight = torch.randn(D, device="cuda"), torch.rand(D, device="cuda")
    assert relative_error(column_sum(x), x[-50:].double().sum(0)) < 1e-5
    alone, alone_residual = x[-50:].clone().requires_grad_(), residual[-50:].clone()
    x.requires_grad_()
    norm = {"weight": weight, "norm_bias": bias, "eps": EPS}
    pairs = [
        (last_rows(bias_gelu(x, bias), x), last_rows(bias_gelu(alone, bias), alone)),
        (
            last_rows(dropout_add_norm(x, bias, residual, **norm)[1], x),  # type: ignore[arg-type]
            last_rows(dropout_add_norm(alone, bias, alone_residual, **norm)[1], alone),  # type: ignore[arg-type]
        ),
    ]
    for of_all, of_last in pairs:
        assert all(a.any() and torch.equal(a, b) for a, b in zip(of_all, of_last, strict=True))
