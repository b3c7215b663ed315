"""The collectives on real gloo ranks: unequal and empty ranks, missing gradients, several buckets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retriever.config import LossConfig
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.strategies import STRATEGIES
from retriever.parallel import world as world_module
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.problems import random_batch, rank_batch

COUNTS: dict[int, list[tuple[int, ...]]]
COUNTS = {2: [(3, 1), (0, 4), (2, 0), (0, 0), (2, 2)], 3: [(3, 1, 2), (0, 5, 0), (0, 0, 0), (1, 0, 4)]}
SHAPES: dict[torch.dtype, tuple[int, ...]]
SHAPES = {torch.float32: (4,), torch.float64: (2, 3), torch.bfloat16: (4,), torch.int64: (), torch.bool: ()}


def _rows_of(rank: int, n: int, dtype: torch.dtype) -> Tensor:
    numbers = torch.randint(-8, 8, (n, *SHAPES[dtype]), generator=torch.Generator().manual_seed(100 * rank + n))
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def _gather_rows(world: World) -> list[str]:
    """Every rank gets all rows in rank order, in their dtype, and knows which are its own."""
    wrong = []
    for counts in COUNTS[world.size]:
        for dtype in SHAPES:
            own = _rows_of(world.rank, counts[world.rank], dtype)
            found = world.gather_rows(own)
            expected = torch.cat([_rows_of(rank, n, dtype) for rank, n in enumerate(counts)])
            same = (
                found.rows.dtype == dtype
                and torch.equal(found.rows, expected)
                and torch.equal(found.rows[found.own], own)
            )
            if not same or found.counts != counts or found.rank != world.rank:
                wrong.append(f"{counts} {dtype}")
    return wrong


def _reduce_rows(world: World) -> list[str]:
    """A rank's own rows of the sum over ranks."""
    wrong = []
    for counts in COUNTS[world.size]:
        draws = [torch.Generator().manual_seed(rank) for rank in range(world.size)]
        terms = [torch.randn(sum(counts), 3, generator=draw, dtype=torch.float64) for draw in draws]
        mine = terms[world.rank].clone()
        found = world.reduce_rows(mine, counts)
        expected = torch.stack(terms).sum(0).split(counts)[world.rank]
        if (
            found.shape != expected.shape
            or not torch.allclose(found, expected, rtol=1e-14)
            or not torch.equal(mine, terms[world.rank])
        ):
            wrong.append(str(counts))
    return wrong


def _sums(world: World) -> list[str]:
    """sum, max and logsumexp over ranks; −inf where every rank has −inf, without NaN; arguments stay as they are."""
    x = torch.tensor(
        [[1.0, -math.inf, 800.0, -math.inf], [2.0, -math.inf, 801.0, 5.0], [-1.0, -math.inf, -800.0, -math.inf]]
    ).double()
    mine, every = x[world.rank].clone(), x[: world.size]
    wrong = [] if torch.allclose(world.logsumexp(mine), every.logsumexp(0), rtol=1e-14) else ["logsumexp"]
    wrong += [] if torch.equal(world.max(mine), every.amax(0)) else ["max"]
    wrong += [] if torch.equal(world.sum(mine[:1]), every[:, 0].sum()[None]) else ["sum"]
    return wrong + ([] if torch.equal(mine, x[world.rank]) else ["an argument was changed"])


def _sum_gradients(world: World) -> list[str]:
    """Σ over ranks in buckets of any size; missing here: zeros; missing everywhere: none; frozen: untouched."""
    wrong = []
    for bucket_bytes in (1, 100, 2**20):
        world_module._BUCKET_BYTES = bucket_bytes
        shapes = [
            ((3, 4), torch.float32),
            ((5,), torch.float64),
            ((2, 2), torch.float32),
            ((), torch.float32),
            ((6,), torch.float32),
        ]
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
        expected: list[Tensor | None] = []
        for i, p in enumerate(parameters):
            with_gradient = {0: range(world.size), 1: [world.size - 1], 2: [], 3: [0], 4: range(world.size)}[i]
            gradients = {
                r: torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + r)).to(p.dtype)
                for r in with_gradient
            }
            p.grad = gradients.get(world.rank)
            expected.append(sum(gradients.values()) if gradients else None)  # type: ignore[arg-type]
        frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        frozen.grad = torch.full((2,), float(world.rank))
        world.sum_gradients([parameters[0], frozen, *parameters[1:]])
        for i, (p, total) in enumerate(zip(parameters, expected, strict=True)):
            right = p.grad is None if total is None else p.grad is not None and torch.allclose(p.grad, total, atol=1e-6)
            if not right or (p.grad is not None and (p.grad.dtype, p.grad.shape) != (p.dtype, p.shape)):
                wrong.append(f"parameter {i} in buckets of {bucket_bytes} bytes: {p.grad}, expected {total}")
        if not torch.equal(frozen.grad, torch.full((2,), float(world.rank))):
            wrong.append("frozen")
    return wrong


def _empty_rank(world: World) -> list[str]:
    """Where the last rank holds neither query nor passage, every strategy gives what one rank gives."""
    whole = random_batch(seed=10)
    draw = torch.Generator().manual_seed(0)
    q, p = (
        torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (len(whole.positives), len(whole.passage_ids))
    )
    owners = [c % max(1, world.size - 1) for c in range(len(p))]
    batch, rows, columns = rank_batch(replace(whole, owners=owners), world.rank, 10**6)
    alone, wrong = rank_batch(whole, 0, 10**6)[0], []
    for name in STRATEGIES:
        for symmetric in (False, True):
            config = LossConfig(strategy=name, symmetric=symmetric, precision="fp32")  # type: ignore[arg-type]
            objective = ContrastiveObjective(config, unit_norm=True)
            loss, dq, dp = objective(q[rows], p[columns], batch.targets, world)
            whole_loss, whole_dq, whole_dp = objective(q, p, alone.targets, World(world.device))
            pairs = [(world.sum(loss), whole_loss), (dq, whole_dq[rows]), (dp, whole_dp[columns])]
            if not whole_dq.norm() > 0 or not all(torch.allclose(f, e, rtol=1e-9, atol=1e-12) for f, e in pairs):
                wrong.append(f"{name} symmetric={symmetric}")
    return wrong


CHECKS = {f.__name__.removeprefix("_"): f for f in (_gather_rows, _reduce_rows, _sums, _sum_gradients, _empty_rank)}


def _run(world: World, folder: Path) -> dict[str, Any]:
    return {name: check(world) for name, check in CHECKS.items()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_on_several_ranks(world_size: int, tmp_path: Path) -> None:
    """Each check returns what went wrong; one spawn runs them all."""
    for rank, results in enumerate(run_on_ranks(_run, world_size, tmp_path)):
        assert results == {name: [] for name in CHECKS}, f"rank {rank}"


def test_one_rank_is_the_identity() -> None:
    """Alone, every collective gives its argument, and gradients stay the objects they were."""
    world, x = World(torch.device("cpu")), torch.tensor([[1.0, -math.inf]])
    for found in (world.sum(x), world.max(x), world.logsumexp(x), world.gather_rows(x).rows, world.reduce_rows(x, [1])):
        assert torch.equal(found, x)
    p, q = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    p.grad = gradient = torch.ones_like(p)
    world.sum_gradients([p, q])
    assert p.grad is gradient and q.grad is None
    assert world.is_first


def test_several_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(ValueError, match="torch.distributed"):
        World(torch.device("cpu"), 0, 2)
