"""The gradient cache: a batch of any size through an encoder that holds one chunk at a time.

(Gao et al. 2021, arXiv:2101.06983.) With representations r = f(x) and loss L(r), dL/dθ = Σ over chunks of (∂r/∂θ)ᵀ dL/dr.
dL/dr is taken once over the whole batch; each chunk is then encoded again, with a graph, and its rows are pulled back.
The sum is the big batch's gradient exactly, dropout included: the second pass restores the RNG state of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retriever.data.batch import Batch
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.rng import RngState


class Representations(NamedTuple):
    """Embeddings of a rank's batch, or the loss's gradient at them."""

    query: Tensor  # [B, D]
    passage: Tensor  # [N, D]


def encode_without_graph(encoder: DualEncoder, batch: Batch) -> tuple[Representations, list[RngState]]:
    """The batch's representations, and the RNG state that each chunk was encoded under."""
    parameter = next(encoder.parameters())  # embeddings come in its dtype, under autocast too
    sides = [torch.empty(n, encoder.dimension, dtype=parameter.dtype, device=parameter.device) for n in batch.sizes]
    representations = Representations(*sides)
    states = []
    with torch.no_grad():
        for chunk in batch.chunks:
            states.append(RngState.capture(parameter.device))
            getattr(representations, chunk.side)[chunk.rows] = encoder(chunk.side, chunk.input_ids, chunk.attention_mask)
    return representations, states


def representation_gradients(
    objective: ContrastiveObjective, representations: Representations, batch: Batch, world: World, scale: float = 1.0
) -> tuple[Tensor, Representations]:
    """This rank's share of the loss over all ranks' passages, and `scale` times its gradient at the representations.

    The gradient of a learned temperature is left on the objective's parameter, scaled alike.
    """
    loss, dqueries, dpassages = objective(representations.query, representations.passage, batch.targets, world, scale)
    return loss, Representations(dqueries, dpassages)


def backward_through_encoder(encoder: DualEncoder, batch: Batch, gradients: Representations, states: Sequence[RngState]) -> None:
    """Encodes each chunk again under its RNG state, with a graph, and backpropagates its rows of the gradient."""
    for chunk, state in zip(batch.chunks, states, strict=True):
        with state.restored():
            output = encoder(chunk.side, chunk.input_ids, chunk.attention_mask)  # [n, D]
        output.backward(getattr(gradients, chunk.side)[chunk.rows])
