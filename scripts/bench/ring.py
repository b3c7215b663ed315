"""The loss over several GPUs: time, memory, exposed transfers and error, beside other implementations and the cost
model.

    python -m scripts.bench.ring --output docs/bench/ring.json                 # one process for each GPU here
    torchrun --nproc-per-node 2 -m scripts.bench.ring --output docs/bench/ring.json
    python -m scripts.bench.ring --ranks 1 --parts methods --methods "bigbatch gather" "bigbatch offload" \
        --sizes 131072 262144 524288

A method whose gradient is wrong is not timed. Times are medians of calls queued one after another, on the slowest rank.
Memory is what a call adds to its inputs, including gradients, on the rank that needs most. The share of exposed
transfers is (time − time with local copies in place of transfers) / time, both on the slowest rank.
`scripts.bench.report` makes the page and the plot.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from retriever.command import command, option
from retriever.launch import launched
from retriever.parallel.cost import Machine, Workload, gather_cost, ring_cost
from scripts.bench.loss import OPTIONS, LossBench
from scripts.bench.loss_methods import Method, ring_methods
from scripts.bench.measure import Silent, median_ms
from scripts.bench.tables import Table

_PARTS = ("methods", "exposed")
_PACKAGES = ("torch", "triton", "inf-cl", "memeff")


def predict(bench: LossBench, b: int, condition: str) -> None:
    """Adds the cost model's estimate for Bigbatch's loss on a batch of `b`."""
    exchange, _, direction = condition.partition(",")
    size, (cost, workspace_mib) = bench.world.size, (ring_cost, 256) if exchange == "ring" else (gather_cost, 1024)
    work = Workload(b, b, bench.dim, size, direction == "symmetric", workspace_mib=workspace_mib)
    estimate = cost(work, Machine(ranks_per_node=size))
    bench.table.add(bench.case(b, condition), "bigbatch", "predicted_ms", estimate.total_ms, "ms")
    bench.table.add(bench.case(b, condition), "bigbatch", "predicted_mb", estimate.mib, "MiB")


def exposed(bench: LossBench, method: Method, b: int) -> None:
    """Adds the share of a call that waits for transfers. The call and the same work without transfers take turns."""
    problem, world = bench.problem(b), bench.world
    alone = replace(problem, world=Silent(world.device, world.rank, world.size))
    calls = [partial(method.run, each, True) for each in (problem, alone)]
    turns = [[median_ms(world, call, bench.seconds) for call in calls] for _ in range(3)]
    medians = [statistics.median(times) for times in zip(*turns, strict=True)]
    # A GPU that is faster than the others waits for them: of one rank's own times that would count as transfers.
    whole, silent = world.max(torch.tensor(medians, dtype=torch.float64, device=world.device)).tolist()
    add = partial(bench.table.add, bench.case(b, method.condition), method.name)
    add("with_transfers_ms", whole, "ms", "by turns with those without")
    add("without_transfers_ms", silent, "ms")
    add("exposed_share", (whole - silent) / whole, "of the time")


@command(
    "python -m scripts.bench.ring",
    __doc__,
    option("--output", type=Path, default=Path("docs/bench/ring.json")),
    option("--parts", nargs="+", choices=_PARTS, default=list(_PARTS)),
    option("--sizes", type=int, nargs="+", default=[16384, 65536, 131072, 262144, 1048576], help="global batches"),
    option("--exposed-sizes", type=int, nargs="+", default=[131072, 262144]),
    *OPTIONS,
    option("--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes to start, where none are yet"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.ring`."""
    if "RANK" not in os.environ and args.ranks > 1:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks))
        subprocess.run([*launcher, *shlex.split(args.command)[1:]], check=True)
        return
    with launched() as world:
        table = Table.begin(args.command, _PACKAGES, args.output, world=world)
        bench = LossBench(table, world, args.dim, args.seconds, several=True)
        for method, b in bench.cases(ring_methods(), args) if "methods" in args.parts else ():
            bench.measure(method, b)
            if method.name == "bigbatch" and method.condition != "offload":
                predict(bench, b, method.condition)
        if "exposed" in args.parts:
            for method, b in product(ring_methods()[:2], args.exposed_sizes):
                exposed(bench, method, b)


if __name__ == "__main__":
    sys.exit(main())
