"""The gradient cache: the second pass of a chunk is the first one bit by bit, and the gradient is that of kept
graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.layers.layer import SavedActivations
from retriever.config import LossConfig, ModelConfig
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk, Chunks
from retriever.data.layout import Packed, Padded, pad_rows
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.representations import Representations
from retriever.retention import NOTHING, Retention
from retriever.rng import RngState, seed_step
from tests.problems import WholeBatch, cached_gradients, encode_whole, random_batch, rank_batch

CPU = World(torch.device("cpu"))
OBJECTIVE = ContrastiveObjective(LossConfig(precision="fp32", temperature=0.1), unit_norm=True)
WHOLE = random_batch(queries=8, passages=14)


class Recording(nn.Module):
    """An encoder that notes, for each call, what came out and whether a graph was built."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder, self.dimension = encoder, encoder.dimension
        self.outputs: list[Tensor] = []
        self.with_graph: list[bool] = []

    def forward(self, side: str, tokens: Padded | Packed, saved: deque[SavedActivations] | None = None) -> Tensor:
        output = self.encoder(side, tokens, saved)
        self.outputs.append(output.detach().clone())
        self.with_graph.append(output.requires_grad)
        return output


def make_encoder(folder: Path, *, dropout: bool, tied: bool = True) -> DualEncoder:
    encoder = DualEncoder.from_pretrained(
        ModelConfig(str(folder), tied=tied, query_max_tokens=32, passage_max_tokens=32)
    ).double()
    return encoder.train(dropout)


def _gradients(encoder: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖g − g*‖ / ‖g*‖ over all parameters together."""
    norm = torch.stack([e.norm() for e in expected]).norm()
    assert norm > 1e-3, "the expected gradient is zero: this comparison proves nothing"
    return float(torch.stack([(f - e).norm() for f, e in zip(found, expected, strict=True)]).norm() / norm)


def cached(
    encoder: nn.Module, batch: Batch, retention: Retention = NOTHING, objective: ContrastiveObjective = OBJECTIVE
) -> list[Tensor]:
    """Gradients through the cache, from a fixed RNG state on."""
    encoder.zero_grad()
    seed_step(0, 0, 0)
    cached_gradients(encoder, objective, batch, CPU, retention)
    return _gradients(encoder)


def test_with_dropout_the_second_pass_repeats_the_first_bit_by_bit(one_layer: Path) -> None:
    """Each chunk's embeddings in the backward pass equal those that the loss saw; the first pass builds no graph, the
    second does.
    """
    recording = Recording(make_encoder(one_layer, dropout=True))
    batch, _, _ = rank_batch(WHOLE, 0, 40)
    assert len(batch.chunks) > 4
    cached(recording, batch)
    first, second = recording.outputs[: len(batch.chunks)], recording.outputs[len(batch.chunks) :]
    assert recording.with_graph == [False] * len(first) + [True] * len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    seed_step(0, 1, 0)
    encode_without_graph(recording, batch)  # type: ignore[arg-type]
    assert not any(torch.equal(a, b) for a, b in zip(first, recording.outputs[-len(first) :], strict=True)), (
        "dropout is off"
    )


@pytest.mark.parametrize("layers", ["padded", "packed", "fused"])
def test_retained_chunks_are_encoded_once_and_give_the_same_bits(one_layer: Path, layers: str) -> None:
    """With dropout on, however much is retained: the first chunks keep their graphs, and no bit of a gradient
    changes.
    """
    encoder = make_encoder(one_layer, dropout=True)
    if layers != "padded":
        encoder.pack()
    if layers == "fused":
        encoder.fuse_layers()
    recording = Recording(encoder)
    batch, _, _ = rank_batch(WHOLE, 0, 40, packed=encoder.packed)
    sizes = [chunk.tokens.input_ids.numel() for chunk in batch.chunks]
    replayed = cached(recording, batch)
    for kept in (0, 1, 3, len(sizes)):
        recording.with_graph.clear()
        again = cached(recording, batch, Retention(graphs=sum(sizes[:kept])))
        assert recording.with_graph == [True] * kept + [False] * (len(sizes) - kept) + [True] * (len(sizes) - kept)
        assert all(torch.equal(a, b) for a, b in zip(replayed, again, strict=True))


@pytest.mark.parametrize("layers", ["padded", "fused"])
def test_representations_in_host_memory_give_the_same_gradient(one_layer: Path, layers: str) -> None:
    """With dropout on, fillers among the chunks and some of them retained, to rounding; and the same bits whatever is
    retained.
    """
    encoder = make_encoder(one_layer, dropout=True)
    if layers == "fused":
        encoder.pack()
        encoder.fuse_layers()
    batch, _, _ = rank_batch(WHOLE, 0, 40, packed=encoder.packed, chunks_a_side=9)
    offloaded = ContrastiveObjective(LossConfig(precision="fp32", temperature=0.1), block_rows=5, unit_norm=True)
    expected, found = cached(encoder, batch), cached(encoder, batch, objective=offloaded)
    assert _error(found, expected) < 1e-12
    assert all(
        torch.equal(a, b) for a, b in zip(found, cached(encoder, batch, Retention(graphs=150), offloaded), strict=True)
    )


def test_in_host_memory_a_chunks_rows_stand_together(one_layer: Path) -> None:
    """In the order of the chunks, and `order` says which rows of the batch they are."""
    encoder = make_encoder(one_layer, dropout=False)
    batch, _, _ = rank_batch(WHOLE, 0, 40)
    resident, _ = encode_without_graph(encoder, batch)
    moved, first = encode_without_graph(encoder, batch, offload=True)
    assert moved.order is not None and moved.order[1].tolist() != list(range(14))
    assert torch.equal(moved.query, resident.query[moved.order[0]]) and torch.equal(
        moved.passage, resident.passage[moved.order[1]]
    )
    for place, chunk in zip(first.row_slices, batch.chunks, strict=True):
        assert torch.equal(getattr(moved, place.side)[place.rows], getattr(resident, chunk.side)[chunk.rows])


@pytest.mark.parametrize("packed", [False, True])
def test_fillers_change_no_bit(one_layer: Path, packed: bool) -> None:
    """Chunks without rows are encoded like others, twice, and add zeros to every gradient."""
    encoder = make_encoder(one_layer, dropout=False)
    if packed:
        encoder.pack()
    recording = Recording(encoder)
    batch, _, _ = rank_batch(WHOLE, 0, 40, packed=packed)
    filled, _, _ = rank_batch(WHOLE, 0, 40, packed=packed, chunks_a_side=9)
    expected = cached(recording, batch)
    recording.outputs.clear()
    assert len(filled.chunks) == 18 > len(batch.chunks)
    assert all(torch.equal(a, b) for a, b in zip(cached(recording, filled), expected, strict=True))
    assert len(recording.outputs) == 36


def test_other_dropout_masks_give_another_gradient(one_layer: Path) -> None:
    """Guard: a second pass under another RNG state is far outside the bounds of this file and of the contract."""
    encoder = make_encoder(one_layer, dropout=True)
    batch, _, _ = rank_batch(WHOLE, 0, 40)
    expected = cached(encoder, batch)
    encoder.zero_grad()
    seed_step(0, 0, 0)
    representations, first = encode_without_graph(encoder, batch)
    _, gradients = representation_gradients(OBJECTIVE, representations, batch, CPU)
    backward_through_encoder(
        encoder, batch, gradients, first._replace(states=[RngState.capture(CPU.device)] * len(first.states))
    )
    assert _error(_gradients(encoder), expected) > 1e-3


def _cut(whole: WholeBatch, draw: np.random.Generator) -> Batch:
    """The batch in chunks cut anywhere in any order, rows shuffled, some padded wider than they need to be."""
    batch, _, _ = rank_batch(whole, 0, 10**6)
    chunks: list[Chunk] = []
    for side, texts in (("query", whole.query_tokens), ("passage", whole.passage_tokens)):
        order, cuts = draw.permutation(len(texts)), sorted(draw.choice(len(texts), size=draw.integers(0, 6)))
        for rows in (part for part in np.split(order, cuts) if len(part)):
            extra = int(draw.integers(0, 3))
            tokens = pad_rows([texts[i] for i in rows], 0).map(partial(torch.nn.functional.pad, pad=(0, extra)))
            chunks.append(Chunk(side, torch.from_numpy(rows), tokens))  # type: ignore[arg-type]
    shuffled = [chunks[i] for i in draw.permutation(len(chunks))]
    return replace(batch, chunks=Chunks([lambda chunk=chunk: chunk for chunk in shuffled], CPU.device))  # type: ignore[misc]


@pytest.fixture(scope="module")
def without_dropout(one_layer: Path) -> Iterator[tuple[DualEncoder, list[Tensor]]]:
    """An encoder, and its gradient of the whole batch by autograd through the representations' gradients."""
    encoder = make_encoder(one_layer, dropout=False)
    batch, _, _ = rank_batch(WHOLE, 0, 10**6)
    queries, passages = (
        encode_whole(encoder, WHOLE.query_tokens, "query"),
        encode_whole(encoder, WHOLE.passage_tokens, "passage"),
    )
    _, gradients = representation_gradients(OBJECTIVE, Representations(queries.detach(), passages.detach()), batch, CPU)
    torch.autograd.backward([queries, passages], list(gradients[:2]))
    yield encoder, _gradients(encoder)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_chunking_gives_the_same_gradient(without_dropout: tuple[DualEncoder, list[Tensor]], seed: int) -> None:
    """With dropout off, where and in which order the batch is cut changes nothing beyond 1e-9."""
    encoder, expected = without_dropout
    assert _error(cached(encoder, _cut(WHOLE, np.random.default_rng(seed))), expected) < 1e-9


def test_gradients_add_to_what_stands_there(one_layer: Path) -> None:
    """Backward accumulates, so that several calls before one update sum up."""
    encoder = make_encoder(one_layer, dropout=False)
    batch, _, _ = rank_batch(WHOLE, 0, 40)
    once = cached(encoder, batch)
    cached_gradients(encoder, OBJECTIVE, batch, CPU)
    assert _error(_gradients(encoder), [2 * g for g in once]) < 1e-12


def test_a_pass_that_lacks_a_chunk_is_an_error(one_layer: Path) -> None:
    """A number of states other than that of the chunks is refused, never silently cut to the shorter."""
    encoder = make_encoder(one_layer, dropout=False)
    batch, _, _ = rank_batch(WHOLE, 0, 40)
    representations, first = encode_without_graph(encoder, batch)
    _, gradients = representation_gradients(OBJECTIVE, representations, batch, CPU)
    with pytest.raises(ValueError, match="shorter"):
        backward_through_encoder(encoder, batch, gradients, first._replace(states=first.states[:-1]))
