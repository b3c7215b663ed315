"""Runs under accelerate's launcher end as a person expects: on Ctrl-C at once and with one line, without the others in
good time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.processes import free_port
from tests.workplace import make_workplace, on_two_ranks, training_command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("launch"))


def _command(workplace: Path, output: str, timeout_s: int) -> list[str]:
    """Trains for more steps than anybody waits for."""
    endless = ("train.max_steps=1000000", "train.save_every=2", "train.eval_every=0", "eval=null", "run.trackers=[]")
    return training_command(workplace, output, *endless, f"run.timeout_s={timeout_s}")


def test_ctrl_c_ends_all_ranks_with_one_line(workplace: Path) -> None:
    """The launcher gets the signal and passes it on; what was saved before is whole."""
    run, command = workplace / "run", on_two_ranks(_command(workplace, "run", 60))
    log = run.parent / "log"
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
    ended = subprocess.run(
        _command(workplace, "alone", 4), env=os.environ | ranks | meeting, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    message = "error: rank 0 of 2 did not meet the others within run.timeout_s=4"
    assert message in ended.stderr and "Traceback" not in ended.stderr
