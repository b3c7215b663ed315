"""The gradient cache: a batch of any size through an encoder that holds one chunk at a time.

(Gao et al. 2021, arXiv:2101.06983.) With representations r = f(x) and loss L(r), dL/dθ = Σ over chunks of (∂r/∂θ)ᵀ
dL/dr. dL/dr is taken once over the whole batch; each chunk is then encoded again, with a graph, and its rows are pulled
back. The sum is the big batch's gradient exactly, dropout included: the second pass restores the RNG state of the
first. Chunks whose graphs fit in memory keep them and are encoded once; others may keep the results that cost most, and
take them from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.layers.post_norm import SavedActivations
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.representations import DeviceRoom, HostRoom, Place, Representations
from retriever.retention import NOTHING, Budget, Retention
from retriever.rng import RngState


class Begun(NamedTuple):
    """A chunk whose second pass finds a part of its work done."""

    chunk: Chunk
    state: RngState
    saved: deque[SavedActivations]  # of each layer; the second pass takes them out


class FirstPass(NamedTuple):
    """What the first pass leaves for the second, of the chunks in their order."""

    places: list[Place]  # of all of them
    kept: list[Tensor]  # embeddings [n, D] of the first ones, with their graphs
    begun: list[Begun]  # the next ones
    states: list[RngState]  # that the others were encoded under


def encode_without_graph(
    encoder: DualEncoder, batch: Batch, retention: Retention = NOTHING, *, offload: bool = False
) -> tuple[Representations, FirstPass]:
    """The batch's representations, in host memory where `offload`, and what is needed to differentiate them.

    The first chunks keep what `retention` allows: it is they whose memory is free again first.
    """
    parameter = next(encoder.parameters())  # embeddings come in its dtype, under autocast too
    room = (HostRoom if offload else DeviceRoom)(batch.sizes, encoder.dimension, parameter)
    first, budget = FirstPass([], [], [], []), Budget(retention)
    for chunk in batch.chunks:
        keeps = budget.take(chunk.tokens.input_ids.numel())
        saved = deque[SavedActivations]() if keeps == "products" else None
        state = RngState.capture(parameter.device)
        with torch.set_grad_enabled(keeps == "graph"):
            embeddings = _encode(encoder, chunk, saved)  # [n, D]
        first.places.append(room.put(chunk, embeddings.detach()))
        if keeps == "graph":
            first.kept.append(embeddings)
        elif saved is not None:
            first.begun.append(Begun(chunk, state, saved))
        else:
            first.states.append(state)
    return room.finished(), first


def representation_gradients(
    objective: ContrastiveObjective,
    representations: Representations,
    batch: Batch,
    world: World,
    scale: float = 1.0,
    temperature: float | None = None,
) -> tuple[Tensor, Representations]:
    """This rank's share of the loss over all ranks' passages, and `scale` times its gradient at the representations.

    The gradient of a learned temperature is left on the objective's parameter, scaled alike. `temperature`: the present
    one, if known.
    """
    targets = batch.targets if representations.order is None else batch.targets.reordered(*representations.order)
    loss, dqueries, dpassages = objective(
        representations.query, representations.passage, targets, world, scale, temperature
    )
    return loss, Representations(dqueries, dpassages)


def backward_through_encoder(encoder: DualEncoder, batch: Batch, gradients: Representations, first: FirstPass) -> None:
    """Backpropagates each chunk's rows of the gradient, through the graph it kept or one made by encoding it again."""
    for place, embeddings in zip(first.places, _with_graphs(encoder, batch, first), strict=True):
        rows = getattr(gradients, place.side)[place.rows]
        embeddings.backward(rows.to(embeddings.device, non_blocking=True))


def _with_graphs(encoder: DualEncoder, batch: Batch, first: FirstPass) -> Iterator[Tensor]:
    """Every chunk's embeddings [n, D], with a graph."""
    yield from first.kept
    for chunk, state, saved in first.begun:
        with state.restored():
            embeddings = _encode(encoder, chunk, saved)
        yield embeddings
    for chunk, state in zip(batch.chunks.starting_at(len(first.kept) + len(first.begun)), first.states, strict=True):
        with state.restored():
            embeddings = _encode(encoder, chunk)
        yield embeddings


def _encode(encoder: DualEncoder, chunk: Chunk, saved: deque[SavedActivations] | None = None) -> Tensor:
    """The chunk's rows of the representations [n, D]: none of a filler, whose backward pass then is one of zeros."""
    return encoder(chunk.side, chunk.tokens, saved)[: len(chunk.rows)]
