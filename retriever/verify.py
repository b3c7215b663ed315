"""The gradient contract on the user's own data, before step 1: the cached gradient against the whole batch's."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from retriever.config import ConfigError, LossConfig
from retriever.data.batch import Batch
from retriever.data.chunks import Chunk
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.data.tokens import Side
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.custom import CustomLoss
from retriever.loss.plain import plain_objective
from retriever.parallel.world import World
from retriever.retention import NOTHING, Retention
from retriever.rng import RngState
from retriever.wording import counted

# A gradient below this is rounding: texts that truncate to the same tokens, or a batch without negatives.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class GradientCheck:
    """The distance of the cached gradient from the whole batch's."""

    queries: int
    passages: int
    chunks: int
    loss_error: float  # relative
    gradient_error: float  # ‖g − g*‖ / ‖g*‖ over all parameters together

    def __str__(self) -> str:
        return (
            f"{counted(self.queries, 'query')} and {counted(self.passages, 'passage')} in "
            f"{counted(self.chunks, 'chunk')}: gradient equal to the whole batch's to {self.gradient_error:.1e}, "
            f"loss to {self.loss_error:.1e}"
        )


def gradient_error(
    encoder: DualEncoder,
    loss: LossConfig,
    batch: Batch,
    *,
    block_rows: int | None = None,
    custom: CustomLoss | None = None,
) -> GradientCheck:
    """Compares the cached gradient of one rank's `batch` with that of a whole-batch forward pass and autograd.

    Returns the relative errors of the loss and of the gradient. Both sides use copies of the model in float64 without
    dropout, and the loss in full precision, so that the method is measured and not the rounding. With `block_rows`,
    representations are in host memory, in blocks of so many rows. The whole batch must fit in memory. The encoder and
    the global random state do not change. Raises ConfigError if the whole batch's gradient is zero but for rounding.
    """
    state = RngState.capture(encoder.device)
    exact = copy.deepcopy(encoder).double().eval()
    exact.autocast_dtype, custom = None, copy.deepcopy(custom)
    world = World(encoder.device)
    loss = replace(loss, precision="fp32", learn_temperature=False)

    with state.restored():
        objective = ContrastiveObjective(loss, unit_norm=exact.normalize, block_rows=block_rows, custom=custom)
        objective.double()
        cached = []
        # Every chunk encoded again; then some of them not, and some in part.
        for retention in (NOTHING, _some_of_each(exact, batch)):
            representations, first = encode_without_graph(exact, batch, retention, offload=objective.offload)
            value, gradients = representation_gradients(objective, representations, batch, world)
            backward_through_encoder(exact, batch, gradients, first)
            cached.append(_take_gradients(exact))

        whole = {side: _encode_whole(exact, batch, side) for side in ("query", "passage")}
        reference = plain_objective(whole["query"], whole["passage"], batch.targets, loss, exact.normalize, custom)
        reference.backward()
        expected = _take_gradients(exact)

    norm = torch.linalg.vector_norm(expected)
    if not norm > _ROUNDING:
        raise ConfigError(
            f"run.verify: the gradient of {batch.sizes[0]} queries is {norm:.1e}, rounding alone, and proves nothing"
        )
    error = max(torch.linalg.vector_norm(gradient - expected) for gradient in cached) / norm
    return GradientCheck(*batch.sizes, len(batch.chunks), abs(value.item() / reference.item() - 1), error.item())


def _some_of_each(encoder: DualEncoder, batch: Batch) -> Retention:
    """The first third of the chunks keep their graphs, and the second third products where layers keep some."""
    sizes = [chunk.tokens.input_ids.numel() for chunk in batch.chunks]
    third = -(-len(sizes) // 3)
    return Retention(sum(sizes[:third]), sum(sizes[third : 2 * third]) if encoder.keeps_products else 0)


def _encode_whole(encoder: DualEncoder, batch: Batch, side: Side) -> Tensor:
    """All of one side in a single forward pass, in the batch's order."""
    chunks: list[Chunk] = [chunk for chunk in batch.chunks if chunk.side == side]
    texts = {row: text for chunk in chunks for row, text in zip(chunk.rows.tolist(), _texts(chunk.tokens), strict=True)}
    rows = [texts[row] for row in range(len(texts))]
    packed = isinstance(chunks[0].tokens, Packed)
    whole: Padded | Packed = pack_rows(rows) if packed else pad_rows(rows, pad_id=0)
    return encoder(side, whole.map(lambda t: t.to(encoder.device)))


def _texts(tokens: Padded | Packed) -> list[np.ndarray]:
    """Each text's own tokens."""
    if isinstance(tokens, Packed):
        return np.split(tokens.input_ids.cpu().numpy(), tokens.starts[1:-1].cpu().numpy())
    return [ids[mask.bool()].cpu().numpy() for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]


def _take_gradients(encoder: DualEncoder) -> Tensor:
    """All gradients in one vector, and clears them."""
    gradients = torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in encoder.parameters()]
    )
    encoder.zero_grad(set_to_none=True)
    return gradients
