"""Phases of a training run, and kills inside them. A process calls `watch` before it trains."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from retriever.files import append_text

# Each is one call of a function of the trainer.
PHASES = {
    "store build": "retriever.assembly:build_or_open",
    "resume": "retriever.outputs:Outputs.__init__",
    "any moment": "retriever.train:main.body",
    "save": "retriever.outputs:Outputs._write",
    "export": "retriever.published:Published.export",
    "evaluation": "retriever.run:Run.evaluate",
    "publish of best": "retriever.published:Published.best",
    "report": "retriever.published:write_report",
}
HELD = "the fourth step begins"
OF_EVERY_RANK = ("any moment", "evaluation")


@dataclass(frozen=True)
class Kill:
    """SIGKILL for rank `rank`, `after_s` seconds into call number `call` (from 1 on) of `phase`."""

    phase: str
    call: int
    after_s: float
    rank: int = 0


def watch(log: Path, kill: Kill | None) -> None:
    """Appends `<phase> <seconds>` to `log` after each phase of this process, and `killed in <phase>` at its end."""
    if kill is not None and kill.rank != int(os.environ.get("RANK", "0")):
        kill = None
    for phase, place in PHASES.items():
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for inner in owners:
            owner = getattr(owner, inner)
        setattr(owner, name, _watched(phase, getattr(owner, name), log, kill if kill and kill.phase == phase else None))


def hold_fourth_step(seconds: float) -> None:
    """Makes the fourth step of this process take longer."""
    from retriever.run import Run

    forward_backward, steps = Run.forward_backward, iter(range(1, 1_000_000))

    def held(*arguments: Any, **named: Any) -> Any:
        if next(steps) == 4:
            print(HELD, flush=True)
            time.sleep(seconds)
        return forward_backward(*arguments, **named)

    Run.forward_backward = held  # type: ignore[method-assign]


def read(log: Path) -> list[tuple[str, float]]:
    """What `watch` wrote: each phase with its seconds, in the order in which they ended."""
    lines = (line.rpartition(" ") for line in log.read_text().splitlines())
    return [(phase, float(seconds)) for phase, _, seconds in lines]


def _watched(phase: str, function: Callable[..., Any], log: Path, kill: Kill | None) -> Callable[..., Any]:
    calls, running = 0, False

    def end_here() -> None:
        append_text(log, f"killed {'in' if running else 'after'} {phase} 0\n")
        os.kill(os.getpid(), signal.SIGKILL)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls, running
        calls, running, started = calls + 1, True, time.perf_counter()
        if kill is not None and calls == kill.call:
            timer = threading.Timer(kill.after_s, end_here)
            timer.daemon = True
            timer.start()
        try:
            return function(*arguments, **named)
        finally:
            running = False
            with suppress(OSError):  # of a full disk
                append_text(log, f"{phase} {time.perf_counter() - started:.6f}\n")

    return call
