"""A small training run: a tiny model, data, a configuration, and the command that trains with it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from tests.tiny import random_texts, save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
STEPS = 40


def make_workplace(folder: Path) -> Path:
    """A tiny model, and a BEIR folder whose queries are words out of their passages."""
    save_tiny_model(folder / "model")
    (folder / "data" / "qrels").mkdir(parents=True)
    texts = random_texts(160, shortest=6, longest=20, seed=3)
    draw = random.Random(0)
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": " ".join(draw.sample(text.split(), 3))} for i, text in enumerate(texts)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for split, rows in (("train", range(120)), ("dev", range(120, 160))):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in rows)
        (folder / "data" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    (folder / "run.yaml").write_text(
        f"""
model: {{name_or_path: {folder}/model, query_max_tokens: 16, passage_max_tokens: 32}}
data: {{train: [{{path: {folder}/data}}], cache_dir: {folder}/cache}}
batch: {{queries: 24, tokens_per_chunk: 192}}
loss: {{temperature: 0.05, learn_temperature: true}}
optim: {{lr: 1.0e-3, precision: fp32}}
train: {{max_steps: {STEPS}, save_every: 3, eval_every: 10, log_every: 5}}
eval: {{path: {folder}/data, split: dev, metrics: [MRR@10, "Recall@20"], k: 50}}
"""
    )
    return folder


def training_command(workplace: Path, output: str, *overrides: str) -> list[str]:
    """Trains as the workplace says, but for the overrides, into its folder `output`."""
    script = str(ROOT / "retriever" / "train.py")
    return [
        sys.executable,
        script,
        "--config",
        str(workplace / "run.yaml"),
        f"run.output_dir={workplace / output}",
        *overrides,
    ]


def on_two_ranks(command: list[str]) -> list[str]:
    """The command of a script under accelerate's launcher, with two processes."""
    ranks = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *ranks, *settings, *command[1:]]


def run_training(workplace: Path, output: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs that command to its end, in a process of its own."""
    return subprocess.run(
        training_command(workplace, output, *overrides), cwd=workplace, capture_output=True, text=True, timeout=240
    )


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
