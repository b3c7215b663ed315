"""The gradient cache: a batch of any size through an encoder that holds one chunk at a time.

(Gao et al. 2021, arXiv:2101.06983.) With representations r = f(x) and loss L(r), dL/dθ = Σ over chunks of (∂r/∂θ)ᵀ dL/dr.
dL/dr is taken once over the whole batch; each chunk is then encoded again, with a graph, and its rows are pulled back.
The sum is the big batch's gradient exactly, dropout included: the second pass restores the RNG state of the first. Chunks whose graphs
fit in memory keep them and are encoded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retriever.data.batch import Batch
from retriever.data.chunks import Chunk
from retriever.data.tokens import Side
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.rng import RngState


class Representations(NamedTuple):
    """Embeddings of a rank's batch, or the loss's gradient at them."""

    query: Tensor  # [B, D]
    passage: Tensor  # [N, D]


class Kept(NamedTuple):
    """A chunk that keeps its graph between the passes."""

    side: Side
    rows: Tensor  # [n]
    embeddings: Tensor  # [n, D], with their graph


class FirstPass(NamedTuple):
    """What the first pass leaves for the second."""

    kept: list[Kept]  # the first chunks of the batch
    states: list[RngState]  # that the others were encoded under


def encode_without_graph(encoder: DualEncoder, batch: Batch, retain: int = 0) -> tuple[Representations, FirstPass]:
    """The batch's representations, and what is needed to differentiate them.

    The first chunks, of at most `retain` tokens together, keep their graphs: they are the first whose memory is free again.
    """
    parameter = next(encoder.parameters())  # embeddings come in its dtype, under autocast too
    sides = [torch.empty(n, encoder.dimension, dtype=parameter.dtype, device=parameter.device) for n in batch.sizes]
    representations = Representations(*sides)
    first = FirstPass([], [])
    for chunk in batch.chunks:
        retain -= chunk.tokens.input_ids.numel()
        state = RngState.capture(parameter.device)
        with torch.set_grad_enabled(retain >= 0):
            embeddings = _encode(encoder, chunk)  # [n, D]
        getattr(representations, chunk.side)[chunk.rows] = embeddings.detach()
        if retain >= 0:
            first.kept.append(Kept(chunk.side, chunk.rows, embeddings))
        else:
            first.states.append(state)
    return representations, first


def representation_gradients(
    objective: ContrastiveObjective, representations: Representations, batch: Batch, world: World, scale: float = 1.0
) -> tuple[Tensor, Representations]:
    """This rank's share of the loss over all ranks' passages, and `scale` times its gradient at the representations.

    The gradient of a learned temperature is left on the objective's parameter, scaled alike.
    """
    loss, dqueries, dpassages = objective(representations.query, representations.passage, batch.targets, world, scale)
    return loss, Representations(dqueries, dpassages)


def backward_through_encoder(encoder: DualEncoder, batch: Batch, gradients: Representations, first: FirstPass) -> None:
    """Backpropagates each chunk's rows of the gradient, through the graph it kept or one made by encoding it again."""
    for side, rows, embeddings in first.kept:
        embeddings.backward(getattr(gradients, side)[rows])
    for chunk, state in zip(batch.chunks.starting_at(len(first.kept)), first.states, strict=True):
        with state.restored():
            embeddings = _encode(encoder, chunk)  # [n, D]
        embeddings.backward(getattr(gradients, chunk.side)[chunk.rows])


def _encode(encoder: DualEncoder, chunk: Chunk) -> Tensor:
    """The chunk's rows of the representations [n, D]: none of a filler, whose backward pass then is one of zeros."""
    return encoder(chunk.side, chunk.tokens)[: len(chunk.rows)]
