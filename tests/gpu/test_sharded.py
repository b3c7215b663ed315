"""An encoder in shards over NCCL: it trains, saves and goes on as a whole one, in mixed precision too, and takes its share of memory."""

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
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.sharded import PlacedEncoder, whole_tensors
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.distributed.test_sharded import compare
from tests.problems import random_batch, rank_batch
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.multi_gpu
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_shards_train_save_and_resume_over_nccl(tmp_path: Path) -> None:
    """In float64, with torch's fused AdamW: what two ranks give that hold the encoder whole."""
    save_tiny_model(tmp_path / "model", num_hidden_layers=1)
    for rank in run_on_ranks(compare, 2, tmp_path, cuda=True):
        for run in rank.values():
            assert run["sharded"] and run["smallest norm"] > 0.1
            assert max(run["norms"], run["trained"], run["resumed apart"], run["resumed whole"]) < 1e-9, run
            assert run["resumed from whole"] == 0 and run["copy is ordinary"] and run["copy"] < 1e-12, run


def _gradients(world: World, folder: Path, dtype: torch.dtype | None, *, sharded: bool) -> tuple[dict[str, Tensor], float]:
    """Gradients of packed texts, and MiB that the placed encoder takes."""
    config = ModelConfig(str(folder / "model"), query_max_tokens=32, passage_max_tokens=32)
    encoder = DualEncoder.from_pretrained(config, autocast_dtype=dtype)
    world = World(world.device, world.rank, world.size, sharded=sharded)
    before = torch.cuda.memory_allocated(world.device)
    PlacedEncoder(encoder, world)
    taken = (torch.cuda.memory_allocated(world.device) - before) / 2**20
    encoder.pack()
    cut = partial(rank_batch, random_batch(queries=200, passages=500, ranks=world.size), tokens_per_chunk=512, packed=True)
    most = max(len(cut(rank)[0].chunks) for rank in range(world.size)) if sharded else 0
    batch, _, _ = cut(world.rank, chunks_a_side=most)
    batch = replace(batch, chunks=Chunks([partial(chunk.to, world.device) for chunk in batch.chunks], torch.device("cpu")))
    objective = ContrastiveObjective(LossConfig(precision="fp32", temperature=0.1), unit=True).to(world.device)
    representations, passes = encode_without_graph(encoder, batch)
    _, gradients = representation_gradients(objective, representations, batch, world)
    backward_through_encoder(encoder, batch, gradients, passes)
    world.sum_gradients(list(encoder.parameters()))
    return whole_tensors({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, world.device), taken


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


def test_mixed_precision_in_shards_is_that_of_whole_encoders(tmp_path: Path) -> None:
    """bf16 errs no more against fp32 than without shards; fp32 differs by rounding; two ranks hold half each."""
    save_tiny_model(tmp_path / "model", **WIDE, **STILL)
    for found in run_on_ranks(_measure, 2, tmp_path, cuda=True):
        print(found)
        assert found["norm"] > 1e-3 and found["fp32"] < 1e-4, found
        assert 0 < found["bf16"] <= 1.1 * found["bf16 whole"], found
        assert found["mib"] < 0.6 * found["whole mib"], found
