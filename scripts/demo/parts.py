"""The demo's calls of the project: BM25, an encoder's evaluation, the exactness check, the training command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.collections.collection import Collection
from eval.engines.bm25 import bm25_run
from eval.evaluate import EvalOptions, evaluate_collection
from eval.measures import Scores, measure_run
from retriever.config import Config
from retriever.data.store import build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.preflight import verify
from retriever.verify import GradientCheck

METRICS = ("nDCG@10", "MRR@10", "Recall@100")
_DEPTH = 100  # passages a query, the deepest of METRICS
_CPU_TOKENS_PER_CHUNK = 1024  # what stays in the caches: 66 passages a second and core, against 49 in chunks of 8,192


def bm25_scores(test: Collection) -> Scores:
    """BM25 over the same passages and queries."""
    run = bm25_run(test.passages("join", " "), test.queries, _DEPTH, progress=True)
    return measure_run(test.qrels, run, METRICS)


def load_bundle(folder: Path, config: Config) -> EncoderBundle:
    """The model of a folder with the lengths and the precision of the training run."""
    model = config.model
    return load_encoder(
        folder,
        query_max_tokens=model.query_max_tokens,
        passage_max_tokens=model.passage_max_tokens,
        precision=config.optim.precision,
    )


def evaluate_encoder(bundle: EncoderBundle, test: Collection, shards: Path) -> Scores:
    """The encoder's measures on the test split; its embeddings stay in `shards`."""
    tokens_per_chunk = _CPU_TOKENS_PER_CHUNK if bundle.encoder.device.type == "cpu" else None
    options = EvalOptions(k=_DEPTH, batch=tokens_per_chunk, progress=True)
    result = evaluate_collection(bundle, test, METRICS, shards, options)
    assert result is not None  # only ranks other than the first get none
    return result.scores


def exactness(config: Config, bundle: EncoderBundle) -> GradientCheck:
    """The cached, chunked gradient against the whole batch's, on pairs of the training data; tokenises them."""
    store = build_or_open(config, bundle.tokenizer)
    return verify(config, bundle.encoder, store, TokenTemplate.from_tokenizer(bundle.tokenizer))


def train(config_file: Path, overrides: Sequence[str], output: Path) -> dict[str, float]:
    """Runs the training command, which writes to `output`, and returns its speed, from the metrics that it wrote.

    Raises subprocess.CalledProcessError if the command fails, which has said why.
    """
    script = os.path.relpath(Path(__file__).resolve().parents[2] / "retriever" / "train.py")
    rest = [script, "--config", os.path.relpath(config_file), *overrides]
    print(f"$ accelerate launch {shlex.join([*_launch_options(), *rest])}", flush=True)
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *_launch_options(), *rest], check=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "train/pairs_per_s" in line]
    steady = logged[1:] or logged  # the first step warms up
    speed = {"pairs_per_s": len(steady) / sum(1 / line["train/pairs_per_s"] for line in steady)}
    if peaks := [line["train/peak_gib"] for line in logged if "train/peak_gib" in line]:
        speed["peak_gib"] = max(peaks)
    return speed


def _launch_options() -> list[str]:
    """Launch options that accelerate would otherwise guess, with a warning; on a CPU it would guess one thread."""
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if not torch.cuda.is_available():
        threads = str(torch.get_num_threads())
        return [*options, "--cpu", "--num_processes", "1", "--num_cpu_threads_per_process", threads]
    devices = torch.cuda.device_count()
    return [*options, *(["--multi_gpu"] if devices > 1 else []), "--num_processes", str(devices)]
