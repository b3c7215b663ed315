"""Runs of an encoder in shards and of a whole one, trained, saved and resumed by either: what `tests.gpu.test_sharded`
judges.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from retriever import checkpoint
from retriever.checkpoint import TrainingState
from retriever.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from retriever.data.chunks import Chunks
from retriever.data.layout import pad_rows
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import adapt
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.sharded import PlacedEncoder
from retriever.parallel.world import World
from retriever.step import train_step
from tests.problems import random_batch, rank_batch

STEPS, BUDGET = 3, 30
CPU = torch.device("cpu")


class _Run:
    """A run in float64, clipped at every step, its temperature learned; dropout off."""

    def __init__(self, model: Path, world: World, lora: bool) -> None:
        self.config = Config(
            model=ModelConfig(
                str(model), tied=lora, query_max_tokens=32, passage_max_tokens=32, lora=LoraConfig() if lora else None
            ),
            data=DataConfig(train=(SourceConfig(path="x"),)),
            loss=LossConfig(learn_temperature=True, precision="fp32", temperature=0.1),
            optim=OptimConfig(lr=1e-2, precision="fp32", max_grad_norm=0.1),
            train=TrainConfig(max_steps=STEPS),
        )
        self.world, self.encoder = world, DualEncoder.from_pretrained(self.config.model).double().eval()
        if self.config.model.lora is not None:
            adapt(self.encoder.towers, self.config.model.lora, seed=0)
        self.placed = PlacedEncoder(self.encoder, world)
        objective = ContrastiveObjective(self.config.loss, unit_norm=True).double().to(world.device)
        self.state = TrainingState(
            self.encoder, objective, Optimizer(self.config.optim, [self.encoder, objective], STEPS, world.device)
        )
        whole = random_batch(queries=7, passages=12, ranks=world.size)
        cut = partial(rank_batch, whole, tokens_per_chunk=BUDGET)
        most = max(len(cut(rank)[0].chunks) for rank in range(world.size)) if world.sharded else 0
        batch, _, _ = cut(world.rank, chunks_a_side=most)
        chunks = [partial(chunk.to, world.device) for chunk in batch.chunks]
        self.batch = replace(batch, chunks=Chunks(chunks, CPU))  # on the device already

    def train(self, first: int, last: int) -> list[float]:
        """Norms of the gradients before clipping."""
        objective: Any = self.state.objective
        step = partial(train_step, self.encoder, objective, optimizer=self.state.optimizer, world=self.world, seed=1)
        return [step(replace(self.batch, step=i)).grad_norm for i in range(first, last)]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state, whole, on every rank."""
        snapshot = checkpoint.snapshot(self.state)
        return {f"{name} of weights": t for name, t in snapshot.weights.items()} | snapshot.optimizer

    def save(self, folder: Path, step: int) -> Path:
        snapshot = checkpoint.snapshot(self.state, keep=self.world.is_first)
        if self.world.is_first:
            checkpoint.save(folder, step, snapshot, self.config, "f1", lambda export: export.mkdir())
        else:
            assert not snapshot.weights and not snapshot.optimizer
        self.world.barrier()
        return folder / f"step-{step:08d}"


def _apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor; a key's bias has no gradient but rounding, which Adam makes
    large.
    """
    assert found.keys() == expected.keys()
    compared = [name for name in expected if "key.bias" not in name]
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)) for name in compared
    )


def compare(world: World, folder: Path) -> dict[str, Any]:
    """What is judged, of a run that trains all weights and of one with adapters."""
    return {name: _compare_runs(world, folder, name == "lora") for name in ("all", "lora")}


def _compare_runs(world: World, folder: Path, lora: bool) -> dict[str, Any]:
    model, run = folder / "model", folder / f"run-{lora}"
    in_shards = World(world.device, world.rank, world.size, sharded=True)
    whole, sharded = _Run(model, world, lora), _Run(model, in_shards, lora)
    before = sharded.tensors()
    expected = whole.train(0, STEPS)
    norms = sharded.train(0, 2)
    saved = sharded.save(run, 2)
    norms += sharded.train(2, STEPS)

    again, gone_whole = _Run(model, in_shards, lora), _Run(model, world, lora)
    finished = [checkpoint.load(saved, each.state, "f1") for each in (again, gone_whole)]
    again.train(2, STEPS)
    gone_whole.train(2, STEPS)
    from_whole = _Run(model, in_shards, lora)
    checkpoint.load(whole.save(run, STEPS), from_whole.state, "f1")

    after, expected_tensors = sharded.tensors(), whole.tensors()
    copy = sharded.placed.whole(world.device)
    texts = pad_rows(random_batch().query_tokens, 0).map(lambda t: t.to(world.device))
    with torch.no_grad():
        embeddings = [encoder(side, texts) for side in ("query", "passage") for encoder in (copy, sharded.encoder)]
    parameters = list(sharded.encoder.parameters())
    return {
        "sharded": all(
            isinstance(p, DTensor) and p.to_local().numel() <= p.numel() // 2 + p[0].numel() for p in parameters
        ),
        "norms": max(abs(found / norm - 1) for found, norm in zip(norms, expected, strict=True)),
        "smallest norm": min(expected),
        "moved": _apart({name: after[name] for name in before}, before),
        "trained": _apart(after, expected_tensors),
        "finished": finished,
        "resumed": [name for name, tensor in again.tensors().items() if not torch.equal(tensor, after[name])],
        "resumed apart": _apart(again.tensors(), after),
        "resumed whole": _apart(gone_whole.tensors(), expected_tensors),
        "resumed from whole": _apart(from_whole.tensors(), expected_tensors),
        "copy is ordinary": not any(isinstance(t, DTensor) or t.is_meta for t in copy.state_dict().values()),
        "copy": max(float((a - b).abs().max()) for a, b in zip(embeddings[::2], embeddings[1::2], strict=True)),
        "copy without weights": all(p.is_meta for p in sharded.placed.copy(keep=False).parameters()),
    }
