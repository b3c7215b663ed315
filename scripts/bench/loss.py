"""The loss alone: time, memory and error of InfoNCE with in-batch negatives, beside other implementations.

    python -m scripts.bench.loss --output docs/bench/loss.json
    python -m scripts.bench.loss --sizes 1048576 --accuracy-sizes --methods bigbatch --output /tmp/million.json

Needs one NVIDIA GPU, and `pip install -e .[bench]` for the peers. A method whose gradient is wrong is not timed. A
method that does not run gets a row with the reason. Times are medians between CUDA events of calls queued one after
another. Memory is what a call adds to its inputs, including gradients and cuBLAS's workspaces. `scripts.bench.report`
makes the page and the plot from the JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from retriever.command import command, option
from retriever.parallel.world import World
from scripts.bench.loss_methods import Method, methods
from scripts.bench.loss_problem import Problem, random_problem, reference
from scripts.bench.measure import add_matmul_rate, errors, free_memory, median_ms, peak_extra_mb
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "inf-cl", "memeff", "cut-cross-entropy", "liger-kernel", "quack-kernels")
_TIERS = {"bf16": 0, "high": 4}  # of `methods`
_WRONG = 0.1  # a gradient further off than this is another function
OPTIONS = (
    option("--methods", nargs="*", default=[], help="names, or names and conditions; all if absent"),
    option("--check", type=int, default=4096, help="global batch of the comparison with float64"),
    option("--dim", type=int, default=768),
    option("--seconds", type=float, default=0.7, help="of each timing"),
)


@dataclass(frozen=True)
class LossBench:
    """Measures the rows of a table of losses, on each rank."""

    table: Table
    world: World
    dim: int
    seconds: float  # of each timing
    several: bool = False  # cases name the ranks

    def case(self, b: int, condition: str = "") -> str:
        """The name of a case."""
        return f"b={b}" + (f",W={self.world.size}" if self.several else "") + (f",{condition}" if condition else "")

    def problem(self, b: int) -> Problem:
        """This rank's rows of a batch of `b`."""
        return random_problem(self.world, b, self.dim)

    def cases(self, methods: Sequence[Method], args: argparse.Namespace) -> Iterator[tuple[Method, int]]:
        """The cases to measure: the methods that `--methods` names and that are right, at each of `--sizes` that they
        are for.
        """
        for method in methods:
            if method.is_among(args.methods) and self.is_right(method, args.check):
                yield from ((method, b) for b in args.sizes if b <= method.largest)

    def is_right(self, method: Method, b: int) -> bool:
        """Adds the method's errors against float64 on a batch of `b`; returns whether its gradient is right."""
        problem, case = self.problem(b), self.case(b, method.condition)
        with self.table.attempt(case, method.name, "gradient_error", ""):
            exclusions = None if method.exclusions is None else method.exclusions(problem)
            truth = reference(problem, symmetric=method.symmetric, exclusions=exclusions)
            found = errors(method.run(problem, True), truth)
            for metric, value in zip(("loss_error", "gradient_error"), found, strict=True):
                self.table.add(case, method.name, metric, value, "relative", method.note)
            worst = self.world.max(torch.tensor(found, device=self.world.device).nan_to_num(nan=torch.inf)).tolist()
            if math.isfinite(worst[0]) and worst[1] < _WRONG:
                return True
            self.table.add(case, method.name, "forward_backward_ms", None, "ms", "not timed: wrong")
        return False

    def measure(self, method: Method, b: int) -> None:
        """Adds memory and time of a batch of `b`."""
        case, add = self.case(b, method.condition), partial(self.table.add, unit="ms")
        alone = self.world.size == 1  # other ranks would wait for one that fails
        with self.table.attempt(case, method.name, "forward_backward_ms", "ms") if alone else nullcontext():
            problem = self.problem(b)
            call = partial(method.run, problem, True)
            if self.world.device.type == "cuda":
                metric = "mb_per_rank" if self.several else "peak_extra_mb"
                self.table.add(case, method.name, metric, peak_extra_mb(call), "MiB")
            add(case, method.name, "forward_backward_ms", median_ms(self.world, call, self.seconds))
            if not self.several:
                forward = partial(method.run, problem, False)
                add(case, method.name, "forward_ms", median_ms(self.world, forward, self.seconds))
        free_memory(self.world.device)

    def accuracy(self, b: int) -> None:
        """Adds the errors of the precision tiers on a batch of `b`, for several temperatures and cosines of a pair, and
        whether a repeated call gives the same bits.
        """
        for temperature, cosine in product((0.01, 0.02, 0.05), (0.0, 0.2, 0.4)):
            problem = random_problem(self.world, b, self.dim, cosine=cosine, temperature=temperature, seed=1)
            truth = reference(problem)
            for precision, place in _TIERS.items():
                case = self.case(b, f"t={temperature},cosine={cosine},{precision}")
                first, second = (methods()[place].run(problem, True) for _ in range(2))
                same = all(map(torch.equal, first, second))  # type: ignore[arg-type]
                note = f"mean loss {float(truth[0]):.3g}" + ("" if same else "; the repeat differs")
                for metric, value in zip(("loss_error", "gradient_error"), errors(first, truth), strict=True):
                    self.table.add(case, "bigbatch", metric, value, "relative", note)


@command(
    "python -m scripts.bench.loss",
    __doc__,
    option("--output", type=Path, default=Path("docs/bench/loss.json")),
    option("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072]),
    option("--accuracy-sizes", type=int, nargs="*", default=[4096, 32768]),
    *OPTIONS,
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.loss`."""
    world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = Table.begin(args.command, _PACKAGES, args.output)
    add_matmul_rate(table, world.device)
    bench = LossBench(table, world, args.dim, args.seconds)
    for method, b in bench.cases(methods(), args):
        bench.measure(method, b)
    for b in args.accuracy_sizes:
        bench.accuracy(b)


if __name__ == "__main__":
    sys.exit(main())
