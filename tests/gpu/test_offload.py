"""Representations in host memory: as exact as resident ones, in memory that does not grow with the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retriever.config import LossConfig, ModelConfig
from retriever.data.chunks import Chunks
from retriever.data.targets import Targets
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.retention import Retention
from retriever.rng import seed_step
from tests.kernels.oracle import dense_infonce
from tests.problems import random_batch, rank_batch
from tests.tiny import save_tiny_model

FLOOR = {"bf16": 1e-4, "high": 4e-6}  # what rounding alone may differ by, whichever way sums are ordered


@pytest.fixture
def world(device: str) -> World:
    return World(torch.device(device))


def _vectors(device: str, queries: int, passages: int, dimension: int) -> tuple[Tensor, Tensor, Targets]:
    """Unit vectors on the device, each query near its target, and what it is compared with; 7 rows are ignored."""
    draw = torch.Generator(device).manual_seed(0)
    q, p = (torch.randn(n, dimension, generator=draw, device=device) for n in (queries, passages))
    targets = torch.randint(passages, (queries,), generator=draw, device=device)
    q = normalize(q + 0.3 * p[targets], dim=1)
    positives = targets.cpu()
    ptr, known = torch.arange(queries + 1), positives.clone()
    positives[: 7 * 11 : 11] = -1
    return q, normalize(p, dim=1), Targets(positives, torch.arange(passages), ptr, known, queries)


def _results(
    q: Tensor, p: Tensor, targets: Targets, world: World, config: LossConfig, block_rows: int | None
) -> list[Tensor]:
    """Loss, dqueries, dpassages and the temperature's gradient, on the device."""
    objective = ContrastiveObjective(config, block_rows=block_rows, unit_norm=True).to(world.device)
    device = world.device.type
    home = "cpu" if objective.offload else device
    found = objective(q.to(home), p.to(home), targets, world)
    assert [x.device.type for x in found] == [device, home, home] and objective.log_scale.grad is not None
    return [x.to(device) for x in (*found, objective.log_scale.grad)]


@pytest.mark.parametrize(("precision", "symmetric"), [("bf16", False), ("high", True)])
def test_errors_are_those_of_resident_rows(world: World, device: str, precision: str, symmetric: bool) -> None:
    """Against float64 of unrounded values, each gradient's is at most 1.1 times that of the resident loss; blocks
    divide neither side.
    """
    # The last blocks have as many tiles as the others: Triton's pass is compiled for every number of them.
    sizes, block_rows = ((2050, 2750), 700) if device == "cuda" else ((90, 150), 32)
    q, p, targets = _vectors(device, *sizes, 128)
    config = LossConfig(precision=precision, symmetric=symmetric, temperature=0.02, learn_temperature=True)  # type: ignore[arg-type]
    nothing = torch.zeros(len(q), len(p), dtype=torch.bool, device=device)
    weights = torch.full((len(q),), 1 / len(q), device=device)
    loss, dq, dp, dscale = dense_infonce(
        q.double(), p.double(), targets.positives.to(device), 50.0, weights, nothing, symmetric
    )
    truth = [loss.sum() / len(q), dq, dp, 50.0 * dscale]
    resident = _results(q, p, targets, world, config, None)
    offloaded = _results(q, p, targets, world, config, block_rows)
    for number, (found, alone, expected) in enumerate(zip(offloaded, resident, truth, strict=True)):
        assert expected.norm() > 1e-4
        error, of_resident = ((x.double() - expected).norm() / expected.norm() for x in (found, alone))
        floor = FLOOR[precision] * (10 if number in (0, 3) else 1)  # one number may be right by luck
        assert error <= max(1.1 * of_resident, floor), f"result {number}: {error:.2g}, resident {of_resident:.2g}"


def test_two_parts_of_a_loss_add_up(world: World, device: str) -> None:
    """Hardness makes a part of each direction; the host adds up their gradients."""
    sizes, block_rows = ((2050, 2750), 700) if device == "cuda" else ((90, 150), 32)
    q, p, targets = _vectors(device, *sizes, 128)
    config = LossConfig(
        precision="high",
        symmetric=True,
        temperature=0.02,
        learn_temperature=True,
        hardness="all",
        hardness_strength=5.0,
    )
    resident, offloaded = (_results(q, p, targets, world, config, rows) for rows in (None, block_rows))
    for found, expected in zip(offloaded, resident, strict=True):
        assert expected.norm() > 1e-4 and (found - expected).norm() < 1e-3 * expected.norm()


def test_the_encoders_gradient_is_that_of_resident_rows(world: World, device: str, tmp_path: Path) -> None:
    """With dropout on, chunk by chunk to the host and back; twice, so that page-locked memory is used again."""
    encoder = DualEncoder.from_pretrained(
        ModelConfig(str(save_tiny_model(tmp_path)), query_max_tokens=32, passage_max_tokens=32)
    )
    encoder.to(world.device).train()
    queries, passages, rows = (300, 700, 128) if device == "cuda" else (30, 70, 16)
    batch, _, _ = rank_batch(random_batch(queries=queries, passages=passages), 0, 2 * passages)
    batch = replace(batch, chunks=Chunks(batch.chunks._builders, world.device))
    gradients = []
    for block_rows in (None, rows, rows):
        objective = ContrastiveObjective(
            LossConfig(precision="fp32", temperature=0.1), block_rows=block_rows, unit_norm=True
        ).to(world.device)
        encoder.zero_grad()
        seed_step(0, 0, 0)
        representations, first = encode_without_graph(
            encoder, batch, Retention(graphs=3 * passages), offload=objective.offload
        )
        assert (
            first.kept
            and first.states
            and representations.query.is_pinned() == (objective.offload and device == "cuda")
        )
        _, found = representation_gradients(objective, representations, batch, world)
        backward_through_encoder(encoder, batch, found, first)
        gradients.append(torch.cat([x.grad.flatten() for x in encoder.parameters() if x.grad is not None]))
    assert gradients[0].norm() > 1e-3
    for offloaded in gradients[1:]:
        assert (offloaded - gradients[0]).norm() < 1e-4 * gradients[0].norm()


@pytest.mark.parametrize("device", ["cuda"])
def test_memory_does_not_grow_with_the_batch(world: World, device: str) -> None:
    """65,536 pairs of 768 numbers: a fraction of what resident rows take, and no more than half as many pairs take."""
    config = LossConfig(temperature=0.02, workspace_mib=64, learn_temperature=True)
    peaks: dict[int | str, float] = {}
    for pairs in (32_768, 65_536):
        q, p, targets = _vectors(device, pairs, pairs, 768)
        on_host = q.cpu(), p.cpu()
        peaks["resident"], resident = _peak(q, p, targets, world, config, None)
        expected = [x.cpu() for x in resident]
        del q, p, resident
        peaks[pairs], found = _peak(*on_host, targets, world, config, 8192)
        for f, e in zip(found, expected, strict=True):
            assert (
                f.cpu() - e
            ).norm() < 5e-3 * e.norm()  # on the host: a copy on the device would count into the next peak
    assert peaks[65_536] < 1.05 * peaks[32_768] and peaks[65_536] < 0.35 * peaks["resident"], peaks


def _peak(
    q: Tensor, p: Tensor, targets: Targets, world: World, config: LossConfig, block_rows: int | None
) -> tuple[float, tuple[Tensor, ...]]:
    """Bytes on the GPU at the peak, the rows' own included, and the results."""
    objective = ContrastiveObjective(config, block_rows=block_rows, unit_norm=True).to(world.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = objective(q, p, targets, world)
    return torch.cuda.max_memory_allocated(), found
