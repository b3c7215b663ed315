"""A loss of your own, by autograd: rows of queries against all passages, or the whole batch at once.

A row loss is called with a block of this rank's queries at a time, and its graph lives as long as the block: memory is
linear in the batch. A batch loss is called once, on every rank, with all queries: memory is quadratic, and every rank
computes the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.infonce.api import Exclusions
from retriever.config import ConfigError
from retriever.data.teacher import Groups
from retriever.loss.distill import columns_of
from retriever.loss.problem import Problem
from retriever.loss.strategies import excluded_pairs, exclusions_of_all_rows
from retriever.parallel.world import World

_MIB = 1024  # for the graph of a block
_BYTES_A_PAIR = 32  # of a graph: eight numbers for each query and passage


@dataclass(frozen=True)
class LossTargets:
    """The targets of queries [b, D] among passages [N, D] of all ranks, as a custom loss receives them."""

    positives: Tensor  # [b] int64: the column of each query's positive
    excluded: Tensor  # [b, N] bool: passages that are no negatives of the query, its positive never
    scores: Tensor | None  # [b, N]: a teacher's, NaN where it gave none; None without a teacher
    temperature: float


Loss = Callable[[Tensor, Tensor, LossTargets], Tensor]


def batch_loss(function: Any) -> Any:
    """Marks a loss function, or a class or module of such, as one that takes the whole batch: memory is quadratic.

    It must give the same numbers on every rank, and so draw no random ones.
    """
    function.takes_whole_batch = True
    return function


def load_loss(name: str) -> Loss:
    """The function of `loss.custom`; a class is called without arguments to make it. Raises as `find_loss`."""
    found = find_loss(name)
    loss: Loss = found() if isinstance(found, type) else found
    return loss


def find_loss(name: str) -> Any:
    """What `loss.custom` names as `package.module:function`. Raises ConfigError if it cannot be imported."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"loss.custom: expected package.module:function, which can be imported; received {name!r} ({error})"
        ) from error
    return found


class CustomLoss(nn.Module):
    """A strategy that calls a function; the parameters of a module are trained with the encoder.

    The function takes queries [b, D], passages [N, D] and `LossTargets`, and returns the loss of each query [b].
    Ignored queries are left out. The sum over queries and ranks, the division by the global queries and the gradients
    are made here.
    """

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function
        self._whole = getattr(function, "takes_whole_batch", False)

    @torch.no_grad()
    def start_from_first(self, world: World) -> None:
        """Gives every rank the parameters and buffers of rank 0. Every rank calls it."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.copy_(world.gather_rows(tensor.detach()[None]).rows[0])

    def forward(self, problem: Problem, groups: Groups | None, world: World) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B], and dqueries [B, D] and dpassages [N, D] of `problem.weight` times their sum over ranks.

        Adds this rank's part of the parameters' gradient to their `grad`. Raises ValueError if the function returns
        anything but one differentiable loss for each query.
        """
        passages = world.gather_rows(problem.passages)
        rows = _Rows.of(problem, groups, passages.own.start, world)
        if not self._whole:
            losses, dqueries, dpassages = self._differentiated(problem, rows, passages.rows, counts=True)
            return losses, dqueries, world.reduce_rows(dpassages, passages.counts)
        own = world.gather_rows(problem.queries).own
        rows = rows.of_all_ranks(problem, world)
        # Every rank has the whole gradient, of the parameters too.
        losses, dqueries, dpassages = self._differentiated(problem, rows, passages.rows, counts=world.is_first)
        return losses[own], dqueries[own], dpassages[passages.own]

    def _differentiated(
        self, problem: Problem, rows: _Rows, passages: Tensor, *, counts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and gradients of all of `rows`; those of the parameters are kept where this rank's part `counts`."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        leaf = passages.detach().requires_grad_()
        losses, dqueries = torch.zeros_like(rows.queries[:, 0]), torch.zeros_like(rows.queries)
        dpassages = torch.zeros_like(passages)
        active = (rows.positives >= 0).nonzero()[:, 0]
        at_once = (problem.workspace_mib or _MIB) * 2**20 // (_BYTES_A_PAIR * max(1, len(passages)))
        for index in active.split(len(active) if self._whole else max(1, at_once)):
            targets = rows.targets(index, passages, 1 / problem.scale)
            with torch.enable_grad():
                queries = rows.queries[index].detach().requires_grad_()
                values = self._checked(self.function(queries, leaf, targets), len(index))
                inputs = [queries, leaf, *parameters]
                gradients = torch.autograd.grad(problem.weight * values.sum(), inputs, materialize_grads=True)
            losses[index] = values.detach()
            dqueries[index] = gradients[0]
            dpassages += gradients[1]
            for parameter, gradient in zip(parameters, gradients[2:], strict=True):
                if counts:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return losses, dqueries, dpassages

    def _checked(self, values: Any, count: int) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != (count,) or not values.requires_grad:
            found = f"{tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            kind = " without a graph" if isinstance(values, Tensor) and not values.requires_grad else ""
            raise ValueError(f"loss.custom: expected the losses of {count} queries, ({count},); received {found}{kind}")
        return values


@dataclass(frozen=True)
class _Rows:
    """Queries [b, D] and what they are compared with; columns are counted over all ranks' passages."""

    queries: Tensor
    positives: Tensor  # [b] int64, -1: ignored
    exclusions: Exclusions
    scored: tuple[Tensor, Tensor, Tensor] | None  # row, column and score [G] of a teacher's pairs

    @classmethod
    def of(cls, problem: Problem, groups: Groups | None, start: int, world: World) -> _Rows:
        """The rows of this rank, whose passages begin at column `start`."""
        ids, guide = world.gather_rows(problem.exclusions.passage_ids).rows, problem.exclusions.guide
        if guide is not None:
            guide = guide._replace(passages=world.gather_rows(guide.passages).rows)
        positives = torch.where(problem.active, problem.positives + start, -1)
        scored = None
        if groups is not None:
            rows = torch.repeat_interleave(groups.ptr.diff())
            scored = rows, columns_of(groups.ids, ids), groups.scores.to(problem.queries.dtype)
        return cls(problem.queries, positives, replace(problem.exclusions, passage_ids=ids, guide=guide), scored)

    def of_all_ranks(self, problem: Problem, world: World) -> _Rows:
        """The rows of every rank, rank after rank."""
        queries, scored = world.gather_rows(self.queries), self.scored
        if scored is not None:
            moved = scored[0] + queries.own.start, scored[1], scored[2]
            rows, columns, scores = (world.gather_rows(part).rows for part in moved)
            scored = rows, columns, scores
        exclusions, guide = exclusions_of_all_rows(problem, world, self.exclusions.passage_ids), self.exclusions.guide
        if guide is not None:
            of_queries, limit = (world.gather_rows(part).rows for part in (guide.queries, guide.limit))
            exclusions = replace(exclusions, guide=guide._replace(queries=of_queries, limit=limit))
        return _Rows(queries.rows, world.gather_rows(self.positives).rows, exclusions, scored)

    def targets(self, index: Tensor, passages: Tensor, temperature: float) -> LossTargets:
        """The targets of the rows `index` [b], ascending."""
        exclusions, positives = self.exclusions.of_rows(index), self.positives[index]
        block = passages.new_empty(len(index), len(passages))
        if exclusions.threshold is not None:
            torch.mm(self.queries[index], passages.T, out=block)
        excluded = excluded_pairs(block, exclusions)
        excluded[torch.arange(len(index), device=index.device), positives] = False
        scores = None
        if self.scored is not None:
            place = torch.full_like(self.positives, -1)
            place[index] = torch.arange(len(index), device=index.device)
            here = place[self.scored[0]] >= 0
            rows, columns, values = (part[here] for part in self.scored)
            scores = torch.full_like(block, torch.nan).index_put((place[rows], columns), values)
        return LossTargets(positives, excluded, scores, temperature)
