"""Twenty of the malformed inputs of tests/malformed through the real commands, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.malformed.cases import Case
from tests.malformed.test_malformed import CASES, arguments, make_sound, place
from tests.torture.page import Row
from tests.workplace import ROOT

_MODULES = {
    **dict.fromkeys(("train", "config"), "retriever.train"),
    "encode": "retriever.encode",
    "beir": "eval.beir",
    "answers": "eval.answers",
    "compare": "eval.compare",
    "hold_out": "scripts.hold_out",
    "mine": "scripts.mine_negatives",
}


def refusals(root: Path, count: int) -> Iterator[Row]:
    """A row for each command: cases spread evenly over the table, at least one for each command."""
    make_sound(root / "sound")
    spread = [CASES[number * len(CASES) // count] for number in range(count)]
    missing = [command for command in _MODULES if command not in {case.command for case in spread}]
    first = {command: next(case for case in CASES if case.command == command) for command in missing}
    chosen = [*first.values(), *spread][:count]
    for command in _MODULES:
        cases = [case for case in chosen if case.command == command]
        failures = [failure for case in cases for failure in _refused(case, root)]
        if cases:
            yield Row(
                f"python -m {_MODULES[command]}, malformed inputs",
                len(cases),
                "the expected line, exit status 2",
                failures,
            )


def _refused(case: Case, root: Path) -> Iterator[str]:
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "sound", folder)
    place(case, folder)
    command = [sys.executable, "-m", _MODULES[case.command], *arguments(case, folder)]
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in re.split("[\r\n]", ended.stderr) if line.startswith("error: ")]
    if (
        ended.returncode != 2
        or len(lines) != 1
        or not re.search(case.expected, lines[0])
        or "Traceback" in ended.stderr
    ):
        yield f"{case.name}: exit status {ended.returncode}: {ended.stderr[-1000:]}"
