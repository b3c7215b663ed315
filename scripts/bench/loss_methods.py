"""The losses that `scripts.bench.loss` and `scripts.bench.ring` compare. Each maps one rank's rows to (mean loss,
dqueries, dpassages).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from kernels.infonce.api import Exclusions, infonce
from kernels.infonce.exclusions import known_pairs
from kernels.infonce.rules import Guide, Pairs, guide_vectors
from kernels.matmul import float32_products
from retriever.config import LossConfig
from retriever.data.batch import KnownPairs, Targets
from retriever.loss import problem as strategy
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS
from retriever.loss.strategies import STRATEGIES
from retriever.loss.tiled import tiled
from retriever.parallel.host import host_rows
from retriever.parallel.world import World
from scripts.bench.measure import Result

Found = tuple[Tensor, Tensor | None, Tensor | None]
LossOf = Callable[["Problem", Tensor, Tensor], Tensor]  # (problem, queries, passages) -> this rank's part of the loss
_ROWS_DRAWN = 65_536
_GUIDE_DIM = 384


@dataclass(frozen=True)
class Problem:
    """One rank's rows. Passage i is the positive of query i, and every other passage of any rank is a negative. All
    ranks have the same number of rows.
    """

    queries: Tensor  # [B, D] bf16 unit vectors
    passages: Tensor  # [B, D]
    temperature: float
    world: World

    @property
    def at(self) -> Tensor:
        """Row numbers [B] on this rank."""
        return torch.arange(len(self.queries), device=self.queries.device)

    @property
    def ids(self) -> Tensor:
        """Passage ids [B], distinct over all ranks."""
        return self.at + self.world.rank * len(self.queries)

    @cached_property
    def known(self) -> Exclusions:
        """Every query has a second positive, a random row of this rank."""
        B, device = len(self.queries), self.queries.device
        generator = torch.Generator(device).manual_seed(0)
        second = torch.randint(B, (B,), device=device, generator=generator)
        known = torch.stack([self.at, second], dim=1).flatten()
        return Exclusions(self.at, torch.arange(0, 2 * B + 1, 2, device=device), known)

    @cached_property
    def guided(self) -> Exclusions:
        """A guide's vectors of 384 dimensions, of which about one pair in a thousand is as similar as a positive."""
        B, device = len(self.queries), self.queries.device
        generator = torch.Generator(device).manual_seed(0)
        queries, noise = (torch.randn(B, _GUIDE_DIM, device=device, generator=generator) for _ in range(2))
        vectors = guide_vectors(queries), guide_vectors(0.16 * queries + noise)
        limit = (vectors[0].float() * vectors[1].float()).sum(dim=1)
        return Exclusions(self.at, torch.arange(B + 1, device=device), self.at, guide=Guide(*vectors, limit))

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """Queries and passages in float32, in page-locked host memory."""
        sides = (self.queries, self.passages)
        copies = [host_rows(side.shape, torch.float32, self.world.device).copy_(side) for side in sides]
        return copies[0], copies[1]

    def for_strategy(
        self, *, dtype: torch.dtype = torch.bfloat16, symmetric: bool = False, **more: Any
    ) -> strategy.Problem:
        """The problem as the loader hands it to a strategy in training, with no known positives besides the targets."""
        B, none = len(self.queries), self.at.new_empty(0)
        exclusions = Exclusions(self.ids, torch.arange(B + 1, device=self.queries.device), self.ids)
        known = KnownPairs(Pairs(none, none), (B,) * self.world.size)
        more |= {"known_pairs": known, "ignores": False, "largest": 1.0}  # of unit vectors
        queries, passages, weight = self.queries.to(dtype), self.passages.to(dtype), 1 / (B * self.world.size)
        if symmetric:
            more |= {"directions": ("query_to_passage", "passage_to_query"), "partition": "per_direction"}
        return strategy.Problem(queries, passages, self.at, exclusions, 1 / self.temperature, weight, "bf16", **more)


def random_problem(
    world: World, b: int, dim: int, *, cosine: float = 0.3, temperature: float = 0.02, seed: int = 0
) -> Problem:
    """This rank's rows of a global batch of `b`: random unit queries, and passages whose cosine to their query is
    `cosine` on average.
    """
    generator = torch.Generator(world.device).manual_seed(seed + world.rank)
    sides = [torch.empty(b // world.size, dim, dtype=torch.bfloat16, device=world.device) for _ in range(2)]
    for queries, passages in zip(*(side.split(_ROWS_DRAWN) for side in sides), strict=True):
        q, noise = (
            normalize(torch.randn(queries.shape, device=world.device, generator=generator), dim=1) for _ in range(2)
        )
        queries.copy_(q)
        passages.copy_(normalize(cosine * q + math.sqrt(1 - cosine**2) * noise, dim=1))
    return Problem(sides[0], sides[1], temperature, world)


def reference(problem: Problem, *, symmetric: bool = False, exclusions: Exclusions | None = None) -> Result:
    """The result that this rank should have: the definition over all ranks' rows, by float64 autograd."""
    gathered = [problem.world.gather_rows(side) for side in (problem.queries, problem.passages)]
    q, p = (side.rows.double().requires_grad_() for side in gathered)
    logits = q @ p.T / problem.temperature
    targets = torch.arange(len(q), device=q.device)
    if exclusions is not None:
        known, guide = known_pairs(exclusions), exclusions.guide
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        excluded[known.rows, known.columns] = True
        if guide is not None:
            excluded |= guide.queries.double() @ guide.passages.double().T > guide.limit[:, None]
        logits = logits.masked_fill(excluded.fill_diagonal_(False), -torch.inf)
    loss = cross_entropy(logits, targets)
    if symmetric:
        loss = (loss + cross_entropy(logits.T, targets)) / 2
    loss.backward()
    assert q.grad is not None and p.grad is not None
    return loss.detach(), q.grad[gathered[0].own], p.grad[gathered[1].own]


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
