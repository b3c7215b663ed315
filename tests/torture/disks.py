"""Power cuts and full disks: on file systems of their own where there is root, and without it as far as that goes."""

from __future__ import annotations

import fcntl
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.torture.kills import Runs, ranks_of
from tests.torture.page import Row
from tests.torture.phases import read
from tests.workplace import ROOT

_SHUTDOWN, _WITHOUT_LOG = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN: from then on nothing reaches the disk, the journal neither
_DISK_MIB = 64


def power_cuts(root: Path, *, cuts: int, seed: int) -> Iterator[Row]:
    """Cuts at random moments of a run on a file system of its own, then those that the recorder replays."""
    runs, draw = Runs(root), random.Random(seed)
    for ranks in (1, 2):
        what = f"power cut at a random moment, ext4 on a loop device, {ranks_of(ranks)}"
        try:
            failures = [failure for number in range(cuts) for failure in _cut(runs, ranks, number, draw)]
        except PermissionError as error:
            yield Row(what, 0, f"not run: {error}")
            continue
        yield Row(what, cuts, "" if failures else "mounted again, started again, the same bits", failures)
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_power_cut.py"]
    replayed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", replayed.stdout)
    what = "power cut between any two operations, replayed by the recorder (no root): kinds of artefact"
    failures = [replayed.stdout[-2000:]] if replayed.returncode else []
    yield Row(what, int(passed[1]) if passed else 0, "what has its name is whole, what was finished is there", failures)


def _cut(runs: Runs, ranks: int, number: int, draw: random.Random) -> Iterator[str]:
    name = f"power-{ranks}-{number}"
    image, folder, logs = (runs.root / f"{name}{suffix}" for suffix in (".ext4", "", ".logs"))
    folder.mkdir()
    logs.mkdir()
    with image.open("wb") as disk:
        disk.truncate(_DISK_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    phases = dict(read(runs.undisturbed(ranks) / "phases"))
    with mounted(folder, str(image), "ext4", "loop"):
        started = runs.start(name, ranks, logs=logs)
        started.until((folder / "cache").exists)
        time.sleep(draw.random() * (phases["store build"] + phases["any moment"]))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        os.close(descriptor)
        started.signal(signal.SIGKILL)
        started.wait()
    with mounted(folder, str(image), "ext4", "loop"):
        ended = runs.start(name, ranks, logs=logs).wait()
        yield from runs.differences(name, ranks) if ended.finished else [ended.said[-1000:]]
    image.unlink()


def full_disks(root: Path, *, sizes: int) -> Iterator[Row]:
    """Disks of several sizes, each too small for some other step of the run; then a limit on the size of a file."""
    runs = Runs(root)
    for ranks in (1, 2):
        whole = sum(path.stat().st_size for path in runs.undisturbed(ranks).rglob("*") if path.is_file())
        failures = list[str]()
        what = f"full disk, tmpfs of {sizes} sizes, {ranks_of(ranks)}"
        try:
            for number in range(sizes):
                failures += _fill(runs, ranks, whole * (number + 1) // (sizes + 1) >> 10)
        except PermissionError as error:
            yield Row(what, 0, f"not run: {error}")
            continue
        yield Row(what, sizes, _REFUSED, failures)
    yield Row("no file over 100 kB (RLIMIT_FSIZE, no root), 1 rank", 1, _REFUSED, limited(runs))


_REFUSED = "one line, exit status 2, checkpoints whole; with room, the same bits"


def _fill(runs: Runs, ranks: int, kib: int) -> list[str]:
    name = f"full-{ranks}-{kib}"
    folder, logs = runs.root / name, runs.root / f"{name}.logs"
    folder.mkdir()
    logs.mkdir()
    with mounted(folder, "tmpfs", "tmpfs", f"size={kib}k"):
        ended = runs.start(name, ranks, logs=logs).wait()
        found = _refusal(ended.statuses[0], ended.said, "No space left on device")
        _mount("tmpfs", folder, "tmpfs", f"remount,size={_DISK_MIB}m")
        again = runs.start(name, ranks, logs=logs).wait()
        return found + (runs.differences(name, ranks) if again.finished else [again.said[-1000:]])


def limited(runs: Runs) -> list[str]:
    """What is wrong with how a run ends that may write no large file, and goes on without that limit."""
    logs = runs.root / "limited.logs"
    logs.mkdir()
    ended = runs.start("limited", 1, before=_limit_files, logs=logs).wait()
    found = _refusal(ended.statuses[0], ended.said, "File too large")
    again = runs.start("limited", 1, logs=logs).wait()
    return found + (runs.differences("limited", 1) if again.finished else [again.said[-1000:]])


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def _refusal(status: int, said: str, reason: str) -> list[str]:
    """What is wrong with how a command was refused."""
    lines = [line for line in re.split("[\r\n]", said) if line.startswith("error: ")]
    if status == 2 and len(lines) == 1 and reason in lines[0] and "Traceback" not in said:
        return []
    return [f"exit status {status}, {len(lines)} lines: {said[-1500:]}"]


@contextmanager
def mounted(folder: Path, source: str, kind: str, options: str) -> Iterator[None]:
    """Mounts a file system at `folder`. Raises PermissionError where that is not allowed."""
    _mount(source, folder, kind, options)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(source: str, folder: Path, kind: str, options: str) -> None:
    done = subprocess.run(["mount", "-t", kind, "-o", options, source, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(" ".join(done.stderr.split()))
