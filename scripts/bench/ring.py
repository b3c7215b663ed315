"""The loss over several GPUs: time, memory, exposed transfers and error, beside other implementations and the cost model.

    python -m scripts.bench.ring --output docs/bench/ring.json                 # one process for each GPU here
    torchrun --nproc-per-node 2 -m scripts.bench.ring --output docs/bench/ring.json
    python -m scripts.bench.ring --ranks 1 --parts methods --methods "bigbatch gather" "bigbatch offload" --sizes 131072 262144 524288

A method that is wrong is not timed. Times are medians of calls queued one after the other, those of the slowest rank; memory is what a
call adds to its inputs, gradients included, on the rank that needs most. A share of exposed transfers is (time − time of the same work
with local copies in place of transfers) / time, both those of the slowest rank. `scripts.bench.report` makes the page and the plot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.bench.loss_bench import LossBench
from scripts.bench.loss_methods import ring_methods
from scripts.bench.measure import joined
from scripts.bench.tables import Table

_PARTS = ("methods", "exposed")
_PACKAGES = ("torch", "triton", "inf-cl", "memeff")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.bench.ring`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/ring.json"))
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--methods", nargs="*", default=[], help="names, or names and conditions; all if absent")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 65536, 131072, 262144, 1048576], help="global batches")
    parser.add_argument("--exposed-sizes", type=int, nargs="+", default=[131072, 262144])
    parser.add_argument("--check", type=int, default=4096, help="global batch of the comparison with float64")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(words)
    world = joined("scripts.bench.ring", args.ranks, words)
    if world is None:
        return
    bench = LossBench(world, Table.begin(_PACKAGES) if world.is_first else None, args.output, args.dim, args.check, several=True)
    if "methods" in args.parts:
        bench.run(ring_methods(), args.methods, args.sizes)
    if "exposed" in args.parts:
        for method in ring_methods()[:2]:
            for b in args.exposed_sizes:
                bench.exposed(method, b)


if __name__ == "__main__":
    main()
