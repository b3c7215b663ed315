"""Packed attention: against float64, against itself in other tiles, and at addresses beyond 2³¹."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import short
from kernels.attention.reference import Mask, Texts
from tests.gpu.devices import toy
from tests.kernels.attention_oracle import Heads, attend, each, errors, heads_of, texts, turned_errors
from tests.kernels.oracle import relative_error

SHORT = [3, 0, 5, 7, 1, 9, 4, 0, 12]
# Every tile and setting once: each compiles kernels of its own, seconds a case, and other tests share those of the
# plain ones.
CASES: list[tuple[list[int], int, int, int, dict[str, Any]]] = [
    (SHORT, 12, 12, 64, {}),
    ([30, 20, 31, 9, 32], 12, 12, 64, {"window": 3}),
    ([64, 40, 1, 50], 12, 12, 64, {"causal": True, "window": 5}),
    ([90, 70, 0, 96], 12, 12, 64, {}),
    ([100, 65, 127, 128, 0, 90], 12, 12, 64, {}),
    ([30, 20, 0, 32], 12, 4, 96, {}),
    ([200, 130, 0, 257], 12, 12, 64, {}),
    ([100, 128, 80], 8, 2, 128, {"causal": True, "window": 30}),
    ([40, 90, 20], 4, 1, 256, {"causal": True}),
]
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 5e-6}
VARIANTS = [(case, torch.bfloat16, 0.1) for case in range(len(CASES))]
VARIANTS += [
    (0, torch.float16, 0.1),
    (0, torch.float32, 0.1),
    (6, torch.float32, 0.1),
    (4, torch.bfloat16, 0.0),
    (6, torch.bfloat16, 0.0),
]


def seed(device: str) -> Tensor:
    return torch.tensor([-(2**40) - 7], device=device)


@pytest.mark.parametrize(("case", "dtype", "dropout"), VARIANTS)
def test_matches_float64(case: int, dtype: torch.dtype, dropout: float, device: str) -> None:
    lengths, heads, groups, d, options = CASES[case]
    if device == "cpu":
        lengths, heads, groups, d = [-(-n // 8) for n in lengths], heads // groups, 1, d // 8
    starts, longest = texts(lengths, device)
    inputs = heads_of(int(starts[-1]), heads, groups, d, dtype, device, fused=dropout > 0)
    found = errors(inputs, starts, longest, scale=d**-0.5, dropout=dropout, seed=seed(device), **options)
    assert max(found.values()) < BOUNDS[dtype], found


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # of the first backward pass in a process
@pytest.mark.parametrize(
    ("lengths", "H", "G", "d"),
    [(SHORT, 12, 12, 64), ([90, 70, 0, 96], 12, 12, 64), ([100, 65, 128], 12, 12, 64), ([30, 32, 20], 8, 2, 64)],
)
def test_turned_heads_match_float64(lengths: list[int], H: int, G: int, d: int, device: str) -> None:
    """A GPU turns them inside the kernels of attention."""
    lengths = [min(n, 12) for n in lengths] if device == "cpu" else lengths
    given = Texts(*texts(lengths, device))
    heads = torch.randn(sum(lengths), H + 2 * G, d, generator=torch.Generator().manual_seed(d)).to(
        device, torch.bfloat16
    )
    found, turns = turned_errors(heads, H, G, given, Mask(d**-0.5, 0.1, seed(device), window=9))
    assert max(found.values()) < 6e-3 and turns == (device == "cuda"), (found, turns)


def run(inputs: Heads, starts: Tensor, longest: int) -> list[Tensor]:
    out = attend(*inputs, starts, longest, scale=0.125, dropout=0.1, seed=seed(inputs[0].device.type))
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out) * out.detach())]


@pytest.mark.parametrize("lengths", [[8, 9] * 300, [70, 90] * 40, [150, 250] * 20])
def test_repeats_and_strides_give_the_same_bits(lengths: list[int], device: str) -> None:
    starts, longest = texts(lengths if device == "cuda" else lengths[:4], device)
    heads = toy(device, 12, 12, most=2)
    T = int(starts[-1])
    first = run(heads_of(T, *heads, 64, torch.bfloat16, device), starts, longest)
    for fused in (False, True):
        for x, y in zip(
            first, run(heads_of(T, *heads, 64, torch.bfloat16, device, fused=fused), starts, longest), strict=True
        ):
            assert x.any() and torch.equal(x, y)
    with torch.no_grad():
        inputs = heads_of(T, *heads, 64, torch.bfloat16, device)
        assert torch.equal(first[0], attend(*inputs, starts, longest, scale=0.125, dropout=0.1, seed=seed(device)))


def test_the_same_mask_in_every_tile_and_block(device: str) -> None:
    """A text longer than the others changes tiles or goes by blocks; what the others get changes by rounding alone."""
    lengths = [9, 7, 12, 5]
    starts, longest = texts(lengths, device)
    query, key, value = each(heads_of(433, *toy(device, 12, 12, most=2), 64, torch.bfloat16, device), Tensor.detach)
    options: dict[str, Any] = {"scale": 0.125, "dropout": 0.1, "seed": seed(device)}
    few = attend(query[:33], key[:33], value[:33], starts, longest, **options)
    for extra in (90, 120, 400):
        more, longest = texts([*lengths, extra], device)
        T = 33 + extra
        got = attend(query[:T], key[:T], value[:T], more, longest, **options)
        assert relative_error(got[:33], few.double()) < 4e-3


def test_texts_of_every_length_fill_their_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block, longest in ((16, 11), (32, 1), (64, 64), (128, 11)):
        tile = short.Tile(block, 4, 4)
        monkeypatch.setattr(short, "tile_for", lambda *_, tile=tile: tile)
        starts, _ = texts([longest, longest - 1, longest] * 11, device)
        inputs = each(heads_of(int(starts[-1]), 2, 2, 32, torch.float16, device), Tensor.detach)
        got = attend(*inputs, starts, longest, scale=0.2)
        want = attend(*each(inputs, Tensor.double), starts, longest, scale=0.2)
        assert relative_error(got, want) < 1e-3, (block, longest)


@pytest.mark.parametrize("length", [100, 300])
def test_addresses_beyond_two_to_the_31(length: int) -> None:
    n = 2_900_000 // length
    starts = torch.arange(n + 1, device="cuda", dtype=torch.int32) * length
    T = n * length
    assert T * 12 * 64 > 2**31
    buffer = torch.randn(T, 12, 64, device="cuda", dtype=torch.bfloat16)
    inputs = each((buffer, buffer, buffer), lambda x: x.clone().requires_grad_())
    whole = run(inputs, starts, length)
    # The last text alone has other token indices, and so another mask: compare without dropout.
    out = attend(*inputs, starts, length, scale=0.125)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    last = each(inputs, lambda x: x.detach()[-length:].clone().requires_grad_())
    alone = attend(*last, starts[:2], length, scale=0.125)
    assert torch.equal(out[-length:], alone)
    for x, y in zip(gradients, torch.autograd.grad(alone, last, torch.ones_like(alone)), strict=True):
        assert y.norm() > 0 and torch.equal(x[-length:], y)
    assert all(bool(x[-length:].isfinite().all()) for x in whole)


@pytest.mark.filterwarnings(
    "ignore:.*script_method. is deprecated:DeprecationWarning"
)  # torch's own, while it compiles
def test_compiled_with_dropout_is_the_same_call(device: str) -> None:
    starts, longest = texts([84, 40, 1, 30], device)
    inputs = heads_of(155, *toy(device, 12, 12, most=2), 64, torch.bfloat16, device)
    word, backend = seed(device), "inductor" if device == "cuda" else "aot_eager"

    def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query * 2, key, value, starts, longest, scale=0.125, dropout=0.1, seed=word) * 2

    want, got = twice(*inputs), torch.compile(twice, fullgraph=True, backend=backend)(*inputs)
    assert torch.equal(got, want)
    for x, y in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert torch.equal(x, y)
