"""Losses of fifty steps on any number of ranks, with dropout off: training on several is training on one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from retriever.config import LossConfig, ModelConfig, OptimConfig
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk, Chunks
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.step import train_step
from tests.problems import random_batch, rank_batch
from tests.tiny import save_tiny_model

STEPS, BATCHES = 50, 3  # every batch comes by many times, so that a falling loss means learning
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """What is trained how; the model's folder is `model` in the folder of the run."""

    exchange: str
    symmetric: bool = False
    precision: str = "fp32"  # of the encoder
    loss_precision: str = "fp32"
    lr: float = 2e-3
    queries: int = 10


def losses_of(world: World, folder: Path, run: Run) -> list[float]:
    """The batch's loss at every step, the same on every rank; ranks hold unequal parts of the same batches."""
    model = ModelConfig(str(folder / "model"), query_max_tokens=32, passage_max_tokens=32)
    encoder = DualEncoder.from_pretrained(model, autocast_dtype=AUTOCAST[run.precision]).to(world.device)
    loss = LossConfig(
        temperature=0.1,
        learn_temperature=True,
        symmetric=run.symmetric,
        exchange=run.exchange,  # type: ignore[arg-type]
        precision=run.loss_precision,  # type: ignore[arg-type]
    )
    objective = ContrastiveObjective(loss, unit_norm=True).to(world.device)
    optim = OptimConfig(lr=run.lr, warmup=5, precision=run.precision)  # type: ignore[arg-type]
    optimizer = Optimizer(optim, [encoder, objective], STEPS, world.device)
    batches = [_batch(world, run.queries, seed) for seed in range(BATCHES)]
    steps = (replace(batches[step % BATCHES], step=step) for step in range(STEPS))
    return [train_step(encoder, objective, batch, optimizer, world, seed=1).loss for batch in steps]


def _batch(world: World, queries: int, seed: int) -> Batch:
    """One batch for all numbers of ranks; three in four passages are on the first rank."""
    whole, draw = random_batch(queries=queries, passages=queries * 8 // 5, seed=seed), random.Random(seed)
    whole = replace(whole, owners=[draw.choice([0, 0, *range(world.size)]) for _ in whole.owners])
    batch, _, _ = rank_batch(whole, world.rank, 10 * queries)
    return replace(batch, chunks=Chunks([partial(_itself, chunk) for chunk in batch.chunks], world.device))


def _itself(chunk: Chunk) -> Chunk:
    return chunk


def save_still_model(folder: Path) -> None:
    """A model without dropout."""
    save_tiny_model(folder / "model", num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def assert_same_training(together: list[float], alone: list[float]) -> None:
    """Equal to 1e-3 at every step, and something was learned."""
    assert len(alone) == STEPS and sum(alone[-BATCHES:]) < 0.9 * sum(alone[:BATCHES]), alone
    assert together == pytest.approx(alone, rel=1e-3)
