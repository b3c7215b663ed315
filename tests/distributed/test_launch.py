"""Runs under accelerate's launcher end as a person expects: on Ctrl-C at once and with one line, without the others in
good time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import random_texts, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run's arguments: a tiny model, 40 pairs, more steps than anybody waits for."""
    folder = tmp_path_factory.mktemp("launch")
    save_tiny_model(folder / "model", num_hidden_layers=1)
    pairs = [{"anchor": text.split()[0], "positive": text} for text in random_texts(40, shortest=4, longest=9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = {
        "run": {"output_dir": str(folder / "run"), "trackers": [], "timeout_s": 60},
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "cache_dir": str(folder / "cache")},
        "batch": {"queries": 8},
        "optim": {"precision": "fp32"},
        "train": {"max_steps": 1_000_000, "save_every": 2},
    }
    (folder / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    return [str(ROOT / "retriever" / "train.py"), "--config", str(folder / "run.yaml")]


def test_ctrl_c_ends_all_ranks_with_one_line(settings: list[str]) -> None:
    """The launcher gets the signal and passes it on; what was saved before is whole."""
    run = Path(settings[-1]).parent / "run"
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command = [
        sys.executable,
        *launcher,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        *settings,
    ]
    log = run.parent / "log"
    with log.open("wb") as output, subprocess.Popen(command, cwd=run.parent, stdout=output, stderr=output) as process:
        deadline = time.monotonic() + 90
        while not any((run / "checkpoints").glob("step-*/state.json")) and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    said = log.read_text()
    assert said.count("which is saved. The same command goes on from there") == 1, said
    assert said.count("SIGINT: stopping after this step") == 1, said
    assert "error: " not in said and "KeyboardInterrupt" not in said, said
    assert all((step / "state.json").exists() for step in (run / "checkpoints").glob("step-*"))


def test_a_rank_that_is_left_alone_says_so(settings: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ended = subprocess.run(
        [sys.executable, *settings, "run.output_dir=alone", "run.timeout_s=4"],
        cwd=Path(settings[-1]).parent,
        env=alone,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert (
        "error: rank 0 of 2 did not meet the others within run.timeout_s=4" in ended.stderr
        and "Traceback" not in ended.stderr
    )
