"""An encoder in shards, over NCCL or gloo: it trains, saves and goes on as a whole one, in mixed precision too, in its
share of memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retriever.config import LossConfig, ModelConfig
from retriever.data.chunks import Chunks
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.sharded import PlacedEncoder, whole_tensors
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.distributed.sharded_runs import compare
from tests.problems import cached_gradients, random_batch, rank_batch
from tests.tiny import save_tiny_model

WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
NARROW: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Found = tuple[dict[str, Any], dict[str, Any]]  # of runs in float64, and in mixed precision


def _allocated_mib(world: World) -> float:
    return torch.cuda.memory_allocated(world.device) / 2**20 if world.device.type == "cuda" else 0.0


def _gradients(
    world: World, folder: Path, dtype: torch.dtype | None, *, sharded: bool
) -> tuple[dict[str, Tensor], float]:
    """Gradients of packed texts, and MiB that the placed encoder takes."""
    config = ModelConfig(str(folder / "model"), query_max_tokens=32, passage_max_tokens=32)
    encoder = DualEncoder.from_pretrained(config, autocast_dtype=dtype)
    world = World(world.device, world.rank, world.size, sharded=sharded)
    before = _allocated_mib(world)
    PlacedEncoder(encoder, world)
    taken = _allocated_mib(world) - before
    encoder.pack()
    queries, passages = (200, 500) if world.device.type == "cuda" else (20, 50)
    cut = partial(
        rank_batch,
        random_batch(queries=queries, passages=passages, ranks=world.size),
        tokens_per_chunk=512,
        packed=True,
    )
    most = max(len(cut(rank)[0].chunks) for rank in range(world.size)) if sharded else 0
    batch, _, _ = cut(world.rank, chunks_a_side=most)
    batch = replace(
        batch, chunks=Chunks([partial(chunk.to, world.device) for chunk in batch.chunks], torch.device("cpu"))
    )
    objective = ContrastiveObjective(LossConfig(precision="fp32", temperature=0.1), unit_norm=True).to(world.device)
    cached_gradients(encoder, objective, batch, world)
    return whole_tensors(
        {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, world.device
    ), taken


def _measure(world: World, folder: Path) -> dict[str, Any]:
    truth, whole_mib = _gradients(world, folder, None, sharded=False)
    norm = torch.stack([g.norm() for g in truth.values()]).norm()

    def error(found: dict[str, Tensor]) -> float:
        assert found.keys() == truth.keys()
        return float(torch.stack([(found[name] - g).norm() for name, g in truth.items()]).norm() / norm)

    fp32, mib = _gradients(world, folder, None, sharded=True)
    bf16, bf16_whole = (_gradients(world, folder, torch.bfloat16, sharded=sharded)[0] for sharded in (True, False))
    return {
        "norm": float(norm),
        "fp32": error(fp32),
        "bf16": error(bf16),
        "bf16 whole": error(bf16_whole),
        "mib": mib,
        "whole mib": whole_mib,
    }


def _both(world: World, folder: Path) -> Found:
    return compare(world, folder / "tiny"), _measure(world, folder / "still")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two ranks found, all in one set of processes."""
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny_model(folder / "tiny" / "model", num_hidden_layers=1)
    save_tiny_model(folder / "still" / "model", **(WIDE if device == "cuda" else NARROW), **STILL)
    return run_on_ranks(_both, 2, folder, cuda=device == "cuda")


@pytest.fixture(scope="module")
def runs(ranks: list[Found]) -> list[dict[str, Any]]:
    """Of every rank, the run that trains all weights and the one with adapters."""
    return [run for found, _ in ranks for run in found.values()]


def test_training_in_shards_is_training(runs: list[dict[str, Any]]) -> None:
    """The same norms, weights and moments as two ranks that hold the encoder whole, at clipped steps."""
    for run in runs:
        assert run["sharded"] and run["smallest norm"] > 0.1 and run["moved"] > 1e-3
        assert max(run["norms"], run["trained"]) < 1e-9, run


def test_a_checkpoint_goes_on_in_shards_and_whole(runs: list[dict[str, Any]], device: str) -> None:
    """In shards bitwise (to rounding on a GPU, whose sums have no order); to rounding where the other kind goes on."""
    for run in runs:
        assert run["finished"] == [2, 2] and run["resumed from whole"] == 0, run
        assert max(run["resumed apart"], run["resumed whole"]) < 1e-9 and (device == "cuda" or run["resumed"] == []), (
            run
        )


def test_the_whole_copy_is_the_encoder(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert run["copy is ordinary"] and run["copy"] < 1e-12 and run["copy without weights"], run


def test_mixed_precision_in_shards_is_that_of_whole_encoders(ranks: list[Found]) -> None:
    """bf16 errs no more against fp32 than without shards; fp32 differs by rounding."""
    for _, found in ranks:
        print(found)
        assert found["norm"] > 1e-3 and found["fp32"] < 1e-4, found
        assert 0 < found["bf16"] <= 1.1 * found["bf16 whole"], found


@pytest.mark.multi_gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_two_ranks_hold_half_each(ranks: list[Found]) -> None:
    for _, found in ranks:
        assert 0 < found["mib"] < 0.6 * found["whole mib"], found
