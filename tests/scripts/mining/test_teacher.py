"""What is loaded as a cross-encoder: every weight comes from the folder, from safetensors; only a new head may be
drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from retriever.config import ConfigError
from scripts.mining.teacher import CrossEncoder, load_classifier
from tests.scripts.mining.workplace import save_tiny_teacher
from tests.tiny import ARCHITECTURES, MAX_POSITIONS, random_texts, save_tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"


def _teach(folder: Path) -> CrossEncoder:
    return CrossEncoder(folder, max_tokens=64, device=torch.device("cpu"))


def _keep(folder: Path, wanted: Callable[[str], bool]) -> Mapping[str, Tensor]:
    """Rewrites the weights with those whose names are wanted, and returns them."""
    kept = {key: value for key, value in load_file(folder / WEIGHTS).items() if wanted(key)}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return kept


def test_an_encoder_is_no_teacher(tmp_path: Path) -> None:
    """Its head would be random, and another on every rank."""
    save_tiny_model(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=rf"--teacher {tmp_path}/encoder: lacks \d+ weights, \S+ first; expected all"):
        _teach(tmp_path / "encoder")


@pytest.mark.parametrize(
    "lost", ["classifier.bias", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.weight"]
)
def test_a_teacher_lacks_no_weight(tmp_path: Path, lost: str) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher")
    _keep(folder, lambda key: key != lost)
    with pytest.raises(ConfigError, match=f"teacher: lacks 1 weights, {lost} first"):
        _teach(folder)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "qwen2"])
def test_a_new_head_is_put_on_a_whole_body_alone(tmp_path: Path, architecture: str) -> None:
    """Every weight of the body is the folder's; without one of them nothing is trained."""
    folder = tmp_path / "encoder"
    save_tiny_model(folder, architecture)
    body = _keep(folder, lambda key: not key.startswith("pooler."))
    model, _ = load_classifier(str(folder), "--model", new_head=True, num_labels=1)
    loaded = model.base_model.state_dict()
    assert body and all(torch.equal(loaded[key], value) for key, value in body.items())
    lost = max(key for key in body if key.endswith("weight"))
    _keep(folder, lambda key: key != lost)
    with pytest.raises(ConfigError, match=rf"--model {folder}: lacks 1 weights, \S*{lost} first; expected all but"):
        load_classifier(str(folder), "--model", new_head=True, num_labels=1)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match=r"two/model.safetensors: classifier.bias has shape \[2\]; expected \[1\]"):
        load_classifier(str(folder), "--model", new_head=True, num_labels=1)


def test_weights_of_something_else_are_no_encoder(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "other")
    save_file({"unrelated": torch.zeros(2)}, tmp_path / "other" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other: lacks \d+ weights"):
        load_classifier(str(tmp_path / "other"), "--model", new_head=True, num_labels=1)


@pytest.mark.parametrize("new_head", [False, True])
def test_pickled_weights_are_not_read(tmp_path: Path, new_head: bool) -> None:
    folder = save_tiny_teacher(tmp_path / "pickled")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"pickled: there is no model\.safetensors; pytorch_model\.bin is pickled"):
        load_classifier(str(folder), "--teacher", new_head=new_head)


def test_a_teacher_of_two_labels_gives_their_difference(tmp_path: Path) -> None:
    """Two logits: the second less the first; three labels are refused."""
    save_tiny_teacher(tmp_path / "two", labels=2)
    teacher = _teach(tmp_path / "two")
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "two") for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    query, passage = random_texts(2, shortest=6, longest=16, seed=2)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(query, passage, return_tensors="pt")).logits[0]
    assert teacher.score([query], [passage], 1000)[0] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    save_tiny_teacher(tmp_path / "three", labels=3)
    with pytest.raises(ConfigError, match="1 or 2 labels, found 3"):
        _teach(tmp_path / "three")


def _set(folder: Path, file: str, **values: object) -> None:
    """Entries of an object in JSON replaced, or removed where they are None."""
    found = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize("limit", [None, 10**30, 4096])
def test_a_pair_is_no_longer_than_the_positions(tmp_path: Path, limit: int | None) -> None:
    """Whatever the tokenizer says of lengths, or where it says nothing."""
    folder = save_tiny_teacher(tmp_path / "teacher")
    _set(folder, "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(
        ConfigError, match=f"--teacher-max-tokens: expected at most {MAX_POSITIONS}, the model's length; received 512"
    ):
        CrossEncoder(folder, device=torch.device("cpu"))
    long = " ".join(random_texts(40, shortest=20))
    assert np.isfinite(
        CrossEncoder(folder, max_tokens=MAX_POSITIONS, device=torch.device("cpu")).score(["heart"], [long], 1000)
    ).all()


def test_the_tokenizers_own_length_counts_where_it_is_shorter(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher")
    _set(folder, "tokenizer_config.json", model_max_length=100)
    with pytest.raises(ConfigError, match="expected at most 100, the model's length; received 101"):
        CrossEncoder(folder, max_tokens=101, device=torch.device("cpu"))


def _decoder(folder: Path, **tokens: object) -> Path:
    """A decoder with a head and without a padding token in its configuration, as language models have none."""
    tokenizer = tiny_tokenizer("llama")
    sizes = ARCHITECTURES["llama"] | {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0 if parameter.dim() >= 2 else 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _set(folder, "tokenizer_config.json", **tokens)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    return folder


def test_a_decoder_pads_by_the_token_that_its_tokenizer_knows(tmp_path: Path) -> None:
    """Scores are those of pairs read one by one, which need no padding."""
    folder = _decoder(tmp_path / "decoder")
    queries, passages = random_texts(6, longest=5), random_texts(6, shortest=2, longest=20, seed=1)
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        alone = [
            model.eval()(**tokenizer(*pair, return_tensors="pt")).logits.item()
            for pair in zip(queries, passages, strict=True)
        ]
    assert np.ptp(alone) > 0.1
    np.testing.assert_allclose(_teach(folder).score(queries, passages, 10_000), alone, rtol=0, atol=1e-5)


def test_a_teacher_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--teacher .*decoder: expected a padding token; set pad_token in its tokenizer_config\.json"
    ):
        _teach(_decoder(tmp_path / "decoder", pad_token=None))


def test_a_malformed_teacher_is_named(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ConfigError,
        match=r"teacher/tokenizer\.json: token 'zebra' has the id 198, but vocab_size in config\.json is 198",
    ):
        _teach(folder)
    _set(folder, "config.json", num_hidden_layers="two")
    with pytest.raises(ConfigError, match=r"teacher/config\.json: no configuration .*num_hidden_layers"):
        _teach(folder)
