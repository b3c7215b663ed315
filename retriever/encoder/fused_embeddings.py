"""BERT's embeddings on packed texts in one pass over memory: same weights, same names, same mathematics as the
library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.dispatch import WIDEST_ROW
from kernels.layers.embeddings import Tables, embeddings
from retriever.encoder.packed_attention import draw_seeds

_NAMES = {"word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "dropout"}


def knows_embeddings(tower: PreTrainedModel) -> bool:
    """Whether `tower` adds a word's, a position's and a segment's row and hands their norm to its layers, as BERT and
    RoBERTa do.
    """
    module: Any = tower.embeddings
    tables = [
        getattr(module, name, None) for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    plain = {name for name, _ in module.named_children()} == _NAMES and type(module.LayerNorm) is nn.LayerNorm
    plain = plain and all(type(table) is nn.Embedding and table.max_norm is None for table in tables)
    plain = plain and not any(table.sparse or table.scale_grad_by_freq for table in tables if table is not None)
    absolute = getattr(tower.config, "position_embedding_type", None) in (None, "absolute")
    hidden = tower.config.hidden_size  # ELECTRA's rows may be narrower, and go through a matrix product
    return plain and absolute and hidden <= WIDEST_ROW and module.LayerNorm.normalized_shape == (hidden,)


class FusedEmbeddings(nn.Module):
    """Stands where a tower's embeddings stood, with its modules under their names; takes packed texts, whose tokens are
    of segment 0.
    """

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
        """input_ids and position_ids [1, T] to the layers' input [1, T, H] in the tables' dtype."""
        dropout = self.dropout.p if self.dropout.training else 0.0
        seed = draw_seeds(1, input_ids.device) if dropout > 0 else None
        with torch.autocast(input_ids.device.type, enabled=False):
            y = embeddings(input_ids[0], position_ids[0], self.tables(), seed, eps=self.LayerNorm.eps, dropout=dropout)
        return y[None]

    def tables(self) -> Tables:
        """The parameters, the segment's row out of its table."""
        words, places, norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        segment = self.token_type_embeddings.weight[0]
        return Tables(
            words.weight, places.weight, segment, norm.weight, norm.bias, words.padding_idx, places.padding_idx
        )
