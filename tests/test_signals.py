"""Signals end a run after its step, or after the grace time with the last update; the same command goes on to the same
bits.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.workplace import ROOT

# A run of steps of 0.2 s, one of which takes as long as it is told; it prints what it saves.
_RUN = """
import sys, time, torch
from retriever.parallel.world import World
from retriever.errors import Stopped
from retriever.signals import StopSignals, die_with_launcher

die_with_launcher()
last = 0

def save():
    print("late", last, flush=True)
    return last

stop = StopSignals(World(torch.device("cpu")), save, grace_s={grace_s})
with stop:
    for step in range(1, 100):
        print("step", step, flush=True)
        time.sleep({slow} if step == {slow_step} else 0.2)
        last = step
        if number := stop.agreed(False)[0]:
            print("saved", last, flush=True)
            print(Stopped(number, last), file=sys.stderr)
            sys.exit(Stopped(number, last).status)
        if {evaluates} and step == 4:
            with stop.between_steps():
                print("evaluate", flush=True)
                time.sleep(200)
"""


def _start(
    slow: float = 0.2, evaluates: bool = False, grace_s: float = 1.0, slow_step: int = 4
) -> subprocess.Popen[str]:
    code = textwrap.dedent(_RUN).format(slow=slow, evaluates=evaluates, grace_s=grace_s, slow_step=slow_step)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _until(run: subprocess.Popen[str], line: str) -> None:
    assert run.stdout is not None
    while run.stdout.readline().strip() != line:
        assert run.poll() is None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_the_step_at_hand_is_finished_and_saved(number: signal.Signals, status: int) -> None:
    run = _start(slow=3, grace_s=60)
    _until(run, "step 4")
    run.send_signal(number)
    said, errors = run.communicate(timeout=120)
    assert said.split("\n")[0] == "saved 4"
    assert run.returncode == status
    assert f"{number.name}: stopped after step 4, which is saved. The same command goes on from there" in errors


def test_a_step_that_takes_too_long_is_given_up_for_the_last_update() -> None:
    """The main thread sleeps in C, where Python runs no handler."""
    run = _start(slow=120)
    _until(run, "step 4")
    run.send_signal(signal.SIGTERM)
    started = time.monotonic()
    said, errors = run.communicate(timeout=120)
    assert time.monotonic() - started < 60
    assert (said.strip(), run.returncode) == ("late 3", 143)
    assert "stopped after step 3" in errors


def test_an_evaluation_is_not_waited_for() -> None:
    run = _start(evaluates=True)
    _until(run, "evaluate")
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=100)
    assert (said.strip(), run.returncode) == ("late 4", 130)


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    """A Ctrl-C that a terminal and a launcher pass on counts once."""
    run = _start(slow=600, grace_s=600)
    _until(run, "step 4")
    run.send_signal(signal.SIGINT)
    assert run.stderr is not None
    while "stopping after this step" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    said, errors = run.communicate(timeout=120)
    assert (said, run.returncode) == ("", 130)
    assert "Ctrl-C after SIGINT: stopped at once; the same command goes on from the last checkpoint" in errors


def test_a_stop_before_the_first_update_says_that_nothing_was_saved() -> None:
    run = _start(slow=20, slow_step=1)
    _until(run, "step 1")
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 143
    assert (
        "SIGTERM: stopped before the end of step 1: there was nothing to save. The same command starts again" in errors
    )


def test_the_trainer_ends_with_the_launcher_of_one_process(tmp_path: Path) -> None:
    """accelerate starts one process without ending it when it is killed itself; here a stand-in does so."""
    code = textwrap.dedent(_RUN).format(slow=2, evaluates=False, grace_s=60, slow_step=4)
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    environment = {"PATH": "/usr/bin:/bin", "ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "-c", launcher],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _until(run, "step 2")
    run.kill()
    said, _ = run.communicate(timeout=120)  # returns once the trainer has ended too
    assert "saved" in said and "step 99" not in said
