"""SIGKILL in every phase of a run; started again until it ends, it must be the undisturbed run bit for bit."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from retriever.errors import LOST, REFUSED
from tests.starts import LIMIT_S, Start, nothing, start
from tests.torture.page import Row
from tests.torture.phases import OF_EVERY_RANK, Kill, read, watch
from tests.workplace import make_workplace

STEPS = 16
_TIMED = {"train/pairs_per_s", "train/tokens_per_s", "train/waited_share", "time"}
_BEFORE, _LATER = ("store build", "first save"), ("save during a step", "evaluation", "publish of best", "export")
ORDER = (*_BEFORE, "resume", *_LATER, "any moment", "report")


@dataclass
class Runs:
    """Runs of one workplace, each in a folder of its own with a token store of its own."""

    root: Path
    settings: tuple[str, ...] = ()
    _undisturbed: dict[int, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.root.exists():
            make_workplace(self.root)
        relative = (
            "run.output_dir=run",
            "data.cache_dir=cache",
            "run.timeout_s=60",
            "run.trackers=[]",
            "batch.tokens_per_chunk=1024",
        )
        length = (f"train.max_steps={STEPS}", "train.save_every=2", "train.eval_every=4", "train.log_every=1")
        self.arguments = ["--config", str(self.root / "run.yaml"), *relative, *length, *self.settings]

    def undisturbed(self, ranks: int) -> Path:
        """The folder of a run that nothing happened to."""
        if ranks not in self._undisturbed:
            folder = self.root / f"undisturbed-{ranks}"
            ended = self.start(folder.name, ranks).wait()
            assert ended.finished, ended.said
            self._undisturbed[ranks] = folder
        return self._undisturbed[ranks]

    def start(
        self,
        name: str,
        ranks: int,
        *,
        kill: Kill | None = None,
        before: Callable[[], object] = nothing,
        logs: Path | None = None,
        limit_s: float = LIMIT_S,
    ) -> Start:
        """Starts the run of a name, or goes on with it. `logs`, by default its folder, holds `log` and `phases`."""
        folder = self.root / name
        logs = logs or folder
        begin = partial(_begin, logs / "phases", kill, before)
        return start(folder, self.arguments, ranks=ranks, before=begin, log=logs / "log", limit_s=limit_s)

    def differences(self, name: str, ranks: int) -> list[str]:
        """Where the run's folder is not the undisturbed one's, byte for byte but for measured times."""
        return [*_differences(_content(self.root / name / "run"), _content(self.undisturbed(ranks) / "run"))]


def _begin(log: Path, kill: Kill | None, before: Callable[[], object]) -> None:
    log.touch()
    watch(log, kill)
    before()


def _content(run: Path) -> dict[str, object]:
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    lines = [json.loads(line) for line in files.pop("metrics.jsonl").read_text().splitlines()]
    files.pop("report.html")  # draws the measured times
    timeless = [{key: value for key, value in line.items() if key not in _TIMED} for line in lines]
    return {"metrics.jsonl": timeless} | {name: path.read_bytes() for name, path in files.items()}


def _differences(found: dict[str, object], expected: dict[str, object]) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            yield f"{name} is {'missing' if name in expected else 'left over'}"
        elif found[name] != expected[name]:
            yield f"{name} differs"


def kills(root: Path, *, ranks: int, campaigns: int, seed: int, plan: tuple[str, ...] = ORDER) -> Iterator[Row]:
    """A row for each phase: how many kills fell there, and which of their runs did not end as the undisturbed one.

    A campaign kills once in each phase, and starts the run again; where the run ends before a phase comes, it goes on with
    another run. On several ranks every second campaign kills one rank only, and the others have to find out.
    """
    runs, draw = Runs(root), random.Random(f"{seed} {ranks}")
    fell, failures = Counter[tuple[str, str]](), {phase: list[str]() for phase in plan}
    for number in range(campaigns):
        names = (f"killed-{ranks}-{number}-{run}" for run in count())
        name = next(names)
        for phase in _order(plan, draw):
            kill = _moment(phase, runs.undisturbed(ranks), ranks, draw)
            for _ in range(3):
                where = _killed(runs, name, ranks, kill, together=number % 2 == 0)
                if where in ("in", "behind"):
                    fell[phase, where] += 1
                    break
                failures[phase] += [where] if where else _end(runs, name, ranks)
                name = next(names)
        failures[plan[-1]] += _end(runs, name, ranks)
    for phase in plan:
        inside, behind = fell[phase, "in"], fell[phase, "behind"]
        seen = f"{inside} inside, {behind} just behind it" + ("" if failures[phase] else "; the same bits")
        yield Row(f"killed in: {phase}, {ranks_of(ranks)}", inside + behind, seen, failures[phase])


def ranks_of(ranks: int) -> str:
    """In words."""
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _killed(runs: Runs, name: str, ranks: int, kill: Kill, *, together: bool) -> str:
    """Whether a kill fell `in` its phase or `behind` it; empty where the run ended before, or else what went wrong."""
    ended = runs.start(name, ranks, kill=kill).wait(together=together)
    expected = (
        -signal.SIGKILL,
        0,
        REFUSED if kill.phase == "store build" else LOST,
    )  # before the ranks have met, and after
    if any(status not in expected for status in ended.statuses) or "Traceback" in ended.said:
        return f"{name}: exit statuses {ended.statuses}: {ended.said[-1500:]}"
    if -signal.SIGKILL not in ended.statuses:
        return ""
    log = runs.root / name / "phases"
    inside = any(line == f"killed in {kill.phase}" for line, _ in read(log))
    log.unlink()
    return "in" if inside else "behind"


def _end(runs: Runs, name: str, ranks: int) -> list[str]:
    """What is wrong with a run once it has ended."""
    ended = runs.start(name, ranks).wait()
    return [f"{name}: {found}" for found in (runs.differences(name, ranks) if ended.finished else [ended.said[-1500:]])]


def _order(plan: tuple[str, ...], draw: random.Random) -> list[str]:
    """The phases of a campaign: what comes once in a run, then the others in any order, the report at the end."""
    first, last = (*_BEFORE, "resume"), "report"
    middle = [phase for phase in plan if phase not in (*first, last)]
    draw.shuffle(middle)
    return [*(phase for phase in plan if phase in first), *middle, *(phase for phase in plan if phase == last)]


def _moment(phase: str, undisturbed: Path, ranks: int, draw: random.Random) -> Kill:
    """A random moment of a phase, by how long it took undisturbed at its shortest."""
    called = "save" if "save" in phase else phase
    taken = min(seconds for name, seconds in read(undisturbed / "phases") if name == called)
    first = 2 if phase == "save during a step" else 1
    rank = draw.randrange(ranks) if phase in OF_EVERY_RANK else 0
    call = draw.choice((first, first + 1)) if phase in _LATER else first
    return Kill(called, call, draw.random() * taken, rank)
