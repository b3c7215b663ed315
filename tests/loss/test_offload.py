"""The loss over representations in host memory: on the device there are blocks, whatever the size of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.data.teacher import Groups
from retriever.loss import offload as module
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import offloaded
from retriever.loss.problem import Problem
from retriever.loss.tiled import gathered
from retriever.parallel import host
from retriever.parallel.world import World
from tests.problems import random_batch, rank_batch

CPU = World(torch.device("cpu"))
D, ROWS = 64, 8  # a block: 512 numbers
QUERIES, PASSAGES = 90, 150  # a number for each, or for each known pair, is less than a block


class _Largest(TorchDispatchMode):
    """Notes the most numbers that an operation's result has, results in known host memory aside."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: set[int] = set()
        self.seen: list[tuple[int, int, str]] = []  # numbers, address of the storage, operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.seen.append((x.numel(), x.untyped_storage().data_ptr(), str(func)))
        return result

    def on_device(self) -> tuple[int, str]:
        """The largest that is none of the host's, and the operation that made it."""
        return max((numbers, name) for numbers, address, name in self.seen if address not in self.on_host)


@contextmanager
def _largest(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Largest]:
    mode = _Largest()

    def noted(*args: Any) -> Tensor:
        rows = allocate(*args)
        mode.on_host.add(rows.untyped_storage().data_ptr())
        return rows

    allocate = host.host_rows
    monkeypatch.setattr(host, "host_rows", noted)
    monkeypatch.setattr(module, "host_rows", noted)
    with mode:
        yield mode


def _problem(symmetric: bool = False, block_rows: int | None = ROWS, **loss: Any) -> Problem:
    whole = random_batch(queries=QUERIES, passages=PASSAGES, ignored=4, seed=2)
    draw = torch.Generator().manual_seed(2)
    q, p = (normalize(torch.randn(n, D, generator=draw, dtype=torch.float64), dim=1) for n in (QUERIES, PASSAGES))
    objective = ContrastiveObjective(
        LossConfig(precision="fp32", temperature=0.1, symmetric=symmetric, false_negative_margin=0.2, **loss),
        unit_norm=True,
    )
    return replace(objective._problem(q, p, _targets(whole), 1.0, 0.1), block_rows=block_rows)


def _targets(whole: Any) -> Targets:
    return rank_batch(whole, 0, 10**6)[0].targets.to(CPU.device)


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_tensor_on_the_device_is_larger_than_a_block(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes out is what the resident loss gives, which does hold more."""
    problem = _problem(symmetric)
    expected = gathered(replace(problem, block_rows=None), CPU)
    with _largest(monkeypatch) as blocks:
        found = offloaded(problem, CPU)
    with _largest(monkeypatch) as whole:
        gathered(replace(problem, block_rows=None), CPU)
    assert len(blocks.on_host) == 4, "rows and gradients of two sides"
    assert blocks.on_device()[0] <= ROWS * D < PASSAGES * D <= whole.on_device()[0], blocks.on_device()
    for f, e in zip(found, expected, strict=True):
        assert e.norm() > 1e-3 and float((f - e).norm() / e.norm()) < 1e-12


def test_the_gradients_are_in_host_memory_and_the_callers_rows_are_left_alone() -> None:
    """Twice the same bits; queries and passages keep theirs."""
    problem = _problem()
    before = problem.queries.clone(), problem.passages.clone()
    first, second = offloaded(problem, CPU), offloaded(problem, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(problem.queries, before[0]) and torch.equal(problem.passages, before[1])


class _LateCopies(host.CopyStream):
    """Makes its copies only when they are waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._begun: list[tuple[Tensor, Tensor]] = []

    def begin(self, *copies: tuple[Tensor, Tensor]) -> None:
        self._begun += copies

    def wait(self, begun: object) -> None:
        self.finish()

    def finish(self) -> None:
        for destination, source in self._begun:
            destination.copy_(source)
        self._begun.clear()


def test_gradients_of_several_parts_are_added_after_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(symmetric=True, hardness="all", hardness_strength=5.0)
    expected = gathered(replace(problem, block_rows=None), CPU)
    monkeypatch.setattr(module, "CopyStream", _LateCopies)
    for f, e in zip(offloaded(problem, CPU), expected, strict=True):
        assert e.norm() > 1e-3 and float((f - e).norm() / e.norm()) < 1e-12


@pytest.mark.parametrize("sizes", [(1, 1), (1, 20), (20, 1), (ROWS, ROWS), (ROWS + 1, 2 * ROWS)])
def test_any_sizes_make_whole_blocks_and_a_rest(sizes: tuple[int, int]) -> None:
    queries, passages = sizes
    draw = torch.Generator().manual_seed(0)
    q, p = (normalize(torch.randn(n, D, generator=draw, dtype=torch.float64), dim=1) for n in sizes)
    positives = torch.arange(queries) % passages
    targets = Targets(positives, torch.arange(passages), torch.arange(queries + 1), positives, queries)
    config = LossConfig(precision="fp32", temperature=0.1, symmetric=True)
    found, expected = (
        ContrastiveObjective(config, block_rows=rows, unit_norm=True)(q, p, targets, CPU) for rows in (ROWS, None)
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-14)


def test_a_teachers_groups_do_not_follow() -> None:
    """They are refused with `batch.offload`; targets that were moved do not pass them on in the old order."""
    whole = random_batch(queries=5, passages=9, seed=4)
    targets = replace(_targets(whole), groups=Groups(torch.arange(6), torch.arange(5), torch.ones(5)))
    assert targets.reordered(torch.arange(5).flip(0), torch.arange(9)).groups is None


def test_targets_follow_their_rows_into_another_order() -> None:
    """Loss and gradients of rows in any order are the same rows' own."""
    whole = random_batch(queries=20, passages=33, ignored=3, seed=4)
    targets, draw = _targets(whole), torch.Generator().manual_seed(4)
    q, p = (normalize(torch.randn(n, D, generator=draw, dtype=torch.float64), dim=1) for n in (20, 33))
    rows, columns = torch.randperm(20, generator=draw), torch.randperm(33, generator=draw)
    objective = ContrastiveObjective(
        LossConfig(precision="fp32", temperature=0.1, symmetric=True, false_negative_margin=0.3), unit_norm=True
    )
    loss, dq, dp = objective(q, p, targets, CPU)
    moved = objective(q[rows], p[columns], targets.reordered(rows, columns), CPU)
    assert dq.norm() > 1e-2
    for f, e in zip(moved, (loss, dq[rows], dp[columns]), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-14)
