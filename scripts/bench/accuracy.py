"""Accuracy and gradient error of training by several methods, over equal data and several seeds.

    python -m scripts.bench.accuracy --config configs/x.yaml --methods replayed redrawn undropped --sizes 1024 16384
    python -m scripts.bench.accuracy --config configs/x.yaml --methods dense local disco tiled accumulated
    python -m scripts.bench.accuracy --config configs/x.yaml --methods tiled small moco contaccum --sizes 4096

The configuration needs a section `eval`, and its length in `train.epochs`, so that all methods see equal data. A run of
each method, batch size and seed is evaluated after its last step. Started again, the command goes on after the rows of
its JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor

from retriever.command import command, option
from retriever.config import Config
from retriever.config_file import load
from retriever.data.batch import Batch
from retriever.history import read_metrics
from retriever.loss.strategies import STRATEGIES, Problem
from retriever.parallel.world import World
from retriever.retention import EVERYTHING, NOTHING, Retention
from retriever.rng import RngState
from retriever.run import Run
from retriever.step import forward_backward
from scripts.bench.tables import Table

_PACKAGES = ("torch", "triton", "transformers")
_NOTHING_KEPT = ("batch.retain=false", "batch.retain_products=false")


Contrast = Callable[[Problem, World], tuple[Tensor, Tensor, Tensor]]


def in_small_batches(size: int, contrast: Contrast = STRATEGIES["tiled"]) -> Contrast:
    """The sum of the losses of small batches of about `size` pairs, each with its own passages as negatives only: what
    adding up their gradients gives. Pairs are dealt at random; on one rank.
    """

    def small(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
        parts = max(1, len(problem.queries) // size)
        home = torch.randperm(len(problem.passages), device=problem.passages.device) % parts  # [N]
        losses = problem.queries.new_zeros(len(problem.queries))
        dqueries, dpassages = torch.zeros_like(problem.queries), torch.zeros_like(problem.passages)
        for part in range(parts):
            columns = (home == part).nonzero()[:, 0]
            rows = (home[problem.columns] == part).nonzero()[:, 0]
            place = torch.empty_like(home)
            place[columns] = torch.arange(len(columns), device=home.device)
            exclusions = replace(problem.exclusions.of_rows(rows), passage_ids=problem.exclusions.passage_ids[columns])
            one = replace(
                problem,
                queries=problem.queries[rows],
                passages=problem.passages[columns],
                positives=place[problem.positives[rows]],
                exclusions=exclusions,
                known_pairs=None,
            )
            losses[rows], dqueries[rows], dpassages[columns] = contrast(one, world)
        return losses, dqueries, dpassages

    return small


def masks_redrawn() -> AbstractContextManager[object]:
    """Inside, a chunk that is encoded again draws dropout masks of its own."""
    return patch.object(RngState, "restored", lambda _: nullcontext())


@dataclass(frozen=True)
class Method:
    """The settings in which runs of a method differ from the configuration."""

    settings: tuple[str, ...] = ()
    dropout: bool = True
    bank: str | None = None  # loss.bank of runs over small batches, of which bank and batch together fill the size
    inside: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext()  # of the size of a small batch


METHODS = {
    "replayed": Method(_NOTHING_KEPT),
    "redrawn": Method(_NOTHING_KEPT, inside=lambda _: masks_redrawn()),
    "undropped": Method(_NOTHING_KEPT, dropout=False),
    **{strategy: Method((f"loss.strategy={strategy}",)) for strategy in ("dense", "local", "disco", "tiled")},
    "small": Method(bank="none"),
    "moco": Method(bank="moco"),
    "contaccum": Method(bank="contaccum"),
    "accumulated": Method(inside=lambda size: patch.dict(STRATEGIES, tiled=in_small_batches(size))),
}


def gradient(training: Run, batch: Batch, seed: int, retention: Retention) -> Tensor:
    """The gradient of `batch` at the present weights, in one vector."""
    parts = training.encoder, training.objective, batch, training.optimizer, training.world
    forward_backward(*parts, seed, retention)
    training.world.sum_gradients(training.optimizer.parameters)
    found = torch.cat([p.grad.flatten() for p in training.optimizer.parameters if p.grad is not None])
    training.optimizer.torch.zero_grad(set_to_none=True)
    return found


def gradient_errors(training: Run, batch: Batch, inside: AbstractContextManager[object]) -> tuple[float, float]:
    """‖g − g*‖/‖g*‖, where g* has one graph over all chunks: of the method's g, and of a g* under other masks."""
    seed = training.config.run.seed
    exact = gradient(training, batch, seed, Retention(graphs=EVERYTHING))
    other = gradient(training, batch, seed + 1, NOTHING)
    with inside:
        found = gradient(training, batch, seed, NOTHING)
    return float((found - exact).norm() / exact.norm()), float((other - exact).norm() / exact.norm())


def measured(config: Config, method: Method, small: int, *, errors: bool) -> dict[str, tuple[float, str]]:
    """Trains to the end. The figures, with their units: the gradient's errors at the first batch, seconds a step, and
    the measures of the evaluation after the last step.
    """
    found: dict[str, tuple[float, str]] = {}
    with Run(config) as training:
        training.encoder.train(method.dropout)
        for batch in training.batches():
            if batch.step == 0:
                if errors:
                    error, other = gradient_errors(training, batch, method.inside(small))
                    found |= {"gradient_error": (error, "relative"), "other_masks": (other, "relative")}
                started = perf_counter()
            with method.inside(small):
                loss = training.forward_backward(batch).loss
            if batch.step + 1 == training.total:
                loss.item()  # waits for the device
                found["seconds"] = (perf_counter() - started) / training.total, "s a step"
            training.optimizer_step()
    lines = read_metrics(Path(config.run.output_dir) / "metrics.jsonl")
    named = ((name, value) for line in lines for name, value in line.items())
    return found | {name.removeprefix("eval/"): (x, "") for name, x in named if name.startswith("eval/")}


def _batch(method: Method, size: int, small: int) -> list[str]:
    """The settings of a method's batch and bank."""
    if method.bank is None:
        return [f"batch.queries={size}"]
    if method.bank == "none":
        return [f"batch.queries={small}"]
    return [f"batch.queries={small}", f"loss.bank={method.bank}", f"loss.bank_steps={max(1, size // small - 1)}"]


def _add_means(table: Table, case: str, method: str) -> None:
    """A row for each figure over all seeds, in place of an earlier one, whose note has the least and the most."""
    found: dict[tuple[str, str], list[float]] = {}
    table.rows = [row for row in table.rows if (row.case, row.method) != (case, method)]
    for row in table.rows:
        if row.method == method and row.case.startswith(f"{case},") and row.value is not None:
            found.setdefault((row.metric, row.unit), []).append(row.value)
    for (metric, unit), values in found.items():
        note = f"{metric} {min(values):.4g} to {max(values):.4g} over {len(values)} seeds"
        table.add(case, method, metric, fmean(values), unit, note)


@command(
    "python -m scripts.bench.accuracy",
    __doc__,
    option("--config", required=True, help="a training configuration with a section eval"),
    option("--output", type=Path, default=Path("docs/bench/accuracy.json")),
    option("--methods", nargs="+", choices=METHODS, default=list(METHODS)),
    option("--sizes", type=int, nargs="+", default=[1024, 16384], help="queries of a batch"),
    option("--seeds", type=int, nargs="+", default=[0, 1, 2]),
    option("--small", type=int, default=256, help="queries of the small batches that some methods have"),
    option("--errors", action="store_true", help="measure the gradient's error at the first batch too"),
    option("--settings", nargs="*", default=[], metavar="key=value", help="of every run"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.accuracy`."""
    table = Table.begin(args.command, _PACKAGES, args.output)
    if args.output.exists():
        table.rows = Table.load(args.output).rows
    rarely = ("train.save_every=1000000000", "train.eval_every=0", "run.trackers=[]")
    for size, name in product(args.sizes, args.methods):
        method, case = METHODS[name], f"b={size}"
        for seed in args.seeds:
            at = f"{case},seed={seed}"
            if any((row.case, row.method) == (at, name) for row in table.rows):
                continue
            with tempfile.TemporaryDirectory() as folder:
                settings = [*args.settings, *rarely, *method.settings, *_batch(method, size, args.small)]
                config = load(args.config, [*settings, f"run.output_dir={folder}/run", f"run.seed={seed}"])
                found = measured(config, method, args.small, errors=args.errors)
            for metric, (value, unit) in found.items():
                table.add(at, name, metric, value, unit)
        _add_means(table, case, name)


if __name__ == "__main__":
    sys.exit(main())
