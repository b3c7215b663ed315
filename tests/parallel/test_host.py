"""Blocks of rows in host memory: what passes over the device, in which order it is copied, and what goes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retriever.parallel.host import CopyStream, HostRows

CPU = torch.device("cpu")


class _Log(CopyStream):
    """Writes down what is copied where, by numbers of rows' first entries."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.events: list[str] = []

    def begin(self, *copies: tuple[Tensor, Tensor]) -> None:
        self.events.append("copy " + ", ".join(f"{len(destination)}" for destination, _ in copies))
        return super().begin(*copies)  # type: ignore[return-value]


def _rows(n: int, size: int, blocks: int, copies: CopyStream | None = None) -> HostRows:
    return HostRows(torch.arange(2.0 * n).view(n, 2), size, blocks, copies or CopyStream(CPU))


@pytest.mark.parametrize(("n", "size", "blocks"), [(7, 3, 3), (6, 3, 2), (1, 5, 1), (4, 3, 4), (0, 3, 1), (0, 3, 2)])
def test_blocks_are_the_rows_in_order(n: int, size: int, blocks: int) -> None:
    """Also empty ones past the end, where another rank has more."""
    rows = _rows(n, size, blocks)
    for _ in range(2):
        seen = [(number, block.clone()) for number, block in rows.read()]
        assert [number for number, _ in seen] == list(range(blocks))
        assert all(len(block) <= size for _, block in seen)
        assert torch.equal(torch.cat([block for _, block in seen]), torch.arange(2.0 * n).view(n, 2))


def test_sums_begin_at_zero_and_go_on_from_where_they_were() -> None:
    """The last block's too; with four blocks every buffer is used twice in a sweep."""
    rows = _rows(10, 3, 4)
    rows.sums.fill_(torch.nan)
    for sweep in range(3):
        for number, block, sums in rows.accumulate(fresh=sweep == 0):
            sums += block + number
    assert torch.equal(rows.sums, 3 * (torch.arange(20.0).view(10, 2) + torch.arange(10)[:, None] // 3))


def test_the_next_block_is_on_its_way_while_one_is_worked_on() -> None:
    """And a block goes back before the one that takes its room comes."""
    log = _Log()
    rows = _rows(7, 3, 3, log)
    for number, _, _ in rows.accumulate(fresh=False):
        log.events.append(f"work on {number}")
    there = ["copy 3, 3", "copy 3, 3", "work on 0", "copy 3", "copy 1, 1", "work on 1", "copy 3", "work on 2", "copy 1"]
    assert log.events == there
    log.events.clear()
    assert len(list(rows.read())) == 3 and log.events == ["copy 3", "copy 3", "copy 1"], "sums stay where they are"


def test_two_blocks_are_held() -> None:
    addresses = {(block.data_ptr(), sums.data_ptr()) for _, block, sums in _rows(20, 3, 7).accumulate(fresh=True)}
    assert len(addresses) == 2
