"""Fused layers are the library's layers: same embeddings, same gradients, same names; dropout replays bitwise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import Packed, pack_rows
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.fused_layers import FAMILY, FusedLayers
from retriever.rng import RngState
from tests.tiny import MAX_POSITIONS, save_tiny_model

LENGTHS = (90, 41, 17, 3, 1)


@pytest.fixture(scope="module", params=sorted(FAMILY))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def tokens() -> Packed:
    generator = torch.Generator().manual_seed(0)
    return pack_rows([torch.randint(5, 198, (n,), generator=generator).numpy() for n in LENGTHS])


def _packed(folder: Path, *, fused: bool) -> DualEncoder:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=MAX_POSITIONS))
    encoder.pack()
    if fused:
        encoder.fuse_layers()
    return encoder


def test_embeddings_and_gradients_are_the_library_s(folder: Path, tokens: Packed) -> None:
    """In float64, dropout off: 1e-12 for embeddings, every parameter's gradient to 1e-9."""
    encoders = [_packed(folder, fused=fused).double().eval() for fused in (False, True)]
    expected, found = (encoder("passage", tokens) for encoder in encoders)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for embeddings in (expected, found):
        (embeddings * direction).sum().backward()
    named = [dict(encoder.named_parameters()) for encoder in encoders]
    assert named[0].keys() == named[1].keys()
    for name, p in named[0].items():
        torch.testing.assert_close(named[1][name].grad, p.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert any(isinstance(module, FusedLayers) for module in encoders[1].modules())


def test_dropout_draws_at_every_place_and_replays_bitwise(folder: Path, tokens: Packed) -> None:
    encoder = _packed(folder, fused=True)
    state = RngState.capture(torch.device("cpu"))
    with torch.no_grad():
        first = encoder("passage", tokens)
    other = encoder("passage", tokens)
    with state.restored():
        again = encoder("passage", tokens)
    assert again.requires_grad and torch.equal(first, again) and not torch.equal(first, other)
    layer = encoder.passage_tower.encoder.layer[0]
    places = (layer.attention.self.dropout, layer.attention.output.dropout, layer.output.dropout, encoder.passage_tower.embeddings.dropout)
    seen = []
    for place in places:  # one at a time
        for other_place in encoder.modules():
            if isinstance(other_place, torch.nn.Dropout):
                other_place.p = 0.5 if other_place is place else 0.0
        seen.append(encoder("passage", tokens).detach())
    encoder.eval()
    seen.append(encoder("passage", tokens).detach())
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_weights_keep_their_names_in_memory_and_on_disk(folder: Path, tmp_path: Path) -> None:
    plain, fused = _packed(folder, fused=False), _packed(folder, fused=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    for name, encoder in (("plain", plain), ("fused", fused)):
        encoder.passage_tower.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "fused" / "config.json").read_text()


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(save_tiny_model(tmp_path / "a", "modernbert"))))
    assert not encoder.can_fuse
    with pytest.raises(ConfigError, match="model.fused: true, but the layers of a 'modernbert' model are not known"):
        encoder.fuse_layers()
    config = AutoConfig.from_pretrained(save_tiny_model(tmp_path / "b"), hidden_act="relu")
    AutoModel.from_config(config).save_pretrained(tmp_path / "c")
    (tmp_path / "c").joinpath("tokenizer.json").write_bytes((tmp_path / "b" / "tokenizer.json").read_bytes())
    relu = copy.deepcopy(DualEncoder.from_pretrained(ModelConfig(str(tmp_path / "c"))))
    assert not relu.can_fuse
