"""What stands behind every text, in training, in the export and in sentence-transformers; and whether a text has room
at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from retriever.config import Config, ConfigError, ModelConfig
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.settings import settings_of
from retriever.encoder.tokenizer import ends_texts, load_tokenizer, training_tokenizer
from retriever.export import Probe, export
from tests.tiny import random_texts, save_plain_model, save_tiny_model

SEP = 3  # the end-of-text token of the tiny tokenizers
TEXTS = random_texts(6, shortest=2, longest=12)


def _model(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(str(folder), **{"query_max_tokens": 12, "passage_max_tokens": 24} | settings)


def _ids(tokenizer: Any, text: str = "the brain") -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_plain_language_model_of_last_pooling_gets_an_end(tmp_path: Path, architecture: str) -> None:
    folder = save_plain_model(tmp_path / "start", architecture)
    bare = _ids(load_tokenizer(folder))
    appending = training_tokenizer(_model(folder))
    assert _ids(appending) == [*bare, SEP] and ends_texts(appending)
    assert _ids(training_tokenizer(_model(folder, pooling="mean"))) == bare
    assert _ids(training_tokenizer(_model(folder, append_eos=False))) == bare
    assert _ids(training_tokenizer(_model(folder, pooling="mean", append_eos=True))) == [*bare, SEP]


def test_what_is_appended_is_appended_in_the_export_too(tmp_path: Path) -> None:
    model = _model(save_plain_model(tmp_path / "start"), query_prompt="find: ", query_max_tokens=24)
    encoder, tokenizer, config = DualEncoder.from_pretrained(model), training_tokenizer(model), Config(model=model)
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, TEXTS))
    live = EncoderBundle(encoder, tokenizer, settings_of(config, "last"))
    expected = {side: live.encode(TEXTS, side) for side in ("query", "passage")}
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), load_encoder(folder, device="cpu")
    np.testing.assert_allclose(ours.encode(TEXTS, "query"), expected["query"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), expected["query"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), expected["passage"], rtol=0, atol=1e-5)
    cut = AutoTokenizer.from_pretrained(folder)(" ".join(TEXTS), truncation=True)["input_ids"]
    assert (len(cut), cut[-1]) == (24, SEP)
    without = EncoderBundle(encoder, load_tokenizer(tmp_path / "start"), live.settings).encode(TEXTS, "passage")
    assert np.abs(without - expected["passage"]).max() > 0.01


def test_an_embedding_models_tokenizer_is_left_alone(tmp_path: Path) -> None:
    """It was trained as it is."""
    folder = save_plain_model(tmp_path / "start")
    model = _model(folder, append_eos=False)
    encoder, tokenizer, config = DualEncoder.from_pretrained(model), training_tokenizer(model), Config(model=model)
    export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, TEXTS))
    assert not ends_texts(training_tokenizer(_model(tmp_path / "export")))
    assert ends_texts(training_tokenizer(_model(tmp_path / "export", append_eos=True)))


def test_an_end_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "bert")  # [CLS] … [SEP], which is its end-of-text token
    with_end = _ids(load_tokenizer(folder))
    assert _ids(training_tokenizer(_model(folder, append_eos=True))) == with_end
    without = training_tokenizer(_model(folder, append_eos=False))
    assert _ids(without) == with_end[:-1] and len(with_end) == 4
    assert without("the brain", "heart")["input_ids"] == [*with_end[:-1], *_ids(load_tokenizer(folder), "heart")[1:-1]]


def test_an_end_that_there_is_none_of_is_refused(tmp_path: Path) -> None:
    folder = save_plain_model(tmp_path, eos_token=None)
    assert not ends_texts(training_tokenizer(_model(folder)))
    with pytest.raises(
        ConfigError, match=r"model\.append_eos: True, but the \w+ of this model has no eos_token; set it to auto"
    ):
        training_tokenizer(_model(folder, append_eos=True))


def test_a_prompt_that_leaves_no_room_for_a_text_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    prompt = " ".join(["search"] * 27)
    message = (
        r"model\.query_prompt: 27 tokens and 2 special ones leave no room .* 24 of model\.query_max_tokens; "
        ".* at least 30 tokens"
    )
    with pytest.raises(ConfigError, match=message):
        training_tokenizer(_model(folder, query_max_tokens=24, query_prompt=prompt))
    with pytest.raises(ConfigError, match=message):
        load_encoder(folder, query_max_tokens=24, query_prompt=prompt)
    with pytest.raises(ConfigError, match=r"model\.passage_prompt: 27 tokens .* 29 of model\.passage_max_tokens"):
        load_encoder(folder, passage_max_tokens=29, passage_prompt=prompt)
    found = load_encoder(folder, query_max_tokens=30, query_prompt=prompt).encode(["brain", "heart"], "query")
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.query_prompt: '\\ud800' cannot be tokenised"):
        training_tokenizer(_model(save_tiny_model(tmp_path), query_prompt="\ud800"))
