"""Signals end a run after its step, or after the grace time with the last update; the same command goes on to the same
bits.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from retriever.errors import Stopped
from retriever.parallel.world import World
from retriever.signals import StopSignals, die_with_launcher
from tests.starts import Ended, Start, start
from tests.workplace import ROOT


def main(words: Sequence[str]) -> int:
    """A run of steps of 0.2 s, of which step `slow_step` takes as long as it is told; it prints what it saves."""
    slow, slow_step, grace_s, evaluates = (float(word) for word in words)
    die_with_launcher()
    last = 0

    def save() -> int:
        sys.stdout.write(f"late {last}\n")  # in one piece: other threads write too
        sys.stdout.flush()
        return last

    stop = StopSignals(World(torch.device("cpu")), save, grace_s=grace_s)
    with stop:
        for step in range(1, 100):
            print("step", step, flush=True)
            time.sleep(slow if step == slow_step else 0.2)
            last = step
            if number := stop.agreed(False)[0]:
                print("saved", last, flush=True)
                stopped = Stopped(number, last)
                print(stopped, file=sys.stderr)
                return stopped.status
            if evaluates and step == 4:
                with stop.between_steps():
                    print("evaluate", flush=True)
                    time.sleep(200)
    return 0


def _start(folder: Path, slow: float = 0.2, evaluates: bool = False, grace_s: float = 1.0, slow_step: int = 4) -> Start:
    words = [str(float(value)) for value in (slow, slow_step, grace_s, evaluates)]
    return start(folder, words, command=__name__, limit_s=120)


def _saved(ended: Ended) -> list[str]:
    """What the run said that it saved."""
    return [line for line in ended.said.splitlines() if line.startswith(("saved ", "late "))]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_the_step_at_hand_is_finished_and_saved(tmp_path: Path, number: signal.Signals, status: int) -> None:
    run = _start(tmp_path, slow=1, grace_s=60)
    run.says("step 4")
    run.signal(number)
    ended = run.wait()
    assert (_saved(ended), ended.statuses) == (["saved 4"], [status])
    assert f"{number.name}: stopped after step 4, which is saved. The same command goes on from there" in ended.said


def test_a_step_that_takes_too_long_is_given_up_for_the_last_update(tmp_path: Path) -> None:
    """The main thread sleeps in C, where Python runs no handler."""
    run = _start(tmp_path, slow=120)
    run.says("step 4")
    run.signal(signal.SIGTERM)
    started = time.monotonic()
    ended = run.wait()
    assert time.monotonic() - started < 60
    assert (_saved(ended), ended.statuses) == (["late 3"], [143])
    assert "stopped after step 3" in ended.said


def test_an_evaluation_is_not_waited_for(tmp_path: Path) -> None:
    run = _start(tmp_path, evaluates=True)
    run.says("evaluate")
    run.signal(signal.SIGINT)
    ended = run.wait()
    assert (_saved(ended), ended.statuses) == (["late 4"], [130])


def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    """A Ctrl-C that a terminal and a launcher pass on counts once."""
    run = _start(tmp_path, slow=600, grace_s=600)
    run.says("step 4")
    run.signal(signal.SIGINT)
    run.until(lambda: "stopping after this step" in run.log.read_text())
    run.signal(signal.SIGINT)
    time.sleep(2.5)
    assert run.processes[0].exitcode is None
    run.signal(signal.SIGINT)
    ended = run.wait()
    assert (_saved(ended), ended.statuses) == ([], [130])
    assert "Ctrl-C after SIGINT: stopped at once; the same command goes on from the last checkpoint" in ended.said


def test_a_stop_before_the_first_update_says_that_nothing_was_saved(tmp_path: Path) -> None:
    run = _start(tmp_path, slow=20, slow_step=1)
    run.says("step 1")
    run.signal(signal.SIGTERM)
    ended = run.wait()
    said = "SIGTERM: stopped before the end of step 1: there was nothing to save. The same command starts again"
    assert ended.statuses == [143] and said in ended.said


def test_the_trainer_ends_with_the_launcher_of_one_process() -> None:
    """accelerate starts one process without ending it when it is killed itself; here a stand-in does so."""
    code = f"import sys; from {__name__} import main; sys.exit(main(['2', '4', '60', '0']))"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    environment = {"PATH": "/usr/bin:/bin", "ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", launcher]
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while run.stdout.readline().strip() != "step 2":
        assert run.poll() is None
    run.kill()
    said, _ = run.communicate(timeout=120)  # returns once the trainer has ended too
    assert "saved" in said and "step 99" not in said
