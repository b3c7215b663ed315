"""The gradient contract in mixed precision: chunks and tiles add no error to what bf16 costs a whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from retriever.config import LossConfig, ModelConfig
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.problems import WholeBatch, cached_gradients, encode_whole, oracle_loss, random_batch, rank_batch
from tests.tiny import save_tiny_model


def _gradients(encoder: DualEncoder) -> Tensor:
    gradients = torch.cat([p.grad.flatten().double() for p in encoder.parameters() if p.grad is not None])
    encoder.zero_grad(set_to_none=True)
    return gradients


def _whole(encoder: DualEncoder, whole: WholeBatch, precision: str = "fp32") -> Tensor:
    """One forward pass over everything, then autograd through the plain loss of embeddings in the loss's precision."""
    sides = [encode_whole(encoder, t, s) for t, s in ((whole.query_tokens, "query"), (whole.passage_tokens, "passage"))]
    queries, passages = (x.bfloat16().float() if precision == "bf16" else x for x in sides)
    oracle_loss(queries, passages, whole, torch.tensor(0.05).log().neg()).backward()
    return _gradients(encoder)


def _cached(encoder: DualEncoder, whole: WholeBatch, precision: str) -> Tensor:
    batch, _, _ = rank_batch(whole, 0, 40)
    objective = ContrastiveObjective(LossConfig(precision=precision, temperature=0.05), unit_norm=True)  # type: ignore[arg-type]
    cached_gradients(encoder, objective, batch, World(torch.device("cpu")))
    return _gradients(encoder)


@pytest.mark.parametrize("loss_precision", ["fp32", "bf16"])
def test_the_cache_adds_no_error_to_bf16(tmp_path: Path, loss_precision: str) -> None:
    """Over several batches, ‖cached bf16 − fp32‖ is at most 1.1 times ‖whole batch in bf16 − fp32‖."""
    folder = save_tiny_model(tmp_path / "model")
    config = ModelConfig(name_or_path=str(folder))
    exact = DualEncoder.from_pretrained(config).eval()
    rounded = DualEncoder.from_pretrained(config, autocast_dtype=torch.bfloat16).eval()
    found, inherent = [], []
    for seed in range(5):
        whole = random_batch(queries=20, passages=40, seed=seed)
        expected = _whole(exact, whole)
        assert expected.norm() > 1e-3
        inherent.append((_whole(rounded, whole, loss_precision) - expected).norm() / expected.norm())
        found.append((_cached(rounded, whole, loss_precision) - expected).norm() / expected.norm())
    assert torch.stack(inherent).mean() > 1e-4, "bf16 was not in use"
    assert torch.stack(found).mean() <= 1.1 * torch.stack(inherent).mean()
