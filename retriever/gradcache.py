"""The gradient cache: a batch of any size through an encoder that holds one chunk at a time.

(Gao et al. 2021, arXiv:2101.06983.) With representations r = f(x) and loss L(r), dL/dθ = Σ over chunks of (∂r/∂θ)ᵀ
dL/dr. dL/dr is taken once over the whole batch; each chunk is then encoded again, with a graph, and its rows are pulled
back. The sum is the big batch's gradient exactly, dropout included: the second pass restores the RNG state of the
first. Chunks whose graphs fit in memory keep them and are encoded once; others may keep their costliest results, which
the second pass then reuses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.layers.layer import SavedActivations
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk
from retriever.encoder.batch_norm import running_values_kept
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.bank import Part
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.representations import DeviceBuffer, HostBuffer, Representations, RowSlice
from retriever.retention import NOTHING, Budget, Retention
from retriever.rng import RngState


class PartialReplay(NamedTuple):
    """A chunk that is encoded again in part: the second pass reuses what the first one saved."""

    chunk: Chunk
    state: RngState
    saved: deque[SavedActivations]  # one a layer; the second pass removes them as it goes


class FirstPass(NamedTuple):
    """The results of the first pass that the second needs, in the order of the chunks."""

    row_slices: list[RowSlice]  # one for each chunk
    kept: list[Tensor]  # of the first chunks: embeddings [n, D] with their graphs
    partial: list[PartialReplay]  # of the next chunks
    states: list[RngState]  # of the other chunks: the RNG state they were encoded under


def encode_without_graph(
    encoder: DualEncoder, batch: Batch, retention: Retention = NOTHING, *, offload: bool = False
) -> tuple[Representations, FirstPass]:
    """The batch's representations, in host memory if `offload`, and what the second pass needs.

    The first chunks keep what `retention` allows: their memory is released first in the second pass.
    """
    parameter = next(encoder.parameters())  # embeddings come in its dtype, under autocast too
    buffer = (HostBuffer if offload else DeviceBuffer)(batch.sizes, encoder.dimension, parameter)
    first, budget = FirstPass([], [], [], []), Budget(retention)
    for chunk in batch.chunks:
        keeps = budget.take(chunk.tokens.input_ids.numel())
        saved = deque[SavedActivations]() if keeps == "products" else None
        state = RngState.capture(parameter.device)
        with torch.set_grad_enabled(keeps == "graph"):
            embeddings = _encode(encoder, chunk, saved)  # [n, D]
        first.row_slices.append(buffer.put(chunk, embeddings.detach()))
        if keeps == "graph":
            first.kept.append(embeddings)
        elif saved is not None:
            first.partial.append(PartialReplay(chunk, state, saved))
        else:
            first.states.append(state)
    return buffer.finished(), first


def representation_gradients(
    objective: ContrastiveObjective,
    representations: Representations,
    batch: Batch,
    world: World,
    scale: float = 1.0,
    temperature: float | None = None,
) -> tuple[Tensor, Representations]:
    """This rank's share of the loss over all ranks' passages, and `scale` times its gradient at the representations.

    Where there is a memory bank, its rows take part, and it takes these representations for later steps.
    The gradient of a learned temperature is left on the objective's parameter, with the same scale. `temperature`: its
    present value, if the caller knows it.
    """
    targets = batch.targets if representations.order is None else batch.targets.reordered(*representations.order)
    own = part = Part(representations.query, representations.passage, targets)
    if objective.bank is not None:
        part = objective.bank.join(batch.step, own)
        objective.bank.add(batch, own)
    loss, dqueries, dpassages = objective(part.queries, part.passages, part.targets, world, scale, temperature)
    if part is not own:  # copies, so that the gradient at the bank's rows takes no memory any more
        dqueries, dpassages = dqueries[: len(own.queries)].clone(), dpassages[: len(own.passages)].clone()
    return loss, Representations(dqueries, dpassages)


def backward_through_encoder(encoder: DualEncoder, batch: Batch, gradients: Representations, first: FirstPass) -> None:
    """Backpropagates each chunk's rows of the gradient, through the graph it kept or a new one."""
    with running_values_kept(encoder):
        for row_slice, embeddings in zip(first.row_slices, _with_graphs(encoder, batch, first), strict=True):
            rows = getattr(gradients, row_slice.side)[row_slice.rows]
            embeddings.backward(rows.to(embeddings.device, non_blocking=True))


def _with_graphs(encoder: DualEncoder, batch: Batch, first: FirstPass) -> Iterator[Tensor]:
    """Every chunk's embeddings [n, D], with a graph."""
    yield from first.kept
    for chunk, state, saved in first.partial:
        with state.restored():
            embeddings = _encode(encoder, chunk, saved)
        yield embeddings
    for chunk, state in zip(batch.chunks.starting_at(len(first.kept) + len(first.partial)), first.states, strict=True):
        with state.restored():
            embeddings = _encode(encoder, chunk)
        yield embeddings


def _encode(encoder: DualEncoder, chunk: Chunk, saved: deque[SavedActivations] | None = None) -> Tensor:
    """The chunk's embeddings [n, D]. A filler has no rows, and its backward pass gives zeros."""
    return encoder(chunk.side, chunk.tokens, saved)[: len(chunk.rows)]
