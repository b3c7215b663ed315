"""On several ranks: the gradient contract in mixed precision, against float64 and one rank, rows of unequal ranks, and
fifty steps.

All of it runs in one set of processes, over NCCL or gloo, for starting them and compiling takes longer than the rest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retriever.config import LossConfig
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.ring import Ring
from retriever.parallel.world import World
from tests.distributed import training
from tests.distributed.processes import run_on_ranks
from tests.kernels.oracle import dense_infonce
from tests.problems import WholeBatch, random_batch, rank_batch

D = 128
FLOOR = {"bf16": 1e-4, "high": 4e-6}  # what rounding alone may differ by, whichever way sums are ordered


@dataclass(frozen=True)
class Case:
    """What is asked of the objective."""

    exchange: str
    precision: str
    symmetric: bool
    margin: float | None = None
    ignored: int = 0
    block_rows: int | None = None  # representations in host memory; an eighth of it at toy size

    def objective(self, device: torch.device) -> ContrastiveObjective:
        """The objective, with a learned temperature."""
        block_rows = self.block_rows if self.block_rows is None or device.type == "cuda" else self.block_rows // 8
        return ContrastiveObjective(
            LossConfig(
                exchange=self.exchange,  # type: ignore[arg-type]
                precision=self.precision,  # type: ignore[arg-type]
                temperature=0.02,
                learn_temperature=True,
                symmetric=self.symmetric,
                false_negative_margin=self.margin,
            ),
            block_rows=block_rows,
            unit_norm=True,
        ).to(device)


# Every value once or more: each further combination compiles kernels of its own.
CASES = [
    Case("ring", "bf16", False, 0.15, 9),
    Case("ring", "high", True, 0.15, 9),
    Case("ring", "bf16", True, 0.15, 9, block_rows=256),
    Case("gather", "bf16", True, 0.15, 9),
    Case("gather", "bf16", False),
]
# In bf16 ten queries leave a noise of 1e-3 and more: chunks of other texts round otherwise.
RUN = training.Run("ring", symmetric=True, loss_precision="high", lr=3e-4)


def _whole(case: Case, world: World) -> WholeBatch:
    """Three in four passages on the first rank."""
    queries, passages = (900, 2100) if world.device.type == "cuda" else (90, 210)
    draw, whole = random.Random(0), random_batch(queries=queries, passages=passages, ignored=case.ignored)
    return replace(whole, owners=[draw.choice([0, 0, *range(world.size)]) for _ in whole.owners])


def _vectors(whole: WholeBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    q, p = (
        torch.randn(n, D, generator=draw, dtype=torch.float64) for n in (len(whole.positives), len(whole.passage_ids))
    )
    p[torch.tensor(whole.positives).clamp(min=0)] += 0.15 * q  # queries find their positives more often than not
    return tuple(normalize(x, dim=1).float().to(device) for x in (q, p))  # type: ignore[return-value]


def _truth(q: Tensor, p: Tensor, whole: WholeBatch, case: Case) -> tuple[Tensor, ...]:
    """Loss, dqueries, dpassages and the gradient of log scale in float64; rounding to the precision tier counts as
    error.
    """
    q, p = q.double(), p.double()
    targets = torch.tensor(whole.positives, device=q.device)
    column = {i: c for c, i in enumerate(whole.passage_ids)}
    excluded = torch.zeros(len(q), len(p), dtype=torch.bool, device=q.device)
    for row, known in enumerate(whole.known):
        excluded[row, [column[i] for i in known if i in column]] = True
    if case.margin is not None:
        similarities = q @ p.T
        excluded |= similarities > similarities.gather(1, targets.clamp(min=0)[:, None]) + case.margin
    weights = torch.full((len(q),), 1 / len(q), device=q.device)
    loss, dq, dp, dscale = dense_infonce(q, p, targets, 50.0, weights, excluded, case.symmetric)
    return loss.mean(), dq, dp, 50.0 * dscale


def _measure(world: World, folder: Path) -> dict[str, Any]:
    """What this rank finds. Ranks begin by themselves, each with another case, so that they compile for one another."""
    alone = World(world.device)
    own = {
        i: _errors(alone, CASES[i]) for i in sorted(range(len(CASES)), key=lambda i: (i - 2 * world.rank) % len(CASES))
    }
    world.barrier()
    return {
        "collectives": _collectives(world),
        "errors": [_errors(world, case) + own[i] for i, case in enumerate(CASES)],
        "losses": [training.losses_of(w, folder, RUN) for w in (world, alone)],
    }


def _errors(world: World, case: Case) -> list[float]:
    """Errors of loss, dqueries, dpassages and the temperature's gradient on this rank, squared."""
    whole = _whole(case, world)
    q, p = _vectors(whole, world.device)
    batch, rows, columns = rank_batch(whole, world.rank, 10**6)
    objective = case.objective(world.device)
    home = torch.device("cpu") if objective.offload else world.device
    loss, dq, dp = objective(q[rows].to(home), p[columns].to(home), batch.targets, world)
    dq, dp = dq.to(world.device), dp.to(world.device)
    assert objective.log_scale.grad is not None
    found = [world.sum(loss.double()), dq, dp, world.sum(objective.log_scale.grad)]
    truth = _truth(q, p, whole, case)
    expected = [truth[0], truth[1][rows], truth[2][columns], truth[3]]
    return [float((f.double() - e).norm() / t.norm()) ** 2 for f, e, t in zip(found, expected, truth, strict=True)]


def _collectives(world: World) -> list[str]:
    """What went wrong with rows of equal, unequal and empty ranks."""
    wrong, size = [], world.size
    for counts in ([5] * size, [5, 2, 7, 3][:size], [0, 4, 0, 6][:size], [0] * size):
        every = [torch.full((n, 3), float(rank + 1), device=world.device) for rank, n in enumerate(counts)]
        found = world.gather_rows(every[world.rank])
        if found.counts != tuple(counts) or not found.rows.equal(torch.cat(every)):
            wrong.append(f"gather_rows {counts}: {found.rows.tolist()}")
        own = world.reduce_rows((world.rank + 1) * torch.cat(every), counts)
        if not own.equal(every[world.rank] * (size * (size + 1) / 2)):
            wrong.append(f"reduce_rows {counts}: {own.tolist()}")
        ring = {owner: block.clone() for owner, block in Ring(world, counts, every[world.rank]).back()}
        wrong += [f"ring {counts} {owner}" for owner, block in ring.items() if not block.equal(every[owner])]
    return wrong


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of up to four GPUs found, or of two ranks on the CPU."""
    folder = tmp_path_factory.mktemp("ranks")
    training.save_still_model(folder)
    size = min(4, torch.cuda.device_count()) if device == "cuda" else 2
    return run_on_ranks(_measure, size, folder, cuda=device == "cuda")


def test_rows_of_unequal_ranks_travel_unpadded(ranks: list[dict[str, Any]]) -> None:
    assert [rank["collectives"] for rank in ranks] == [[]] * len(ranks)


def test_several_ranks_train_as_one(ranks: list[dict[str, Any]]) -> None:
    """The loss of every step to 1e-3; each rank is told the same."""
    assert all(rank["losses"][0] == ranks[0]["losses"][0] for rank in ranks)
    training.assert_same_training(*ranks[0]["losses"])


def test_errors_are_those_of_one_rank(ranks: list[dict[str, Any]]) -> None:
    """Each gradient's error against float64 is at most 1.1 times that of the whole batch on one rank in the same
    precision.
    """
    failures = []
    for index, case in enumerate(CASES):
        of_ranks = [rank["errors"][index][:4] for rank in ranks]
        together = [max(part) if i in (0, 3) else sum(part) for i, part in enumerate(zip(*of_ranks, strict=True))]
        for name, found, alone in zip(
            ("loss", "dqueries", "dpassages", "dscale"), together, ranks[0]["errors"][index][4:], strict=True
        ):
            floor = FLOOR[case.precision] * (10 if name in ("loss", "dscale") else 1)  # one number may be right by luck
            if not found**0.5 <= max(1.1 * alone**0.5, floor):
                failures.append(f"{case} {name}: {found**0.5:.2g}, on one rank {alone**0.5:.2g}")
    assert not failures, "\n".join(failures)
