"""Rows of a table of losses: each method checked against float64, then timed at every size it is for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from retriever.parallel.cost import Machine, Workload, gather_cost, ring_cost
from retriever.parallel.world import World
from scripts.bench.loss_methods import Method, Problem, random_problem, reference
from scripts.bench.measure import Silent, errors, median_ms, peak_extra_mb
from scripts.bench.tables import Table

_WRONG = 0.1  # a gradient further off than this is another function


@dataclass(frozen=True)
class LossBench:
    """The measurements of one rank; rank 0 holds the table and writes it."""

    world: World
    table: Table | None
    output: Path
    dim: int
    check: int  # global batch of the comparison with float64
    several: bool  # cases name the ranks

    def add(self, case: str, method: str, metric: str, value: float | None, unit: str, note: str = "") -> None:
        """Writes the largest value of all ranks."""
        if value is not None:
            value = float(self.world.max(torch.tensor(value, dtype=torch.float64, device=self.world.device)))
        if self.table is not None:
            self.table.add(case, method, metric, value, unit, note)
            self.table.save(self.output)

    def case(self, b: int, condition: str = "") -> str:
        """The name of a case."""
        return f"b={b}" + (f",W={self.world.size}" if self.several else "") + (f",{condition}" if condition else "")

    def problem(self, b: int) -> Problem:
        """This rank's rows of a batch of `b`."""
        return random_problem(self.world, b, self.dim)

    def run(self, methods: Sequence[Method], names: Sequence[str], sizes: Sequence[int]) -> None:
        """Checks and times those methods whose name, or name and condition, is among `names`; all where there are
        none.
        """
        for method in methods:
            if (not names or method.name in names or f"{method.name} {method.condition}" in names) and self._is_right(
                method
            ):
                for b in sizes:
                    if b <= method.largest:
                        self._measure(method, b)

    def _is_right(self, method: Method) -> bool:
        problem, case = self.problem(self.check), self.case(self.check, method.condition)
        truth = reference(problem, symmetric=method.symmetric, masked=method.masked)
        try:
            found = errors(method.run(problem, True), truth)
        except Exception as error:  # a peer may fail in any way, and the table says how
            self.add(
                case,
                method.name,
                "gradient_error",
                None,
                "",
                f"does not run: {type(error).__name__}: {str(error)[:160]}",
            )
            return False
        for metric, value in zip(("loss_error", "gradient_error"), found, strict=True):
            self.add(case, method.name, metric, value, "relative", method.note)
        worst = self.world.max(torch.tensor(found, device=self.world.device).nan_to_num(nan=torch.inf)).tolist()
        if right := math.isfinite(worst[0]) and worst[1] < _WRONG:
            return right
        self.add(case, method.name, "forward_backward_ms", None, "ms", "not timed: wrong")
        return False

    def _measure(self, method: Method, b: int) -> None:
        """Memory and time of one size; a failure of one rank alone becomes a row with the reason."""
        problem, case = self.problem(b), self.case(b, method.condition)
        call, gpu = partial(method.run, problem, True), self.world.device.type == "cuda"
        try:
            if gpu:
                self.add(
                    case, method.name, "mb_per_rank" if self.several else "peak_extra_mb", peak_extra_mb(call), "MiB"
                )
            self.add(case, method.name, "forward_backward_ms", median_ms(self.world, call), "ms")
            if not self.several:
                self.add(
                    case, method.name, "forward_ms", median_ms(self.world, partial(method.run, problem, False)), "ms"
                )
        except Exception as error:
            if self.world.size > 1:  # the other ranks wait for this one
                raise
            self.add(
                case,
                method.name,
                "forward_backward_ms",
                None,
                "ms",
                f"fails: {type(error).__name__}: {str(error)[:120]}",
            )
        if self.several and method.name == "bigbatch" and method.condition != "offload":
            self._predict(b, method.condition)
        del problem, call
        if gpu:
            torch.cuda.empty_cache()

    def _predict(self, b: int, condition: str) -> None:
        """What the cost model says of a case."""
        exchange, _, direction = condition.partition(",")
        size, (cost, workspace_mib) = self.world.size, (ring_cost, 256) if exchange == "ring" else (gather_cost, 1024)
        work = Workload(b, b, self.dim, size, direction == "symmetric", workspace_mib=workspace_mib)
        estimate = cost(work, Machine(ranks_per_node=size))
        self.add(self.case(b, condition), "bigbatch", "predicted_ms", estimate.total_ms, "ms")
        self.add(self.case(b, condition), "bigbatch", "predicted_mb", estimate.mib, "MiB")

    def exposed(self, method: Method, b: int) -> None:
        """The share of a call that waits for transfers: the call and the same work without them, by turns."""
        problem = self.problem(b)
        alone = replace(problem, world=Silent(self.world.device, self.world.rank, self.world.size))
        calls = [partial(method.run, each, True) for each in (problem, alone)]
        turns = [[median_ms(self.world, call, 0.5) for call in calls] for _ in range(3)]
        medians = [statistics.median(times) for times in zip(*turns, strict=True)]
        # A GPU that is faster than the others waits for them: of one rank's own times that would count as transfers.
        whole, silent = self.world.max(torch.tensor(medians, dtype=torch.float64, device=self.world.device)).tolist()
        case = self.case(b, method.condition)
        self.add(case, method.name, "with_transfers_ms", whole, "ms", "by turns with those without")
        self.add(case, method.name, "without_transfers_ms", silent, "ms")
        self.add(case, method.name, "exposed_share", (whole - silent) / whole, "of the time")
