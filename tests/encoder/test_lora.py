"""Low-rank adapters: they start as nothing, alone are trained, and are part of the weights in an export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from retriever.config import Config, ConfigError, LoraConfig, ModelConfig
from retriever.data.tokens import Side
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import LoraLinear, adapt, merged_state
from retriever.encoder.settings import settings_of
from retriever.encoder.tokenizer import load_tokenizer
from retriever.export import Probe, export
from tests.tiny import random_texts, save_tiny_model

TEXTS = random_texts(8, seed=2)
LORA = LoraConfig(r=4, alpha=6.0)


def _encoder(
    folder: Path, lora: LoraConfig | None = LORA, *, trained: bool = True, tied: bool = True, seed: int = 0
) -> DualEncoder:
    """An adapted encoder, as after some steps: its B no longer zero."""
    encoder = DualEncoder.from_pretrained(
        ModelConfig(str(folder), tied=tied, query_max_tokens=64, passage_max_tokens=64)
    ).eval()
    if lora is not None:
        adapt(encoder.towers, lora, seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if trained and name.endswith("lora_b"):
                p.copy_(torch.randn(p.shape, generator=generator))
    return encoder


def _embed(encoder: DualEncoder, folder: Path, side: Side = "passage") -> np.ndarray:
    config = Config(model=ModelConfig(str(folder), tied=encoder.tied, query_max_tokens=64, passage_max_tokens=64))
    return EncoderBundle(encoder, load_tokenizer(folder), settings_of(config, encoder.pooling)).encode(TEXTS, side)


@pytest.mark.parametrize(
    "architecture", ["bert", "albert", "deberta-v2", "distilbert", "llama", "modernbert", "mpnet", "nomic_bert"]
)
def test_adapters_compute_what_their_merged_weights_compute(architecture: str, tmp_path: Path) -> None:
    """So no architecture reads a weight behind the adapter's back; untrained adapters change no bit."""
    folder = save_tiny_model(tmp_path / "model", architecture)
    plain, adapted = _encoder(folder, None), _encoder(folder)
    assert np.array_equal(_embed(_encoder(folder, trained=False), folder), _embed(plain, folder))
    found = _embed(adapted, folder)
    assert np.abs(found - _embed(plain, folder)).max() > 1e-2
    plain.passage_tower.load_state_dict(merged_state(adapted.passage_tower))
    assert np.abs(found - _embed(plain, folder)).max() < 1e-5


def test_a_layer_follows_its_equation(tmp_path: Path) -> None:
    """y = W x + b + (α / r) B A x, and its merged weight, against the sum written out in float64."""
    base = nn.Linear(5, 3).double()
    layer = LoraLinear(base, LoraConfig(r=2, alpha=3.0), torch.Generator())
    nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 5, dtype=torch.float64)
    weight = base.weight.clone()
    for k in range(2):
        weight = weight + 3.0 / 2 * torch.outer(layer.lora_b[:, k], layer.lora_a[k])
    assert torch.allclose(layer(x), x @ weight.T + base.bias, rtol=1e-12)
    assert torch.allclose(layer.merged(), weight, rtol=1e-12)


def test_only_adapters_are_trained_and_all_of_them_are(tmp_path: Path) -> None:
    encoder = _encoder(save_tiny_model(tmp_path / "model"))
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    linear = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 12 and trained == {f"{name}.{part}" for name in linear for part in ("lora_a", "lora_b")}
    _embed_with_graph(encoder).sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.any()) == p.requires_grad for p in encoder.parameters() if p.requires_grad
    )
    assert all(p.grad is None for p in encoder.parameters() if not p.requires_grad)


def _embed_with_graph(encoder: DualEncoder) -> Tensor:
    tower = encoder.passage_tower
    return tower(input_ids=torch.arange(50, 70).view(2, 10)).last_hidden_state.square()


def test_dropout_acts_in_training_alone(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = _encoder(folder, LoraConfig(r=4, dropout=0.5))
    still = _embed_with_graph(encoder)
    assert torch.equal(_embed_with_graph(encoder), still)
    encoder.train()
    assert not torch.allclose(_embed_with_graph(encoder), _embed_with_graph(encoder))


def test_the_start_is_a_function_of_the_seed_and_the_layer(tmp_path: Path) -> None:
    """Whatever was drawn before: ranks hold the same adapters without talking. Layers and towers differ."""
    folder = save_tiny_model(tmp_path / "model")
    torch.manual_seed(1)
    first = _encoder(folder, tied=False).state_dict()
    torch.manual_seed(2)
    again, other = _encoder(folder, tied=False).state_dict(), _encoder(folder, tied=False, seed=1).state_dict()
    drawn = [name for name in first if name.endswith("lora_a")]
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in drawn)
    assert len({first[name].double().sum().item() for name in drawn}) == len(drawn) == 24


def test_the_hash_follows_the_scale(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    model = ModelConfig(str(folder), query_max_tokens=64, passage_max_tokens=64)
    hashes = set()
    for alpha in (6.0, 12.0):
        encoder = _encoder(folder, LoraConfig(r=4, alpha=alpha))
        settings = settings_of(Config(model=model), encoder.pooling)
        hashes.add(EncoderBundle(encoder, load_tokenizer(folder), settings).model_hash())
    assert len(hashes) == 2


def test_targets_choose_layers_by_the_end_of_their_names(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    for targets, count in (
        (("query", "value"), 4),
        (("attention.output.dense",), 2),
        (("output.dense",), 4),
        (("layer.1.output.dense",), 1),
    ):
        encoder = _encoder(folder, LoraConfig(targets=targets))
        assert sum(isinstance(module, LoraLinear) for module in encoder.modules()) == count, targets
    with pytest.raises(ConfigError, match=r"model.lora.targets: 'q_proj' is no linear layer.*dense, key, query, value"):
        _encoder(folder, LoraConfig(targets=("query", "q_proj")))
    with pytest.raises(ConfigError, match="model.lora: a GPT2Model has no torch.nn.Linear"):
        _encoder(save_tiny_model(tmp_path / "gpt2", "gpt2"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_an_ordinary_model_of_merged_weights(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    encoder = _encoder(folder, tied=tied)
    config = Config(model=ModelConfig(str(folder), tied=tied, query_max_tokens=64, passage_max_tokens=64, lora=LORA))
    exported = export(
        encoder,
        load_tokenizer(folder),
        config,
        tmp_path / "export",
        Probe.of(encoder, load_tokenizer(folder), config, TEXTS),
    )
    for side in ("query", "passage"):
        live, start = _embed(encoder, folder, side), _embed(_encoder(folder, None), folder, side)
        assert (
            np.abs(load_encoder(exported).encode(TEXTS, side) - live).max() < 1e-5 < 1e-2 < np.abs(live - start).max()
        )
        written = exported if tied else exported / side
        assert load_file(written / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
        assert type(AutoModel.from_pretrained(written).encoder.layer[0].output.dense) is nn.Linear
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), written / "adapter").eval()
        tokens = load_tokenizer(folder)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            found, merged, started = (
                model(**tokens).last_hidden_state
                for model in (adapted, AutoModel.from_pretrained(written), AutoModel.from_pretrained(folder))
            )
        real = tokens["attention_mask"].bool()
        assert (merged - started)[real].abs().max() > 1e-2
        torch.testing.assert_close(found[real], merged[real], rtol=0, atol=1e-4)
