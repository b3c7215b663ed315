"""The loss over several GPUs: time, memory, exposed transfers and error, beside other implementations and the cost
model.

    python -m scripts.bench.ring --output docs/bench/ring.json                 # one process for each GPU here
    torchrun --nproc-per-node 2 -m scripts.bench.ring --output docs/bench/ring.json
    python -m scripts.bench.ring --ranks 1 --parts methods --methods "bigbatch gather" "bigbatch offload" --sizes 131072
    262144 524288

A method that is wrong is not timed. Times are medians of calls queued one after the other, those of the slowest rank;
memory is what a call adds to its inputs, gradients included, on the rank that needs most. A share of exposed transfers
is (time − time of the same work with local copies in place of transfers) / time, both those of the slowest rank.
`scripts.bench.report` makes the page and the plot.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from retriever.command import command_parser, launched, option, run
from scripts.bench.loss_bench import LossBench
from scripts.bench.loss_methods import ring_methods
from scripts.bench.tables import Table

_PARTS = ("methods", "exposed")
_PACKAGES = ("torch", "triton", "inf-cl", "memeff")


def _ring(args: argparse.Namespace) -> None:
    if "RANK" not in os.environ and args.ranks > 1:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks))
        subprocess.run([*launcher, *shlex.split(args.command)[1:]], check=True)
        return
    with launched() as world:
        table = Table.begin(args.command, _PACKAGES) if world.is_first else None
        bench = LossBench(world, table, args.output, args.dim, args.check, several=True)
        if "methods" in args.parts:
            bench.run(ring_methods(), args.methods, args.sizes)
        if "exposed" in args.parts:
            for method, b in product(ring_methods()[:2], args.exposed_sizes):
                bench.exposed(method, b)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.bench.ring`."""
    parser = command_parser(
        "python -m scripts.bench.ring",
        __doc__,
        option("--output", type=Path, default=Path("docs/bench/ring.json")),
        option("--parts", nargs="+", choices=_PARTS, default=list(_PARTS)),
        option("--methods", nargs="*", default=[], help="names, or names and conditions; all if absent"),
        option("--sizes", type=int, nargs="+", default=[16384, 65536, 131072, 262144, 1048576], help="global batches"),
        option("--exposed-sizes", type=int, nargs="+", default=[131072, 262144]),
        option("--check", type=int, default=4096, help="global batch of the comparison with float64"),
        option("--dim", type=int, default=768),
        option(
            "--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes to start, where none are yet"
        ),
    )
    return run(parser, arguments, _ring)


if __name__ == "__main__":
    sys.exit(main())
