"""InfoNCE as a differentiable function of embeddings, in linear memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.infonce import api
from kernels.infonce.api import Exclusions, Hardness, Lists, Precision
from kernels.infonce.reference import rounded
from retriever.config import Direction
from retriever.loss.problem import Problem
from retriever.loss.tiled import tiled
from retriever.parallel.world import World


@dataclass(frozen=True)
class Negatives:
    """The negatives of a query, with the fields and defaults of section `loss` of a configuration (docs/loss.md)."""

    directions: tuple[Direction, ...] = ("query_to_passage",)
    partition: Literal["joint", "per_direction"] = "joint"
    hardness: Hardness = Hardness()
    own: Tensor | None = None  # [B, k] int64: columns of each query's own negatives, which are distinct

    def problem(
        self, queries: Tensor, passages: Tensor, targets: Tensor, scale: float, precision: Precision
    ) -> Problem:
        """The mean over queries, of values in `precision`."""
        B, N, device = len(queries), len(passages), queries.device
        own = None
        if self.own is not None:
            own = Lists(self.own.shape[1] * torch.arange(B + 1, device=device), self.own.flatten())
        exclusions = Exclusions(
            torch.arange(N, device=device),
            torch.arange(B + 1, device=device),
            targets,
            torch.full_like(targets, torch.inf, dtype=torch.float32).masked_fill(targets < 0, -torch.inf),
            hardness=self.hardness,
            own=own,
        )
        sides = rounded(queries, precision), rounded(passages, precision)
        softmaxes = self.directions, self.partition
        return Problem(*sides, targets, exclusions, scale, 1 / max(1, B), precision, *softmaxes)


def infonce(
    queries: Tensor,
    passages: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 0.02,
    symmetric: bool = False,
    negatives: Negatives | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """The mean over queries of log Σ_j exp(⟨q_i, p_j⟩ / temperature) − ⟨q_i, p_t⟩ / temperature, with t = targets_i.

    queries [B, D] and passages [N, D] have one floating dtype and device; normalise them for cosine similarity.
    targets [B] int64 are columns of `passages`, or −1 for a query of loss 0, which still counts in the mean; None means
    that passage i belongs to query i. `symmetric` averages with the passage-to-query direction; `negatives` names other
    directions, and negatives that count more. Returns a scalar, float32 (float64 for float64 inputs), differentiable
    once in queries and passages. Value and gradients are computed together in the forward pass; memory is O(B + N), and
    no similarity is stored. `precision` is that of the products: "bf16" (rounded inputs), "high" (errors up to 1e-5) or
    "fp32"; None means bf16 under autocast and for half-precision inputs, else fp32.

    Raises ValueError where shapes, dtypes, devices, targets or the temperature do not fit.
    (Cheng et al. 2024, arXiv:2410.17243)
    """
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, received {temperature}")
    if targets is None:
        if len(passages) < len(queries):
            raise ValueError(f"expected at least {len(queries)} passages, one for each query, received {len(passages)}")
        targets = torch.arange(len(queries), device=queries.device)
    device = queries.device.type
    if precision is None:
        half = queries.dtype in (torch.bfloat16, torch.float16)
        precision = "bf16" if half or torch.is_autocast_enabled(device) else "fp32"
    if symmetric and negatives is not None:
        raise ValueError("expected symmetric=False beside negatives, whose directions say it; received symmetric=True")
    with torch.autocast(device, enabled=False):
        loss: Tensor = _InfoNCE.apply(queries, passages, targets, 1 / temperature, symmetric, negatives, precision)
    return loss


class InfoNCE(nn.Module):
    """`infonce` as a module, with its keyword arguments; it has no parameters.

    loss = InfoNCE(temperature=0.05, symmetric=True)
    loss(queries, passages).backward()
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, queries: Tensor, passages: Tensor, targets: Tensor | None = None) -> Tensor:
        """The scalar loss of queries [B, D] and passages [N, D]."""
        return infonce(queries, passages, targets, **self.options)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        passages: Tensor,
        targets: Tensor,
        scale: float,
        symmetric: bool,
        negatives: Negatives | None,
        precision: Precision,
    ) -> Tensor:
        ctx.dtype = queries.dtype
        if negatives is not None:
            problem = negatives.problem(queries, passages, targets, scale, precision)
            losses, dqueries, dpassages = tiled(problem, World(queries.device))
            if any(ctx.needs_input_grad[:2]):
                ctx.save_for_backward(dqueries, dpassages)
            return losses.sum() * problem.weight
        dtype = torch.promote_types(queries.dtype, torch.float32)
        weights = queries.new_full((len(queries),), 1 / max(1, len(queries)), dtype=dtype)
        found = api.infonce(
            queries,
            passages,
            targets,
            scale,
            weights=weights,
            symmetric=symmetric,
            precision=precision,
            gradients=any(ctx.needs_input_grad[:2]),
        )
        if found.dqueries is not None and found.dpassages is not None:
            ctx.save_for_backward(found.dqueries, found.dpassages)
        return found.loss.mean() if len(queries) else found.loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dqueries, dpassages = ctx.saved_tensors
        of_queries, of_passages = ((gradient * x).to(ctx.dtype) for x in (dqueries, dpassages))
        return of_queries, of_passages, None, None, None, None, None
