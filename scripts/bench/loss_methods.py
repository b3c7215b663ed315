"""The losses that `scripts.bench.loss` and `scripts.bench.ring` compare. Each maps one rank's rows to (mean loss,
dqueries, dpassages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kernels.infonce.api import Exclusions, infonce
from kernels.matmul import float32_products
from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS
from retriever.loss.strategies import STRATEGIES
from retriever.loss.tiled import tiled
from scripts.bench.loss_problem import Problem
from scripts.bench.measure import Result

Found = tuple[Tensor, Tensor | None, Tensor | None]
LossOf = Callable[[Problem, Tensor, Tensor], Tensor]  # (problem, queries, passages) -> this rank's part of the loss


@dataclass(frozen=True)
class Method:
    """A loss, with its name in the table and the options it runs with."""

    name: str
    condition: str  # what follows the batch in the case, "" for the plain one
    run: Callable[[Problem, bool], Found]  # (problem, with gradients)
    largest: int = 131_072  # global batch
    note: str = ""
    symmetric: bool = False
    exclusions: Callable[[Problem], Exclusions] | None = None  # of the problem, what else is no negative

    def is_among(self, names: Sequence[str]) -> bool:
        """Whether `names` is empty or holds the method's name, or its name and condition."""
        return not names or self.name in names or f"{self.name} {self.condition}" in names


def methods() -> list[Method]:
    """The losses of one GPU. A peer's package is imported when the peer first runs."""
    note, folded = "fp32 gradients", "bf16 gradients; scale folded into the bf16 queries"
    return [
        Method("bigbatch", "", _infonce, 2**20, note),
        Method("bigbatch", "workspace=256", partial(_infonce, workspace_mib=256), note=note),
        Method("bigbatch", "symmetric", partial(_infonce, symmetric=True), note=note, symmetric=True),
        _excluding("known=1", lambda problem: problem.known),
        _excluding("guide=384", lambda problem: problem.guided),
        Method("bigbatch", "high", partial(_infonce, precision="high"), 65_536, note),
        Method("dense", "", _fp32_peer(_dense), 65_536, "fp32 logits of tf32 products, fp32 gradients"),
        Method("dense", "bf16 logits", _dense_bf16, 65_536, "autocast, bf16 gradients"),
        Method("inf-cl", "", _fp32_peer(_inf_cl), note="fp32 inputs, tf32 products, fp32 gradients"),
        Method("memeff", "", _peer(_memeff), note="one direction (its Qwen3 loss without mask), bf16 gradients"),
        Method("cce", "", _peer(_cce), note=f"exact (no filter), {folded}"),
        Method("liger", "", partial(_liger, chunks=1), note=folded),
        Method("liger", "8x chunks", partial(_liger, chunks=8), note="chunk_mem_const=8, as above"),
        Method("liger", "sm90", _peer(_liger_hopper), note=f"its kernels for Hopper, {folded}"),
        Method("quack", "", _peer(partial(_quack, chunk=4096)), note=f"chunks of 4,096 rows, {folded}"),
        Method("quack", "16k chunks", _peer(partial(_quack, chunk=16_384)), note="chunks of 16,384 rows, as above"),
    ]


def ring_methods() -> list[Method]:
    """The losses over several ranks."""
    ring: dict[str, Any] = {"exchange": "ring", "workspace_mib": 256}
    note, ring_note = "fp32 gradients", "256 MiB workspace, fp32 gradients"
    host, logits = "rows and gradients in host memory, whose part is in the time", "fp32 logits of tf32 products"
    memeff = partial(_memeff, name="DistributedMemoryEfficientQwen3Loss")
    return [
        Method("bigbatch", "gather", _tiled, 2**20, note),
        Method("bigbatch", "ring", partial(_tiled, **ring), 2**22, ring_note),
        Method("bigbatch", "gather,symmetric", partial(_tiled, symmetric=True), note=note, symmetric=True),
        Method("bigbatch", "ring,symmetric", partial(_tiled, symmetric=True, **ring), note=ring_note, symmetric=True),
        Method("bigbatch", "offload", _offloaded, 2**20, host),
        Method("dense", "", partial(_strategy, name="dense"), 32_768, f"b × b {logits} on every rank"),
        Method("local", "", partial(_strategy, name="local"), 65_536, f"B × b {logits}"),
        Method("disco", "", partial(_strategy, name="disco"), 65_536, f"B × b {logits}"),
        Method("dense", "bf16 logits", _dense_bf16, note="passages gathered, autocast, bf16 gradients"),
        Method("inf-cl", "ring", _fp32_peer(_inf_cl_ring), note="its ring, fp32 inputs, tf32 products"),
        Method("memeff", "ring", _peer(memeff), note="its ring, bf16 gradients"),
    ]


def _excluding(condition: str, exclusions: Callable[[Problem], Exclusions]) -> Method:
    def run(problem: Problem, gradients: bool) -> Found:
        return _infonce(problem, gradients, exclusions=exclusions(problem))

    return Method("bigbatch", condition, run, note="fp32 gradients", exclusions=exclusions)


def _infonce(problem: Problem, gradients: bool, **options: Any) -> Found:
    b, device = len(problem.queries), problem.queries.device
    weights = torch.full((b,), 1 / b, device=device)
    sides = (problem.queries, problem.passages)
    out = infonce(*sides, problem.at, 1 / problem.temperature, weights=weights, gradients=gradients, **options)
    return out.loss.mean(), out.dqueries, out.dpassages


def _tiled(problem: Problem, gradients: bool, **options: Any) -> Found:
    return _mean(problem, tiled(problem.for_strategy(**options), problem.world))


def _strategy(problem: Problem, gradients: bool, *, name: str) -> Found:
    with float32_products("tf32"):
        return _mean(problem, STRATEGIES[name](problem.for_strategy(dtype=torch.float32), problem.world))


def _mean(problem: Problem, result: Result) -> Found:
    losses, dqueries, dpassages = result
    return problem.world.sum(losses.sum()) / (len(losses) * problem.world.size), dqueries, dpassages


def _offloaded(problem: Problem, gradients: bool) -> Found:
    """The objective as training calls it with rows in host memory. A small batch still has several blocks."""
    B = len(problem.queries)
    config = LossConfig(temperature=problem.temperature, precision="bf16", workspace_mib=1024)
    block_rows = BLOCK_ROWS if B > BLOCK_ROWS else max(1, 3 * B // 10)
    objective = ContrastiveObjective(config, unit_norm=True, block_rows=block_rows).to(problem.world.device)
    at, ids = problem.at.cpu(), problem.ids.cpu()
    targets = Targets(at, ids, torch.arange(B + 1), ids, B * problem.world.size)
    loss, dqueries, dpassages = objective(*problem.on_host, targets, problem.world)
    return problem.world.sum(loss), dqueries, dpassages


def _peer(loss_of: LossOf, dtype: torch.dtype = torch.bfloat16) -> Callable[[Problem, bool], Found]:
    """A method whose gradients come from autograd. Products of fp32 inputs are in TF32."""

    def run(problem: Problem, gradients: bool) -> Found:
        sides = (problem.queries, problem.passages)
        queries, passages = (side.to(dtype).detach().requires_grad_(gradients) for side in sides)
        with torch.set_grad_enabled(gradients), float32_products("tf32"):
            loss = loss_of(problem, queries, passages)
            if gradients:
                loss.backward()
        return problem.world.sum(loss.detach()), queries.grad, passages.grad

    return run


_fp32_peer = partial(_peer, dtype=torch.float32)


def _dense(problem: Problem, queries: Tensor, passages: Tensor) -> Tensor:
    return cross_entropy(queries @ passages.T / problem.temperature, problem.at)


def _dense_bf16(problem: Problem, gradients: bool) -> Found:
    """Gathers all passages, takes the cross-entropy of bf16 logits by autograd, and reduce-scatters the gradients."""
    world, gathered = problem.world, problem.world.gather_rows(problem.passages)
    every = gathered.rows.detach().requires_grad_(gradients)
    targets = problem.at + gathered.own.start
    dense = _peer(lambda _, q, p: cross_entropy(q @ every.T / problem.temperature, targets) / world.size)
    loss, dqueries, _ = dense(problem, gradients)
    return loss, dqueries, world.reduce_rows(every.grad, gathered.counts) if every.grad is not None else None


def _inf_cl(problem: Problem, queries: Tensor, passages: Tensor) -> Tensor:
    loss = import_module("inf_cl").cal_flash_loss
    return loss(queries, passages, problem.at, scale=1 / problem.temperature).mean()


def _inf_cl_ring(problem: Problem, queries: Tensor, passages: Tensor) -> Tensor:
    loss = import_module("inf_cl").cal_inf_loss
    return loss(queries / problem.temperature, passages) / problem.world.size


def _memeff(problem: Problem, queries: Tensor, passages: Tensor, *, name: str = "MemoryEfficientQwen3Loss") -> Tensor:
    one_direction = {"margin": 2.0, "use_qq_negatives": False, "use_dd_negatives": False}
    settings = {"temperature": problem.temperature, "normalized_inputs": True, "stable": False, **one_direction}
    return getattr(import_module("memeff"), name)(**settings)(queries, passages)


def _cce(problem: Problem, queries: Tensor, passages: Tensor) -> Tensor:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return loss(queries / problem.temperature, passages, problem.at, filter_eps=None)


def _liger(problem: Problem, gradients: bool, *, chunks: int) -> Found:
    """Calls the forward of Liger's autograd function, which also computes the gradients; the function itself does not
    take the size of a chunk.
    """
    forward = import_module("liger_kernel.ops.fused_linear_cross_entropy").fused_linear_cross_entropy_forward
    asked = {"compute_gradients": gradients, "weight_requires_grad": gradients, "chunk_mem_const": chunks}
    loss, *found = forward(problem.queries / problem.temperature, problem.passages, problem.at, **asked)
    if not gradients:
        return loss, None, None
    dscaled, dpassages = (x for x in found if isinstance(x, Tensor) and x.shape == problem.queries.shape)
    return loss, dscaled / problem.temperature, dpassages


def _liger_hopper(problem: Problem, queries: Tensor, passages: Tensor) -> Tensor:
    module = import_module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    loss: Tensor = module.liger_fused_linear_cross_entropy_sm90(queries / problem.temperature, passages, problem.at)
    return loss


def _quack(problem: Problem, queries: Tensor, passages: Tensor, *, chunk: int) -> Tensor:
    loss = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    found: Tensor = loss(queries / problem.temperature, passages, problem.at, chunk_size=chunk)
    return found
