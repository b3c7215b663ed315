"""Bigbatch's loss for sentence-transformers' trainer: change one line of a training script.

    loss = bigbatch.st.InfoNCELoss(model, scale=20.0, mini_batch_size=64)

in place of `losses.CachedMultipleNegativesRankingLoss(model, …)`. Same arguments, same gradient. Embeddings are
computed by their own gradient cache; the similarity matrix is never stored, and mini-batches hold texts of similar
length. `unpad(model)` makes the encoder itself faster, with this loss or any other:

    loss = bigbatch.st.InfoNCELoss(bigbatch.st.unpad(model), mini_batch_num_tokens=65_536)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor
from torch.nn.functional import normalize, pad

from bigbatch.loss import Negatives, infonce
from kernels.infonce.api import Hardness, Precision
from retriever.config import Direction
from retriever.data.layout import Packed
from retriever.encoder.architectures import PACKED
from retriever.encoder.fused_layers import fuse
from retriever.encoder.fused_specs import unfused_because
from retriever.encoder.packed_attention import packed_inputs, use_packed_attention

_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids"}
_DIRECTIONS: dict[str, Direction] = {
    "query_to_doc": "query_to_passage",
    "doc_to_query": "passage_to_query",
    "query_to_query": "query_to_query",
    "doc_to_doc": "passage_to_passage",
}


class InfoNCELoss(CachedMultipleNegativesRankingLoss):
    """Multiple-negatives ranking loss over a batch of any size, in memory linear in the batch.

    Takes (anchor, positive, negative_1, …, negative_n) columns of texts, and the arguments of
    `CachedMultipleNegativesRankingLoss` with the same meaning. On several devices, `gather_across_devices` is for the
    direction "query_to_doc" alone. `precision` is as in `bigbatch.infonce`. Padded texts are sorted by length before
    they are cut into mini-batches, which changes no gradient unless dropout draws other masks for it. Works inside
    MatryoshkaLoss.

    Raises ValueError for an argument that is not available.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        *others: Any,
        precision: Precision | None = None,
        **named: Any,
    ) -> None:
        super().__init__(model, scale, similarity_fct, *others, **named)
        if similarity_fct not in (cos_sim, dot_score):
            raise ValueError(f"similarity_fct: expected util.cos_sim or util.dot_score, received {similarity_fct}")
        if len(set(self.directions)) > 1 and self.gather_across_devices:
            raise ValueError("gather_across_devices: expected False with several directions, received True")
        self.precision = precision
        self._places: list[Tensor | None] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss; its gradient is computed when it is differentiated."""
        columns = [_sorted_by_length(features) for features in sentence_features]
        self._places = [places for _, places in columns]
        return super().forward([features for features, _ in columns], labels)  # type: ignore[arg-type]

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the mini-batches' embeddings `reps`, by column; backpropagated to them where `with_backward`."""
        columns = [
            torch.cat(parts) if places is None else torch.cat(parts)[places]
            for parts, places in zip(reps, self._places, strict=True)
        ]
        if self.similarity_fct is cos_sim:
            columns = [normalize(column, dim=1) for column in columns]
        queries, documents = columns[0], columns[1:]  # [B, D] each
        first = 0
        if self.gather_across_devices:
            documents = [all_gather_with_grad(column) for column in documents]  # [W B, D] each
            first = get_rank() * len(queries)
        targets = torch.arange(first, first + len(queries), device=queries.device)
        loss = infonce(
            queries,
            torch.cat(documents).to(queries.dtype),
            targets,
            temperature=1 / self.scale,
            negatives=self._negatives(targets, documents),
            precision=self.precision,
        )
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _negatives(self, targets: Tensor, documents: list[Tensor]) -> Negatives | None:
        """What competes with the positives, documents[0], of which targets [B] are; None: the documents alone."""
        directions = tuple(_DIRECTIONS[name] for name in dict.fromkeys(self.directions))
        if len(directions) == 1 and self.hardness_mode is None:
            return None
        own, in_batch = (
            self.hardness_strength if self.hardness_mode in (mode, "all_negatives") else 0.0
            for mode in ("hard_negatives", "in_batch_negatives")
        )
        partition: Any = self.partition_mode
        columns = None
        if own != in_batch or "doc_to_doc" in self.directions:
            columns = targets[:, None] + len(documents[0]) * torch.arange(1, len(documents), device=targets.device)
        return Negatives(directions, partition, Hardness(own, in_batch), columns)

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"precision": self.precision}


def _sorted_by_length(features: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The rows of `features` by length, longest first, and where each row has gone; padded texts only."""
    tensors = {key for key, value in features.items() if isinstance(value, Tensor)}
    if "attention_mask" not in tensors or not tensors <= _TEXT_KEYS:
        return features, None
    order = features["attention_mask"].sum(1).argsort(descending=True, stable=True)
    return {key: value[order] if key in tensors else value for key, value in features.items()}, order.argsort()


def unpad(model: SentenceTransformer) -> SentenceTransformer:
    """Makes the encoder of `model` run on texts without padding, with Bigbatch's attention and fused layers.

    Embeddings are the same up to rounding, in training and in `model.encode`. Padded texts are packed before the
    encoder and padded again behind it, so other modules, losses and the trainer see no difference. Saved files are
    those of the model as it was. Returns `model` itself. Raises ValueError for an architecture whose attention cannot
    be told where texts begin, and for weights that are not float32: train in bf16 by the trainer's `bf16=True`.

    Add adapters and turn gradient checkpointing on before: after, a forward pass through fused layers raises
    RuntimeError. Made for GPUs: on a CPU it is slower than padding.
    """
    tower: Any = model[0].model
    if isinstance(tower.forward, partial):
        return model  # it is unpadded already
    if tower.config.model_type not in PACKED:
        raise ValueError(f"expected a model of {', '.join(sorted(PACKED))}, received {tower.config.model_type!r}")
    if tower.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected weights in torch.float32, received {tower.dtype}")
    use_packed_attention(tower)
    if unfused_because(tower) is None:
        fuse(tower)
    tower.forward = partial(_unpadded, tower.forward)
    return model


def _unpadded(forward: MethodType, *, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
    """A tower's own `forward` [n, width, H] over padded texts [n, width], packed before it and padded behind it."""
    lengths = attention_mask.sum(1)
    starts = pad(lengths.cumsum(0), (1, 0))  # [n + 1]
    places = attention_mask.flatten().nonzero()[:, 0]  # [T]: of the tokens among n · width
    positions = (attention_mask.cumsum(1) - 1).flatten()[places]
    packed = Packed(input_ids.flatten()[places], positions, starts.int(), int(lengths.max()))
    output = forward(**packed_inputs(forward.__self__, packed))  # type: ignore[arg-type]
    hidden = output.last_hidden_state[0]  # [T, H]
    rows = hidden.new_zeros(input_ids.numel(), hidden.shape[1]).index_copy(0, places, hidden)
    output.last_hidden_state = rows.view(*input_ids.shape, -1)
    return output
