"""Two thousand steps on two ranks, with saves and evaluations: memory, descriptors and threads stay where they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.torture.kills import Runs
from tests.torture.page import Row

MOST_KIB_A_STEP = 4.0  # of resident memory: 8 MiB in 2,000 steps


@dataclass(frozen=True)
class _Sample:
    step: int
    rss_kib: int
    descriptors: int
    threads: int


def soak(root: Path, *, steps: int, ranks: int = 2) -> Iterator[Row]:
    """A row for memory, descriptors and threads of each rank. The first quarter of the steps warms up.

    Medians are compared: how many threads of saves and evaluations a sample happens to meet differs from time to time.
    """
    settings = (f"train.max_steps={steps}", f"train.save_every={steps // 40}", f"train.eval_every={steps // 10}")
    runs = Runs(root, (*settings, "batch.queries=8", "train.log_every=10"))
    started = runs.start("soak", ranks, limit_s=3600)
    taken: list[list[_Sample]] = [[] for _ in range(ranks)]
    while any(process.exitcode is None for process in started.processes):
        step = _step(runs.root / "soak" / "run" / "metrics.jsonl")
        for process, samples in zip(started.processes, taken, strict=True):
            if step and process.exitcode is None and (sample := _sample(process.pid or 0, step)) is not None:
                samples.append(sample)
        time.sleep(0.25)
    ended = started.wait()
    for rank, samples in enumerate(taken):
        yield _judge(f"{steps:,} steps, rank {rank} of {ranks}", steps, samples, ended.said, ended.finished)


def _judge(what: str, steps: int, samples: list[_Sample], said: str, finished: bool) -> Row:
    warm = [sample for sample in samples if steps / 4 < sample.step < steps]
    second = [sample for sample in warm if sample.step <= steps / 2]
    last = [sample for sample in warm if sample.step > 3 * steps / 4]
    if not finished or not second or not last:
        return Row(what, len(samples), "", [said[-1000:]])
    slope = statistics.linear_regression([s.step for s in warm], [s.rss_kib for s in warm]).slope
    failures = [f"resident memory grows by {slope:.2f} KiB a step"] if slope > MOST_KIB_A_STEP else []
    counts = []
    for name in ("descriptors", "threads"):
        before, after = (int(statistics.median(getattr(sample, name) for sample in part)) for part in (second, last))
        counts.append(f"{name} {before} and {after}")
        failures += [f"{name} grow from {before} to {after}"] if after > before + 1 else []
    mib = [statistics.median(sample.rss_kib for sample in part) / 1024 for part in (second, last)]
    memory = f"{mib[0]:.0f} MiB in the second quarter, {mib[1]:.0f} in the last ({slope:+.2f} KiB a step)"
    seen = f"{memory}; medians of {', '.join(counts)}"
    return Row(what, len(samples), seen, failures)


def _sample(pid: int, step: int) -> _Sample | None:
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        descriptors = len(list((process / "fd").iterdir()))
        return _Sample(step, int(status["VmRSS"].split()[0]), descriptors, int(status["Threads"]))
    except (OSError, KeyError):  # it has just ended
        return None


def _step(metrics: Path) -> int:
    """The last step that was logged."""
    try:
        last = metrics.read_text().rsplit("\n", 2)[-2]
        return int(last.partition(":")[2].partition(",")[0])
    except (OSError, IndexError, ValueError):
        return 0
