"""The pointwise parts of a layer: against float64, against themselves and beyond 2³¹ elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.layers.api import Activation, Norm, gelu_backward, gelu_forward, norm_backward, norm_forward
from tests.gpu.devices import toy
from tests.kernels.oracle import relative_error
from tests.kernels.test_fused_layer import EPS, check_gated, check_gelu, check_norm, check_rotary, norm_inputs

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.mark.parametrize(
    ("T", "D", "dtype", "dropout", "bias"),
    [
        (1001, 768, torch.bfloat16, 0.1, True),
        (1001, 768, torch.bfloat16, 0.0, False),
        (1, 768, torch.bfloat16, 0.1, True),
        (257, 100, torch.float32, 0.1, False),
        (257, 100, torch.float16, 0.0, True),
        (129, 4096, torch.bfloat16, 0.1, True),
        (40, 1, torch.float32, 0.0, True),
    ],
)
def test_norm_matches_float64(T: int, D: int, dtype: torch.dtype, dropout: float, bias: bool, device: str) -> None:
    seed = torch.tensor([2**40 + 3], device=device)
    check_norm(norm_inputs(*toy(device, T, D), dtype, bias, device), dropout, seed, BOUNDS[dtype], 2e-6)


@pytest.mark.parametrize(
    ("T", "F", "dtype"),
    [
        (1001, 3072, torch.bfloat16),
        (1001, 3072, torch.float32),
        (1, 3072, torch.bfloat16),
        (257, 100, torch.float16),
        (40, 1, torch.float32),
    ],
)
def test_gelu_matches_float64(T: int, F: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device).manual_seed(F)
    check_gelu((3 * torch.randn(toy(device, T, F), device=device, generator=generator)).to(dtype), BOUNDS[dtype], 2e-6)


@pytest.mark.parametrize(
    ("D", "rms", "pre", "own", "dropout"),
    [
        (768, False, True, False, 0.0),
        (1024, True, True, False, 0.1),
        (100, True, False, False, 0.0),
        (768, True, True, True, 0.0),
    ],
)
def test_pre_norm_and_rms_norm_match_float64(
    D: int, rms: bool, pre: bool, own: bool, dropout: float, device: str
) -> None:
    inputs = norm_inputs(*toy(device, 1001, D), torch.bfloat16, device=device)
    check_norm(inputs, dropout, torch.tensor([7], device=device), 3e-3, 2e-6, own, rms=rms, pre=pre)


@pytest.mark.parametrize(
    ("F", "activation", "dtype"),
    [(1152, "gelu", torch.bfloat16), (3072, "silu", torch.float32), (100, "gelu_tanh", torch.float16)],
)
def test_gates_match_float64(F: int, activation: Activation, dtype: torch.dtype, device: str) -> None:
    gate_up = 3 * torch.randn(1001, 2 * F, generator=torch.Generator().manual_seed(F))
    check_gated(gate_up[:, : 2 * toy(device, F)[0]].contiguous().to(device, dtype), activation, BOUNDS[dtype])


@pytest.mark.parametrize(
    ("queries", "keys", "d", "normed", "dtype"),
    [(12, 12, 64, False, torch.bfloat16), (16, 8, 128, True, torch.bfloat16), (4, 1, 100, True, torch.float32)],
)
def test_rotations_match_float64(
    queries: int, keys: int, d: int, normed: bool, dtype: torch.dtype, device: str
) -> None:
    heads = torch.randn(toy(device, 1001)[0], queries + 2 * keys, d, generator=torch.Generator().manual_seed(d))
    check_rotary(heads.to(device, dtype), queries, keys, normed, (BOUNDS[dtype], 5e-6))


def test_gelu_is_accurate_in_the_tails(device: str) -> None:
    u = torch.linspace(-12, 12, 100_000, device=device).view(-1, 100)
    # erfc keeps the lower tail, where torch's own normal distribution is 0.
    want, near = u.double() * torch.special.erfc(-u.double() / 2**0.5) / 2, u.abs() < 3
    torch.testing.assert_close(gelu_forward(u).double(), want, rtol=3e-5, atol=0)
    torch.testing.assert_close(gelu_forward(u).double()[near], want[near], rtol=3e-6, atol=0)


def test_a_half_precision_stream_is_computed_in_float32(device: str) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(*toy(device, 1001, 768), torch.bfloat16, device=device)
    y, low, statistics = norm_forward(Norm(x, bias, residual.half(), weight), norm_bias, EPS)
    want, want_low, _ = norm_forward(Norm(x, bias, residual.half().float(), weight), norm_bias, EPS)
    assert statistics.dtype == torch.float32 and relative_error(y, want) < BOUNDS[torch.float16]
    assert low is not None and want_low is not None and relative_error(low, want_low) < BOUNDS[torch.bfloat16] / 4


def passes(T: int, D: int, rows: slice, inputs: tuple[Tensor, ...], seed: Tensor | None) -> list[Tensor]:
    """The last rows of all that the kernels compute, and the sums over all rows."""
    x, bias, residual, weight, norm_bias = inputs
    norm = Norm(x, bias, residual, weight, seed, 0.0 if seed is None else 0.1)
    y, low, statistics = norm_forward(norm, norm_bias, EPS)
    assert low is not None and y.shape == (T, D)
    dx, dresidual, sums = norm_backward(y, low, norm, statistics)
    found = [part[rows].clone() for part in (y, low, dx, dresidual)]
    del y, dx, dresidual
    activated = gelu_forward(low)
    found.append(activated[rows].clone())
    du, of_rows = gelu_backward(activated, low)
    return [*found, du[rows], sums, of_rows]


def test_no_row_is_no_error(device: str) -> None:
    inputs = norm_inputs(0, 768, torch.bfloat16, device=device)
    *_, sums, of_rows = passes(0, 768, slice(None), inputs, torch.tensor([1], device=device))  # type: ignore[arg-type]
    assert sums.shape == (3, 768) and not sums.any() and not of_rows.any()


def test_repeats_give_the_same_bits(device: str) -> None:
    T, D = toy(device, 5000, 768)
    inputs, seed = norm_inputs(T, D, torch.bfloat16, device=device), torch.tensor([3], device=device)
    runs = [passes(T, D, slice(None), inputs, seed) for _ in range(2)]  # type: ignore[arg-type]
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows are what they are on their own: addresses are 64 bits wide."""
    T, D = 2**31 // 3072 + 100, 3072
    x, residual = torch.zeros(T, D, device="cuda", dtype=torch.bfloat16), torch.zeros(T, D, device="cuda")
    x[-50:], residual[-50:] = torch.randn(2, 50, D, device="cuda")
    bias, weight = torch.randn(D, device="cuda"), torch.rand(D, device="cuda")
    of_all = passes(T, D, slice(-50, None), (x, bias, residual, weight, bias), None)
    of_last = passes(50, D, slice(None), (x[-50:].clone(), bias, residual[-50:].clone(), weight, bias), None)
    assert all(a.any() and torch.equal(a, b) for a, b in zip(of_all[:-2], of_last[:-2], strict=True))
