"""A small training run: a tiny model, data, a configuration, and the arguments of the command that trains with it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from safetensors.numpy import load_file

from tests.beir import write_beir
from tests.tiny import random_texts, save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20


def make_workplace(folder: Path) -> Path:
    """A tiny model, and a BEIR folder whose queries are words out of their passages."""
    save_tiny_model(folder / "model")
    texts = random_texts(160, shortest=6, longest=20, seed=3)
    draw = random.Random(0)
    corpus = ({"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts))
    queries = {f"q{i}": " ".join(draw.sample(text.split(), 3)) for i, text in enumerate(texts)}
    splits = {"train": range(120), "dev": range(120, 160)}
    judged = {split: {f"q{i}": {f"d{i}": 1} for i in rows} for split, rows in splits.items()}
    write_beir(folder / "data", corpus, queries, **judged)
    (folder / "run.yaml").write_text(
        f"""
model: {{name_or_path: {folder}/model, query_max_tokens: 16, passage_max_tokens: 32}}
data: {{train: [{{path: {folder}/data}}], cache_dir: {folder}/cache}}
batch: {{queries: 24, tokens_per_chunk: 192}}
loss: {{temperature: 0.05, learn_temperature: true}}
optim: {{lr: 1.0e-3, precision: fp32}}
train: {{max_steps: {STEPS}, save_every: 3, eval_every: 10, log_every: 1}}
eval: {{path: {folder}/data, split: dev, metrics: [MRR@10, "Recall@20"], k: 50}}
"""
    )
    return folder


def training_arguments(workplace: Path, output: str, *overrides: str) -> list[str]:
    """Trains as the workplace says, but for the overrides, into its folder `output`."""
    return ["--config", str(workplace / "run.yaml"), f"run.output_dir={workplace / output}", *overrides]


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_trained_alike(found: Path, expected: Path, started: Path) -> None:
    """Of three model folders: training changed the last one's weights to those of the first two, which differ by a
    hundredth of that at most.
    """
    weights = [load_file(folder / "model.safetensors") for folder in (found, expected, started)]
    # A key bias has no gradient but rounding, which Adam makes large.
    trained = [key for key in weights[1] if not key.endswith("key.bias")]
    apart, changed = (
        sum(float(((weights[1][key] - other[key]) ** 2).sum()) for key in trained) ** 0.5
        for other in (weights[0], weights[2])
    )
    assert changed > 0.05 and apart < 0.01 * changed, (apart, changed)
