"""The gradient contract with low-rank adapters: their gradients are those of one process that trains the merged
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retriever.config import LoraConfig, LossConfig, ModelConfig
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import adapt
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.problems import cached_gradients, encode_whole, oracle_loss, random_batch, rank_batch
from tests.tiny import save_tiny_model

BOUND = 1e-9
LORA = LoraConfig(r=3, alpha=5.0)
CASES = ((True, "tiled"), (False, "dense"))


def _encoder(folder: Path, tied: bool) -> DualEncoder:
    encoder = DualEncoder.from_pretrained(
        ModelConfig(str(folder), tied=tied, query_max_tokens=32, passage_max_tokens=32)
    ).double()
    adapt(encoder.towers, LORA, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in encoder.parameters():  # B not zero, and towers that differ
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return encoder.eval()


def _objective(strategy: str) -> ContrastiveObjective:
    config = LossConfig(strategy=strategy, precision="fp32", temperature=0.1)  # type: ignore[arg-type]
    return ContrastiveObjective(config, unit_norm=True).double()


def _oracle(folder: Path, tied: bool, ranks: int) -> tuple[float, dict[str, Tensor]]:
    """Autograd over the whole batch through plain layers of weight W' = W + s·B·A, then dA = s·Bᵀ·dW' and dB =
    s·dW'·Aᵀ.
    """
    whole = random_batch(ranks=ranks)
    state = _encoder(folder, tied).state_dict()
    plain = (
        DualEncoder.from_pretrained(ModelConfig(str(folder), tied=tied, query_max_tokens=32, passage_max_tokens=32))
        .double()
        .eval()
    )
    adapted = [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]
    s = LORA.alpha / LORA.r
    weights = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    for name in adapted:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + s * state[f"{name}.lora_b"] @ state[f"{name}.lora_a"]
    plain.load_state_dict(weights)
    queries, passages = (
        encode_whole(plain, tokens, side)
        for tokens, side in ((whole.query_tokens, "query"), (whole.passage_tokens, "passage"))
    )
    loss = oracle_loss(queries, passages, whole, _objective("dense").log_scale.detach())
    loss.backward()
    gradients = {}
    for name in adapted:
        gradient = plain.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        gradients[f"{name}.lora_a"] = s * state[f"{name}.lora_b"].T @ gradient
        gradients[f"{name}.lora_b"] = s * gradient @ state[f"{name}.lora_a"].T
    return loss.item(), gradients


def _measure(world: World, folder: Path) -> dict[str, dict[str, Any]]:
    return {str(case): _measure_case(world, folder, *case) for case in CASES}


def _measure_case(world: World, folder: Path, tied: bool, strategy: str) -> dict[str, Any]:
    encoder = _encoder(folder, tied)
    objective = _objective(strategy)
    batch, _, _ = rank_batch(random_batch(ranks=world.size), world.rank, 57)
    loss = cached_gradients(encoder, objective, batch, world)
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    expected_loss, expected = _oracle(folder, tied, world.size)
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    return {
        "differing": sorted(expected.keys() ^ found.keys()),
        "norm": total.item(),
        "loss": abs(loss.item() / expected_loss - 1),
        # A key's bias moves no attention weight, but its adapter's B does: no tensor is exempt.
        "worst": max(((found[name] - g).norm() / g.norm()).item() for name, g in expected.items() if name in found),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_get_the_whole_batchs_gradient(world_size: int, tmp_path: Path) -> None:
    for rank, results in enumerate(run_on_ranks(_measure, world_size, save_tiny_model(tmp_path / "model"))):
        for case, result in results.items():
            assert result["norm"] > 1e-3 and result["differing"] == [], f"{case}: {result}"
            assert max(result["loss"], result["worst"]) <= BOUND, f"W={world_size} rank {rank} {case}: {result}"
