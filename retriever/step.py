"""One optimizer step over a batch of any size. This is the page to read first."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retriever.data.accuracy import BINS, COUNTS
from retriever.data.batch import Batch
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.retention import NOTHING, Retention
from retriever.rng import seed_step


@dataclass(frozen=True)
class Backward:
    """The results of a step before its update."""

    step: int
    loss: Tensor  # []: mean over all queries of the global batch, the same on every rank
    ranked: Tensor  # [COUNTS]: as `Ranking.counts` has them, of all ranks
    temperature: float
    queries: int  # of the global batch
    tokens: int  # of this rank, padding not counted
    waited_s: float  # this rank's, for chunks that were not ready
    candidates: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """The results of one step, the same on every rank but for `tokens` and `waited_s`."""

    step: int
    loss: float  # mean over all queries of the global batch
    grad_norm: float  # before clipping
    lr: float
    temperature: float
    queries: int
    tokens: int  # of this rank, padding not counted
    waited_s: float = field(compare=False)  # this rank's, for chunks that were not ready
    accuracy: float | None = None  # share of queries whose target is the first of `CANDIDATES` passages
    candidates: float = 0.0  # passages that a query is contrasted with, its target included; 0: not known
    # Queries by the similarity of their target, and by that of their most similar other candidate, in `BINS` bins.
    similarities: tuple[list[int], list[int]] | None = None


def train_step(
    encoder: DualEncoder,
    objective: ContrastiveObjective,
    batch: Batch,
    optimizer: Optimizer,
    world: World,
    seed: int,
    retention: Retention = NOTHING,
) -> StepReport:
    """Encode, differentiate the loss at the representations, encode again and backpropagate, update."""
    return update(forward_backward(encoder, objective, batch, optimizer, world, seed, retention), optimizer, world)


def forward_backward(
    encoder: DualEncoder,
    objective: ContrastiveObjective,
    batch: Batch,
    optimizer: Optimizer,
    world: World,
    seed: int,
    retention: Retention = NOTHING,
) -> Backward:
    """Leaves this rank's part of the gradient in the parameters' `grad`.

    (Gradient cache: Gao et al. 2021, arXiv:2101.06983; tiled loss: Cheng et al. 2024, arXiv:2410.17243.)
    """
    seed_step(seed, batch.step, world.rank)
    # Read while the device has nothing to do.
    temperature, gradient_scale = objective.temperature_at(batch.step), optimizer.gradient_scale

    # 1. Encode every chunk without a graph and remember its RNG state. (The first chunks keep what `retention` allows,
    # which leaves less to do in 3.) Representations: queries [B, D], passages [N, D].
    representations, first = encode_without_graph(encoder, batch, retention, offload=objective.offload)

    # 2. The loss over all ranks' passages, and its gradient at the representations.
    loss, gradients = representation_gradients(objective, representations, batch, world, gradient_scale, temperature)

    ranked = loss.new_zeros(COUNTS)
    if batch.ranking is not None:
        ranked = batch.ranking.counts(representations.query, representations.passage).to(loss.dtype)

    # 3. Encode each chunk again under its RNG state, with a graph, or take the graph it kept. Backpropagate its rows of
    # the gradient.
    backward_through_encoder(encoder, batch, gradients, first)
    queries, waited_s = batch.targets.global_queries, batch.chunks.waited_s
    sums = world.sum(torch.cat([loss[None], ranked]))
    return Backward(batch.step, sums[0], sums[1:], temperature, queries, batch.tokens, waited_s, batch.candidates)


def update(backward: Backward, optimizer: Optimizer, world: World) -> StepReport:
    """Sums the gradients over ranks, clips, and updates the parameters."""
    # 4. The step's only collective on parameters. (An encoder in shards has summed its own gradients chunk by chunk.)
    world.sum_gradients(optimizer.parameters)
    lr = optimizer.set_learning_rate(backward.step)
    grad_norm = optimizer.clip_and_step(backward.step)
    first, queries, *similarities = map(int, backward.ranked.tolist())
    return StepReport(
        backward.step,
        backward.loss.item(),
        grad_norm,
        lr,
        backward.temperature,
        backward.queries,
        backward.tokens,
        backward.waited_s,
        first / queries if queries else None,
        backward.candidates,
        (similarities[:BINS], similarities[BINS:]) if queries else None,
    )
