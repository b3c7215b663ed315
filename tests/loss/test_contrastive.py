"""The objective around the strategies: temperature, margin, masks, precision tiers, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.data.text_vectors import TeacherVectors
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.strategies import STRATEGIES
from retriever.parallel.world import World
from tests.kernels.oracle import gradient
from tests.problems import WholeBatch, oracle_loss, random_batch, rank_batch

CPU = World(torch.device("cpu"))
strategy = pytest.mark.parametrize("strategy", sorted(STRATEGIES))


def _problem(
    seed: int = 0, dtype: torch.dtype = torch.float64, dimension: int = 6
) -> tuple[WholeBatch, Tensor, Tensor, Targets]:
    whole = random_batch(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    q, p = (
        torch.randn(n, dimension, generator=draw, dtype=torch.float64)
        for n in (len(whole.positives), len(whole.passage_ids))
    )
    q, p = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (q, p))
    return whole, q, p, rank_batch(whole, 0, 10**6)[0].targets


def _objective(block_rows: int | None = None, **settings: Any) -> ContrastiveObjective:
    config = replace(LossConfig(precision="fp32", temperature=0.1), **settings)
    return ContrastiveObjective(config, unit_norm=True, block_rows=block_rows)


def _one_query(similarities: list[float]) -> tuple[Tensor, Tensor, Targets]:
    """One query whose similarity with passage j is similarities[j]; passage 0 is its positive."""
    p = torch.stack([torch.tensor([s, math.sqrt(1 - s * s)], dtype=torch.float64) for s in similarities])
    known = torch.tensor([0, 1]), torch.tensor([5])
    targets = Targets(torch.tensor([0]), torch.arange(5, 5 + len(similarities)), *known, global_queries=1)
    return torch.tensor([[1.0, 0.0]], dtype=torch.float64), p, targets


@strategy
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_a_margin_is_in_similarity_units_before_temperature(strategy: str, temperature: float) -> None:
    """Positive at 0.5, margin 0.1: the column at 0.65 is taken for a false negative and dropped, 0.55 stays, at any
    temperature.
    """
    q, p, targets = _one_query([0.5, 0.55, 0.65])
    losses = {}
    for margin, negatives in ((None, [0.55, 0.65]), (0.1, [0.55]), (0.0, []), (0.2, [0.55, 0.65])):
        loss, dq, dp = _objective(strategy=strategy, temperature=temperature, false_negative_margin=margin)(
            q, p, targets, CPU
        )
        losses[margin] = math.log1p(sum(math.exp((s - 0.5) / temperature) for s in negatives))
        assert loss.item() == pytest.approx(losses[margin], rel=1e-6, abs=1e-12)
        assert (dp[2].norm() > 0) == (0.65 in negatives) and (dq.norm() > 0) == bool(negatives)
    assert losses[None] > losses[0.1] > losses[0.0] == 0


@strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [3, 64, 384])
def test_a_copy_of_the_target_is_a_negative_wherever_it_stands(
    strategy: str, dtype: torch.dtype, dimension: int
) -> None:
    """At margin 0 the rounding of a similarity must not decide: with every passage twice and the halves as blocks, all
    or none would.
    """
    draw = torch.Generator().manual_seed(0)
    q, p = (
        torch.nn.functional.normalize(torch.randn(n, dimension, generator=draw, dtype=dtype), dim=1) for n in (64, 32)
    )
    p = torch.cat([p, p])
    known = torch.arange(65), torch.arange(64)
    targets = Targets(torch.arange(64), torch.arange(64), *known, global_queries=64)
    similarities = (q.double() @ p.double().T)[:, :32]
    own = similarities.gather(1, torch.arange(64)[:, None] % 32)
    below = similarities.masked_fill(similarities > own, -torch.inf).masked_fill(similarities == own, -torch.inf)
    negatives = torch.cat([own, below, below], dim=1)  # the copy among them
    expected = torch.logaddexp(own[:, 0] / 0.1, (negatives / 0.1).logsumexp(dim=1)) - own[:, 0] / 0.1
    for rows in (None, 5):
        if rows is None or strategy == "tiled":
            objective = _objective(rows, strategy=strategy, false_negative_margin=0.0)
            assert objective(q, p, targets, CPU)[0].item() == pytest.approx(expected.mean().item(), rel=1e-6)


@strategy
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_a_learned_temperature_is_autograds(strategy: str, symmetric: bool) -> None:
    """d loss / d log(1/temperature), added to what already stands there; none where the temperature is fixed."""
    whole, q, p, targets = _problem(1)
    objective = _objective(
        strategy=strategy, symmetric=symmetric, learn_temperature=True, false_negative_margin=0.3
    ).double()
    log_scale = objective.log_scale.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle_loss(q, p, whole, log_scale, symmetric=symmetric, margin=0.3), log_scale)
    assert abs(expected) > 1e-3
    for times in (1, 2):
        objective(q, p, targets, CPU)
        assert objective.log_scale.grad is not None
        assert objective.log_scale.grad.item() == pytest.approx(times * expected.item(), rel=1e-9)
    fixed = _objective(strategy=strategy)
    fixed(q, p, targets, CPU)
    assert fixed.log_scale.grad is None


@strategy
def test_the_gradient_scale_multiplies_gradients_and_not_the_loss(strategy: str) -> None:
    """By a power of two, so exactly: dqueries, dpassages and the temperature's gradient, while the loss reads as
    ever.
    """
    _, q, p, targets = _problem(2, torch.float32)
    plain, scaled = (_objective(strategy=strategy, learn_temperature=True) for _ in range(2))
    loss, dq, dp = plain(q, p, targets, CPU)
    scaled_loss, scaled_dq, scaled_dp = scaled(q, p, targets, CPU, 2.0**16)
    assert torch.equal(scaled_loss, loss) and dq.norm() > 1e-3
    for found, expected in ((scaled_dq, dq), (scaled_dp, dp), (gradient(scaled.log_scale), gradient(plain.log_scale))):
        torch.testing.assert_close(found, expected * 2.0**16, rtol=1e-5, atol=1e-3)


@strategy
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_bf16_tier_is_the_loss_of_the_rounded_vectors(strategy: str, symmetric: bool) -> None:
    """Loss and gradients are those of bf16-rounded vectors, positives included, and so stay close to full
    precision's.
    """
    _, q, p, targets = _problem(3, torch.float32, dimension=64)
    settings: dict[str, Any] = {"strategy": strategy, "symmetric": symmetric, "temperature": 0.05}
    found = _objective(precision="bf16", **settings)(q, p, targets, CPU)
    of_rounded = _objective(**settings)(*(x.bfloat16().float() for x in (q, p)), targets, CPU)
    full = _objective(**settings)(q, p, targets, CPU)
    for f, r, e in zip(found, of_rounded, full, strict=True):
        assert f.dtype == torch.float32 and e.norm() > 1e-3
        torch.testing.assert_close(f, r, rtol=1e-4, atol=1e-6)
        assert 0 < (f - e).norm() / e.norm() < 2e-2


@strategy
def test_a_loss_is_never_negative_in_bf16(strategy: str) -> None:
    """Positive and negative logits come from the same rounded numbers: where they are equal, the loss is log 2, not a
    rounding's sign.
    """
    q, p, targets = _one_query([0.73, 0.73])
    q, p = q.float(), p.float()
    loss, dq, _ = _objective(strategy=strategy, precision="bf16", temperature=0.005)(q, p, targets, CPU)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5) and dq.abs().max() < 1e-3
    far = _one_query([0.999, -0.999])
    assert (
        0
        <= _objective(strategy=strategy, precision="bf16", temperature=0.005)(
            far[0].float(), far[1].float(), far[2], CPU
        )[0]
        < 1e-6
    )


@strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_callers_tensors_are_left_alone(strategy: str, dtype: torch.dtype) -> None:
    """Vectors keep their values and their requires_grad; targets keep theirs; a second call gives the same bits."""
    _, q, p, targets = _problem(4, dtype)
    before = [t.clone() for t in (q, p, targets.positives, targets.passage_ids, targets.known_ids)]
    objective = _objective(strategy=strategy, symmetric=True, false_negative_margin=0.1)
    first, second = objective(q, p, targets, CPU), objective(q, p, targets, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    after = (q, p, targets.positives, targets.passage_ids, targets.known_ids)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not q.requires_grad and not p.requires_grad
    assert not any(t.requires_grad for t in first)


def test_rows_that_are_not_contrasted_leave_the_distance_of_embeddings() -> None:
    """With `loss.contrastive_weight` 0 nothing else is left of a batch of rows that have their own negatives."""
    _, q, p, targets = _problem()
    objective = _objective(contrastive_weight=0.0, embedding_weight=1.0)
    teacher = TeacherVectors(q.flip(0), p.flip(0))
    found = objective(q, p, replace(targets, teacher=teacher, contrasts=False), CPU)
    expected = objective(q, p, replace(targets, teacher=teacher), CPU)
    assert found[0] > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("log_scale", [800.0, -800.0, float("nan")])
def test_a_learned_temperature_out_of_bounds_names_the_step(log_scale: float) -> None:
    """1/temperature is 0, or infinite, where the learning rate is far too high."""
    objective = ContrastiveObjective(LossConfig(temperature=0.05, learn_temperature=True), unit_norm=True)
    assert objective.temperature_at(6) == objective.temperature
    with torch.no_grad():
        objective.log_scale.fill_(log_scale)
    with pytest.raises(
        FloatingPointError, match=r"step 7: the learned temperature has left all bounds .*; lower optim\.lr"
    ):
        objective.temperature_at(6)
