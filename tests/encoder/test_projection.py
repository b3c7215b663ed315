"""A projection head: trained behind the pooling, and a Dense module in the export, as sentence-transformers has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense as STDense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch.nn import Identity, Module, Tanh
from torch.nn.functional import normalize

from retriever.config import Config, ConfigError, ModelConfig
from retriever.data.layout import pad_rows
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.projection import Dense
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from retriever.parallel.sharded import PlacedEncoder
from retriever.parallel.world import World
from tests.tiny import save_tiny_model

TEXTS = ["river and mountain", "a question about the ocean"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DualEncoder]:
    root = tmp_path_factory.mktemp("projected")
    model = ModelConfig(str(save_tiny_model(root / "start")), tied=request.param, projection=12)
    config, tokenizer = Config(model=model), training_tokenizer(model)
    encoder = DualEncoder.from_pretrained(model).eval()
    encoder.project(12, seed=3)
    export(encoder, tokenizer, config, root / "export", Probe.of(encoder, tokenizer, config, TEXTS))
    return root / "export", encoder


def test_an_embedding_is_the_projected_vector_and_trains_the_matrix(exported: tuple[Path, DualEncoder]) -> None:
    _, encoder = exported
    tokens = pad_rows([np.array([2, 50, 60, 3])], 0)
    embeddings = encoder("query", tokens)
    with torch.no_grad():
        pooled = encoder.query_tower(input_ids=tokens.input_ids).last_hidden_state.mean(dim=1)
        weight = next(encoder.projections.parameters())
        torch.testing.assert_close(embeddings, normalize(pooled @ weight.T, dim=1))
    assert encoder.dimension == embeddings.shape[1] == 12
    embeddings[0, 0].backward()
    gradients = [p.grad for p in encoder.projections.parameters() if p.grad is not None]
    assert len(gradients) == 1 and gradients[0].norm() > 0
    encoder.zero_grad()


def test_the_export_is_sentence_transformers_dense_module(exported: tuple[Path, DualEncoder]) -> None:
    """Read by sentence-transformers, by us, and as the start of a further training, with the same embeddings."""
    folder, encoder = exported
    ours = load_encoder(folder, device="cpu")
    for side, name in (("query", "query"), ("passage", "document")):
        theirs = SentenceTransformer(str(folder if encoder.tied else folder / side), device="cpu")
        assert [type(module).__name__ for module in theirs][1:] == ["Pooling", "Dense", "Normalize"]
        expected = theirs.encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(ours.encode(TEXTS, side), expected, atol=1e-5)  # type: ignore[arg-type]
        whole = SentenceTransformer(str(folder), device="cpu")
        found = whole.encode_query(TEXTS) if side == "query" else whole.encode_document(TEXTS)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    again = DualEncoder.from_pretrained(ModelConfig(str(folder), tied=encoder.tied))
    before = {name: p.clone() for name, p in again.projections.named_parameters()}
    again.project(12, seed=9)
    for name, parameter in again.projections.named_parameters():
        assert torch.equal(parameter, before[name]) and torch.equal(parameter, encoder.projections.get_parameter(name))
    again.project(8, seed=9)
    assert again.dimension == 8


def test_truncation_is_measured_by_the_head_that_is_used(exported: tuple[Path, DualEncoder]) -> None:
    folder, encoder = exported
    model = ModelConfig(str(folder), tied=encoder.tied, truncate_dim=13)
    with pytest.raises(ConfigError, match="truncate_dim: expected at most 12, the model's dimension; received 13"):
        DualEncoder.from_pretrained(model)
    assert DualEncoder.from_pretrained(replace(model, projection=40)).truncate_dim == 13


def test_the_hash_follows_the_activation(exported: tuple[Path, DualEncoder]) -> None:
    bundle = load_encoder(exported[0], device="cpu")
    before = bundle.model_hash()
    for layer in bundle.encoder.projections.modules():
        if isinstance(layer, Dense):
            layer.activation = Tanh()
    assert bundle.model_hash() != before


def test_a_head_of_the_folder_is_refused_in_shards(exported: tuple[Path, DualEncoder]) -> None:
    with pytest.raises(ConfigError, match="names a model with Dense modules; expected one without them with FSDP"):
        PlacedEncoder(exported[1], World(torch.device("cpu"), sharded=True))


@pytest.mark.parametrize(("asked", "kept"), [(12, True), (4, False)])
def test_a_head_is_kept_by_its_own_size_not_by_the_truncated_one(
    exported: tuple[Path, DualEncoder], asked: int, kept: bool
) -> None:
    folder, encoder = exported
    cut = DualEncoder.from_pretrained(ModelConfig(str(folder), tied=encoder.tied, truncate_dim=4))
    before = [p.clone() for p in cut.projections.parameters()]
    cut.project(asked, seed=9)
    after = list(cut.projections.parameters())
    assert [torch.equal(p, q) for p, q in zip(before, after, strict=True)] == [kept] * len(before)
    assert {p.shape[0] for p in after} == {asked} and cut.dimension == 4


@pytest.mark.parametrize(
    ("architecture", "activation"), [("t5", Identity()), ("gemma3_text", Identity()), ("bert", Tanh())]
)
def test_the_dense_modules_of_others_are_kept(architecture: str, activation: Module, tmp_path: Path) -> None:
    """As sentence-t5, EmbeddingGemma and LaBSE have them: loaded, trained, exported, and read where they came from."""
    transformer = Transformer(str(save_tiny_model(tmp_path / "model", architecture)))
    wide = STDense(32, 48, bias=architecture == "bert", activation_function=activation)
    narrow = STDense(48, 24, bias=False, activation_function=Identity())
    start = tmp_path / "start"
    SentenceTransformer(modules=[transformer, Pooling(32, "mean"), wide, narrow, Normalize()], device="cpu").save(
        str(start)
    )
    theirs = SentenceTransformer(str(start), device="cpu")
    np.testing.assert_allclose(
        load_encoder(start, device="cpu").encode(TEXTS, "query"), theirs.encode(TEXTS), rtol=0, atol=1e-5
    )
    model = ModelConfig(str(start))
    encoder, tokenizer = DualEncoder.from_pretrained(model), training_tokenizer(model)
    encoder.project(24, seed=0)  # which they are already
    tokens = pad_rows([np.array([2, 50, 60, 3]), np.array([2, 70, 3])], encoder.passage_tower.config.pad_token_id)
    encoder("query", tokens).pow(3).sum().backward()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            parameter.sub_(parameter.grad)
    assert encoder.projections["shared"].get_parameter("0.weight").grad.norm() > 0  # type: ignore[union-attr]
    config = Config(model=model)
    folder = export(encoder.eval(), tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, TEXTS))
    again, found = SentenceTransformer(str(folder), device="cpu"), load_encoder(folder, device="cpu")
    assert [type(module).__name__ for module in again][1:] == ["Pooling", "Dense", "Dense", "Normalize"]
    np.testing.assert_allclose(found.encode(TEXTS, "query"), again.encode(TEXTS), rtol=0, atol=1e-5)
    assert np.abs(again.encode(TEXTS) - theirs.encode(TEXTS)).max() > 1e-3
    assert again.get_embedding_dimension() == found.dimension == 24


def test_another_dense_module_is_refused(exported: tuple[Path, DualEncoder]) -> None:
    folder, encoder = exported
    file = folder / ("" if encoder.tied else "query") / "2_Dense" / "config.json"
    found = file.read_text()
    for change, message in (
        ({"bias": True}, r"expected the weights of a Dense module: 'linear\.bias'"),
        ({"activation_function": "my.Swish"}, "activation_function: expected one of .*Identity.*received 'my.Swish'"),
        ({"use_residual": True}, "expected use_residual false"),
    ):
        file.write_text(json.dumps(json.loads(found) | change))
        with pytest.raises(ConfigError, match=message):
            load_encoder(folder, device="cpu")
    weights = load_file(file.with_name("model.safetensors"))
    save_file({"linear.weight": torch.zeros(12, 31)}, file.with_name("model.safetensors"))
    file.write_text(json.dumps(json.loads(found) | {"in_features": 31}))
    with pytest.raises(ConfigError, match=r"2_Dense/config.json: in_features: expected 32, .*; received 31"):
        load_encoder(folder, device="cpu")
    save_file(weights, file.with_name("model.safetensors"))
    file.write_text(json.dumps(json.loads(found) | {"out_features": 13}))
    with pytest.raises(ConfigError, match=r"linear.weight: expected shape \[13, 32\], received \[12, 32\]"):
        load_encoder(folder, device="cpu")
    file.write_text(found)
