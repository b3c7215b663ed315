"""Layers that only encode: the library's embeddings as closely as half precision allows, and the fused layers' wherever they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from retriever.config import ModelConfig
from retriever.data.layout import Packed, pack_rows
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.encoding_embeddings import EncodingEmbeddings
from retriever.encoder.encoding_layers import EncodingLayers, fuse_for_encoding, fused_for_encoding
from retriever.encoder.fused_layers import FusedLayers
from retriever.encoder.slabs import inference
from tests.tiny import MAX_POSITIONS, save_tiny_model

LENGTHS = (90, 41, 17, 3, 1)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def tokens() -> Packed:
    generator = torch.Generator().manual_seed(0)
    return pack_rows([torch.randint(5, 198, (n,), generator=generator).numpy() for n in LENGTHS])


def _encoder(folder: Path, layers: str, dtype: torch.dtype | None = None) -> DualEncoder:
    """Packed, of the library's own, fused or encoding layers, in eval mode."""
    config = ModelConfig(str(folder), passage_max_tokens=MAX_POSITIONS)
    encoder = DualEncoder.from_pretrained(config, autocast_dtype=dtype)
    encoder.pack()
    if layers == "fused":
        encoder.fuse_layers()
    elif layers == "encoding":
        fuse_for_encoding(encoder.passage_tower)
    return encoder.eval()


@pytest.mark.parametrize(("dtype", "distance"), [(torch.bfloat16, 1e-4), (torch.float16, 3e-6)])
def test_half_precision_embeddings_are_close_to_exact_ones(folder: Path, tokens: Packed, dtype: torch.dtype, distance: float) -> None:
    """1 − cosine to the library's float32, which is no more than 1.5 times that of the fused layers in the same precision, if any."""
    with torch.no_grad():
        exact = _encoder(folder, "plain")("passage", tokens)

        def away(layers: str) -> Tensor:
            found = _encoder(folder, layers, dtype)("passage", tokens)
            assert found.dtype == torch.float32
            return 1 - cosine_similarity(found.double(), exact.double())  # [n]

        encoding, fused = away("encoding"), away("fused")
    assert 0 < encoding.max() < distance
    assert encoding.mean() < 1.5 * fused.mean() + 1e-7


def test_what_is_pooled_was_not_rounded(folder: Path, tokens: Packed) -> None:
    """The last layer's result is float32, with more digits than the stream between layers has."""
    tower = _encoder(folder, "encoding").passage_tower.eval()
    hidden = torch.randn(1, len(tokens.input_ids), tower.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = tower.encoder(hidden, packed_starts=tokens.starts, packed_longest=tokens.longest).last_hidden_state  # type: ignore[operator]
    assert found.dtype == torch.float32 and not torch.equal(found, found.half().float())


def test_without_half_precision_or_with_a_graph_they_are_the_fused_layers(folder: Path, tokens: Packed) -> None:
    """The very bits, in float32 and wherever a gradient is asked for; and the weights keep their names."""
    with torch.no_grad():
        assert torch.equal(_encoder(folder, "encoding")("passage", tokens), _encoder(folder, "fused")("passage", tokens))
    encoders = [_encoder(folder, layers, torch.bfloat16) for layers in ("encoding", "fused")]
    found = [encoder("passage", tokens) for encoder in encoders]
    assert found[0].requires_grad and torch.equal(*found)
    with torch.no_grad():
        assert not torch.equal(encoders[0]("passage", tokens), found[1])
    assert isinstance(encoders[0].passage_tower.encoder, EncodingLayers)
    assert list(encoders[0].state_dict()) == list(_encoder(folder, "plain").state_dict())


def test_a_projection_before_the_layers_may_hand_on_half_precision(tmp_path: Path, tokens: Packed) -> None:
    """ELECTRA's embeddings pass through a matrix product first, and stay the library's."""
    folder = save_tiny_model(tmp_path, "electra")
    with torch.no_grad():
        exact, found = (_encoder(folder, *how)("passage", tokens) for how in (("plain",), ("encoding", torch.bfloat16)))
    assert 0 < (1 - cosine_similarity(found.double(), exact.double())).max() < 1e-4
    assert not isinstance(_encoder(folder, "encoding").passage_tower.embeddings, EncodingEmbeddings)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta", "camembert"])
def test_embeddings_are_the_library_s_rounded_once(tmp_path: Path, tokens: Packed, architecture: str) -> None:
    """What reaches the layers: the float32 sum and norm in float16, and the very bits of the library with a graph."""
    tower = _encoder(save_tiny_model(tmp_path, architecture), "plain").passage_tower
    inputs = {"input_ids": tokens.input_ids[None], "position_ids": tokens.positions[None] + 2}
    exact = tower.embeddings(**inputs)  # type: ignore[operator]
    fuse_for_encoding(tower)
    assert torch.equal(tower.embeddings(**inputs), exact)  # type: ignore[operator]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = tower.embeddings(**inputs)  # type: ignore[operator]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), exact, rtol=1.01 * torch.finfo(torch.float16).eps / 2, atol=1e-6)


def test_a_model_in_training_encodes_by_them_and_keeps_its_own(folder: Path, tokens: Packed) -> None:
    """Inside the block the embeddings are the encoding layers'; after it the modules and their modes are those of before."""
    training = _encoder(folder, "fused", torch.bfloat16).train()
    before = dict(training.named_modules())
    with torch.no_grad():
        expected = _encoder(folder, "encoding", torch.bfloat16)("passage", tokens)
        with inference(training):
            assert torch.equal(training("passage", tokens), expected)
        with pytest.raises(RuntimeError, match="stopped"), inference(training):
            raise RuntimeError("stopped")
        assert not torch.equal(training.eval()("passage", tokens), expected)
    training.train()
    after = dict(training.named_modules())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert type(training.passage_tower.encoder) is FusedLayers and all(module.training for module in after.values())


def test_modes_set_by_hand_outlive_an_encoding(folder: Path) -> None:
    """A dropout that was switched off by hand stays off, in the embeddings and in the layers."""
    training = _encoder(folder, "fused", torch.bfloat16).train()
    tower: Any = training.passage_tower
    for dropout in (tower.embeddings.dropout, tower.encoder.layer[0].output.dropout):
        dropout.eval()
    before = {name: module.training for name, module in training.named_modules()}
    with inference(training):
        assert not any(module.training for module in training.modules())
    assert {name: module.training for name, module in training.named_modules()} == before
    assert list(before.values()).count(False) == 2


def test_layers_of_the_library_are_left_alone(folder: Path) -> None:
    tower = _encoder(folder, "plain").passage_tower
    layers = tower.encoder
    with fused_for_encoding(tower):
        assert tower.encoder is layers
