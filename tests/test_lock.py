"""Locks: one process works in a folder, another is refused by the first one's name, and a lock whose process is gone
holds nobody up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from retriever import lock
from retriever.lock import LockedError, locked

_HOLD = """
import sys
from pathlib import Path
from retriever.lock import locked
with locked(Path(sys.argv[1]), "the folder"):
    print("HELD", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def _holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is told to let go, or killed."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "HELD\n"
        yield process
        process.kill()


def _refusal(path: Path) -> str:
    with pytest.raises(LockedError) as refused, locked(path, "the folder"):
        pass
    return str(refused.value)


def _rewrite(path: Path, **values: object) -> None:
    """At once, for its holder reads the lock at any time."""
    changed = path.with_name("changed")
    changed.write_text(json.dumps(json.loads(path.read_text()) | values))
    changed.replace(path)


def test_the_second_process_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with _holder(path) as first:
        said = _refusal(path)
        assert (
            said.startswith(f"the folder is in use by process {first.pid} on {os.uname().nodename} since 2")
            and "\n" not in said
        )
        first.communicate("go\n")
        assert not path.exists()
        with locked(path, "the folder"):
            assert f"process {os.getpid()} " in _refusal(path)
        assert not path.exists()


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    """Even while its parent has not taken note of its end."""
    path = tmp_path / ".lock"
    with _holder(path) as first:
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        assert path.exists()
        with locked(path, "the folder"):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with _holder(path):
        _rewrite(path, started="1")
        with locked(path, "the folder"):
            pass


def test_a_lock_of_another_machine_is_stale_a_minute_after_its_last_heartbeat(tmp_path: Path) -> None:
    """Whatever processes of its number run here."""
    path = tmp_path / ".lock"
    with _holder(path):
        _rewrite(path, host="elsewhere", machine="another", boot="another", pid=1)
        assert "process 1 on elsewhere since" in _refusal(path)
        os.utime(path, (time.time() - 50,) * 2)
        assert "process 1 on elsewhere since" in _refusal(path)
        os.utime(path, (time.time() - 70,) * 2)
        with locked(path, "the folder"):
            assert json.loads(path.read_text())["host"] == os.uname().nodename


def test_a_machine_that_was_started_anew_runs_none_of_its_earlier_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one of the same name, or a container of the same boot, may: their locks are stale by their heartbeat
    alone.
    """
    path, here = tmp_path / ".lock", replace(lock._this_process(), machine="m1", boot=f"{'b' * 36} pid:[1]")
    monkeypatch.setattr(lock, "_this_process", lambda: here)
    for changes, stale in (
        ({"boot": f"{'a' * 36} pid:[1]"}, True),
        ({"boot": f"{'a' * 36} pid:[1]", "machine": "m2"}, False),
        ({"boot": f"{'a' * 36} pid:[1]", "host": "elsewhere"}, False),
        ({"boot": f"{'b' * 36} pid:[2]"}, False),
    ):
        path.write_text(json.dumps(asdict(here) | changes | {"pid": 1, "started": "1"}))
        if not stale:
            assert "in use by process 1 on " in _refusal(path)
            continue
        with locked(path, "the folder"):
            pass


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT_S", 0.01)
    path = tmp_path / ".lock"
    with locked(path, "the folder"):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_process_whose_lock_was_taken_over_ends(tmp_path: Path) -> None:
    """It was held up so long that another one works there by now."""
    path = tmp_path / ".lock"
    code = _HOLD.replace("with locked", "from retriever import lock; lock._BEAT_S = 0.05\nwith locked")
    command = [sys.executable, "-c", code, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "HELD\n"
        _rewrite(path, pid=1, host="elsewhere")
        assert process.wait(30) == 2
        assert process.stderr is not None
        assert "error: the folder was taken over by process 1 on elsewhere since 2" in process.stderr.read()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_lock_without_a_holder_is_free(tmp_path: Path, content: str) -> None:
    """As a kill or a power cut may leave it, and earlier versions left it."""
    (tmp_path / ".lock").write_text(content)
    with locked(tmp_path / ".lock", "the folder"):
        pass


def test_a_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock", "the folder"):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_whoever_waits_goes_on_when_the_other_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one ends as soon as it is waited for."""
    path, said = tmp_path / ".lock", list[str]()
    with _holder(path) as first:

        def end_the_first(message: str) -> None:
            said.append(message)
            first.kill()

        monkeypatch.setattr(lock, "say", end_the_first)
        with locked(path, "the store", wait=True):
            assert first.wait(30) == -signal.SIGKILL
    assert len(said) == 1 and said[0].startswith(f"the store is built by process {first.pid} on ")


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path: Path) -> None:
    path, held, together, peak = tmp_path / ".lock", 0, threading.Lock(), []

    def work() -> None:
        nonlocal held
        with locked(path, "the folder", wait=True):
            with together:
                held += 1
                peak.append(held)
            time.sleep(0.01)
            with together:
                held -= 1

    with _holder(path) as first:
        first.kill()
        first.wait(30)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert peak == [1] * 8
