"""Representations in host memory, on a GPU: as exact as resident ones, in memory that does not grow with the batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retriever.config import LossConfig, ModelConfig
from retriever.data.batch import Targets
from retriever.data.chunks import Chunks
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS
from retriever.parallel.world import World
from retriever.rng import seed_step
from tests.kernels.oracle import dense_infonce
from tests.problems import random_batch, rank_batch
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.gpu
FLOOR = {"bf16": 1e-4, "high": 4e-6}  # what rounding alone may differ by, whichever way sums are ordered


@pytest.fixture(scope="module")
def gpu() -> World:
    return World(torch.device("cuda"))


def _vectors(queries: int, passages: int, dimension: int) -> tuple[Tensor, Tensor, Targets]:
    """Unit vectors on the GPU, each query near its target, and what it is compared with; 7 rows are ignored."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, p = (torch.randn(n, dimension, generator=draw, device="cuda") for n in (queries, passages))
    targets = torch.randint(passages, (queries,), generator=draw, device="cuda")
    q = normalize(q + 0.3 * p[targets], dim=1)
    positives = targets.cpu()
    ptr, known = torch.arange(queries + 1), positives.clone()
    positives[: 7 * 11 : 11] = -1
    return q, normalize(p, dim=1), Targets(positives, torch.arange(passages), ptr, known, queries)


def _results(q: Tensor, p: Tensor, targets: Targets, world: World, config: LossConfig, block_rows: int | None) -> list[Tensor]:
    """Loss, dqueries, dpassages and the temperature's gradient, on the GPU."""
    objective = ContrastiveObjective(config, block_rows=block_rows, unit=True).to(world.device)
    home = "cpu" if objective.offload else "cuda"
    found = objective(q.to(home), p.to(home), targets, world)
    assert [x.device.type for x in found] == ["cuda", home, home] and objective.log_scale.grad is not None
    return [x.to("cuda") for x in (*found, objective.log_scale.grad)]


@pytest.mark.parametrize(("precision", "symmetric"), [*itertools.product(("bf16", "high"), (False, True))])
def test_errors_are_those_of_resident_rows(gpu: World, precision: str, symmetric: bool) -> None:
    """Against float64 of unrounded values, each gradient's is at most 1.1 times that of the resident loss; blocks divide neither side."""
    q, p, targets = _vectors(3000, 4500, 128)
    config = LossConfig(precision=precision, symmetric=symmetric, temperature=0.02, learn_temperature=True)  # type: ignore[arg-type]
    nothing = torch.zeros(len(q), len(p), dtype=torch.bool, device="cuda")
    weights = torch.full((len(q),), 1 / len(q), device="cuda")
    loss, dq, dp, dscale = dense_infonce(q.double(), p.double(), targets.positives.cuda(), 50.0, weights, nothing, symmetric)
    truth = [loss.sum() / len(q), dq, dp, 50.0 * dscale]
    resident = _results(q, p, targets, gpu, config, None)
    for rows in (1024, 700, 10_000):
        for number, (found, alone, expected) in enumerate(zip(_results(q, p, targets, gpu, config, rows), resident, truth, strict=True)):
            assert expected.norm() > 1e-4
            error, of_resident = ((x.double() - expected).norm() / expected.norm() for x in (found, alone))
            floor = FLOOR[precision] * (10 if number in (0, 3) else 1)  # one number may be right by luck
            assert error <= max(1.1 * of_resident, floor), f"{rows} rows, result {number}: {error:.2g}, resident {of_resident:.2g}"


def test_the_encoders_gradient_is_that_of_resident_rows(gpu: World, tmp_path: Path) -> None:
    """With dropout on, chunk by chunk to the host and back; twice, so that page-locked memory is used again."""
    encoder = DualEncoder.from_pretrained(ModelConfig(str(save_tiny_model(tmp_path)), query_max_tokens=32, passage_max_tokens=32))
    encoder.to(gpu.device).train()
    batch, _, _ = rank_batch(random_batch(queries=300, passages=700), 0, 640)
    batch = replace(batch, chunks=Chunks(batch.chunks._builders, gpu.device))
    gradients = []
    for block_rows in (None, 128, 128):
        objective = ContrastiveObjective(LossConfig(precision="fp32", temperature=0.1), block_rows=block_rows, unit=True).to(gpu.device)
        encoder.zero_grad()
        seed_step(0, 0, 0)
        representations, first = encode_without_graph(encoder, batch, 2000, offload=objective.offload)
        assert representations.query.is_pinned() == objective.offload
        _, found = representation_gradients(objective, representations, batch, gpu)
        backward_through_encoder(encoder, batch, found, first)
        gradients.append(torch.cat([x.grad.flatten() for x in encoder.parameters() if x.grad is not None]))
    assert gradients[0].norm() > 1e-3
    for offloaded in gradients[1:]:
        assert (offloaded - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_memory_does_not_grow_with_the_batch(gpu: World) -> None:
    """262,144 pairs of 768 numbers: a fraction of what resident rows take, and no more than half as many pairs take."""
    config, peaks = LossConfig(temperature=0.02, workspace_mib=256, learn_temperature=True), {}
    for pairs in (131_072, 262_144):
        q, p, targets = _vectors(pairs, pairs, 768)
        on_host = q.cpu(), p.cpu()
        peaks["resident"], resident = _peak(q, p, targets, gpu, config, None)
        expected = [x.cpu() for x in resident]
        del q, p, resident
        peaks[pairs], found = _peak(*on_host, targets, gpu, config, BLOCK_ROWS)
        for f, e in zip(found, expected, strict=True):
            assert (f.cpu() - e).norm() < 5e-3 * e.norm()
    assert peaks[262_144] < 1.05 * peaks[131_072] and peaks[262_144] < 0.35 * peaks["resident"], peaks


def _peak(
    q: Tensor, p: Tensor, targets: Targets, world: World, config: LossConfig, block_rows: int | None
) -> tuple[float, tuple[Tensor, ...]]:
    """Bytes on the GPU at the peak, the rows' own included, and the results."""
    objective = ContrastiveObjective(config, block_rows=block_rows, unit=True).to(world.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = objective(q, p, targets, world)
    return torch.cuda.max_memory_allocated(), found
