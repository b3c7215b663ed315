"""The objective: in-batch-negative InfoNCE over the passages of all ranks, value and gradient.

With s_ij = ⟨q_i, p_j⟩, scale = 1/temperature, t the target of query i and neg(i) the columns that are no known positive
of i:

    row_i    = log(exp(scale·s_it) + Σ_{j ∈ neg(i)} exp(scale·s_ij)) − scale·s_it
    column_i = log(exp(scale·s_it) + Σ_{k : t ∈ neg(k)} exp(scale·s_kt)) − scale·s_it
    loss     = Σ_i row_i / global queries,     symmetric: Σ_i ½(row_i + column_i) / global queries

summed over several leading dimensions of the embeddings where `loss.dims` names them. A teacher's terms
(`retriever.loss.distill`) are added to contrastive_weight · loss, divided by the global queries too.

A loss is this rank's part of it: the loss of the batch is the sum over ranks, and so is every parameter's gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from kernels.infonce.api import Hardness
from kernels.infonce.reference import rounded
from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.loss.bank import Bank
from retriever.loss.custom import CustomLoss
from retriever.loss.distill import contrast_own, distill
from retriever.loss.embedding import distil_embeddings
from retriever.loss.matryoshka import over_leading_dimensions
from retriever.loss.strategies import STRATEGIES, Problem
from retriever.parallel.world import World

_ROWS_AT_ONCE = 65_536  # held in double precision
_LARGEST_LOG_SCALE = 80.0  # beyond it, temperature or scale has no float32


def false_negatives_from(queries: Tensor, targets: Tensor, margin: float) -> Tensor:
    """[B]: a passage more similar to query i than this is no negative of its; queries and their targets [B, D], the
    margin in similarity.

    It lies above the target's similarity by more than rounding even where the margin is 0, so that a passage with the
    target's own embedding is a negative in whichever block and on whichever rank its similarity is computed.
    """
    similarity = (queries * targets).sum(dim=1)
    rounding = (
        torch.finfo(similarity.dtype).eps ** (2 / 3) * queries.norm(dim=1) * targets.norm(dim=1)
    )  # 2.4e-5 of unit vectors in float32
    return similarity + rounding.clamp(min=margin)


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Σ over all numbers of x · y [rows, D], in double precision."""
    parts = zip(x.split(_ROWS_AT_ONCE), y.split(_ROWS_AT_ONCE), strict=True)
    return torch.stack([(a.double() * b.double()).sum() for a, b in parts]).sum()


class ContrastiveObjective(nn.Module):
    """Loss and gradient at the representations; holds the temperature, learned in the log of its inverse."""

    def __init__(
        self, config: LossConfig, *, unit_norm: bool, block_rows: int | None = None, custom: CustomLoss | None = None
    ) -> None:
        """`unit_norm`: embeddings are unit vectors, taken on trust, and their leading parts are to be where `loss.dims`
        asks for them.

        `block_rows`: queries, passages and their gradients are in host memory; the device holds blocks of so many rows.

        `custom`: takes the place of the contrastive loss.
        """
        super().__init__()
        self._config, self._unit_norm, self._block_rows = config, unit_norm, block_rows
        self.custom = custom
        self.bank: Bank | None = None  # what earlier steps add to a part before it comes here
        self.log_scale = nn.Parameter(
            torch.tensor(-math.log(config.temperature), dtype=torch.float64), requires_grad=config.learn_temperature
        )

    @property
    def temperature(self) -> float:
        """The present temperature; one that is not learned is the configuration's to the last bit."""
        return math.exp(-self.log_scale.item()) if self.log_scale.requires_grad else self._config.temperature

    def temperature_at(self, step: int) -> float:
        """`temperature`, for step `step`, counted from 0. Raises FloatingPointError where a learned one has left all
        bounds.
        """
        log_scale = self.log_scale.item() if self.log_scale.requires_grad else 0.0
        if not abs(log_scale) < _LARGEST_LOG_SCALE:
            raise FloatingPointError(
                f"step {step + 1}: the learned temperature has left all bounds (e^{-log_scale:.3g}); lower optim.lr"
            )
        return self.temperature

    @property
    def offload(self) -> bool:
        """Whether representations and their gradients are in host memory."""
        return self._block_rows is not None

    @torch.no_grad()
    def forward(
        self,
        queries: Tensor,
        passages: Tensor,
        targets: Targets,
        world: World,
        gradient_scale: float = 1.0,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's loss [], dqueries [B, D] and dpassages [N, D], of the dtype of queries [B, D] and passages [N,
        D].

        Where the temperature is learned, this rank's part of its gradient is added to `log_scale.grad`. Gradients, not
        the loss, are multiplied by `gradient_scale`, which keeps them inside the range of fp16. `temperature`: the
        present one; None: it is read here, and where it is learned the host waits for it.
        """
        targets, temperature = targets.to(queries.device), self.temperature if temperature is None else temperature
        temperature = temperature if targets.temperature is None else targets.temperature
        loss, dqueries, dpassages = self._over_dims(queries, passages, targets, world, gradient_scale, temperature)
        if targets.teacher is None:
            return loss, dqueries, dpassages
        ones = torch.ones_like(passages[:, 0])
        shares = torch.ones_like(queries[:, 0]) if targets.shares is None else targets.shares.to(queries.dtype)
        sides = (
            (queries, targets.teacher.queries, shares / targets.global_queries, dqueries),
            (passages, targets.teacher.passages, ones / world.sum(ones.sum().to(world.device)).to(ones), dpassages),
        )
        for embeddings, teacher, weights, gradient in sides:
            value, more = distil_embeddings(embeddings, teacher, weights, self._config)
            gradient += gradient_scale * more
            loss = loss + value.to(loss)
        return loss, dqueries, dpassages

    def _over_dims(
        self,
        queries: Tensor,
        passages: Tensor,
        targets: Targets,
        world: World,
        gradient_scale: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._config.dims:
            return self._contrast(queries, passages, targets, world, gradient_scale, temperature)
        weights = self._config.dim_weights or (1.0,) * len(self._config.dims)

        def contrast(q: Tensor, p: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
            return self._contrast(q, p, targets, world, gradient_scale * weight, temperature)

        return over_leading_dimensions(contrast, queries, passages, self._config.dims, weights, self._unit_norm)

    def _contrast(
        self,
        queries: Tensor,
        passages: Tensor,
        targets: Targets,
        world: World,
        gradient_scale: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = self._problem(queries, passages, targets, gradient_scale, temperature)
        row_losses, dqueries, dpassages = self._terms(problem, targets, world)
        if self.log_scale.requires_grad:
            # dL/d(log scale) = Σ dL/ds · s over all pairs = Σ_i ⟨q_i, dL/dq_i⟩: no second pass over the similarities.
            gradient = _inner_product(problem.queries, dqueries)
            if "query_to_query" in problem.directions or "passage_to_passage" in problem.directions:
                # Then each pair is counted at both of its ends.
                gradient = (gradient + _inner_product(problem.passages, dpassages)) / 2
            gradient = gradient.to(self.log_scale)
            self.log_scale.grad = gradient if self.log_scale.grad is None else self.log_scale.grad + gradient
        if targets.shares is not None:
            row_losses = row_losses * targets.shares.to(row_losses)
        loss = row_losses.sum() / targets.global_queries
        return loss, dqueries.to(queries.dtype), dpassages.to(passages.dtype)

    def _terms(self, problem: Problem, targets: Targets, world: World) -> tuple[Tensor, Tensor, Tensor]:
        """Per-row losses [B], dqueries and dpassages of the weighted sum of the contrastive and the teacher's terms."""
        config, weight = self._config, self._config.contrastive_weight
        if config.distils and targets.groups is None:
            raise ValueError(
                "a teacher's loss.kl_weight, margin_mse_weight or cosent_weight is above 0, but the batch has no "
                "Targets.groups of a teacher"
            )
        parts = []
        if targets.contrasts and (weight > 0 or self.custom is not None):
            contrasted = problem if targets.in_batch is None else problem.of_rows(targets.in_batch)
            weighted = replace(contrasted, weight=weight * problem.weight)
            if self.custom is not None:
                losses, *gradients = self.custom(weighted, targets.groups, world)
            else:
                losses, *gradients = STRATEGIES[config.strategy](weighted, world)
            parts.append((weight * losses, *gradients))
        if weight > 0 and targets.own_groups is not None:
            parts.append(contrast_own(problem, targets.own_groups, weight, world))
        if config.distils:
            parts.append(distill(problem, targets, config, world))
        if not parts:  # embeddings alone are distilled
            nothing = torch.zeros_like(problem.weights)
            return nothing, torch.zeros_like(problem.queries), torch.zeros_like(problem.passages)
        losses, dqueries, dpassages = (reduce(torch.add, terms) for terms in zip(*parts, strict=True))
        return losses, dqueries, dpassages

    def _problem(
        self, queries: Tensor, passages: Tensor, targets: Targets, gradient_scale: float, temperature: float
    ) -> Problem:
        # Positive and negative similarities come from the same rounded vectors: a loss is never below zero.
        queries, passages = rounded(queries, self._config.precision), rounded(passages, self._config.precision)
        threshold = None
        margin = self._config.false_negative_margin
        if margin is not None:
            threshold = false_negatives_from(queries, passages[targets.positives.clamp(min=0)], margin)
        elif targets.ignores:
            threshold = queries.new_full((len(queries),), torch.inf)
        if threshold is not None:
            threshold = threshold.masked_fill(
                targets.positives < 0, -torch.inf
            )  # no column of an ignored row takes part
        strength = self._config.hardness_strength
        hardness = Hardness(
            strength if self._config.hardness in ("own", "all") else 0.0,
            strength if self._config.hardness in ("in_batch", "all") else 0.0,
        )
        exclusions = replace(targets.exclusions, threshold=threshold, hardness=hardness)
        directions, partition = self._config.softmaxes
        return Problem(
            queries,
            passages,
            targets.positives,
            exclusions,
            scale=1.0 / temperature,
            weight=gradient_scale / targets.global_queries,
            directions=directions,
            partition=partition,
            precision=self._config.precision,
            workspace_mib=None if self._config.workspace_mib == "auto" else self._config.workspace_mib,
            exchange="ring" if self._config.exchange == "ring" else "gather",  # auto is settled before step 1
            known_pairs=targets.known_pairs,
            ignores=targets.ignores,
            shares=targets.shares,
            largest=1.0 if self._unit_norm else None,
            block_rows=self._block_rows,
        )
