"""Every strategy computes the one loss that is written out pair by pair in tests/problems.py, whatever the batch looks
like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.strategies import STRATEGIES
from retriever.parallel.world import World
from tests.problems import WholeBatch, oracle_loss, random_batch, rank_batch

CPU = World(torch.device("cpu"))
D = 6
strategy = pytest.mark.parametrize("strategy", sorted(STRATEGIES))


def _objective(**settings: Any) -> ContrastiveObjective:
    return ContrastiveObjective(
        replace(LossConfig(precision="fp32", temperature=0.1), **settings), unit_norm=True
    ).double()


def _vectors(whole: WholeBatch, seed: int, *, unit: bool = True, length: float = 1.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> Tensor:
        vectors = torch.randn(n, D, generator=draw, dtype=torch.float64)
        return length * (torch.nn.functional.normalize(vectors, dim=1) if unit else vectors)

    return drawn(len(whole.positives)), drawn(len(whole.passage_ids))


def _targets(whole: WholeBatch) -> Targets:
    return rank_batch(whole, 0, 10**6)[0].targets


def _oracle(
    q: Tensor, p: Tensor, whole: WholeBatch, temperature: float = 0.1, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, p = q.double().clone().requires_grad_(), p.double().clone().requires_grad_()
    loss = oracle_loss(q, p, whole, torch.tensor(-math.log(temperature), dtype=torch.float64), **settings)
    dq, dp = torch.autograd.grad(loss, (q, p))
    return loss.detach(), dq, dp


def _error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, where `expected` is not zero."""
    assert expected.norm() > 1e-8, "the oracle's value is zero: this comparison proves nothing"
    return float((found.double() - expected).norm() / expected.norm())


def _compare(names: Iterable[str], whole: WholeBatch, q: Tensor, p: Tensor, bound: float, **settings: Any) -> None:
    config = replace(LossConfig(precision="fp32", temperature=0.1), **settings)
    expected = _oracle(q, p, whole, config.temperature, symmetric=config.symmetric, margin=config.false_negative_margin)
    for name in names:
        found = ContrastiveObjective(replace(config, strategy=name), unit_norm=True)(q, p, _targets(whole), CPU)  # type: ignore[arg-type]
        assert [f.dtype for f in found[1:]] == [q.dtype, p.dtype]
        errors = [_error(f, e) for f, e in zip(found, expected, strict=True)]
        assert max(errors) <= bound, f"{name}: {errors}"


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(3, 10),
    passages=st.integers(3, 16),
    ignored=st.integers(0, 2),
    symmetric=st.booleans(),
    margin=st.none() | st.floats(0, 0.5),
    seed=st.integers(0, 10**6),
)
def test_loss_and_gradients_equal_the_oracle(
    queries: int, passages: int, ignored: int, symmetric: bool, margin: float | None, seed: int
) -> None:
    """In float64 to 1e-9 for any batch: shared and several positives, ignored rows, false-negative margin,
    symmetric.
    """
    whole = random_batch(queries=queries, passages=passages, ignored=ignored, seed=seed)
    q, p = _vectors(whole, seed)
    assume(_oracle(q, p, whole, symmetric=symmetric, margin=margin)[0] > 1e-4)  # the oracle itself cancels below
    _compare(STRATEGIES, whole, q, p, 1e-9, symmetric=symmetric, false_negative_margin=margin)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("temperature", "unit", "length", "dtype", "bound"),
    [
        (0.005, True, 1.0, torch.float64, 1e-9),
        (0.005, True, 1.0, torch.float32, 2e-5),
        (1.0, False, 8.0, torch.float64, 1e-9),
        (0.02, False, 8.0, torch.float64, 1e-9),  # logits of thousands
        (0.02, False, 8.0, torch.float32, 5e-3),  # the rounding of such a logit itself
    ],
)
def test_low_temperature_and_unnormalised_rows(
    symmetric: bool, temperature: float, unit: bool, length: float, dtype: torch.dtype, bound: float
) -> None:
    """No exponential overflows and no difference of large numbers decides: logits of thousands keep the bound of their
    dtype.
    """
    whole = random_batch(seed=1)
    q, p = (x.to(dtype) for x in _vectors(whole, 1, unit=unit, length=length))
    _compare(STRATEGIES, whole, q, p, bound, symmetric=symmetric, temperature=temperature)


@strategy
def test_small_losses_keep_their_gradients(strategy: str) -> None:
    """Where every positive wins by far, loss and gradient of size 1e-6 are right to 1e-3 in float32, not lost in
    rounding.
    """
    whole = random_batch(queries=4, passages=4, seed=3)
    whole = replace(whole, positives=[0, 1, 2, 3], known=[[i] for i in whole.passage_ids])
    q = p = torch.eye(4)
    objective = _objective(strategy=strategy, temperature=0.07)
    expected = _oracle(q, p, whole, 0.07)
    found = objective(q, p, _targets(whole), CPU)
    assert 1e-7 < expected[0] < 1e-5
    assert max(_error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-3


def test_duplicate_rows() -> None:
    """Equal vectors under different ids are different passages and queries; each counts."""
    whole = random_batch(seed=4)
    q, p = _vectors(whole, 4)
    q[3], q[5] = q[0], q[0]
    p[7:11] = p[whole.positives[0]]
    _compare(STRATEGIES, whole, q, p, 1e-9, symmetric=True)


@strategy
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_without_negatives_costs_nothing(strategy: str, symmetric: bool) -> None:
    """Where all columns are masked, a row's own loss and gradient are exactly 0; a batch of such rows is all zeros,
    without NaN.
    """
    whole = random_batch(seed=5)
    q, p = _vectors(whole, 5)
    objective = _objective(strategy=strategy, symmetric=symmetric)
    everything = replace(whole, known=[sorted(whole.passage_ids)] * len(whole.known))
    for found in objective(q, p, _targets(everything), CPU):
        assert torch.equal(found, torch.zeros_like(found))
    one = replace(whole, known=[sorted(whole.passage_ids), *whole.known[1:]])
    _compare([strategy], one, q, p, 1e-9, symmetric=symmetric)
    if not symmetric:
        assert torch.equal(objective(q, p, _targets(one), CPU)[1][0], torch.zeros(D, dtype=q.dtype))


@strategy
@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (5, 1)])
def test_one_row_and_one_column(strategy: str, sizes: tuple[int, int]) -> None:
    """The smallest batches: without a negative the loss is 0, with some it is the oracle's."""
    queries, passages = sizes
    whole = WholeBatch([], [], list(range(10, 10 + passages)), [0] * queries, [[10]] * queries, [0] * passages)
    known = torch.arange(queries + 1), torch.full((queries,), 10)
    targets = Targets(torch.zeros(queries, dtype=torch.int64), torch.tensor(whole.passage_ids), *known, queries)
    q, p = _vectors(whole, 6)
    found = _objective(strategy=strategy, symmetric=True)(q, p, targets, CPU)
    if passages == 1:
        assert all(torch.equal(f, torch.zeros_like(f)) for f in found)
    else:
        expected = _oracle(q, p, whole, symmetric=True)
        assert max(_error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-9


@strategy
def test_all_rows_ignored(strategy: str) -> None:
    """A batch in which no query has its positive gives 0 and zeros."""
    whole = random_batch(seed=7)
    q, p = _vectors(whole, 7)
    targets = replace(_targets(whole), positives=torch.full((len(q),), -1))
    for found in _objective(strategy=strategy, symmetric=True)(q, p, targets, CPU):
        assert torch.equal(found, torch.zeros_like(found))


def test_known_pairs_of_other_ranks_are_refused() -> None:
    """Looked up for two ranks, or for another number of passages."""
    whole = random_batch(queries=4, passages=7)
    q, p = _vectors(whole, 0)
    targets = rank_batch(whole, 0, 10**6, looked_up=True)[0].targets
    assert targets.known_pairs is not None
    for counts in ((7, 7), (6,)):
        wrong = replace(targets, known_pairs=targets.known_pairs._replace(counts=counts))
        with pytest.raises(ValueError, match="expected known pairs of 1 ranks, of which rank 0 has 7 passages"):
            _objective(strategy="tiled")(q, p, wrong, CPU)
