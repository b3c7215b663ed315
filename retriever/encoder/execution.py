"""Execution of the towers: packed or padded texts; fused, compiled or the library's own layers.

Checks show that packing changes no embedding, and that a chunk encoded again has the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.data.tokens import SIDES
from retriever.encoder.architectures import longest_input
from retriever.encoder.batch_norm import running_values_kept
from retriever.encoder.dual_encoder import DualEncoder
from retriever.rng import RngState

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


def check_replay(encoder: DualEncoder, model: ModelConfig) -> None:
    """Encodes random texts without a graph, and again with one under the same RNG state, as the gradient cache does.

    Texts are longer than a tile of attention, and shorter. Leaves the generators as they were. Raises ConfigError if
    the embeddings differ in a bit.
    """
    with RngState.capture(encoder.device).restored(), running_values_kept(encoder):
        for longest in (max(_LENGTHS), _LENGTHS[2]):
            tokens = _probe_texts(encoder, longest)
            for side in SIDES:
                state = RngState.capture(encoder.device)
                with torch.no_grad():
                    first = encoder(side, tokens)
                with state.restored():
                    again = encoder(side, tokens).detach()
                if not torch.equal(first, again):
                    modes = f"attention={model.attention}, fused={model.fused}, compile={model.compile}".lower()
                    raise ConfigError(
                        f"model: with {modes}, {side} texts encoded again with a graph have other embeddings (up to "
                        f"{float((first - again).abs().max()):.1e} apart, the same bits expected), so that the "
                        "gradient would not be the batch's; set model.compile=false and model.fused=false, or "
                        "model.attention=padded, and please report it"
                    )


@torch.no_grad()
def has_dropout(encoder: DualEncoder) -> bool:
    """Whether two encodings of the same texts differ, the encoder being in training mode. Leaves the generators as they
    were.
    """
    tokens = _probe_texts(encoder, max(_LENGTHS))
    with RngState.capture(encoder.device).restored(), running_values_kept(encoder):
        return not torch.equal(encoder("passage", tokens), encoder("passage", tokens))


@torch.no_grad()
def _probe_embeddings(encoder: DualEncoder) -> list[Tensor]:
    """Embeddings of the same random texts by every tower, in the layout that the encoder takes, without dropout."""
    training = encoder.training
    encoder.eval()
    embeddings = [encoder(side, _probe_texts(encoder, max(_LENGTHS))) for side in SIDES]
    encoder.train(training)
    return embeddings


def _probe_texts(encoder: DualEncoder, longest: int) -> Packed | Padded:
    """Random texts of up to `longest` tokens, in the layout that the encoder takes."""
    config = encoder.passage_tower.config
    longest = min(longest, longest_input(config) or longest)
    generator = np.random.default_rng(0)
    rows = [generator.integers(config.vocab_size // 8, config.vocab_size, min(n, longest)) for n in _LENGTHS]
    tokens: Packed | Padded = pack_rows(rows) if encoder.packed else pad_rows(rows, config.pad_token_id or 0)
    return tokens.map(lambda t: t.to(encoder.device))
