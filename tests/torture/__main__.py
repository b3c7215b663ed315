"""Runs what `tests.torture` describes and writes its tables into docs/reliability.md: `make torture`.

    python -m tests.torture                       # everything, about an hour on two cores
    python -m tests.torture kills soak --seed 7   # parts, with other random moments

It needs no GPU. Power cuts on a loop device and full disks need root; without it their rows say so. The exit status is
1 where anything failed; what failed is printed, and its folder is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch

from retriever.wording import counted
from tests.torture import page
from tests.torture.damage import damage
from tests.torture.disks import full_disks, power_cuts
from tests.torture.fuzz import fuzz
from tests.torture.kills import kills
from tests.torture.launches import launches
from tests.torture.page import Row
from tests.torture.refusals import refusals
from tests.torture.soak import soak


def _kills(root: Path, args: argparse.Namespace) -> Iterator[Row]:
    return chain.from_iterable(kills(root, ranks=ranks, campaigns=3, seed=args.seed) for ranks in (1, 2))


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Row]]] = {
    "kills": _kills,
    "power": lambda root, args: power_cuts(root, cuts=3, seed=args.seed),
    "disk": lambda root, args: full_disks(root, sizes=8),
    "damage": lambda root, args: damage(root, args.seed),
    "launches": lambda root, args: launches(root),
    "refusals": lambda root, args: refusals(root, 20),
    "soak": lambda root, args: soak(root, steps=2_000),
    "fuzz": lambda root, args: fuzz(root, seconds=args.fuzz_seconds, seed=args.seed),
}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments and bytes")
    parser.add_argument("--fuzz-seconds", type=int, default=600, help="of processor time, for all readers together")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    os.environ |= {"BIGBATCH_CACHE": str(root / "verified"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    failed = sum(_run(part, root / part, args) for part in args.parts or PARTS)
    print(f"\n{failed} failures" if failed else "\nno failure")
    return int(failed > 0)


def _run(part: str, root: Path, args: argparse.Namespace) -> int:
    """Runs a part, writes its table, and returns how much failed."""
    started, rows = time.monotonic(), list[Row]()
    print(f"\n{part} ({root})", flush=True)
    for row in PARTS[part](root, args):
        rows.append(row)
        print(f"{row.what}: {row.count:,}; {row.outcome}", *row.failures, sep="\n  FAILED ", flush=True)
        minutes = max(1, round((time.monotonic() - started) / 60))
        command = f"`python -m tests.torture {part} --seed {args.seed}` on {_machine()}: {counted(minutes, 'minute')}."
        page.write(part, f"{command}\n\n{page.table(rows)}")
    return sum(len(row.failures) for row in rows)


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} {platform.machine()} cores, {platform.system()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
