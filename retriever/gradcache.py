"""The gradient cache: a batch of any size through an encoder that holds one chunk at a time.

(Gao et al. 2021, arXiv:2101.06983.) With representations r = f(x) and loss L(r), dL/dθ = Σ over chunks of (∂r/∂θ)ᵀ dL/dr.
dL/dr is taken once over the whole batch; each chunk is then encoded again, with a graph, and its rows are pulled back.
The sum is the big batch's gradient exactly, dropout included: the second pass restores the RNG state of the first. Chunks whose graphs
fit in memory keep them and are encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retriever.data.batch import Batch
from retriever.data.chunks import Chunk
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.rng import RngState


class Representations(NamedTuple):
    """Embeddings of a rank's batch, or the loss's gradient at them."""

    query: Tensor  # [B, D]
    passage: Tensor  # [N, D]


# What the first pass leaves of a chunk: the RNG state to encode it under again, or its embeddings [n, D] with their graph.
FirstPass = RngState | Tensor


def encode_without_graph(encoder: DualEncoder, batch: Batch, retain: int = 0) -> tuple[Representations, list[FirstPass]]:
    """The batch's representations, and what is needed to differentiate each chunk.

    The first chunks, of at most `retain` tokens together, keep their graphs: they are the first whose memory is free again.
    """
    parameter = next(encoder.parameters())  # embeddings come in its dtype, under autocast too
    sides = [torch.empty(n, encoder.dimension, dtype=parameter.dtype, device=parameter.device) for n in batch.sizes]
    representations = Representations(*sides)
    passes: list[FirstPass] = []
    for chunk in batch.chunks:
        retain -= chunk.tokens.input_ids.numel()
        state = RngState.capture(parameter.device)
        with torch.set_grad_enabled(retain >= 0):
            output = _encode(encoder, chunk)  # [n, D]
        getattr(representations, chunk.side)[chunk.rows] = output.detach()
        passes.append(output if retain >= 0 else state)
    return representations, passes


def representation_gradients(
    objective: ContrastiveObjective, representations: Representations, batch: Batch, world: World, scale: float = 1.0
) -> tuple[Tensor, Representations]:
    """This rank's share of the loss over all ranks' passages, and `scale` times its gradient at the representations.

    The gradient of a learned temperature is left on the objective's parameter, scaled alike.
    """
    loss, dqueries, dpassages = objective(representations.query, representations.passage, batch.targets, world, scale)
    return loss, Representations(dqueries, dpassages)


def backward_through_encoder(encoder: DualEncoder, batch: Batch, gradients: Representations, passes: Sequence[FirstPass]) -> None:
    """Backpropagates each chunk's rows of the gradient, through the graph it kept or one made by encoding it again."""
    for chunk, first in zip(batch.chunks, passes, strict=True):
        if isinstance(first, RngState):
            with first.restored():
                output = _encode(encoder, chunk)  # [n, D]
        else:
            output = first
        output.backward(getattr(gradients, chunk.side)[chunk.rows])


def _encode(encoder: DualEncoder, chunk: Chunk) -> Tensor:
    """The chunk's rows of the representations [n, D]: none of a filler, whose backward pass then is one of zeros."""
    return encoder(chunk.side, chunk.tokens)[: len(chunk.rows)]
