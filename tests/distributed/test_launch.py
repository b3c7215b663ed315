"""Runs under accelerate's launcher end as a person expects: on Ctrl-C at once and with one line, without the others in
good time.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.starts import free_port, start
from tests.workplace import ROOT, training_arguments


def _endless(workplace: Path, output: str, timeout_s: int) -> list[str]:
    """Trains for more steps than anybody waits for."""
    endless = ("train.max_steps=1000000", "train.save_every=2", "train.eval_every=0", "eval=null", "run.trackers=[]")
    return training_arguments(workplace, output, *endless, f"run.timeout_s={timeout_s}")


def test_ctrl_c_ends_all_ranks_with_one_line(workplace: Path) -> None:
    """The launcher gets the signal and passes it on; what was saved before is whole."""
    run, log = workplace / "run", workplace / "log"
    ranks = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launcher = f"-m accelerate.commands.launch {ranks} --mixed_precision no --dynamo_backend no"
    script = str(ROOT / "retriever" / "train.py")
    command = [sys.executable, *launcher.split(), script, *_endless(workplace, "run", 60)]
    with log.open("wb") as output, subprocess.Popen(command, cwd=run.parent, stdout=output, stderr=output) as process:
        deadline = time.monotonic() + 240
        while not any((run / "checkpoints").glob("step-*/state.json")) and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    said = log.read_text()
    assert said.count("which is saved. The same command goes on from there") == 1, said
    assert said.count("SIGINT: stopping after this step") == 1, said
    assert "error: " not in said and "KeyboardInterrupt" not in said, said
    assert all((step / "state.json").exists() for step in (run / "checkpoints").glob("step-*"))


def test_a_rank_that_is_left_alone_says_so(workplace: Path) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = start(workplace, _endless(workplace, "alone", 4), environment=ranks | meeting).wait()
    assert ended.statuses == [2], ended.said
    message = "error: rank 0 of 2 did not meet the others within run.timeout_s=4"
    assert message in ended.said and "Traceback" not in ended.said
