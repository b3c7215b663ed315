"""Pooling against loops over single rows, in the precision and on the padding side it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retriever.encoder.pooling import MODES, pool, unit_norm

LENGTHS = (5, 1, 7, 3)
WIDTH = 7


def _batch(left: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    """hidden [n, T, H] with NaN at the padding, its mask [n, T], and the real rows."""
    generator = torch.Generator().manual_seed(0)
    hidden, mask = (
        torch.full((len(LENGTHS), WIDTH, 3), torch.nan, dtype=dtype),
        torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int64),
    )
    rows = [torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype) for n in LENGTHS]
    for i, row in enumerate(rows):
        place = slice(WIDTH - len(row), WIDTH) if left else slice(0, len(row))
        hidden[i, place], mask[i, place] = row, 1
    return hidden, mask, rows


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_pooling_sees_the_real_tokens_only(mode: str, left: bool) -> None:
    hidden, mask, rows = _batch(left)
    expected = torch.stack([{"cls": row[0], "last": row[-1], "mean": row.sum(0) / len(row)}[mode] for row in rows])
    torch.testing.assert_close(pool(hidden, mask, mode), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_padding_gets_no_gradient(mode: str) -> None:
    hidden, mask, _ = _batch(left=False)
    hidden = hidden.requires_grad_()
    pool(hidden, mask, mode).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[mask == 0].eq(0).all()
    assert hidden.grad[mask == 1].abs().sum() > 0


def test_half_precision_is_summed_in_fp32_even_under_autocast() -> None:
    """A running bf16 sum of ones stops at 256."""
    hidden, mask = torch.ones(1, 1000, 2, dtype=torch.bfloat16), torch.ones(1, 1000, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool(hidden, mask, "mean")
        length = unit_norm(pooled * 3).norm(dim=1)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(1, 2))
    torch.testing.assert_close(length, torch.ones(1), rtol=0, atol=1e-6)


def test_unit_vectors_keep_their_direction_and_zero_stays_zero() -> None:
    torch.testing.assert_close(
        unit_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    )


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pooling is 'max'; expected one of cls, mean, last \(model\.pooling\)"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1), "max")
