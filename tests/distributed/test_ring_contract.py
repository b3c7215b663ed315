"""The gradient contract at the representations, over the ring and in blocks: any number of ranks, unequal and empty,
every feature.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retriever.config import Direction, LossConfig
from retriever.data.text_vectors import TeacherVectors
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.problems import WholeBatch, oracle_loss, random_batch, rank_batch

D = 12
DIM_WEIGHTS = (1.0, 0.3)
HARDNESS = 4.0  # α


@dataclass(frozen=True)
class Case:
    """What is asked of the objective, and how the batch lies on the ranks."""

    exchange: str = "ring"
    block_rows: int | None = None  # in host memory
    precision: str = "fp32"
    dtype: str = "float64"
    symmetric: bool = False
    directions: tuple[Direction, ...] = ("query_to_passage",)
    partition: str = "joint"
    hardness: str = "none"
    guide: bool = False
    shared: bool = False  # rows are shares of a query's loss
    teacher: str = ""  # the distance of embeddings from it
    learn_temperature: bool = False
    margin: float | None = None
    ignored: int = 0
    dims: tuple[int, ...] = ()
    pools: int = 0
    temperature: float = 0.1
    unit: bool = True
    owners: str = "unequal"  # unequal | equal | one: everything on the last rank
    bound: float = 1e-9

    def config(self) -> LossConfig:
        """The objective's configuration."""
        return LossConfig(
            exchange=self.exchange,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            symmetric=self.symmetric,
            directions=self.directions,
            partition=self.partition,  # type: ignore[arg-type]
            hardness=self.hardness,  # type: ignore[arg-type]
            hardness_strength=HARDNESS,
            embedding_weight=0.7 if self.teacher else 0.0,
            embedding_distance=self.teacher or "mse",  # type: ignore[arg-type]
            false_negative_margin=self.margin,
            dims=self.dims,
            dim_weights=DIM_WEIGHTS[: len(self.dims)],
        )


FEATURES = ((False, 0.2, 3), (True, 0.2, 3), (False, None, 0), (True, None, 3))  # symmetric, margin, ignored
EVERY = get_args(Direction)
SOFTMAXES = [
    (EVERY, "joint"),
    (EVERY, "per_direction"),
    (EVERY[:2], "joint"),
    (EVERY[:3:2], "joint"),
    ((EVERY[0], EVERY[3]), "joint"),
]
# Directions, guide and hardness, in a ring and gathered.
KINDS_OF_NEGATIVES = [
    *(Case(directions=d, partition=p, learn_temperature=True) for d, p in SOFTMAXES),
    Case(directions=EVERY, margin=0.2, ignored=3, guide=True, hardness="in_batch", learn_temperature=True),
    Case(directions=EVERY, partition="per_direction", hardness="own", dims=(4, D), owners="one"),
    *(Case(hardness=h) for h in ("own", "in_batch", "all")),
    Case(symmetric=True, hardness="own", learn_temperature=True),
    Case(guide=True),
    Case(shared=True, margin=0.2, ignored=2),
    Case(teacher="mse", shared=True),
    Case(teacher="cosine", dims=(4, D), unit=False, temperature=1.0),
    Case(shared=True, directions=(EVERY[0], EVERY[3]), learn_temperature=True),
    Case(guide=True, symmetric=True, ignored=2),
    Case(directions=EVERY, guide=True, pools=3, learn_temperature=True),
]
CASES = [
    *(Case(symmetric=s, margin=m, ignored=i) for s, m, i in itertools.product((False, True), (None, 0.2), (0, 3))),
    *(Case(symmetric=s, learn_temperature=True, dims=(4, D)) for s in (False, True)),
    *(Case(symmetric=s, owners=owners) for s in (False, True) for owners in ("equal", "one")),
    *(Case(block_rows=r, symmetric=True, margin=0.2, ignored=3, pools=4) for r in (None, 5)),
    *(Case(symmetric=s, temperature=0.005) for s in (False, True)),
    *(Case(symmetric=s, temperature=0.02, unit=False) for s in (False, True)),  # logits of thousands
    *(Case(symmetric=s, precision="bf16", dtype="float32", bound=1e-5) for s in (False, True)),
    *(Case(symmetric=s, precision="high", dtype="float32", bound=1e-5) for s in (False, True)),
    Case(exchange="gather", symmetric=True, margin=0.1, ignored=2, learn_temperature=True),
    *(
        Case(block_rows=r, symmetric=s, margin=m, ignored=i)
        for r, (s, m, i) in zip((5, 5, 8, 20), FEATURES, strict=True)
    ),
    *(Case(block_rows=9, symmetric=s, learn_temperature=True, dims=(4, D)) for s in (False, True)),
    *(Case(block_rows=6, symmetric=s, owners=owners) for s, owners in ((True, "equal"), (False, "one"))),
    Case(block_rows=100, symmetric=True, temperature=0.005),
    Case(block_rows=9, symmetric=True, temperature=0.02, unit=False),
    *(
        Case(block_rows=7, symmetric=s, precision=p, dtype="float32", bound=1e-5)
        for s, p in ((False, "bf16"), (True, "high"))
    ),
]
UP_TO_THREE_RANKS = [
    *(replace(case, exchange=exchange) for case in KINDS_OF_NEGATIVES for exchange in ("ring", "gather")),
    Case(block_rows=7, directions=EVERY[:2], hardness="own", ignored=2, learn_temperature=True),
    Case(block_rows=7, hardness="all", shared=True),
]


def _cases(ranks: int) -> list[Case]:
    return CASES + UP_TO_THREE_RANKS if ranks < 4 else CASES


def _whole(case: Case, ranks: int) -> WholeBatch:
    """One batch for all numbers of ranks; where unequal, the first rank holds most and the last of several passages
    only.
    """
    whole = random_batch(
        ignored=case.ignored,
        own=case.config().needs_own_negatives,
        guide=case.guide,
        pools=case.pools,
        shared=case.shared,
    )
    draw = random.Random(ranks)
    n, targets = len(whole.owners), set(whole.positives)
    unequal = [draw.choice([0, 0, *range(max(1, ranks - 1) if c in targets else ranks)]) for c in range(n)]
    owners = {"unequal": unequal, "equal": [c % ranks for c in range(n)], "one": [ranks - 1] * n}[case.owners]
    return replace(whole, owners=owners)


def _vectors(whole: WholeBatch, case: Case) -> tuple[Tensor, Tensor]:
    """Representations with the values that the precision tier computes from."""
    draw, dtype = torch.Generator().manual_seed(3), getattr(torch, case.dtype)
    drawn = [
        torch.randn(n, D, generator=draw, dtype=torch.float64) for n in (len(whole.positives), len(whole.passage_ids))
    ]
    vectors = [normalize(v, dim=1) if case.unit else 2 * v for v in drawn]
    rounded = [v.bfloat16() if case.precision == "bf16" else v for v in vectors]
    return rounded[0].to(dtype), rounded[1].to(dtype)


def _teacher(whole: WholeBatch) -> TeacherVectors:
    draw = torch.Generator().manual_seed(4)
    sizes = len(whole.positives), len(whole.passage_ids)
    return TeacherVectors(*(torch.randn(n, D, generator=draw).half() for n in sizes))


def _distance(q: Tensor, p: Tensor, whole: WholeBatch, kind: str) -> Tensor:
    """Of all queries and all passages from the teacher's, half each."""
    both = zip((q, p), _teacher(whole), strict=True)
    if kind == "mse":
        queries, passages = ((x - y.to(x)).square().mean(1) for x, y in both)
    else:
        queries, passages = (1 - (normalize(x) * normalize(y.to(x))).sum(1) for x, y in both)
    shares = torch.tensor(whole.shares) if whole.shares else torch.ones(len(q))
    return 0.35 * ((queries * shares.to(queries)).sum() / shares.sum().round() + passages.mean())


@cache
def _oracle(case: Case) -> tuple[Tensor, ...]:
    """Loss, dqueries, dpassages and the gradient of log scale of the whole batch, in float64 by autograd."""
    whole = _whole(case, 1)
    log_scale = torch.tensor(-math.log(case.temperature), dtype=torch.float64, requires_grad=True)
    q, p = (x.double().clone().requires_grad_() for x in _vectors(whole, case))
    cuts = [(normalize(q[:, :d]), normalize(p[:, :d])) for d in case.dims] or [(q, p)]
    alpha = {"own": (HARDNESS, 0.0), "in_batch": (0.0, HARDNESS), "all": (HARDNESS, HARDNESS)}
    asked = {
        "symmetric": case.symmetric,
        "margin": case.margin,
        "directions": case.directions,
        "partition": case.partition,
        "hardness": alpha.get(case.hardness, (0.0, 0.0)),
    }
    losses = [oracle_loss(*cut, whole, log_scale, **asked) for cut in cuts]  # type: ignore[arg-type]
    loss = torch.stack([w * value for w, value in zip(DIM_WEIGHTS, losses, strict=False)]).sum()
    if case.teacher:
        loss = loss + _distance(q, p, whole, case.teacher)
    return loss.detach(), *torch.autograd.grad(loss, (q, p, log_scale))


def _compute(world: World, folder: Path) -> list[dict[str, Any]]:
    return [_compute_case(world, case) for case in _cases(world.size)]


def _compute_case(world: World, case: Case) -> dict[str, Any]:
    """This rank's part of the loss and the gradients, and which rows of the whole batch it holds."""
    whole = _whole(case, world.size)
    q, p = _vectors(whole, case)
    batch, rows, columns = rank_batch(whole, world.rank, 10**6)
    objective = ContrastiveObjective(case.config(), block_rows=case.block_rows, unit_norm=True)
    targets = batch.targets
    if case.teacher:
        queries, passages = _teacher(whole)
        targets = replace(targets, teacher=TeacherVectors(queries[rows], passages[columns]))
    loss, dq, dp = objective(q[rows], p[columns], targets, world)
    dscale = torch.zeros(()) if objective.log_scale.grad is None else objective.log_scale.grad
    return {
        "rows": rows,
        "columns": columns,
        "loss": loss.item(),
        "dq": dq.tolist(),
        "dp": dp.tolist(),
        "dscale": dscale.item(),
    }


def _together(case: Case, ranks: list[dict[str, Any]]) -> list[Tensor]:
    """Loss, dqueries, dpassages and, where learned, the gradient of log scale, from all ranks' parts."""
    dq, dp = (torch.zeros(len(side), D, dtype=torch.float64) for side in _oracle(case)[1:3])
    for part in ranks:
        dq[part["rows"]] = torch.tensor(part["dq"], dtype=torch.float64).view(-1, D)
        dp[part["columns"]] = torch.tensor(part["dp"], dtype=torch.float64).view(-1, D)
    sums = [torch.tensor(sum(part[name] for part in ranks), dtype=torch.float64) for name in ("loss", "dscale")]
    return [sums[0], dq, dp, *sums[1:]] if case.learn_temperature else [sums[0], dq, dp]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_loss_and_gradient_equal_one_process_over_the_whole_batch(world_size: int, tmp_path: Path) -> None:
    """Loss, both gradients and the temperature's: each within its bound, relative to its own norm."""
    alone = world_size == 1
    ranks = [_compute(World(torch.device("cpu")), tmp_path)] if alone else run_on_ranks(_compute, world_size, tmp_path)
    failures = []
    for index, case in enumerate(_cases(world_size)):
        parts = [rank[index] for rank in ranks]
        if world_size > 1 and case.owners == "unequal":
            assert len({(len(part["rows"]), len(part["columns"])) for part in parts}) > 1, (
                f"{case}: the ranks are equal"
            )
        for found, expected in zip(_together(case, parts), _oracle(case), strict=False):
            assert expected.norm() > 1e-6, f"{case}: the oracle's gradient is zero"
            error = float((found - expected).norm() / expected.norm())
            failures += [] if error <= case.bound else [f"W={world_size} {case}: {error:.2g}"]
    assert not failures, "\n".join(failures)
