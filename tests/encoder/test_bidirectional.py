"""Decoders whose tokens see the whole text: padded, packed, fused, and in exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel

from retriever.config import Config, ConfigError, ModelConfig
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.encoder.architectures import DECODERS
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.fused_specs import FAMILY
from retriever.encoder.settings import read_settings
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from tests.tiny import random_texts, save_plain_model, save_tiny_model

LENGTHS = (3, 41, 24, 1)
WINDOW = 16  # Mistral's and Gemma 3's; without a causal mask, transformers counts it to either side
TEXTS = random_texts(5, shortest=4, longest=40)


@pytest.fixture(scope="module", params=sorted(DECODERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_plain_model(tmp_path_factory.mktemp("model"), request.param)
    if request.param == "gemma3_text":  # a causal one
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_bidirectional_attention": False}))
    return folder


@pytest.fixture
def rows() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, 198, n) for n in LENGTHS]


def _encoder(folder: Path) -> DualEncoder:
    model = ModelConfig(str(folder), bidirectional=True, normalize=False)
    return DualEncoder.from_pretrained(model).double().eval()


def _expected(folder: Path, rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Means of the library's token vectors, text by text, under a mask given as a matrix; and a gradient."""
    tower = AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    means = []
    for row in rows:
        apart = (torch.arange(len(row))[:, None] - torch.arange(len(row))).abs()
        full = torch.zeros(1, 1, *apart.shape, dtype=torch.float64)
        sliding = full.masked_fill(apart > WINDOW, -torch.inf)
        both = {"full_attention": full, "sliding_attention": sliding}
        mask: Any = {"mistral": sliding, "gemma3_text": both}.get(tower.config.model_type, full)
        ids, positions = torch.from_numpy(row)[None], torch.arange(len(row))[None]
        hidden = tower(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        means.append(hidden[0].mean(dim=0))
    embeddings = torch.stack(means)
    embeddings.pow(3).sum().backward()
    gradient = tower.get_input_embeddings().weight.grad
    assert gradient is not None and gradient.abs().max() > 1e-3
    return embeddings, gradient


@pytest.mark.parametrize("layout", ["padded", "packed", "fused"])
def test_every_token_sees_the_whole_text(folder: Path, rows: list[np.ndarray], layout: str) -> None:
    """Embeddings are means (`pooling: auto`), and gradients are the library's (whose norms compute in float32)."""
    encoder = _encoder(folder)
    tokens: Padded | Packed = pad_rows(rows, encoder.passage_tower.config.pad_token_id)
    if layout != "padded":
        encoder.pack()
        tokens = pack_rows(rows)
    if layout == "fused":
        if encoder.passage_tower.config.model_type not in FAMILY:
            assert not encoder.can_fuse
            return
        encoder.fuse_layers()
    expected, gradient = _expected(folder, rows)
    found = encoder("passage", tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    found.pow(3).sum().backward()
    weight = encoder.passage_tower.get_input_embeddings().weight
    torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


def test_an_export_stays_bidirectional(folder: Path, tmp_path: Path) -> None:
    """Read by us, by sentence-transformers and as the start of another run, which may make it causal again."""
    model = ModelConfig(str(folder), bidirectional=True)
    encoder, tokenizer, config = DualEncoder.from_pretrained(model), training_tokenizer(model), Config(model=model)
    written = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, TEXTS))
    assert json.loads((written / "config.json").read_text())["is_causal"] is False
    expected = load_encoder(written, device="cpu").encode(TEXTS, "passage")
    theirs = SentenceTransformer(str(written), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)
    causal = load_encoder(folder, device="cpu", pooling="mean").encode(TEXTS, "passage")
    assert np.abs(causal - expected).max() > 0.01
    again = DualEncoder.from_pretrained(ModelConfig(str(written)))
    assert again.passage_tower.config.is_causal is False
    again = DualEncoder.from_pretrained(ModelConfig(str(written), bidirectional=False))
    assert again.passage_tower.config.is_causal is True


def test_a_plain_folder_that_says_so_is_pooled_by_the_mean(folder: Path, tmp_path: Path) -> None:
    assert read_settings(folder).pooling == "last"
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"is_causal": False}))
    assert read_settings(tmp_path).pooling == "mean"
    assert DualEncoder.from_pretrained(ModelConfig(str(tmp_path), bidirectional=False)).pooling == "last"


def test_gemma_s_own_setting_is_refused(tmp_path: Path) -> None:
    """transformers 5.23 makes padded texts causal, and others not."""
    start = save_tiny_model(tmp_path, "gemma", use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match=r"use_bidirectional_attention: true.*write is_causal: false into its config"):
        DualEncoder.from_pretrained(ModelConfig(str(start)))


@pytest.mark.parametrize("architecture", ["bert", "gemma3_text"])
def test_what_is_built_for_whole_texts_cannot_be_causal(architecture: str, tmp_path: Path) -> None:
    start = save_tiny_model(tmp_path, architecture)
    encoder = DualEncoder.from_pretrained(ModelConfig(str(start), bidirectional=True))
    assert encoder.pooling == "mean" and not hasattr(encoder.passage_tower.config, "is_causal")
    with pytest.raises(ConfigError, match=rf"model\.bidirectional: false, but .* is a '{architecture}' model"):
        DualEncoder.from_pretrained(ModelConfig(str(start), bidirectional=False))
