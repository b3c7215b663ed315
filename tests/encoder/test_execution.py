"""The check at the start of a run: it passes for what the allow-list admits, and finds attention that crosses texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from retriever.config import ConfigError, ModelConfig
from retriever.encoder import packed_attention
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution, check_replay
from retriever.encoder.fused_layers import FusedLayers
from tests.tiny import MAX_POSITIONS, save_tiny_model

PLAIN = ModelConfig(attention="padded", fused=False, compile=False)


def _encoder(folder: Path, architecture: str = "bert") -> DualEncoder:
    model = save_tiny_model(folder, architecture, initializer_range=0.5)
    return DualEncoder.from_pretrained(ModelConfig(str(model), passage_max_tokens=MAX_POSITIONS))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "qwen3"])
def test_packed_and_fused_pass_and_leave_the_encoder_as_it_was(tmp_path: Path, architecture: str) -> None:
    encoder = _encoder(tmp_path, architecture)
    state = torch.get_rng_state()
    apply_execution(encoder, replace(PLAIN, attention="packed", fused=encoder.can_fuse))
    assert encoder.packed and encoder.training and all(module.training for module in encoder.modules())
    assert any(isinstance(module, FusedLayers) for module in encoder.modules()) == (architecture != "modernbert")
    assert all(p.grad is None for p in encoder.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_padded_changes_nothing(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path)
    apply_execution(encoder, PLAIN)
    assert not encoder.packed


@pytest.mark.parametrize("fault", ["one text", "positions"])
def test_a_model_that_reads_packed_texts_wrongly_is_refused(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder(tmp_path)
    right = packed_attention.packed_inputs

    def wrong(tower: object, texts: object) -> dict[str, object]:
        inputs = right(tower, texts)  # type: ignore[arg-type]
        if fault == "one text":
            total = inputs["input_ids"].numel()
            return inputs | {"packed_starts": torch.tensor([0, total], dtype=torch.int32), "packed_longest": total}
        return inputs | {"position_ids": inputs["position_ids"].flip(1)}

    monkeypatch.setattr("retriever.encoder.dual_encoder.packed_inputs", wrong)
    with pytest.raises(ConfigError, match=r"model\.attention: packed texts have other embeddings"):
        apply_execution(encoder, replace(PLAIN, attention="packed"))


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_a_replay_that_differs_in_a_bit_is_refused(
    tmp_path: Path, attention: Literal["packed", "padded"], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, model = _encoder(tmp_path), replace(PLAIN, attention=attention)
    apply_execution(encoder, model)
    state = torch.get_rng_state()
    check_replay(encoder, model)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in encoder.parameters())
    norm = encoder.passage_tower.get_submodule("encoder.layer.1.output.LayerNorm")
    right = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: right(x) * (1 + 1e-6 * torch.is_grad_enabled() * (len(x) > 0)))
    with pytest.raises(ConfigError, match=f"model: with attention={attention}, fused=false, compile=false, query"):
        check_replay(encoder, model)


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # torch's own
def test_more_graphs_than_dynamo_keeps_are_an_error_and_not_uncompiled_layers(tmp_path: Path) -> None:
    encoder, limits = _encoder(tmp_path), torch._dynamo.config
    with limits.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # as torch has them
        encoder.compile_layers()
        assert limits.recompile_limit >= 64 and limits.fail_on_recompile_limit_hit
