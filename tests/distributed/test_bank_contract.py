"""The gradient contract with a memory bank: on any number of ranks, loss and gradient are those of one process that
puts the bank's rows behind the batch's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retriever.config import LossConfig
from retriever.loss.bank import Bank, Part
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.problems import WholeBatch, oracle_loss, random_batch, rank_batch

BOUND, DIMENSION, HELD, STEPS = 1e-9, 8, 2, 4
IDS = 45  # so few that a bank has old copies of a batch's passages


@dataclass(frozen=True)
class Case:
    bank: str
    strategy: str = "tiled"
    exchange: str = "gather"
    block_rows: int | None = None
    symmetric: bool = False
    margin: float | None = None


CASES = [
    *(Case(bank, strategy) for bank in ("moco", "contaccum") for strategy in ("dense", "local", "disco", "tiled")),
    Case("moco", exchange="ring", symmetric=True),
    Case("contaccum", exchange="ring", symmetric=True, margin=0.1),
    Case("contaccum", block_rows=5, symmetric=True),
    Case("contaccum", symmetric=True, margin=0.1),
    Case("moco", "dense", symmetric=True, margin=0.1),
]


def _batch(step: int, ranks: int) -> WholeBatch:
    whole = random_batch(queries=9, passages=14, ranks=ranks, ignored=2, seed=step)
    ids = random.Random(step).sample(range(IDS), 14)
    renamed = dict(zip(whole.passage_ids, ids, strict=True))
    known = [[renamed.get(i, i % IDS) for i in row] for row in whole.known]
    return replace(whole, passage_ids=ids, known=known)


def _vectors(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    rows = [torch.randn(n, DIMENSION, dtype=torch.float64, generator=draw) for n in (9, 14)]
    return normalize(rows[0], dim=1), normalize(rows[1], dim=1)


def _expected_entries(step: int, ranks: int, bank: str) -> tuple[list[int], list[int], list[int]]:
    """Rows of the queries that the bank keeps, columns of the passages by id, and where the queries' targets stand."""
    whole = _batch(step, ranks)
    columns = sorted(range(14), key=lambda c: whole.passage_ids[c])
    rows = [row for row, positive in enumerate(whole.positives) if positive >= 0] if bank == "contaccum" else []
    rows.sort(key=lambda row: columns.index(whole.positives[row]))
    return rows, columns, [columns.index(whole.positives[row]) for row in rows]


@cache
def _oracle(case: Case, ranks: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss and gradients at queries, passages and log scale, from all rows of batch and bank in one process."""
    last = STEPS - 1
    queries, passages = (x.requires_grad_() for x in _vectors(last))
    log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    together, rows, columns = _batch(last, ranks), [queries], [passages]
    for step in range(last - HELD, last):
        kept, by_id, positives = _expected_entries(step, ranks, case.bank)
        held, (q, p), start = _batch(step, ranks), _vectors(step), len(together.passage_ids)
        rows.append(q[kept])
        columns.append(p[by_id])
        together = replace(
            together,
            passage_ids=together.passage_ids + [held.passage_ids[c] for c in by_id],
            positives=together.positives + [start + positive for positive in positives],
            known=together.known + [held.known[row] for row in kept],
        )
    loss = oracle_loss(
        torch.cat(rows), torch.cat(columns), together, log_scale, symmetric=case.symmetric, margin=case.margin
    )
    loss.backward()
    assert queries.grad is not None and passages.grad is not None and log_scale.grad is not None
    return loss.item(), queries.grad, passages.grad, log_scale.grad


def _steps(tensors: dict[str, Tensor]) -> list[int]:
    return sorted({int(name.split("/")[0]) for name in tensors})


def _measure(world: World, folder: Path) -> list[dict[str, Any]]:
    return [_measure_case(world, case) for case in CASES]


def _measure_case(world: World, case: Case) -> dict[str, Any]:
    config = LossConfig(
        strategy=case.strategy,  # type: ignore[arg-type]
        exchange=case.exchange,  # type: ignore[arg-type]
        bank=case.bank,  # type: ignore[arg-type]
        bank_steps=HELD,
        precision="fp32",
        temperature=float(torch.tensor(-2.0, dtype=torch.float64).exp()),
        learn_temperature=True,
        symmetric=case.symmetric,
        false_negative_margin=case.margin,
    )
    bank = Bank(config, world, world.device)
    for step in range(STEPS):
        batch, rows, columns = rank_batch(_batch(step, world.size), world.rank, 19)
        queries, passages = _vectors(step)
        part = own = Part(queries[rows], passages[columns], batch.targets)
        if case.bank == "moco":
            nothing = torch.empty(0, dtype=torch.int64)
            no_rows = replace(own.targets, positives=nothing, known_ptr=torch.zeros(1, dtype=torch.int64))
            own = Part(queries[:0], own.passages, replace(no_rows, known_ids=nothing, global_queries=0))
        part = bank.join(step, part)
        bank.put(step, own)
    entry = bank.tensors(STEPS)
    kept, by_id, _ = _expected_entries(STEPS - 1, world.size, case.bank)
    objective = ContrastiveObjective(config, unit_norm=True, block_rows=case.block_rows)
    loss, dqueries, dpassages = objective(part.queries, part.passages, part.targets, world)
    assert objective.log_scale.grad is not None
    plain = replace(case, strategy="dense", exchange="gather", block_rows=None)
    expected_loss, *expected = _oracle(plain, world.size)
    found = dqueries[: len(rows)], dpassages[: len(columns)], world.sum(objective.log_scale.grad)
    wanted = expected[0][rows], expected[1][columns], expected[2]
    return {
        "norm": min(float(x.norm()) for x in expected),
        "loss": abs(world.sum(loss).item() / expected_loss - 1),
        "gradients": [float((a - b).norm()) for a, b in zip(found, wanted, strict=True)],
        "entries": [
            _steps(entry) == [STEPS - 2, STEPS - 1],
            _steps(bank.tensors(STEPS - 1)) == [STEPS - 3, STEPS - 2],  # as the last update left it
            torch.equal(entry[f"{STEPS - 1}/passages"], _vectors(STEPS - 1)[1][by_id]),
            sorted(entry[f"{STEPS - 1}/queries"].tolist()) == sorted(_vectors(STEPS - 1)[0][kept].tolist()),
        ],
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_loss_and_gradient_equal_one_process_with_the_bank_behind_the_batch(ranks: int, tmp_path: Path) -> None:
    failures = []
    for rank, results in enumerate(run_on_ranks(_measure, ranks, tmp_path)):
        for case, found in zip(CASES, results, strict=True):
            assert found["norm"] > 1e-3, f"{case}: a gradient of the oracle is zero"
            if max(found["loss"], *found["gradients"]) > BOUND or not all(found["entries"]):
                failures.append(f"W={ranks} rank {rank} {case}: {found}")
    assert not failures, "\n".join(failures)
