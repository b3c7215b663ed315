"""Su's surrogate, accumulated over small batches, gives the parameter gradient of the gradient cache
(docs/method.md)."""

from __future__ import annotations

from pathlib import Path

import torch

from retriever.config import LossConfig, ModelConfig
from retriever.data.layout import pad_rows
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.problems import WholeBatch, cached_gradients, encode_whole, random_batch, rank_batch

TEMPERATURE = 0.1


def test_the_accumulated_surrogate_has_the_gradient_of_the_cache_and_another_value(one_layer: Path) -> None:
    """One set of texts, each the positive of its neighbour; a text is no negative of itself."""
    encoder = DualEncoder.from_pretrained(ModelConfig(str(one_layer))).double().eval()
    texts = random_batch(queries=4, passages=8).passage_tokens
    positives = [i ^ 1 for i in range(len(texts))]
    known = [[i, i ^ 1] for i in range(len(texts))]
    whole = WholeBatch(texts, texts, list(range(len(texts))), positives, known, [0] * len(texts))
    batch, _, _ = rank_batch(whole, 0, 40)

    objective = ContrastiveObjective(LossConfig(precision="fp32", temperature=TEMPERATURE), unit_norm=True)
    loss = cached_gradients(encoder, objective, batch, World(torch.device("cpu")))
    expected = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    encoder.zero_grad()

    h = encode_whole(encoder, texts, "passage").detach()  # [b, D]
    s = (h @ h.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    p, t = s.softmax(1), torch.eye(len(texts), dtype=h.dtype)[positives]  # [b, b] each
    surrogate_h = 2 * ((p + p.T) / 2 - t) @ h / TEMPERATURE / len(texts)  # [b, D]
    value = 0.0
    for start in range(0, len(texts), 2):  # small batches, each with a graph of its own
        rows = slice(start, start + 2)
        small = (encoder("passage", pad_rows(texts[rows], 0)) * surrogate_h[rows]).sum()
        small.backward()
        value += float(small.detach())
    found = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert abs(value - float(loss.detach())) > 0.1 * abs(float(loss.detach()))
