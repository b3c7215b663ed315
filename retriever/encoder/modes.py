"""How the towers compute: packed or padded, by fused, compiled or the library's own layers; and a check that it changes
no embedding.
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
_APART = 1e-3  # 1 − cosine: bf16 stays below 1e-4; attention that crosses texts, or positions that run on, do not


def use(encoder: DualEncoder, model: ModelConfig) -> None:
    """Makes `encoder` compute as `model` says, whose `auto` values are resolved.

    Raises ConfigError where its towers cannot, or where packed texts have other embeddings than padded ones.
    """
    if model.attention == "packed":
        before = _embeddings(encoder)
        encoder.pack()
        if model.fused is True:
            encoder.fuse_layers()
        _check_equal(before, _embeddings(encoder))
    if model.compile is True:
        encoder.compile_layers()


def _check_equal(before: list[Tensor], after: list[Tensor]) -> None:
    apart = max(float((1 - torch.cosine_similarity(a, b, dim=1)).max()) for a, b in zip(before, after, strict=True))
    if not apart <= _APART:
        raise ConfigError(
            f"model.attention: packed texts have other embeddings than padded ones in this model (1 - cosine up to {apart:.1e}, "
            f"at most {_APART:g} expected); set it to padded, and please report it"
        )


@torch.no_grad()
def _embeddings(encoder: DualEncoder) -> list[Tensor]:
    """Of the same random texts by every tower, in whichever layout the encoder takes; dropout is off meanwhile."""
    training = encoder.training
    encoder.eval()
    config = encoder.passage_tower.config
    most = longest_input(config) or max(_LENGTHS)
    generator = np.random.default_rng(0)
    rows = [generator.integers(config.vocab_size // 8, config.vocab_size, min(n, most)) for n in _LENGTHS]
    tokens = (pack_rows(rows) if encoder.packed else pad_rows(rows, config.pad_token_id or 0)).map(
        lambda t: t.to(encoder.device)
    )
    embeddings = [encoder("query", tokens), encoder("passage", tokens)]
    encoder.train(training)
    return embeddings
