"""Training a teacher: its loss, what a step reads, that it learns to prefer positives, and its command's errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.mining.cross_encoder import Group, Training, _pairs, _steps, first_among, read_groups
from scripts.mining.teacher import CrossEncoder
from scripts.train_cross_encoder import main
from tests.commands import assert_refused
from tests.tiny import random_texts, save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, and 60 queries whose positive repeats them while negatives are other texts."""
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_model(folder / "model")
    lines = random_texts(80, shortest=5, longest=8, seed=6)
    with (folder / "train.jsonl").open("w") as stream:
        for i in range(60):
            record: dict[str, Any] = {"query_id": f"q{i}", "query": lines[i]}
            record["positive_passages"] = [{"docid": f"p{i}", "title": "", "text": lines[i]}]
            record["negative_passages"] = [
                {"docid": f"n{i}-{j}", "title": "a title", "text": lines[(i + j) % 80]} for j in range(1, 6)
            ]
            stream.write(json.dumps(record) + "\n")
    return folder


def _arguments(folder: Path, output: str, *more: str) -> list[str]:
    places = [
        "--data",
        str(folder / "train.jsonl"),
        "--model",
        str(folder / "model"),
        "--output-dir",
        str(folder / output),
    ]
    return [*places, "--max-tokens", "40", *more]


def test_the_loss_is_the_cross_entropy_of_the_first_of_each_group() -> None:
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[2] = scores[2:6].max() + 1
    losses, highest = first_among(scores, [2, 4, 3])
    for row, (first, last) in enumerate(((0, 2), (2, 6), (6, 9))):
        expected = torch.nn.functional.cross_entropy(scores[None, first:last], torch.tensor([0]))
        assert losses[row] == pytest.approx(expected.item(), rel=1e-12)
        assert highest[row] == float(max(scores[first:last].tolist()) == scores[first])
    assert highest[1] == 1


def test_every_query_is_read_once_an_epoch() -> None:
    steps = list(_steps(10, Training(queries=4, epochs=2.5)))
    seen = np.concatenate(steps)
    assert [len(step) for step in steps] == [4] * 6 + [1]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and len(set(seen[20:])) == 5
    assert list(seen[:10]) != list(seen[10:20])


def test_a_step_reads_a_positive_first_and_then_as_many_negatives_as_there_are() -> None:
    lines = random_texts(12, shortest=3, longest=4, seed=1)
    groups = [Group(lines[0], (lines[1],), tuple(lines[2:7])), Group(lines[7], (lines[8], lines[9]), (lines[10],))]
    tokenizer = tiny_tokenizer()
    inputs, sizes = _pairs(groups, Training(negatives=3, max_tokens=40), tokenizer)
    assert sizes == [4, 2] and len(inputs["input_ids"]) == 6
    texts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert texts[0] == tokenizer.decode(tokenizer(f"{lines[0]} {lines[1]}")["input_ids"], skip_special_tokens=True)
    assert len(set(texts[1:4])) == 3 and all(text.startswith(texts[0].split()[0]) for text in texts[1:4])


def test_the_same_command_gives_the_same_weights(folder: Path) -> None:
    for output in ("one", "two"):
        main(_arguments(folder, output, "--epochs", "0.5", "--lr", "3e-3"))
    weights = [(folder / output / "model.safetensors").read_bytes() for output in ("one", "two")]
    assert weights[0] == weights[1]


def test_it_learns_to_prefer_positives(folder: Path) -> None:
    """After training, the positive stands first among its group for nearly every query; before it, for about one in
    six.
    """
    main(_arguments(folder, "first", "--epochs", "20", "--lr", "3e-3", "--queries", "10", "--negatives", "4"))
    groups, teacher = (
        read_groups(str(folder / "train.jsonl"), "join", " "),
        CrossEncoder(folder / "first", max_tokens=40, device=torch.device("cpu")),
    )
    assert groups[0].negatives[0].startswith("a title ")
    right = 0
    for group in groups:
        texts = [*group.positives, *group.negatives]
        right += int(teacher.score([group.query] * len(texts), texts, 1000).argmax() == 0)
    assert right > 0.9 * len(groups)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--epochs", "0"), "--epochs: expected a number above 0"),
        (("--model", "/nowhere/model"), "model /nowhere/model: there is no such folder"),
        (("--data", "/nowhere/data"), "/nowhere/data"),
        (("--output-dir", "."), "exists already"),
        (("--max-tokens", "512"), "--max-tokens: expected at most 256, the model's length; received 512"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, more: tuple[str, ...], message: str) -> None:
    assert_refused(main, _arguments(folder, "wrong", *more), message)


def test_data_without_negatives_teach_nothing(folder: Path, tmp_path: Path) -> None:
    record = {
        "query_id": "q",
        "query": "a",
        "positive_passages": [{"docid": "p", "title": "", "text": "b"}],
        "negative_passages": [],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    assert_refused(
        main,
        _arguments(folder, "none", "--data", str(tmp_path / "train.jsonl")),
        "no query has both a positive and a negative",
    )
