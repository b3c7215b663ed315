"""One step, end to end on a tiny model: it trains, reports the batch's own loss and gradient norm, and repeats
bitwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retriever.config import LossConfig, ModelConfig, OptimConfig
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.step import StepReport, train_step
from tests.problems import encode_whole, oracle_loss, random_batch, rank_batch

CPU = World(torch.device("cpu"))
WHOLE = random_batch(queries=8, passages=14)
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Run:
    """A model and what trains it; steps are repeated on one batch, so that a falling loss means learning."""

    def __init__(self, folder: Path, optim_precision: str = "fp32", **loss: Any) -> None:
        model = ModelConfig(str(folder), query_max_tokens=32, passage_max_tokens=32)
        self.encoder = DualEncoder.from_pretrained(model, autocast_dtype=AUTOCAST[optim_precision])
        self.objective = ContrastiveObjective(
            replace(LossConfig(temperature=0.1, precision="fp32"), **loss), unit_norm=True
        )
        config = OptimConfig(lr=3e-3, warmup=0, precision=optim_precision)  # type: ignore[arg-type]
        self.optimizer = Optimizer(config, [self.encoder, self.objective], 40, CPU.device)

    def train(self, steps: range, seed: int = 1) -> list[StepReport]:
        batch, _, _ = rank_batch(WHOLE, 0, 60)
        return [
            train_step(self.encoder, self.objective, replace(batch, step=step), self.optimizer, CPU, seed)
            for step in steps
        ]

    def weights(self) -> list[Tensor]:
        return [*self.encoder.parameters(), *self.objective.parameters()]


@pytest.mark.parametrize("strategy", ["tiled", "dense"])
def test_the_report_is_the_batchs_own_loss_and_gradient_norm(one_layer: Path, strategy: str) -> None:
    """With dropout off, loss and norm are those of the whole batch under autograd; step, rate, temperature, queries
    read as set.
    """
    run = _Run(one_layer, strategy=strategy, learn_temperature=True, symmetric=True)
    run.encoder.eval()
    queries, passages = (
        encode_whole(run.encoder, WHOLE.query_tokens, "query"),
        encode_whole(run.encoder, WHOLE.passage_tokens, "passage"),
    )
    expected = oracle_loss(queries, passages, WHOLE, run.objective.log_scale, symmetric=True)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(expected, run.weights())]).norm()
    (report,) = run.train(range(10, 11))
    assert report.loss == pytest.approx(expected.item(), rel=1e-5) and report.grad_norm == pytest.approx(
        norm.item(), rel=1e-4
    )
    assert (report.step, report.queries) == (10, 8)
    assert report.lr == pytest.approx(3e-3 * 30 / 40) and report.temperature != 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss(one_layer: Path, precision: str) -> None:
    """Every precision learns one batch by heart within 20 steps, on weights that stay float32."""
    run = _Run(one_layer, precision, precision="bf16" if precision == "bf16" else "fp32")
    before = [w.detach().clone() for w in run.encoder.parameters()]
    losses = [report.loss for report in run.train(range(20))]
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0], losses
    assert all(w.dtype == torch.float32 for w in run.encoder.parameters()) and all(
        w.grad is None for w in run.weights()
    )
    assert all(not torch.equal(w, b) for w, b in zip(run.encoder.parameters(), before, strict=True) if w.numel() > 1)


def test_a_learned_temperature_moves_and_a_fixed_one_stays(one_layer: Path) -> None:
    """The temperature that is reported is the one that the step's loss was taken at."""
    for learned in (True, False):
        run = _Run(one_layer, learn_temperature=learned)
        reports = run.train(range(3))
        assert reports[0].temperature == pytest.approx(0.1, rel=1e-12)
        assert (reports[-1].temperature != pytest.approx(0.1, rel=1e-6)) == learned
        assert (run.objective.temperature != reports[-1].temperature) == learned


def test_two_identical_runs_are_equal_to_the_last_bit(one_layer: Path) -> None:
    """Dropout included; what was drawn before the step does not matter, the seed does."""
    first, second, other = _Run(one_layer), _Run(one_layer), _Run(one_layer)
    reports = first.train(range(4))
    torch.rand(17)
    assert second.train(range(4)) == reports
    assert all(torch.equal(a, b) for a, b in zip(first.weights(), second.weights(), strict=True))
    other.train(range(4), seed=2)
    assert not all(torch.equal(a, b) for a, b in zip(first.weights(), other.weights(), strict=True)), "dropout is off"


def test_a_step_without_a_finite_gradient_is_named(one_layer: Path) -> None:
    """A weight gone NaN stops a bf16 run at that step, with the step's number as people count."""
    run = _Run(one_layer, "bf16")
    with torch.no_grad():
        next(run.encoder.parameters())[41:60] = torch.nan
    with pytest.raises(FloatingPointError, match="step 6:"):
        run.train(range(5, 6))
