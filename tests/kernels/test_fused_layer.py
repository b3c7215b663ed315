"""Dropout + residual + norm, GELU, gates and rotations, on a CPU, against plain torch and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from kernels.dropout import keep_mask
from kernels.layers.api import (
    Activation,
    Norm,
    Rotary,
    gated_backward,
    gated_forward,
    gelu_backward,
    gelu_forward,
    norm_backward,
    norm_forward,
    rotate_heads,
    rotate_heads_backward,
)
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


def norm_by_definition(
    inputs: NormInputs, dropout: float, seed: Tensor | None, rms: bool, added_weight: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(z, y, leaves) of the same inputs in float64, by torch's operations; leaves: x, residual, weight, norm_bias, any
    bias and any weight of a norm of what is added.
    """
    x, bias, residual, weight, norm_bias = (None if v is None else v.detach().double().requires_grad_() for v in inputs)
    assert x is not None and residual is not None and weight is not None and norm_bias is not None
    z = x if bias is None else x + bias
    own = [] if added_weight is None else [added_weight.double().requires_grad_()]
    if own:
        z = rms_norm(z, z.shape[-1:], own[0], EPS)
    if seed is not None and dropout > 0:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
        z = z * keep_mask(seed, rows, columns, dropout) / (1 - dropout)
    leaves = [x, residual, weight, norm_bias, *([] if bias is None else [bias]), *own]
    z = z + residual
    if rms:
        return z, rms_norm(z, z.shape[-1:], weight, EPS) + norm_bias, leaves
    return z, layer_norm(z, z.shape[-1:], weight, norm_bias, EPS), leaves


def check_norm(
    inputs: NormInputs,
    dropout: float,
    seed: Tensor | None,
    bound: float,
    sums_bound: float,
    own: bool = False,
    **modes: bool,
) -> None:
    """Results, gradients from either and from both, dtypes and shapes: relative errors below the bounds (of x's dtype,
    of sums). `own`: what is added has a norm of its own.
    """
    x, _, residual, weight, _ = inputs
    added_weight = weight.flip(0) if own else None
    norm = Norm(*inputs[:4], seed, dropout, **modes, added_weight=added_weight, added_eps=EPS)  # type: ignore[arg-type]
    stream, low, statistics = norm_forward(norm, inputs[4], EPS)
    z, want, leaves = norm_by_definition(inputs, dropout, seed, norm.rms, added_weight)
    of_stream = z if norm.pre else want
    assert stream.dtype == residual.dtype and relative_error(stream, of_stream) < sums_bound
    if norm.pre:
        assert low is not None and low.dtype == x.dtype and relative_error(low, want) < bound
    else:
        assert low is None if x.dtype == stream.dtype else low is not None and torch.equal(low, stream.to(x.dtype))
    d_normed, d_rounded = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1)).to(residual).unbind()
    d_rounded = d_rounded.to(x.dtype)
    given: list[tuple[Tensor | None, Tensor | None]] = [(d_normed, d_rounded), (d_normed, None), (None, d_rounded)]
    for pair in given:
        given_to = [(out, d.double()) for out, d in zip((of_stream, want), pair, strict=True) if d is not None]
        outs, douts = zip(*given_to, strict=True)
        expected = torch.autograd.grad(outs, leaves, douts, retain_graph=True, materialize_grads=True)
        dx, dresidual, sums = norm_backward(*pair, norm, statistics)
        if norm.pre and pair[1] is not None and not own:  # the same from z
            again = norm_backward(*pair, norm._replace(x=None, residual=stream), statistics)
            of_sum = zip((dx, dresidual, sums), again, strict=True)
            assert all(a.dtype == b.dtype and relative_error(b, a) < bound for a, b in of_sum)
        assert dx.dtype == x.dtype and dresidual.dtype == residual.dtype and sums.shape == (len(leaves) - 2, x.shape[1])
        for got, target in zip((dx, dresidual, *sums), expected, strict=True):
            if x.shape[1] == 1:  # a row of one element is its own mean: little depends on it
                assert (got.double() - target).abs().max() < 1e-4
            else:
                needed = target.norm() > 0 or (norm.pre and pair[1] is None)  # z does not depend on the norm
                assert needed and relative_error(got, target) < (bound if got is dx else sums_bound)


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


def check_gated(gate_up: Tensor, activation: Activation, bound: float) -> None:
    """The result, and the gradient; the result takes the place of dout."""
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, 1)
    active = silu(gate) if activation == "silu" else gelu(gate, approximate="none" if activation == "gelu" else "tanh")
    want = active * up
    out = gated_forward(gate_up, activation)
    assert out.dtype == gate_up.dtype and relative_error(out, want) < bound
    dout = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(gate_up)
    (expected,) = torch.autograd.grad(want, leaf, dout.double())
    dgate_up, again = gated_backward(dout, gate_up, activation)
    assert again is dout and relative_error(again, want) < bound and expected.norm() > 0
    assert dgate_up.dtype == gate_up.dtype and relative_error(dgate_up, expected) < bound


def check_rotary(heads: Tensor, query_heads: int, key_heads: int, normed: bool, bounds: tuple[float, float]) -> None:
    """Heads by their definition as complex numbers, and the gradients at them and at the weights of their norms."""
    T, N, d = heads.shape
    generator = torch.Generator().manual_seed(d)
    wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
    angles, weights = torch.randn(T, d // 2, generator=generator), 1 + 0.3 * torch.randn(2, d, generator=generator)
    cos, sin, weights = (x.double().to(heads.device, wide) for x in (angles.cos(), angles.sin(), weights))
    query_weight, key_weight = weights if normed else (None, None)
    rotary = Rotary(cos, sin, query_heads, key_heads, query_weight, key_weight, EPS)
    leaf, leaves = heads.double().requires_grad_(), weights.double().requires_grad_()
    rotated = query_heads + key_heads
    x = leaf[:, :rotated]
    if normed:
        own = torch.cat([leaves[:1].expand(query_heads, d), leaves[1:].expand(key_heads, d)])
        x = rms_norm(x, (d,), eps=EPS) * own
    pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.complex(cos.double(), sin.double())[:, None]
    want = torch.cat([pairs.real, pairs.imag], 2)
    given = heads.clone()
    out = rotate_heads(given, rotary)
    assert (out is given) != normed and torch.equal(given[:, rotated:], heads[:, rotated:])
    assert relative_error(out[:, :rotated], want) < bounds[0] and (not normed or torch.equal(given, heads))
    dout = torch.randn(want.shape, generator=generator).to(heads)
    expected = torch.autograd.grad(want, [leaf, leaves] if normed else [leaf], dout.double())
    dheads = torch.cat([dout, heads[:, rotated:]], 1)
    dweights = rotate_heads_backward(dheads, heads, rotary)
    assert expected[0].norm() > 0 and relative_error(dheads[:, :rotated], expected[0][:, :rotated]) < bounds[0]
    assert torch.equal(dheads[:, rotated:], heads[:, rotated:])  # the values' gradients
    if normed:
        assert expected[1].norm() > 0 and relative_error(dweights, expected[1]) < bounds[1]
    else:
        assert dweights is None


@pytest.mark.parametrize(
    ("rms", "pre", "own", "bias"),
    [
        (True, True, False, True),
        (False, True, False, True),
        (True, False, False, True),
        (True, True, True, False),
        (False, False, True, True),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.bfloat16, 5e-3)])
def test_pre_norm_and_rms_norm_match_torch(
    rms: bool, pre: bool, own: bool, bias: bool, dtype: torch.dtype, bound: float
) -> None:
    inputs = norm_inputs(41, 24, dtype, bias)
    check_norm(inputs, 0.1, torch.tensor([3]), bound, min(bound, 1e-6), own, rms=rms, pre=pre)


def test_a_norm_without_a_bias_is_one_with_a_bias_of_zero() -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(41, 24, torch.bfloat16)
    norm = Norm(x, bias, residual, weight)
    without, zero = norm_forward(norm, None, EPS), norm_forward(norm, torch.zeros_like(norm_bias), EPS)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_gates_match_torch(activation: Activation, dtype: torch.dtype, bound: float) -> None:
    gate_up = 3 * torch.randn(40, 62, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check_gated(gate_up.to(dtype), activation, bound)


@pytest.mark.parametrize(("query_heads", "key_heads", "normed"), [(3, 3, False), (4, 2, True)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_rotations_match_torch(
    query_heads: int, key_heads: int, normed: bool, dtype: torch.dtype, bound: float
) -> None:
    heads = torch.randn(29, query_heads + 2 * key_heads, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_rotary(heads, query_heads, key_heads, normed, (bound, bound))


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
        (lambda a: a | {"added_weight": torch.ones(9)}, r"added_weight floating \[8\]"),
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda norm, y, statistics: norm_backward(torch.ones(()).expand(3, 8), None, norm, statistics),
            r"d_stream torch.float32 \[3, 8\], contiguous, received torch.float32 \[3, 8\] with strides \[0, 0\]",
        ),
        (lambda norm, y, statistics: norm_backward(None, y, norm, statistics), r"d_rounded torch.bfloat16 \[3, 8\]"),
        (lambda norm, y, statistics: norm_backward(y, None, norm, statistics[0]), r"statistics \[2, 3\]"),
        (lambda norm, y, statistics: gelu_backward(y, norm.x), r"dout torch.bfloat16 \[3, 8\]"),
        (lambda norm, y, statistics: gelu_forward(norm.x.T), r"u floating \[T, D\], D of at least 1"),
    ],
)
def test_gradients_that_do_not_fit_are_errors(call: Callable[[Norm, Tensor, Tensor], object], message: str) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(3, 8, torch.bfloat16)
    norm = Norm(x, bias, residual, weight)
    y, _, statistics = norm_forward(norm, norm_bias, EPS)
    with pytest.raises(ValueError, match=message):
        call(norm, y, statistics)
