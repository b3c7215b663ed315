"""A loss of one's own that equals InfoNCE has its value and its gradients, on any number of ranks and in any blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import retriever.loss.custom as module
from bigbatch import LossTargets, batch_loss
from retriever.config import ConfigError, LossConfig
from retriever.data.teacher import Groups
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.custom import CustomLoss, load_loss
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.problems import random_batch, rank_batch

BOUND, TEMPERATURE, DIMENSION = 1e-9, 0.1, 8


class Rows(nn.Module):
    """InfoNCE by rows; `log_scale` is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(-torch.tensor(TEMPERATURE, dtype=torch.float64).log())
        self.called = list[int]()

    def forward(self, queries: Tensor, passages: Tensor, targets: LossTargets) -> Tensor:
        """A block's losses."""
        self.called.append(len(queries))
        logits = self.log_scale.exp() * (queries @ passages.T)
        return cross_entropy(logits.masked_fill(targets.excluded, -torch.inf), targets.positives, reduction="none")


@batch_loss
class Batch(Rows):
    """Symmetric InfoNCE, which needs all queries of a passage."""

    def forward(self, queries: Tensor, passages: Tensor, targets: LossTargets) -> Tensor:
        """The losses of the whole batch."""
        rows, scale = super().forward(queries, passages, targets), self.log_scale.exp()
        logits = scale * (queries @ passages.T)
        positives = targets.positives[:, None]
        others = logits.masked_fill(targets.excluded.scatter(1, positives, True), -torch.inf).logsumexp(0)
        own = logits.gather(1, positives)[:, 0]
        return 0.5 * (rows + torch.logaddexp(own, others[targets.positives]) - own)


@dataclass(frozen=True)
class Case:
    """What is compared; `block`: rows at once."""

    whole: bool = False
    block: int = 10**6
    margin: float | None = None
    ignored: int = 0
    guide: bool = False
    dims: tuple[int, ...] = ()
    weight: float = 1.0


CASES = [
    *(Case(), Case(block=1), Case(block=3, margin=0.05, ignored=2), Case(dims=(4, 8), weight=0.5)),
    *(Case(whole=True), Case(whole=True, margin=0.05, ignored=2)),
    *(Case(block=3, ignored=2, guide=True), Case(whole=True, guide=True)),
]


def _differences(world: World, folder: Path) -> list[dict[str, float]]:
    return [_difference(world, case) for case in CASES]


def _difference(world: World, case: Case) -> dict[str, float]:
    """Of this rank's gradients and of the batch's loss to those of the tiled strategy, relative to the largest."""
    whole = random_batch(ranks=world.size, ignored=case.ignored, guide=case.guide)
    batch, rows, columns = rank_batch(whole, world.rank, 100)
    draws = torch.Generator().manual_seed(1)
    sides = [
        normalize(torch.randn(len(texts), DIMENSION, generator=draws, dtype=torch.float64), dim=1)[own]
        for texts, own in ((whole.query_tokens, rows), (whole.passage_tokens, columns))
    ]
    config = LossConfig(
        precision="fp32",
        temperature=TEMPERATURE,
        false_negative_margin=case.margin,
        dims=case.dims,
        contrastive_weight=case.weight,
    )
    ours = replace(config, learn_temperature=True, symmetric=case.whole)
    function = Batch() if case.whole else Rows()
    bytes_of_pair = module._MIB * 2**20 // (case.block * len(whole.passage_ids))
    found = []
    for objective, scale in (
        ((built_in := ContrastiveObjective(ours, unit_norm=True)), built_in.log_scale),
        (ContrastiveObjective(config, unit_norm=True, custom=CustomLoss(function)), function.log_scale),
    ):
        with patch.object(module, "_BYTES_A_PAIR", bytes_of_pair):
            loss, dqueries, dpassages = objective(*sides, batch.targets, world)
        gradient = scale.grad if scale.grad is not None else torch.zeros_like(scale)
        found.append((world.sum(loss), dqueries, dpassages, world.sum(gradient)))
    if not case.whole:
        assert max(function.called, default=0) <= case.block and (not rows or function.called)
    names = ("loss", "queries", "passages", "parameter")
    largest = {
        name: float(world.max(x.abs().max() if x.numel() else x.new_zeros(())))
        for name, x in zip(names, found[0], strict=True)
    }
    assert min(largest.values()) > 1e-4, largest
    return {
        name: float((x - y).abs().max()) / largest[name] if x.numel() else 0.0
        for name, x, y in zip(names, *found, strict=True)
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_equals_the_built_in_loss(ranks: int, tmp_path: Path) -> None:
    alone = ranks == 1
    found = (
        [_differences(World(torch.device("cpu")), tmp_path)] if alone else run_on_ranks(_differences, ranks, tmp_path)
    )
    for rank, measured in enumerate(found):
        for case, differences in zip(CASES, measured, strict=True):
            assert max(differences.values()) < BOUND, f"rank {rank} of {ranks}, {case}: {differences}"


def _scores(world: World, folder: Path) -> list[list[list[float | None]]]:
    """The teacher's scores that a row loss and a batch loss are given, by query of this rank or of all."""
    whole = random_batch(ranks=world.size)
    batch, rows, columns = rank_batch(whole, world.rank, 100)
    ids = torch.tensor(
        [[whole.passage_ids[whole.positives[row]], whole.passage_ids[row]] for row in rows], dtype=torch.int64
    )
    groups = Groups(2 * torch.arange(len(rows) + 1), ids.flatten(), torch.arange(2.0 * len(rows)) + 100 * world.rank)
    given = []

    def row_loss(queries: Tensor, passages: Tensor, targets: LossTargets) -> Tensor:
        assert targets.scores is not None and targets.temperature == pytest.approx(TEMPERATURE)
        order = torch.cat(
            [torch.tensor([c for c, o in enumerate(whole.owners) if o == rank]) for rank in range(world.size)]
        )
        scores = torch.full_like(targets.scores, torch.nan)
        scores[:, order] = targets.scores
        given.append([[None if x != x else x for x in row] for row in scores.tolist()])
        return queries.sum(1)

    for function in (row_loss, batch_loss(lambda *arguments: row_loss(*arguments))):
        objective = ContrastiveObjective(
            LossConfig(temperature=TEMPERATURE), unit_norm=True, custom=CustomLoss(function)
        )
        targets = replace(batch.targets, groups=groups)
        objective(torch.ones(len(rows), 4), torch.ones(len(columns), 4), targets, world)
    return given


def test_a_teachers_scores_stand_at_its_pairs(tmp_path: Path) -> None:
    """Each query has its own two, and nothing else."""
    whole = random_batch(ranks=2)
    home = [whole.owners[column] for column in whole.positives]
    first, second = run_on_ranks(_scores, 2, tmp_path)
    (of_rows, of_all), of_all_again = first, second[-1]
    assert of_all == of_all_again and len(of_all) == len(home)
    for at, row in enumerate(row for row, owner in enumerate(home) if owner == 0):
        expected: dict[int, float] = {whole.positives[row]: 2.0 * at, row: 2.0 * at + 1}
        assert {column: x for column, x in enumerate(of_rows[at]) if x is not None} == expected
        assert of_all[at] == of_rows[at]


def _starts(world: World, folder: Path) -> list[list[float]]:
    """Weights, and buffers of two types, that were others on each rank."""
    torch.manual_seed(world.rank)
    module = nn.ModuleList([nn.Linear(2, 3), nn.BatchNorm1d(4)])
    module[1].running_var.fill_(world.rank + 5)  # type: ignore[operator]
    CustomLoss(module).start_from_first(world)
    return [x.flatten().tolist() for x in module.state_dict().values()]


def test_every_rank_starts_from_the_first_ones_parameters(tmp_path: Path) -> None:
    first, second = run_on_ranks(_starts, 2, tmp_path)
    torch.manual_seed(0)
    assert first == second and first[0] == nn.Linear(2, 3).weight.flatten().tolist() and [5.0] * 4 in first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda q: q, r"received \(3, 4\)"),
        (lambda q: 0.0, "received float"),
        (lambda q: q.detach().sum(1), "without a graph"),
    ],
)
def test_what_a_loss_returns_is_checked(values: Any, message: str) -> None:
    objective = ContrastiveObjective(
        LossConfig(), unit_norm=True, custom=CustomLoss(lambda queries, passages, targets: values(queries))
    )
    whole = random_batch(queries=3, passages=5)
    batch, _, _ = rank_batch(whole, 0, 100)
    with pytest.raises(ValueError, match=rf"expected the losses of 3 queries, \(3,\); received.*|{message}") as raised:
        objective(torch.ones(3, 4), torch.ones(5, 4), batch.targets, World(torch.device("cpu")))
    assert message.replace("\\", "") in str(raised.value)


def test_a_loss_is_found_by_its_name() -> None:
    assert isinstance(load_loss(f"{Rows.__module__}:Rows"), Rows)
    assert load_loss("torch.nn.functional:normalize") is normalize
    for name in ("nothing.here:f", "torch:nothing", "torch", ""):
        with pytest.raises(
            ConfigError, match=f"expected package.module:function, which can be imported; received '{name}'"
        ):
            load_loss(name)
