"""A memory bank on the device: its rows take part in the kernels' loss as they do in the definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retriever.config import BatchConfig, Config, LossConfig, ModelConfig
from retriever.data.chunks import Chunks
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import encode_without_graph, representation_gradients
from retriever.loss.bank import Bank
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.problems import random_batch, rank_batch
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("bank", ["moco", "contaccum"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_kernels_agree_with_the_definition(device: str, tmp_path: Path, bank: str, offload: bool) -> None:
    """The third step, by packed texts in fused layers, with what two steps put into the bank."""
    model = ModelConfig(str(save_tiny_model(tmp_path, num_hidden_layers=1)), query_max_tokens=32, passage_max_tokens=32)
    encoder, world = DualEncoder.from_pretrained(model).to(device), World(torch.device(device))
    encoder.pack()
    encoder.fuse_layers()

    def third_step(strategy: str, block_rows: int | None) -> tuple[float, list[Tensor]]:
        loss = LossConfig(strategy=strategy, precision="fp32", temperature=0.1, bank=bank, bank_steps=2)  # type: ignore[arg-type]
        objective = ContrastiveObjective(loss, unit_norm=True, block_rows=block_rows)
        config = Config(loss=loss, batch=BatchConfig(offload=block_rows is not None))
        objective.bank = Bank.from_config(config, encoder, world)
        for step in range(3):
            batch, _, _ = rank_batch(random_batch(seed=step, ignored=1), 0, 60, packed=True)
            chunks = [lambda chunk=chunk: chunk for chunk in batch.chunks]
            batch = replace(batch, step=step, chunks=Chunks(chunks, world.device))
            representations, _ = encode_without_graph(encoder.eval(), batch, offload=objective.offload)
            value, gradients = representation_gradients(objective, representations, batch, world)
        order = representations.order or [torch.arange(n) for n in batch.sizes]
        rows = [
            torch.empty_like(x.cpu()).index_copy(0, to, x.cpu()) for x, to in zip(gradients[:2], order, strict=True)
        ]
        return value.item(), rows

    value, found = third_step("tiled", 7 if offload else None)
    expected_value, expected = third_step("dense", None)
    assert abs(value / expected_value - 1) < 1e-4
    for got, wanted in zip(found, expected, strict=True):
        assert wanted.norm() > 1e-3
        assert (got - wanted).norm() < 1e-3 * wanted.norm()
