"""Texts to embeddings: order, chunking, prompts and lengths change nothing they should not, and dropout stays off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from retriever.config import ConfigError, ModelConfig
from retriever.data.tokens import Side
from retriever.encoder import bundle as bundle_module
from retriever.encoder import text_batches
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from tests.tiny import random_texts, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> EncoderBundle:
    return load_encoder(folder, query_prompt="find: ", query_max_tokens=12, passage_max_tokens=20)


def _one_by_one(folder: Path, texts: list[str], prompt: str, max_tokens: int) -> np.ndarray:
    """Normalised means by transformers alone, a text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        encoded = [
            tokenizer(prompt + text, truncation=True, max_length=max_tokens, return_tensors="pt") for text in texts
        ]
        means = torch.cat([model(e["input_ids"], e["attention_mask"]).last_hidden_state.mean(dim=1) for e in encoded])
    return (means / means.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize("tokens_per_chunk", [1, 33, 100_000])
def test_embeddings_equal_transformers_one_by_one(folder: Path, bundle: EncoderBundle, tokens_per_chunk: int) -> None:
    texts = ["", *random_texts(40, longest=30), "the brain"]
    sides: list[tuple[Side, str, int]] = [("query", "find: ", 12), ("passage", "", 20)]
    for side, prompt, max_tokens in sides:
        found = bundle.encode(texts, side, tokens_per_chunk=tokens_per_chunk)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, _one_by_one(folder, texts, prompt, max_tokens), rtol=0, atol=1e-6)


def test_texts_beyond_one_batch_keep_their_order(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(25)
    seen: list[int] = []
    whole = bundle.encode(texts, "passage")
    monkeypatch.setattr(bundle_module, "BATCH_TEXTS", 10)
    monkeypatch.setattr(text_batches, "_TEXTS_AT_ONCE", 4)
    np.testing.assert_allclose(bundle.encode(texts, "passage", progress=seen.append), whole, rtol=0, atol=1e-6)
    assert sum(seen) == 25
    assert bundle.encode([], "passage").shape == (0, 32)


def test_a_text_without_tokens_gets_the_zero_vector(tmp_path: Path) -> None:
    """This decoder's tokenizer is made to add no special tokens, as many real ones do."""
    folder = save_tiny_model(tmp_path, "llama")
    loaded = load_encoder(folder)
    loaded.tokenizer.backend_tokenizer.post_processor = None
    found = loaded.encode(["the brain", "", "heart"], "query")
    assert not found[1].any()
    np.testing.assert_allclose(np.linalg.norm(found[[0, 2]], axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(loaded.encode(["", ""], "query"), np.zeros((2, 32)))


def test_a_live_encoder_is_evaluated_without_dropout_and_goes_on_training(folder: Path, bundle: EncoderBundle) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder)))
    encoder.query_tower.get_submodule("embeddings").eval()  # a module that its owner froze
    modes = [module.training for module in encoder.modules()]
    assert any(modes)
    state = torch.get_rng_state()
    live = EncoderBundle(encoder, bundle.tokenizer, bundle.settings)
    np.testing.assert_array_equal(live.encode(random_texts(5), "query"), bundle.encode(random_texts(5), "query"))
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_hash_follows_what_makes_the_embeddings(folder: Path, tmp_path: Path) -> None:
    first = load_encoder(folder)
    assert (
        first.model_hash() == load_encoder(folder, query_prompt="x", query_max_tokens=9, precision="bf16").model_hash()
    )
    assert first.model_hash() != load_encoder(folder, pooling="cls").model_hash()
    assert first.model_hash() != load_encoder(folder, normalize=False).model_hash()
    assert first.model_hash() != load_encoder(save_tiny_model(tmp_path / "eps", layer_norm_eps=1e-5)).model_hash()
    before = first.model_hash()
    first.tokenizer(
        ["a", "the brain"], padding=True, truncation=True, max_length=3
    )  # leaves its settings in the tokenizer
    assert first.model_hash() == before
    first.tokenizer.add_tokens(["zebra"])
    assert first.model_hash() != before
    again = load_encoder(folder)
    with torch.no_grad():
        again.encoder.query_tower.get_parameter("embeddings.word_embeddings.weight")[7, 3] += 1e-6
    assert again.model_hash() != before


def test_what_is_given_replaces_what_the_folder_says(folder: Path) -> None:
    given = load_encoder(
        folder, pooling="last", normalize=False, passage_prompt="p: ", passage_max_tokens=9, precision="bf16"
    )
    assert (given.settings.pooling, given.settings.normalize, given.settings.passage_prompt) == ("last", False, "p: ")
    assert (given.settings.passage_max_tokens, given.precision, given.encoder.pooling) == (9, "bf16", "last")
    assert not given.encoder.training
    unknown: Any = "int8"
    with pytest.raises(ConfigError, match="precision is 'int8'; expected one of fp32, bf16, fp16"):
        load_encoder(folder, precision=unknown)
    with pytest.raises(ConfigError, match=r"model\.query_max_tokens: 999 tokens.*at most 256"):
        load_encoder(folder, query_max_tokens=999)
    for none_left in (2, 0, -1):
        with pytest.raises(ConfigError, match=rf"model\.passage_max_tokens: expected at least 4.*received {none_left}"):
            load_encoder(folder, passage_max_tokens=none_left)


def test_a_folder_without_a_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer that knows a word"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("modules", [True, False])
def test_a_folder_that_sentence_transformers_truncates_gives_as_many_dimensions(tmp_path: Path, modules: bool) -> None:
    """With and without a module that normalises: the scores are its cosines."""
    parts = [
        Transformer(str(save_tiny_model(tmp_path / "start"))),
        Pooling(32, "mean"),
        *([Normalize()] if modules else []),
    ]
    theirs = SentenceTransformer(modules=parts, device="cpu", truncate_dim=12)
    theirs.save(str(tmp_path / "truncated"))
    texts, ours = random_texts(20), load_encoder(tmp_path / "truncated", device="cpu")
    expected, found = theirs.encode(texts), ours.encode(texts, "passage")
    assert found.shape == expected.shape == (20, 12) and ours.dimension == 12
    np.testing.assert_allclose(found @ found.T, theirs.similarity(expected, expected), rtol=0, atol=1e-5)
    assert np.abs(found - load_encoder(tmp_path / "start").encode(texts, "passage")[:, :12]).max() > 0.01
    assert ours.model_hash() != load_encoder(tmp_path / "start").model_hash()


def test_scores_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    """No module normalises, and nothing is said of similarity: cosine."""
    parts = [Transformer(str(save_tiny_model(tmp_path / "start"))), Pooling(32, "mean")]
    theirs = SentenceTransformer(modules=parts, device="cpu")
    theirs.save(str(tmp_path / "saved"))
    (tmp_path / "saved" / "config_sentence_transformers.json").unlink()
    texts, ours = random_texts(20), load_encoder(tmp_path / "saved", device="cpu")
    found, again = ours.encode(texts, "query"), SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(
        found @ found.T, again.similarity(again.encode(texts), again.encode(texts)), rtol=0, atol=1e-5
    )
    assert ours.settings.similarity == again.similarity_fn_name == "cosine"
    assert np.abs(np.linalg.norm(again.encode(texts), axis=1) - 1).max() > 0.1
