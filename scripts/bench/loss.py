"""The loss alone: time, memory and error of InfoNCE with in-batch negatives, beside every other implementation.

    python -m scripts.bench.loss --output docs/bench/loss.json
    python -m scripts.bench.loss --sizes 1048576 --accuracy-sizes --methods bigbatch --output /tmp/million.json

One NVIDIA GPU; `pip install -e .[bench]` for the peers. A method that is wrong is not timed, one that does not run is
named with the reason. Times are medians of calls queued one after the other, between CUDA events; memory is what a call
adds to its inputs, gradients and cuBLAS's workspaces included. `scripts.bench.report` makes the page and the plot from
the JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from retriever.command import command_parser, option, run
from retriever.parallel.world import World
from scripts.bench.loss_bench import LossBench
from scripts.bench.loss_methods import methods, random_problem, reference
from scripts.bench.measure import add_matmul_rate, errors
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "inf-cl", "memeff", "cut-cross-entropy", "liger-kernel")
_TIERS = {"bf16": 0, "high": 4}  # of `methods`


def accuracy(bench: LossBench, sizes: Sequence[int]) -> None:
    """Errors of the tiers against float64 at several temperatures and cosines of the pairs, and whether a repeat gives
    the same bits.
    """
    tiers = {name: methods()[place] for name, place in _TIERS.items()}
    for b in sizes:
        for temperature in (0.01, 0.02, 0.05):
            for cosine in (0.0, 0.2, 0.4):
                problem = random_problem(bench.world, b, bench.dim, cosine=cosine, temperature=temperature, seed=1)
                truth = reference(problem)
                for precision, method in tiers.items():
                    case = bench.case(b, f"t={temperature},cosine={cosine},{precision}")
                    first, second = (method.run(problem, True) for _ in range(2))
                    same = all(
                        torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None
                    )
                    note = f"mean loss {float(truth[0]):.3g}" + ("" if same else "; the repeat differs")
                    for metric, value in zip(("loss_error", "gradient_error"), errors(first, truth), strict=True):
                        bench.add(case, "bigbatch", metric, value, "relative", note)


def _loss(args: argparse.Namespace) -> None:
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = Table.begin(args.command, _PACKAGES)
    add_matmul_rate(table, world.device)
    bench = LossBench(world, table, args.output, args.dim, args.check, several=False)
    bench.run(methods(), args.methods, args.sizes)
    accuracy(bench, args.accuracy_sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.bench.loss`."""
    parser = command_parser(
        "python -m scripts.bench.loss",
        __doc__,
        option("--output", type=Path, default=Path("docs/bench/loss.json")),
        option("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072]),
        option("--accuracy-sizes", type=int, nargs="*", default=[4096, 32768]),
        option("--methods", nargs="*", default=[], help="names, or names and conditions; all if absent"),
        option("--check", type=int, default=4096, help="batch of the comparison with float64"),
        option("--dim", type=int, default=768),
    )
    return run(parser, arguments, _loss)


if __name__ == "__main__":
    sys.exit(main())
