"""A small training source with tiny models: a BEIR folder with duplicates, several positives and a query that is a
passage.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from scripts.mine_negatives import main
from tests.beir import write_beir
from tests.tiny import ARCHITECTURES, random_texts, save_tiny_model, tiny_tokenizer

QUERIES, PASSAGES = 40, 90


@dataclass(frozen=True)
class Workplace:
    """Where the data and the models are, and the texts as the oracle of a test reads them."""

    folder: Path
    texts: dict[str, str]  # passage id -> text
    queries: dict[str, str]
    positives: dict[str, list[str]]

    @property
    def data(self) -> Path:
        """The BEIR folder."""
        return self.folder / "data"


def make_workplace(folder: Path) -> Workplace:
    """Every query is words of its first positive; passages p80 to p89 repeat the texts of p0 to p9; q5 is the text of
    p40.
    """
    draw, lines = random.Random(4), random_texts(PASSAGES - 10, shortest=6, longest=16, seed=2)
    texts = {f"p{i}": text for i, text in enumerate([*lines, *lines[:10]])}
    queries = {f"q{i}": " ".join(draw.sample(lines[i].split(), 4)) for i in range(QUERIES)} | {"q5": lines[40]}
    positives = {f"q{i}": [f"p{i}", *([f"p{i + 30}"] if i % 4 == 0 else [])] for i in range(QUERIES)}
    corpus = ({"_id": i, "title": "", "text": text} for i, text in texts.items())
    write_beir(
        folder / "data", corpus, queries, train={query: dict.fromkeys(found, 1) for query, found in positives.items()}
    )
    save_tiny_model(folder / "model")
    save_tiny_teacher(folder / "teacher")
    return Workplace(folder, texts, queries, positives)


def save_tiny_teacher(folder: Path, labels: int = 1) -> Path:
    """A random cross-encoder whose scores differ clearly from pair to pair."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tokens: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model("bert", **ARCHITECTURES["bert"], **tokens, num_labels=labels)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5.0 if p.dim() >= 2 else 1.0)
            model.classifier.weight.mul_(100.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mined(workplace: Workplace, output: str, *arguments: str) -> list[dict[str, Any]]:
    """The records that the command writes into `output`, with the tiny model."""
    assert main(words(workplace, output, *arguments)) == 0
    return read(workplace.folder / output)


def words(workplace: Workplace, output: str, *arguments: str) -> list[str]:
    """The arguments of the command that `mined` calls."""
    base = [
        "--data",
        str(workplace.data),
        "--output-dir",
        str(workplace.folder / output),
        "--model",
        str(workplace.folder / "model"),
    ]
    return [*base, "--ranks", "1", "30", "--negatives", "5", "--teacher-max-tokens", "64", *arguments]


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a mined folder."""
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
