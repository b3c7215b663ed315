"""Fused embeddings in the place of those of BERT-like towers, on packed texts, with their weights and names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.dispatch import WIDEST_ROW
from kernels.layers.embeddings import Tables, embeddings
from retriever.encoder.packed_attention import draw_seeds

CHANGE_FIRST = "fused layers would pass it by: change the model first, and fuse it (bigbatch.st.unpad) afterwards"
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def has_plain_embeddings(tower: PreTrainedModel) -> bool:
    """Whether `tower` hands its layers the norm of word, position and segment embeddings, as BERT and RoBERTa do."""
    module: Any = tower.embeddings
    if {name for name, _ in module.named_children()} != {*_EMBEDDINGS, "LayerNorm", "dropout"}:
        return False
    tables = [getattr(module, name) for name in _EMBEDDINGS]
    if any(type(table) is not nn.Embedding or table.max_norm is not None for table in tables):
        return False
    if any(table.sparse or table.scale_grad_by_freq for table in tables):
        return False
    if getattr(tower.config, "position_embedding_type", None) not in (None, "absolute"):
        return False
    norm, hidden = module.LayerNorm, tower.config.hidden_size
    # ELECTRA's rows may be narrower, and go through a matrix product.
    return type(norm) is nn.LayerNorm and norm.normalized_shape == (hidden,) and hidden <= WIDEST_ROW


class FusedEmbeddings(nn.Module):
    """Replaces a tower's embeddings; its modules keep their names. Takes packed texts, all of segment 0.

    Raises RuntimeError where a table was replaced by anything but another one.
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
        for name in _EMBEDDINGS:
            found = type(self._modules[name])
            if found is not nn.Embedding:
                raise RuntimeError(f"{name}: expected an Embedding, received a {found.__name__}; {CHANGE_FIRST}")
        dropout = self.dropout.p if self.dropout.training else 0.0
        seed = draw_seeds(1, input_ids.device) if dropout > 0 else None
        with torch.autocast(input_ids.device.type, enabled=False):
            y = embeddings(input_ids[0], position_ids[0], self.tables(), seed, eps=self.LayerNorm.eps, dropout=dropout)
        return y[None]

    def tables(self) -> Tables:
        """The parameters, the segment's row out of its table."""
        words, positions, norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        weights = words.weight, positions.weight, self.token_type_embeddings.weight[0], norm.weight, norm.bias
        return Tables(*weights, words.padding_idx, positions.padding_idx)
