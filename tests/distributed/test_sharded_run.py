"""The training command with an encoder in shards: killed and started again, it ends where one rank that holds it whole
ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from retriever import launch
from retriever.config import BatchConfig, Config, ConfigError, ModelConfig, OptimConfig, RunConfig
from tests.tiny import random_texts, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "retriever" / "train.py")
ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STEPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run's arguments: a tiny model without dropout, 40 pairs as a BEIR folder, evaluated after its last step."""
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny_model(folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "data" / "qrels").mkdir(parents=True)
    texts = random_texts(40, shortest=4, longest=20)
    passages = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": " ".join(text.split()[:3])} for i, text in enumerate(texts)]
    for name, records in (("corpus", passages), ("queries", queries)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(40))
    for split in ("train", "dev"):
        (folder / "data" / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    values = {
        "run": {"trackers": [], "timeout_s": 60},
        "model": {"name_or_path": str(folder / "model"), "query_max_tokens": 16, "passage_max_tokens": 32},
        "data": {"train": [{"path": str(folder / "data")}], "cache_dir": str(folder / "cache")},
        "batch": {"queries": 11, "tokens_per_chunk": 48},
        "loss": {"temperature": 0.05, "learn_temperature": True},
        "optim": {"lr": 1e-3, "precision": "fp32"},
        "train": {"max_steps": STEPS, "save_every": 2, "log_every": 1},
        "eval": {"path": str(folder / "data"), "metrics": ["MRR@10"], "k": 20},
    }
    (folder / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    return [TRAIN, "--config", str(folder / "run.yaml")]


def _start_and_signal(settings: list[str], run: Path, number: signal.Signals, receivers: Sequence[int]) -> list[int]:
    """Two ranks in shards, some of which receive a signal once they have saved; returns both exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    with (run.parent / "log").open("wb") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, *settings, f"run.output_dir={run}"],
                env=os.environ | ASKED | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(2)
        ]
        deadline = time.monotonic() + 90
        while not any((run / "checkpoints").glob("step-*")):
            alive = all(rank.poll() is None for rank in ranks) and time.monotonic() < deadline
            if not alive:
                break
            time.sleep(0.005)
        for receiver in receivers:
            ranks[receiver].send_signal(number)
        return [rank.wait(timeout=60) for rank in ranks]


def _run(*command: str) -> str:
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_killed_and_resumed_in_shards_it_ends_as_one_whole_rank_does(settings: list[str]) -> None:
    folder = Path(settings[-1]).parent
    ended = _start_and_signal(settings, folder / "sharded", signal.SIGKILL, (0, 1))
    assert ended == [-signal.SIGKILL] * 2, (folder / "log").read_text()
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/fsdp.yaml",
        "--num_processes",
        "2",
    )
    said = _run(*launcher, *settings, f"run.output_dir={folder / 'sharded'}")
    assert "in shards on 2 ranks" in said and "resuming at step" in said
    assert "in shards" not in _run(*settings, f"run.output_dir={folder / 'whole'}")

    logs = [
        [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("sharded", "whole")
    ]
    losses, evaluated = (
        [[line[key] for line in log if key in line] for log in logs] for key in ("train/loss", "eval/MRR@10")
    )
    assert len(losses[1]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert evaluated[0] == pytest.approx(evaluated[1], abs=0.02) and 0 < evaluated[1][0] < 1

    found, expected = (load_file(folder / run / "export" / "model.safetensors") for run in ("sharded", "whole"))
    started = load_file(folder / "model" / "model.safetensors")
    trained = [
        key for key in expected if not key.endswith("key.bias")
    ]  # a key bias has no gradient but rounding, which Adam makes large
    distance = lambda a, b: sum(float(((a[key] - b[key]) ** 2).sum()) for key in trained) ** 0.5  # noqa: E731
    assert distance(expected, started) > 0.05
    assert distance(found, expected) < 0.01 * distance(expected, started)


def test_a_signal_at_the_second_rank_stops_and_saves_the_run(settings: list[str]) -> None:
    run = Path(settings[-1]).parent / "stopped"
    ended = _start_and_signal([*settings, "train.max_steps=5000"], run, signal.SIGTERM, (1,))
    said = (run.parent / "log").read_text()
    assert ended == [143, 143], said
    step = int(said.split("SIGTERM: stopped after step ")[1].split(",")[0])
    assert (run / "checkpoints" / f"step-{step:08d}").exists()


@pytest.mark.parametrize(
    ("variables", "config", "message"),
    [
        ({"FSDP_VERSION": "1"}, Config(), "fsdp_version: expected 2; received 1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, Config(), "fsdp_offload_params: expected false; received true"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FALSE"}, Config(), "fsdp_reshard_after_forward: expected true"),
        (
            {},
            Config(optim=OptimConfig(precision="fp16")),
            "optim.precision: expected bf16 or fp32 with FSDP; received 'fp16'",
        ),
        ({}, Config(optim=OptimConfig(name="adafactor")), "optim.name"),
        ({}, Config(model=ModelConfig(fused=True)), "model.fused"),
        ({}, Config(batch=BatchConfig(retain=4096)), "batch.retain: expected auto or false with FSDP; received 4096"),
        (
            {},
            Config(batch=BatchConfig(retain_products=True)),
            "batch.retain_products: expected auto or false with FSDP; received True",
        ),
        ({}, Config(run=RunConfig(verify=True)), "run.verify"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}, Config(), "DeepSpeed"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_by_name(
    variables: dict[str, str], config: Config, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ASKED | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launch.join(config)
