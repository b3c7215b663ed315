"""The check at the start of a run: it passes for what the allow-list admits, and finds attention that crosses texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retriever.config import ConfigError, ModelConfig
from retriever.encoder import packed_attention
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution
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
    assert any(isinstance(module, FusedLayers) for module in encoder.modules()) == (architecture in ("bert", "roberta"))
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
