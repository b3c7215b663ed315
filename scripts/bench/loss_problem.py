"""A rank's rows of a random batch, on which losses are compared, and the result that they should have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from kernels.infonce.api import Exclusions
from kernels.infonce.exclusions import known_pairs
from kernels.infonce.rules import Guide, Pairs, guide_vectors
from retriever.data.targets import KnownPairs
from retriever.loss import problem as strategy
from retriever.parallel.host import host_rows
from retriever.parallel.world import World
from scripts.bench.measure import Result

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
