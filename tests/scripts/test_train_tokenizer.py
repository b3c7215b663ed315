"""A tokenizer of one's own, and an encoder that starts from random weights with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from retriever.config import ModelConfig
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.tokenizer import training_tokenizer
from retriever.run import Run
from scripts.train_tokenizer import main, read_texts, tokenizer_of, train_pieces
from tests.beir import write_beir
from tests.commands import assert_refused
from tests.tiny import random_texts
from tests.workplace import make_workplace

TEXTS = random_texts(200, shortest=4, seed=2)
UNSEEN = [
    *random_texts(20, seed=5),
    "RIVERS  of\tthe Mountain\n",
    "ﬁne naïve Zürich",
    "水水 snow☃man ▁ x_y",
    "",
    " ",
    "unbelievableness" * 30,
]
SIZES = ["hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64"]
BERT = ["--architecture", "model_type=bert", *SIZES]


@pytest.mark.parametrize("lower_case", [True, False])
def test_it_splits_as_sentencepiece_does(lower_case: bool) -> None:
    pieces = train_pieces(TEXTS, 120, lower_case)
    tokenizer, oracle = tokenizer_of(pieces, lower_case, 64), sentencepiece.SentencePieceProcessor(model_proto=pieces)
    assert len(tokenizer) == 120 and tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    ]
    for text in UNSEEN:
        normalized = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == oracle.encode(normalized)
        assert tokenizer(text)["input_ids"] == [2, *oracle.encode(normalized), 3]
    same = tokenizer("RIVER")["input_ids"] == tokenizer("river")["input_ids"]
    assert same == lower_case and tokenizer("river  river\n")["input_ids"] == tokenizer("river river")["input_ids"]
    assert tokenizer.decode(tokenizer("brain blood")["input_ids"], skip_special_tokens=True) == "brain blood"


def test_what_is_read(tmp_path: Path) -> None:
    corpus = [{"_id": "p", "title": "brain", "text": "blood"}]
    beir = write_beir(tmp_path / "beir", corpus, {"q": "a test query"}, test={"q": {"p": 1}})
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    pair = {"anchor": "river", "positive": "water", "negative_1": "fire"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    found = [list(read_texts(path)) for path in (beir, tmp_path / "lines.txt", tmp_path / "pairs.jsonl")]
    assert found == [["brain blood"], ["one", "two"], ["river", "water", "fire"]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("scratch"))
    words = [
        "--data",
        str(folder / "data"),
        "--output",
        str(folder / "new"),
        "--vocab-size",
        "120",
        "--max-tokens",
        "64",
    ]
    assert main([*words, *BERT]) == 0
    return folder


def test_an_encoder_is_trained_from_scratch(workplace: Path) -> None:
    """With its own tokenizer; the seed draws the weights. The export needs nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(workplace / "new")
    assert (len(tokenizer), tokenizer.model_max_length) == (120, 64)
    names = ["run.trackers=[]", "model.name_or_path=" + str(workplace / "new"), "model.from_scratch=true"]
    lengths = ["train.max_steps=12", "optim.lr=3e-3", f"run.output_dir={workplace / 'out'}"]
    with Run(workplace / "run.yaml", [*names, *lengths]) as run:
        run.train()
    written = workplace / "out" / "export"
    lines = [json.loads(line) for line in (workplace / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert "base_model" not in (written / "bigbatch.json").read_text() + (written / "README.md").read_text()
    texts = ["a river in the mountain", "water"]
    theirs = SentenceTransformer(str(written), device="cpu").encode(texts)
    np.testing.assert_allclose(load_encoder(written, device="cpu").encode(texts, "passage"), theirs, rtol=0, atol=1e-5)


def test_the_seed_draws_the_weights(workplace: Path) -> None:
    model = ModelConfig(str(workplace / "new"), from_scratch=True, tied=False)
    state = torch.get_rng_state()
    encoders = [DualEncoder.from_pretrained(model, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (torch.cat([p.flatten() for p in encoder.query_tower.parameters()]) for encoder in encoders)
    assert torch.equal(first, same) and not torch.equal(first, other)
    embeddings: Any = encoders[0].query_tower.get_input_embeddings().weight
    assert 0.01 < embeddings[5:].std() < 0.03  # BERT's initializer_range is 0.02
    passage = torch.cat([p.flatten() for p in encoders[0].passage_tower.parameters()])
    assert torch.equal(first, passage)
    assert training_tokenizer(replace(model)).pad_token_id == encoders[0].query_tower.config.pad_token_id == 0


def test_the_same_texts_give_the_same_bytes(workplace: Path, tmp_path: Path) -> None:
    words = ["--data", str(workplace / "data"), "--vocab-size", "120", "--max-tokens", "64", *BERT]
    assert main([*words, "--output", str(tmp_path / "new")]) == 0
    both = [
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in (workplace / "new", tmp_path / "new")
    ]
    assert both[0] == both[1] and {"config.json", "tokenizer.json"} <= both[0].keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size", "8"], "sentencepiece finds no vocabulary in these texts .*smaller than required_chars"),
        (["--architecture", "hidden_size=32"], "expected model_type=... among the settings; received hidden_size"),
        (["--architecture", "model_type=roformer"], "is a 'roformer' model, an architecture on which"),
        (["--architecture", "model_type=none"], "no configuration of a model that transformers knows"),
        (["--architecture", "model_type=bert", "layers=3"], "a bert model has no setting 'layers'"),
        ([*BERT, "hidden_size=33"], r"--architecture: no bert model can be built from it: The hidden size \(33\)"),
        (["--vocab-size", "120", *BERT, "vocab_size=119"], "vocab_size: expected at least 120, .*; received 119"),
    ],
)
def test_what_cannot_be_trained_is_refused(words: list[str], message: str, workplace: Path, tmp_path: Path) -> None:
    assert_refused(main, ["--data", str(workplace / "data"), "--output", str(tmp_path / "new"), *words], message)
    assert not (tmp_path / "new").exists()
    assert_refused(main, ["--data", str(workplace / "data"), "--output", str(workplace / "new")], "exists already")
