"""Measuring before step 1: it sees what takes time, and leaves the run as it was."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retriever.config import Direction, LossConfig, ModelConfig, OptimConfig
from retriever.data.layout import Packed, Padded
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.plan.measure import measure_chunk, measure_loss, measure_update, undisturbed, usable_bytes
from tests.tiny import save_tiny_model

CPU = torch.device("cpu")
FIRST_S, AGAIN_S, FORWARD_S, BACKWARD_S = 0.01, 0.03, 0.12, 0.3


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dx: Tensor) -> Tensor:
        time.sleep(BACKWARD_S)
        return dx


class SlowEncoder(nn.Module):
    """Takes a known time for each way through it, and texts of 7, 7 and 2 tokens out of 50."""

    dimension, device = 4, CPU
    passage_tower = SimpleNamespace(config=SimpleNamespace(vocab_size=50))

    def __init__(self, keeps_products: bool, packed: bool) -> None:
        super().__init__()
        self.keeps_products, self.packed = keeps_products, packed
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, side: str, tokens: Padded | Packed, products: deque[str] | None = None) -> Tensor:
        assert products is None or self.keeps_products
        lengths = tokens.starts.diff() if isinstance(tokens, Packed) else tokens.attention_mask.sum(dim=1)
        assert (
            isinstance(tokens, Packed) == self.packed
            and lengths.tolist() == [7, 7, 2]
            and 25 < int(tokens.input_ids.max()) < 50
        )
        if not torch.is_grad_enabled():
            time.sleep(FIRST_S)
            if products is not None:
                products.append("product")
        else:
            time.sleep(AGAIN_S if products else FORWARD_S)
        return _Slow.apply(self.weight.expand(len(tokens), 4))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    return DualEncoder.from_pretrained(
        ModelConfig(str(save_tiny_model(tmp_path_factory.mktemp("model"))), passage_max_tokens=64)
    )


@pytest.mark.parametrize(("keeps_products", "packed"), [(False, False), (True, True)])
def test_a_chunks_times_are_told_apart(keeps_products: bool, packed: bool) -> None:
    cost = measure_chunk(SlowEncoder(keeps_products, packed), "passage", np.array([7, 7, 2]))  # type: ignore[arg-type]
    assert cost.tokens == (16 if packed else 21)
    assert FIRST_S <= cost.first_s < AGAIN_S < FORWARD_S <= cost.forward_s < BACKWARD_S <= cost.backward_s
    assert AGAIN_S <= cost.again_s < FORWARD_S if keeps_products else cost.again_s == cost.forward_s
    assert not any(cost[5:]) and usable_bytes(CPU) is None  # bytes are not known on a CPU


def test_nothing_shows_of_it_outside(encoder: DualEncoder) -> None:
    """Weights, modes, gradients and random numbers are as they were, though dropout drew and gradients were made."""
    objective = ContrastiveObjective(LossConfig(learn_temperature=True), unit_norm=True)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with undisturbed(CPU, encoder, objective):
        measure_chunk(encoder, "query", np.array([9, 4]))
        measure_loss(objective, 6, 8, 32, CPU)
        measure_update(OptimConfig(), list(encoder.parameters()), CPU)
        inside = torch.rand(4)
        assert (
            encoder.passage_tower.get_input_embeddings().weight.grad is not None
            and objective.log_scale.grad is not None
        )
    assert torch.equal(torch.rand(4), expected) and not torch.equal(inside, expected)
    assert all(p.grad is None for module in (encoder, objective) for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items()) and encoder.training


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(symmetric=True, strategy="dense"),
        LossConfig(kl_weight=1.0, dims=(8, 16)),
        LossConfig(directions=get_args(Direction), hardness="own", hardness_strength=5.0),
    ],
)
def test_every_objective_can_be_measured(loss: LossConfig) -> None:
    small, large = (
        measure_loss(ContrastiveObjective(loss, unit_norm=True), n, 2 * n, 16, CPU).seconds for n in (4, 1024)
    )
    assert 0 < small < large


def test_a_loss_in_host_memory_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = ContrastiveObjective(LossConfig(), block_rows=8, unit_norm=True)
    given = []
    monkeypatch.setattr(objective, "forward", lambda *args: given.append(args))
    measure_loss(objective, 4, 8, 16, torch.device("meta"))
    assert {x.device.type for args in given for x in args[:2]} == {"cpu"}


def test_an_update_of_more_parameters_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from retriever.plan import measure

    few, many = ([nn.Parameter(torch.ones(256, 256)) for _ in range(n)] for n in (1, 64))
    whole = measure_update(OptimConfig(), many, CPU)
    assert 0 < measure_update(OptimConfig(), few, CPU) < whole
    monkeypatch.setattr(measure, "_SCRATCH_PARAMETERS", 32 * 2**16)  # half of them stand for all
    assert measure_update(OptimConfig(name="adafactor", betas=(0.9, 0.999)), many, CPU) > 0
    assert 0.2 * whole < measure_update(OptimConfig(), many, CPU) < 5 * whole
    assert all(p.grad is None and bool((p == 1).all()) for p in many)
