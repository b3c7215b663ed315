"""What is loaded as a cross-encoder: every weight comes from the folder, from safetensors; only a new head may be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retriever.config import ConfigError
from scripts.mining.teacher import CrossEncoder, load_classifier
from tests.scripts.mining.workplace import save_tiny_teacher
from tests.tiny import random_texts, save_tiny_model

WEIGHTS = "model.safetensors"


def _teach(folder: Path) -> CrossEncoder:
    return CrossEncoder.load(folder, max_tokens=64, device=torch.device("cpu"))


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


@pytest.mark.parametrize("lost", ["classifier.bias", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.weight"])
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
    model, tokenizer = (kind.from_pretrained(tmp_path / "two") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    query, passage = random_texts(2, shortest=6, longest=16, seed=2)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(query, passage, return_tensors="pt")).logits[0]
    assert teacher.score([query], [passage], 1000)[0] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    save_tiny_teacher(tmp_path / "three", labels=3)
    with pytest.raises(ConfigError, match="1 or 2 labels, found 3"):
        _teach(tmp_path / "three")
