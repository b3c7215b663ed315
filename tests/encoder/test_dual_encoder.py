"""Towers: tied or not, precision of weights and outputs, padding sides, what a model folder may lack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import Padded
from retriever.encoder.dual_encoder import DualEncoder
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def batch() -> Padded:
    lengths = torch.tensor([4, 9, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return Padded(torch.randint(5, 198, (3, 9), generator=torch.Generator().manual_seed(0)) * mask, mask)


def test_embeddings_are_the_normalised_mean_of_automodel_outputs(bert: Path, batch: Padded) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(bert))).eval()
    hidden = (
        AutoModel.from_pretrained(bert)
        .eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        .last_hidden_state
    )
    mean = torch.stack([hidden[i, : int(n)].mean(dim=0) for i, n in enumerate(batch.attention_mask.sum(dim=1))])
    torch.testing.assert_close(encoder("query", batch), mean / mean.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    encoder.normalize = False
    torch.testing.assert_close(encoder("query", batch), mean, rtol=0, atol=1e-6)
    assert encoder.pooling == "mean" and encoder.dimension == 32


def test_tied_towers_are_one_module_and_untied_ones_learn_apart(bert: Path, batch: Padded) -> None:
    tied, untied = (
        DualEncoder.from_pretrained(ModelConfig(str(bert))),
        DualEncoder.from_pretrained(ModelConfig(str(bert), tied=False)),
    )
    assert tied.query_tower is tied.passage_tower and tied.tied
    assert untied.query_tower is not untied.passage_tower and not untied.tied
    assert len(list(untied.parameters())) == 2 * len(list(tied.parameters()))
    assert len(tied.state_dict()) == len(list(tied.parameters())), "a tied tower is saved once"

    untied.eval()("query", batch)[:, 0].sum().backward()
    assert all(p.grad is not None for p in untied.query_tower.parameters())
    assert all(p.grad is None for p in untied.passage_tower.parameters())
    with torch.no_grad():
        before = untied("query", batch)
        next(untied.query_tower.parameters()).add_(0.5)
        assert torch.equal(untied("passage", batch), before)
        assert not torch.equal(untied("query", batch), before)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_are_fp32_whatever_the_file_holds(bert: Path, stored: torch.dtype, tmp_path: Path) -> None:
    AutoModel.from_pretrained(bert).to(stored).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"].dtype == stored
    encoder = DualEncoder.from_pretrained(ModelConfig(str(tmp_path)))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_over_fp32_weights(bert: Path, batch: Padded, dtype: torch.dtype) -> None:
    exact = DualEncoder.from_pretrained(ModelConfig(str(bert))).eval()
    halved = DualEncoder.from_pretrained(ModelConfig(str(bert)), autocast_dtype=dtype).eval()
    seen: list[torch.dtype] = []
    dense = halved.query_tower.get_submodule("encoder.layer.0.intermediate.dense")
    dense.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    embeddings = halved("query", batch)
    embeddings[:, 0].sum().backward()
    assert seen == [dtype]
    assert embeddings.dtype == torch.float32
    assert {p.grad.dtype for p in halved.parameters() if p.grad is not None} == {torch.float32}
    difference = (embeddings - exact("query", batch)).abs().max()
    assert 0 < difference < 0.05
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_a_decoder_reads_padding_on_either_side_alike(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, architecture)
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder))).double().eval()
    assert encoder.pooling == "last"
    row = torch.randint(5, 198, (1, 6), generator=torch.Generator().manual_seed(0))
    pad, zero, one = (
        torch.zeros(1, 4, dtype=torch.int64),
        torch.zeros(1, 4, dtype=torch.int64),
        torch.ones(1, 6, dtype=torch.int64),
    )
    alone = encoder("query", Padded(row, one))
    right = encoder("query", Padded(torch.cat([row, pad], dim=1), torch.cat([one, zero], dim=1)))
    left = encoder("query", Padded(torch.cat([pad, row], dim=1), torch.cat([zero, one], dim=1)))
    torch.testing.assert_close(right, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(left, alone, rtol=0, atol=1e-6)


def test_a_missing_weight_is_refused_and_a_missing_pooler_is_not(bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    model = AutoModel.from_pretrained(bert)
    model.save_pretrained(tmp_path)
    headless = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(headless) < len(weights)
    save_file(headless, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = DualEncoder.from_pretrained(ModelConfig(str(tmp_path)))
    assert encoder.unused_weights == {"shared": {}}
    save_file(
        {k: v for k, v in headless.items() if "layer.1.output.dense" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        ConfigError, match=r"lacks 2 weights of its passage tower, encoder\.layer\.1\.output\.dense\.bias first"
    ):
        DualEncoder.from_pretrained(ModelConfig(str(tmp_path)))


def test_a_chunk_without_tokens_is_refused(bert: Path) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(bert)))
    empty = torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 texts on the query side without a token"):
        encoder("query", Padded(empty, empty))
