"""Two starts in one folder, launchers that die, and signals, on one rank and on two."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from retriever import lock
from retriever.lock import LOCK, Holder
from tests.torture import phases
from tests.torture.kills import Runs, ranks_of
from tests.torture.page import Row
from tests.workplace import ROOT

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
_HELD_S, _LIMIT_S = 60.0, 240.0


def launches(root: Path) -> Iterator[Row]:
    """A row for each kind of start or end, on one rank and on two."""
    runs = Runs(root)
    for ranks in (1, 2):
        yield _row(f"two starts in one folder, {ranks_of(ranks)}", runs, ranks, _second_start)
        yield _row(f"launcher killed, {ranks_of(ranks)}", runs, ranks, _dead_launcher)
        for number in _STATUS:
            yield signalled(runs, ranks, number)
        yield _row(f"a second Ctrl-C in a long step, {ranks_of(ranks)}", runs, ranks, _second_interrupt)


def signalled(runs: Runs, ranks: int, number: signal.Signals) -> Row:
    """A run that a signal stops goes on to the bits of one that none stopped."""

    def stop(runs: Runs, ranks: int, name: str) -> str:
        started = runs.start(name, ranks)
        started.until(_saved(runs.root / name))
        started.signal(number)
        ended = started.wait()
        assert ended.statuses == [_STATUS[number]] * ranks, (ended.statuses, ended.said)
        assert "which is saved. The same command goes on from there" in ended.said, ended.said
        return f"saved, exit status {_STATUS[number]}"

    return _row(f"{number.name}, {ranks_of(ranks)}", runs, ranks, stop)


def _row(what: str, runs: Runs, ranks: int, happen: Callable[[Runs, int, str], str]) -> Row:
    name = "".join(character if character.isalnum() else "-" for character in what)
    try:
        seen = happen(runs, ranks, name)
        ended = runs.start(name, ranks).wait()
        failures = runs.differences(name, ranks) if ended.finished else [ended.said[-1000:]]
    except AssertionError as error:
        seen, failures = "", [str(error)]
    return Row(what, 1, f"{seen}; started again, the same bits" if not failures else seen, failures)


def _second_start(runs: Runs, ranks: int, name: str) -> str:
    """Both start together, so that either may come first."""
    folder = runs.root / name
    both = [_launched(runs, ranks, name, log) for log in ("one", "other")]
    statuses = [process.wait(_LIMIT_S) for process in both]
    said = (folder / ("one" if statuses[0] else "other")).read_text()
    assert sorted(map(bool, statuses)) == [False, True], f"exit statuses {statuses}: {said}"
    (line,) = re.findall("error: [^\r\n]*", said)  # perhaps behind another rank's progress bar
    assert "run is in use by process" in line, line
    return "one finishes, the other is refused by name"


def _dead_launcher(runs: Runs, ranks: int, name: str) -> str:
    folder = runs.root / name
    with _launched(runs, ranks, name, "launched") as launcher:
        _until(_saved(folder), launcher)
        trainer = Holder(**json.loads((folder / "run" / LOCK).read_text()))
        assert trainer.pid != launcher.pid
        launcher.kill()
    limit = time.monotonic() + 60
    while lock._runs(trainer):
        assert time.monotonic() < limit, "the trainer outlives its launcher by a minute"
        time.sleep(0.05)
    return "the trainer ends within a minute"


def _second_interrupt(runs: Runs, ranks: int, name: str) -> str:
    started = runs.start(name, ranks, before=partial(phases.hold_fourth_step, _HELD_S))
    started.until(lambda: started.log.read_text().count(phases.HELD) == ranks)
    before = time.monotonic()
    started.signal(signal.SIGINT)
    time.sleep(2.5)
    started.signal(signal.SIGINT)
    ended = started.wait()
    assert time.monotonic() - before < 20 and set(ended.statuses) == {130}, (ended.statuses, ended.said)
    assert ": stopped at once; the same command goes on" in ended.said, ended.said
    return "ends at once, exit status 130"


def _saved(folder: Path) -> Callable[[], bool]:
    return lambda: any((folder / "run" / "checkpoints").glob("step-*"))


def _until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + _LIMIT_S
    while not happened():
        assert process.poll() is None and time.monotonic() < limit, "ended before its first checkpoint"
        time.sleep(0.01)


def _launched(runs: Runs, ranks: int, name: str, log: str) -> subprocess.Popen[bytes]:
    """The real command, under accelerate's launcher."""
    folder = runs.root / name
    folder.mkdir(exist_ok=True)
    several = ("--multi_gpu",) if ranks > 1 else ()
    launcher = (*several, "--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", "0")
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "retriever" / "train.py")]
    with (folder / log).open("wb") as output:
        return subprocess.Popen(
            [*command, *runs.arguments],
            cwd=folder,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
