"""The teacher's terms by hand: what a perfect student loses, what a teacher's shift does, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.data.teacher import Groups
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World

CPU = World(torch.device("cpu"))
SIMILARITIES = (0.5, 0.1, 0.7)  # of one query with its target, passage 0, and two negatives


def _loss(scores: list[float] | None, **settings: Any) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients for one query at temperature 1, the contrastive term off."""
    p = torch.tensor([[s, math.sqrt(1 - s * s)] for s in SIMILARITIES], dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    groups = (
        None
        if scores is None
        else Groups(torch.tensor([0, len(scores)]), torch.arange(5, 5 + len(scores)), torch.tensor(scores))
    )
    targets = Targets(torch.tensor([0]), torch.arange(5, 8), torch.tensor([0, 1]), torch.tensor([5]), 1, groups)
    config = replace(LossConfig(precision="fp32", temperature=1.0, contrastive_weight=0.0), **settings)
    loss, dq, dp = ContrastiveObjective(config, unit_norm=True)(q, p, targets, CPU)
    return loss.item(), dq, dp


def test_a_group_without_negatives_teaches_nothing() -> None:
    """The target alone, or an empty group: zero loss and zero gradient, not NaN."""
    for scores in ([1.5], []):
        loss, dq, dp = _loss(scores, kl_weight=1.0, margin_mse_weight=1.0)
        assert loss == 0 and not dq.any() and not dp.any()


def test_extreme_teachers_stay_finite() -> None:
    """Scores hundreds apart leave a one-hot distribution."""
    loss, dq, dp = _loss([900.0, -900.0, 0.0], kl_weight=1.0)
    assert loss == pytest.approx(math.log(sum(math.exp(s - SIMILARITIES[0]) for s in SIMILARITIES)), rel=1e-6)
    assert dq.isfinite().all() and dp.isfinite().all()


def test_bf16_representations_give_the_loss_of_their_rounded_values() -> None:
    """Under precision bf16 the terms are those of vectors rounded to bf16; gradients come in the representations'
    dtype.
    """
    loss, dq, _ = _loss([2.0, 0.0, 1.0], margin_mse_weight=1.0, precision="bf16")
    rounded = [float(torch.tensor(s).bfloat16()) for s in SIMILARITIES]
    assert loss == pytest.approx(
        ((rounded[0] - rounded[1] - 2) ** 2 + (rounded[0] - rounded[2] - 1) ** 2) / 2, rel=1e-6
    )
    assert dq.dtype == torch.float64


def test_missing_groups_and_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="no Targets.groups"):
        _loss(None, kl_weight=1.0)
    with pytest.raises(ValueError, match="passage 8 of a teacher's group"):
        _loss([1.0, 2.0, 3.0, 4.0], kl_weight=1.0)
