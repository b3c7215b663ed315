"""BERT's embeddings that only encode: one pass over memory instead of three gathers, two sums, a norm and its rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.dispatch import WIDEST_ROW
from kernels.embed_norm import embed_norm

_NAMES = {"word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"}


def knows_embeddings(tower: PreTrainedModel) -> bool:
    """Whether `tower` adds a word's, a position's and a segment's row and hands their norm to its layers, as BERT and RoBERTa do."""
    module: Any = tower.embeddings
    tables = [getattr(module, name, None) for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")]
    plain = {name for name, _ in module.named_children()} == _NAMES and type(module.LayerNorm) is nn.LayerNorm
    plain = plain and all(type(table) is nn.Embedding and table.max_norm is None for table in tables)
    absolute = getattr(tower.config, "position_embedding_type", None) in (None, "absolute")
    hidden = tower.config.hidden_size  # ELECTRA's rows may be narrower, and go through a matrix product
    return plain and absolute and hidden <= WIDEST_ROW and module.LayerNorm.normalized_shape == (hidden,)


def only_encodes(module: nn.Module, device: torch.device) -> bool:
    """Whether `module` runs in half precision, in eval mode and without a graph."""
    return not module.training and not torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)


class EncodingEmbeddings(nn.Module):
    """Stands where a tower's embeddings stood, with its modules under their names; takes packed texts, whose tokens are of segment 0."""

    word_embeddings: nn.Embedding
    position_embeddings: nn.Embedding
    token_type_embeddings: nn.Embedding
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self.training = module.training  # of it alone: the modules are shared, and have modes of their own

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> Tensor:
        """input_ids and position_ids [1, T] to the layers' input [1, T, H]: float16 where it is only encoded, else the library's."""
        words, places, segment = self.word_embeddings.weight, self.position_embeddings.weight, self.token_type_embeddings.weight[0]
        norm = self.LayerNorm
        if only_encodes(self, input_ids.device) and words.dtype == torch.float32:
            rows = embed_norm(input_ids[0], position_ids[0], words, places, segment, norm.weight, norm.bias, eps=norm.eps)  # [T, H]
            return rows[None]
        return self.dropout(norm(self.word_embeddings(input_ids) + segment + self.position_embeddings(position_ids)))
