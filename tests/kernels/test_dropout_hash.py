"""Dropout masks: a pure function of seed, head, row and column that looks like chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.dropout import keep_mask

ROWS, COLUMNS = torch.arange(512), torch.arange(768)


def dropped(seed: int, dropout: float, rows: Tensor = ROWS, heads: Tensor | None = None) -> Tensor:
    """1.0 where an element is dropped."""
    return (~keep_mask(torch.tensor([seed]), rows, COLUMNS, dropout, heads)).double()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_probability(seed: int, dropout: float) -> None:
    mask = dropped(seed, dropout)
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert abs(mask.mean() - dropout) < 5 * deviation / mask.numel() ** 0.5
    for line, size in ((mask.mean(0), len(ROWS)), (mask.mean(1), len(COLUMNS))):  # no column or row stands out
        assert (line - dropout).abs().max() < 5.5 * deviation / size**0.5
        assert 0.8 < line.std() / (deviation / size**0.5) < 1.2


def test_rows_and_columns_are_uncorrelated() -> None:
    mask = dropped(3, 0.1)
    for lines in (mask, mask.T):
        correlation = torch.corrcoef(lines)
        off = correlation[~torch.eye(len(lines), dtype=torch.bool)] * lines.shape[1] ** 0.5
        assert 0.97 < off.std() < 1.03 and abs(off.mean()) < 0.02 and off.abs().max() < 8


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dropped(3, 0.3), dropped(4, 0.3)),
        (dropped(3, 0.3), dropped(3 + 2**32, 0.3)),
        (dropped(3, 0.3), dropped(3, 0.3, ROWS + 1)),
        (dropped(3, 0.3), dropped(3, 0.3, ROWS + 2**16)),
        (dropped(3, 0.3, heads=torch.tensor([0]))[0], dropped(3, 0.3, heads=torch.tensor([1]))[0]),
        (dropped(3, 0.3)[:, :-1], dropped(3, 0.3)[:, 1:]),
    ],
    ids=["seeds", "upper halves of seeds", "next rows", "far rows", "heads", "next columns"],
)
def test_two_masks_are_independent(first: Tensor, second: Tensor) -> None:
    both = (first * second).mean()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / first.numel()) ** 0.5


def test_an_element_depends_on_its_own_numbers_alone() -> None:
    seed, heads = torch.tensor([11]), torch.tensor([0, 5])
    whole = keep_mask(seed, ROWS, COLUMNS, 0.2, heads)
    assert whole.shape == (2, 512, 768) and whole.dtype == torch.bool
    assert torch.equal(whole[0], keep_mask(seed, ROWS, COLUMNS, 0.2))
    assert torch.equal(whole[1:, 100:103, 7:9], keep_mask(seed, ROWS[100:103], COLUMNS[7:9], 0.2, heads[1:]))
    batched = keep_mask(seed, ROWS.view(4, 128), COLUMNS.expand(4, -1), 0.2, heads)  # [4, 2, 128, 768]
    assert torch.equal(batched.transpose(0, 1).reshape(2, 512, 768), whole)


def test_the_hash_is_the_documented_one() -> None:
    """Against the formula in Python's integers: a checkpoint continued with another release must draw the same
    masks.
    """

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    for seed, head, row, column in [(0, 0, 0, 0), (-5, 3, 70000, 12), (2**50 + 9, 11, 2**31, 2**32 - 1)]:
        key = mix(mix(mix((seed >> 32) % 2**32 ^ 0x9E3779B9) ^ seed % 2**32) ^ head)
        word = (mix(row ^ key) ^ mix(column ^ mix(key ^ 0x9E3779B9))) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 16)) * 0xC2B2AE35 % 2**32
        at = torch.tensor([seed]), torch.tensor([row]), torch.tensor([column])
        for dropout, expected in ((word / 2**32 * 0.999, True), (word / 2**32 * 0.999 + 0.001, False)):
            assert keep_mask(*at, dropout, torch.tensor([head])).item() is expected
