"""How gathered passages' gradients come home where a part of them is complete only after they have left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from kernels.lse import Departure, Exclusions, InfoNCE, infonce
from retriever.loss import tiled as module
from retriever.loss.problem import Problem
from retriever.parallel.world import Transfer, World


class _Second(World):
    """Rank 1 of two, whose neighbour has the same rows under other ids and no gradient; notes what was done when."""

    def __init__(self) -> None:
        self.device, self.rank, self.size = torch.device("cpu"), 1, 2
        self.watch = None
        self.events: list[str] = []

    def counts(self, n: int) -> tuple[int, ...]:
        return (n, n)

    def begin_gather(self, x: torch.Tensor, counts: Any) -> Transfer:
        self.events.append("gather")
        return Transfer(x, torch.cat([x + 1000 if x.dtype == torch.int64 else x.flip(0), x]), [])

    def begin_reduce(self, x: torch.Tensor, counts: Any) -> Transfer:
        self.events.append("reduce")
        return Transfer(x, x.split(list(counts))[1].clone(), [])


def _late(*args: Any, departure: Departure, **options: Any) -> InfoNCE:
    """`infonce` that lets gradients leave before a third of the kept columns' is there."""
    whole = infonce(*args, **options)
    assert whole.dpassages is not None
    remaining = whole.dpassages[departure.kept] / 3
    before = whole.dpassages.clone()
    before[departure.kept] -= remaining
    departure.leave(before)
    return replace(whole, dpassages=remaining)


def test_what_is_complete_late_is_added_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages are on their way before anything is computed; the result does not depend on what had left when."""
    torch.manual_seed(0)
    q, p = (normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (4, 5))
    exclusions = Exclusions(torch.arange(5), torch.arange(5), torch.tensor([0, 1, 2, 2]))
    problem = Problem(q, p, torch.tensor([0, 1, 2, -1]), exclusions, 10.0, 0.25, False, "fp32")
    world = _Second()
    expected = module.gathered(problem, world)
    assert world.events == ["gather", "gather", "reduce"] and expected[2].shape == p.shape and expected[2].norm() > 0.1
    monkeypatch.setattr(module, "infonce", _late)
    for found, want in zip(module.gathered(problem, _Second()), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)
