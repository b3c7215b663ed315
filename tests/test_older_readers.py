"""What transformers 4 reads in our exports; `tests.check_transformers4` compares embeddings with that version
itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from retriever.config import Config, ModelConfig
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.tokenizer import load_tokenizer
from retriever.export import Probe, export
from tests.tiny import random_texts, save_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FULL, SLIDING = {"rope_type": "default", "rope_theta": 80_000.0}, {"rope_type": "default", "rope_theta": 5_000.0}


def _exported(folder: Path, architecture: str, **config: Any) -> Path:
    model = ModelConfig(
        str(save_tiny_model(folder / "start", architecture, **config)), query_max_tokens=20, passage_max_tokens=40
    )
    tokenizer = load_tokenizer(folder / "start")
    encoder, run = DualEncoder.from_pretrained(model), Config(model=model)
    return export(encoder, tokenizer, run, folder / "export", Probe.of(encoder, tokenizer, run, random_texts(2)))


@pytest.mark.parametrize(
    ("architecture", "config", "expected"),
    [
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": None},
        ),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}, "num_hidden_layers": 4},
            {"global_rope_theta": 80_000.0, "local_rope_theta": 5_000.0, "global_attn_every_n_layers": 2},
        ),
        (
            "modernbert",
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            {"global_attn_every_n_layers": 1},
        ),
        ("bert", {}, {"hidden_size": 32}),
    ],
)
def test_rope_is_written_by_its_older_names_too(
    tmp_path: Path, architecture: str, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder = _exported(tmp_path, architecture, **config)
    written = json.loads((folder / "config.json").read_text())
    assert {key: written[key] for key in expected} == expected
    again, start = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "start"))
    assert again.get("rope_parameters") == start.get("rope_parameters")  # which this version reads as before


@pytest.mark.parametrize("architecture", ["bert", "qwen2", "mistral"])
def test_the_tokenizers_class_is_one_that_version_4_has(tmp_path: Path, architecture: str) -> None:
    folder = _exported(tmp_path, architecture)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == [
        "input_ids",
        "attention_mask",
    ]  # version 4 adds token types by itself, and decoders take none
    assert "extra_special_tokens" not in written
    start, texts = load_tokenizer(tmp_path / "start"), random_texts(5)
    assert AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == start(texts)["input_ids"]


def test_special_tokens_without_a_name_keep_their_meaning(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "start", vocab_size=200)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<query>"]})
    tokenizer.save_pretrained(folder)
    model = ModelConfig(str(folder), query_max_tokens=20, passage_max_tokens=40)
    encoder, config = DualEncoder.from_pretrained(model), Config(model=model)
    exported = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, ["a"]))
    assert json.loads((exported / "tokenizer_config.json").read_text())["additional_special_tokens"] == ["<query>"]
    again = AutoTokenizer.from_pretrained(exported)
    assert again.extra_special_tokens == tokenizer.extra_special_tokens == ["<query>"]
