"""Schedules by hand, decay where it belongs, clipping and the fp16 scaler, and a state that goes on bitwise."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from retriever.config import ConfigError, OptimConfig
from retriever.optim import Optimizer, freeze, learning_rate, load_state_tensors, state_tensors
from tests.kernels.oracle import gradient


class _Model(nn.Module):
    """A matrix, a bias, a norm, a scalar, a frozen weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def _optimizer(model: nn.Module, device: str = "cpu", total: int = 20, **settings: Any) -> Optimizer:
    config = replace(OptimConfig(precision="fp32", lr=0.01), **settings)
    return Optimizer(config, [model], total, torch.device(device))


def _set_gradients(optimizer: Optimizer, seed: int, size: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters:
        p.grad = size * torch.randn(p.shape, generator=draw)


def _rates(total: int, **settings: Any) -> list[float]:
    return [learning_rate(OptimConfig(lr=1.0, **settings), step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"schedule": "linear", "warmup": 0.0}, 4, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 0.4}, 5, [0.5, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 2}, 5, [0.5, 1, 0.75, 0.5, 0.25]),  # from 1 on a number of steps
        ({"schedule": "linear", "warmup": 1}, 4, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine", "warmup": 0.0}, 4, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (
            {"schedule": "cosine", "warmup": 3},
            6,
            [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
        ({"schedule": "linear", "warmup": 8}, 4, [0.125, 0.25, 0.375, 0.5]),  # a run that ends while it warms up
        ({"schedule": "cosine", "warmup": 0.1}, 1, [1]),
        ({"schedule": "constant", "warmup": 2}, 4, [0.5, 1, 1, 1]),
        ({"schedule": "wsd", "warmup": 2, "decay": 2}, 6, [0.5, 1, 1, 1, 1, 0.5]),
        ({"schedule": "wsd", "warmup": 0, "decay": 0.6}, 5, [1, 1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "wsd", "warmup": 3, "decay": 5}, 6, [1 / 3, 2 / 3, 0.8, 0.6, 0.4, 0.2]),  # they meet
        ({"schedule": "wsd", "decay": 0, "warmup": 0}, 2, [1, 1]),
    ],
)
def test_schedules_by_hand(settings: dict[str, Any], total: int, expected: list[float]) -> None:
    """Linear warm-up that reaches lr, then a line or half a cosine down to 0, which the step after the last would
    have.
    """
    assert _rates(total, **settings) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_every_step_trains(schedule: str) -> None:
    """No step of a run has rate 0 or above lr; the peak is lr; the rate rises in warm-up and falls after it."""
    for total in (1, 2, 3, 17, 1000):
        for warmup in (0.0, 0.1, 0.33, 1, 5):
            rates = _rates(total, schedule=schedule, warmup=warmup)
            assert min(rates) > 0 and max(rates) <= 1
            peak = rates.index(max(rates))
            assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
            if warmup < total:
                assert max(rates) == pytest.approx(1, abs=1 / (warmup * total if 0 < warmup < 1 else 1000))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactor_momentum"])
def test_only_matrices_decay(name: str) -> None:
    """With zero gradients decay alone moves weights: matrices shrink; biases, norms, the log-scale and frozen weights
    stay.
    """
    model = _Model()
    optimizer = _optimizer(model, name=name, weight_decay=0.5, warmup=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in optimizer.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.set_learning_rate(0)
    optimizer.clip_and_step(0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"linear.weight"}
    assert model.linear.weight.norm() < before["linear.weight"].norm()


def test_settings_reach_torchs_adamw() -> None:
    """A few steps equal torch's own AdamW with the same betas, decay, clipping and the schedule's rates."""
    ours, theirs = _Model(), _Model()
    optimizer = _optimizer(ours, total=4, betas=(0.8, 0.95), weight_decay=0.1, max_grad_norm=0.7, warmup=0)
    decayed = [p for p in theirs.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in theirs.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))
    for step, size in enumerate((1.0, 0.01, 3.0)):
        _set_gradients(optimizer, step, size)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (4 - step) / 4
        assert optimizer.set_learning_rate(step) == pytest.approx(0.01 * (4 - step) / 4)
        reference.step()
        assert optimizer.clip_and_step(step) == pytest.approx(norm.item())
        assert all(p.grad is None for p in optimizer.parameters), "gradients are cleared"
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_fp16_skips_a_non_finite_step_and_lowers_the_scale() -> None:
    """An overflow leaves the weights as they were and halves the scale; the next finite step is unscaled and made."""
    model = _Model()
    optimizer = _optimizer(model, precision="fp16", warmup=0)
    optimizer.set_learning_rate(0)
    before, scale = [p.detach().clone() for p in model.parameters()], optimizer.gradient_scale
    assert scale > 1
    _set_gradients(optimizer, 0)
    gradient(model.linear.weight)[0, 0] = torch.inf
    assert not math.isfinite(optimizer.clip_and_step(0))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.gradient_scale == scale / 2 and model.linear.weight.grad is None
    _set_gradients(optimizer, 1)
    expected = torch.stack([p.grad.norm() for p in optimizer.parameters if p.grad is not None]).norm().item()
    for p in optimizer.parameters:
        gradient(p).mul_(scale / 2)
    assert optimizer.clip_and_step(1) == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(model.linear.weight, before[0])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactor_momentum"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # what is done on a GPU works on the host, too
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_gradient_stops_the_run_and_names_the_step(
    precision: str, bad: float, device: str, name: str
) -> None:
    """Without a scaler it is an error that names step and parameter; neither weights nor the optimizer's state have
    changed.
    """
    model = _Model()
    optimizer = _optimizer(model, device, precision=precision, name=name, warmup=0)
    assert optimizer.gradient_scale == 1.0
    optimizer.set_learning_rate(0)
    _set_gradients(optimizer, 1)
    optimizer.clip_and_step(0)
    kept = [*model.parameters(), *state_tensors(optimizer).values()]
    before = [t.detach().clone() for t in kept]
    _set_gradients(optimizer, 0)
    gradient(model.norm.bias)[1] = bad
    with pytest.raises(FloatingPointError, match=r"step 8: .*norm.bias"):
        optimizer.clip_and_step(7)
    assert all(torch.equal(t, b) for t, b in zip(kept, before, strict=True))


def test_an_update_is_the_same_whoever_would_have_left_it_out() -> None:
    """To the last bit, steps whose gradients the device checks by itself are those of torch's fused AdamW."""
    ours, theirs = _Model(), _Model()
    optimizer, plain = _optimizer(ours, "cuda", warmup=0), _optimizer(theirs, "cuda", warmup=0)
    plain._skips = False
    for step in range(4):
        for one in (optimizer, plain):
            one.set_learning_rate(step)
            _set_gradients(one, step, 10.0**step)
        assert optimizer.clip_and_step(step) == plain.clip_and_step(step)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.linear.weight, _Model().linear.weight)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torch.optim.NAdam", {"betas": [0.7, 0.9], "decoupled_weight_decay": True}),
        ("torch.optim.SGD", {"momentum": 0.9}),
        ("torch.optim.SGD", None),
        ("tests.test_optim.Counting", None),
        ("tests.test_optim.Shared", None),
    ],
)
def test_an_optimizer_by_import_path_goes_on_bitwise(name: str, arguments: dict[str, Any] | None) -> None:
    """It updates as its class does by itself, and goes on from its saved state to the same bits."""
    whole, begun, resumed, direct = (_Model() for _ in range(4))
    made = [
        _optimizer(m, name=name, arguments=arguments, schedule="constant", warmup=0) for m in (whole, begun, resumed)
    ]
    module, _, kind = name.rpartition(".")
    decays = [{"params": [p], "weight_decay": 0.01 if p.ndim >= 2 else 0.0} for p in direct.parameters()]
    reference = getattr(import_module(module), kind)(decays, lr=0.01, **(arguments or {}))
    for step in range(4):
        if step == 2:
            resumed.load_state_dict(begun.state_dict())
            load_state_tensors(made[2], {key: value.clone() for key, value in state_tensors(made[1]).items()})
        _set_gradients(made[0], step, 0.01)
        for p, q in zip(direct.parameters(), whole.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        reference.step()
        made[0].clip_and_step(step)
        _set_gradients(made[1 if step < 2 else 2], step, 0.01)
        made[1 if step < 2 else 2].clip_and_step(step)
    for p, q, r in zip(whole.parameters(), resumed.parameters(), direct.parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r)
    assert not torch.equal(whole.linear.weight, _Model().linear.weight)


class Counting(torch.optim.Optimizer):
    """Its state has a plain number, which decides the size of an update."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad * group["lr"] / state["count"])


class Shared(torch.optim.Optimizer):
    """Its groups keep numbers and a tensor that decide the size of an update, as those of Prodigy do."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        fresh = {"lr": lr, "weight_decay": weight_decay, "count": 0, "size": 1.0, "norms": torch.ones(2)}
        super().__init__(params, fresh)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            group["size"] *= 0.7
            group["norms"] = group["norms"] / 3
            last_bits = group["size"] * 2**30 % 1  # float32 has none of them
            rate = group["lr"] * last_bits / group["norms"][0].item() / [1, 2, 3, 4][group["count"] - 1]
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad * rate)


def test_state_of_groups_that_cannot_be_saved_is_refused() -> None:
    optimizer = _optimizer(_Model(), name="torch.optim.SGD")
    optimizer.torch.param_groups[0]["history"] = [1.0]
    with pytest.raises(ConfigError, match="optim.name: .*torch.optim.SGD changes 'history' of its groups to a list"):
        state_tensors(optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "torch.optim.Adamm"}, "optim.name: expected the import path .*'torch.optim.Adamm'"),
        ({"name": "nowhere.Adam"}, "optim.name: .*nowhere"),
        ({"name": "torch.optim.Adam", "arguments": {"momentum": 1}}, "optim.arguments: torch.optim.Adam .*momentum"),
        ({"name": "torch.nn.ParameterList"}, "optim"),
        ({"name": "torch.optim.Rprop"}, "optim.weight_decay: expected 0 with torch.optim.Rprop"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _optimizer(_Model(), **settings)


def test_averages_follow_their_definition_and_are_exchanged_for_a_while() -> None:
    """mean ← decay · mean + (1 − decay) · weights after each update, from the first one on; saved with the state."""
    model = _Model()
    optimizer = _optimizer(model, ema=0.75, warmup=0)
    expected = None
    for step in range(3):
        _set_gradients(optimizer, step)
        optimizer.set_learning_rate(step)
        optimizer.clip_and_step(step)
        weight = model.linear.weight.detach().clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
    assert expected is not None and not torch.allclose(expected, weight)
    with optimizer.averaged():
        torch.testing.assert_close(model.linear.weight, expected)
    assert torch.equal(model.linear.weight, weight)
    again = _optimizer(_Model(), ema=0.75)
    load_state_tensors(again, {key: value.clone() for key, value in state_tensors(optimizer).items()})
    assert torch.equal(again.averages["linear.weight"], optimizer.averages["linear.weight"])


def test_frozen_parts_of_a_tower_are_not_trained() -> None:
    """A module with all that is inside it, or one parameter; a name of nothing, and freezing everything, is refused."""
    towers = nn.ModuleDict({"query": _Model(), "passage": _Model()})
    freeze(towers, ["linear", "norm.bias"])
    trained = {name for name, p in towers.named_parameters() if p.requires_grad}
    assert trained == {f"{tower}.{name}" for tower in towers for name in ("norm.weight", "log_scale")}
    with pytest.raises(ConfigError, match="optim.freeze: 'lin' is no module .*linear, norm"):
        freeze(towers, ["lin"])
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        freeze(towers, ["linear", "norm", "log_scale"])


def test_state_of_an_unknown_parameter_is_refused() -> None:
    """A checkpoint of another model is an error that names the parameter."""
    optimizer = _optimizer(_Model())
    with pytest.raises(ValueError, match="linear.bia"):
        load_state_tensors(optimizer, {"linear.bia/exp_avg": torch.zeros(5)})


def test_a_shared_parameter_is_trained_once() -> None:
    """Tied towers hold a parameter once; the objective's log-scale counts only where it is learned."""
    shared = nn.Linear(2, 2)
    tied = nn.ModuleDict({"query": shared, "passage": shared})
    assert len(Optimizer(OptimConfig(precision="fp32"), [tied, _Model()], 5, torch.device("cpu")).parameters) == 2 + 5
