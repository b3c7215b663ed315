"""How the towers compute: packed or padded texts; fused, compiled or the library's own layers.

A check shows that packing changes no embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import pack_rows, pad_rows
from retriever.encoder.architectures import longest_input
from retriever.encoder.dual_encoder import DualEncoder

_LENGTHS = (150, 64, 33, 9, 1)
_MOST_APART = 1e-3  # 1 − cosine. bf16 stays below 1e-4; attention across texts and positions that run on exceed it.


def apply_execution(encoder: DualEncoder, model: ModelConfig) -> None:
    """Makes `encoder` compute as `model` says, whose `auto` values are resolved.

    Raises ConfigError where its towers cannot, or where packed texts have other embeddings than padded ones.
    """
    if model.attention == "packed":
        padded = _probe_embeddings(encoder)
        encoder.pack()
        if model.fused is True:
            encoder.fuse_layers()
        both = zip(padded, _probe_embeddings(encoder), strict=True)
        apart = max(float((1 - torch.cosine_similarity(a, b, dim=1)).max()) for a, b in both)
        if not apart <= _MOST_APART:
            raise ConfigError(
                f"model.attention: packed texts have other embeddings than padded ones in this model (1 - cosine up to "
                f"{apart:.1e}, at most {_MOST_APART:g} expected); set it to padded, and please report it"
            )
    if model.compile is True:
        encoder.compile_layers()


@torch.no_grad()
def _probe_embeddings(encoder: DualEncoder) -> list[Tensor]:
    """Embeddings of the same random texts by every tower, in the layout that the encoder takes, without dropout."""
    training, config = encoder.training, encoder.passage_tower.config
    encoder.eval()
    longest = longest_input(config) or max(_LENGTHS)
    generator = np.random.default_rng(0)
    rows = [generator.integers(config.vocab_size // 8, config.vocab_size, min(n, longest)) for n in _LENGTHS]
    tokens = pack_rows(rows) if encoder.packed else pad_rows(rows, config.pad_token_id or 0)
    embeddings = [encoder(side, tokens.to(encoder.device)) for side in ("query", "passage")]
    encoder.train(training)
    return embeddings
