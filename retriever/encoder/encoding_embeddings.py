"""BERT's embeddings that only encode: rounded once to the float16 that encoding layers go on with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.embed_norm import embed_norm
from retriever.encoder.fused_embeddings import FusedEmbeddings


def only_encodes(module: nn.Module, device: torch.device) -> bool:
    """Whether `module` runs in half precision, in eval mode and without a graph."""
    return not module.training and not torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)


class EncodingEmbeddings(FusedEmbeddings):
    """Stands where a tower's embeddings stood."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, **others: Any) -> Tensor:
        """input_ids and position_ids [1, T] to the layers' input [1, T, H]: float16 where it is only encoded, else as in training."""
        words, places, segment, weight, bias, *_ = self.tables()
        if only_encodes(self, input_ids.device) and words.dtype == torch.float32:
            return embed_norm(input_ids[0], position_ids[0], words, places, segment, weight, bias, eps=self.LayerNorm.eps)[None]
        return super().forward(input_ids, position_ids, **others)
