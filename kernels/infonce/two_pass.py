"""InfoNCE in two passes over blocks of queries and passages, wherever they come from: 8·B·N·D operations.

The first pass adds up the log-sum-exp of every query over its negatives and, where symmetric, of every passage. `terms`
turns these into losses and weights. The second pass takes the blocks again and adds up the gradients. A `Passages` says
where blocks come from and keeps the sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from kernels.infonce.reference import Block
from kernels.infonce.terms import Terms


class Step(NamedTuple):
    """One block of a pass."""

    block: Block
    rows: slice = slice(None)  # which of this rank's queries the block has
    owner: int = 0  # the rank whose passages it has
    column_log_weights: Tensor | None = None  # [N] of the block; second pass of a symmetric loss
    dqueries: Tensor | None = None  # [B, D] of the block: what its part is added to; None: nothing yet
    takes_gradient: bool = True  # whether the gradient at its passages is wanted; a memory bank's is not


class Passages:
    """Where passages come from, and the sums over their blocks: here all of them in one block. Others (a ring, host
    memory) replace what they do otherwise. Own passages are those among which this rank's targets are.
    """

    row_lse: Tensor  # [B]; after the first pass
    column_lse: Tensor | None = None  # [own passages]; after the first pass, where symmetric
    dqueries: Tensor  # [B, D]; after the second pass
    dpassages: Tensor  # [own passages, D]; after the second pass
    along: Tensor  # [B]: ⟨q_i, dq_i⟩

    def __init__(self, own: Block, targets: Tensor) -> None:
        """`own`: all queries and own passages; targets [B] int64 in 0..N−1: their columns in it."""
        self.own, self.targets = own, targets

    def forward(self) -> Iterator[Step]:
        """The blocks of the first pass."""
        yield Step(self.own)

    def add_lse(self, step: Step, row_lse: Tensor, column_lse: Tensor | None) -> None:
        """Takes the log-sum-exps of the step's block."""
        self.row_lse, self.column_lse = row_lse, column_lse

    def target_logits(self) -> Tensor:
        """The logit [B] of every query and its target; after the first pass."""
        return self.own.target_logits(self.targets)

    def backward(self, terms: Terms) -> Iterator[Step]:
        """The blocks of the second pass; then adds the targets' part to the gradients."""
        yield Step(self.own, column_log_weights=terms.column_log_weights)
        self.add_targets(terms)

    def add_gradients(self, step: Step, dqueries: Tensor, dpassages: Tensor) -> None:
        """Takes the step's `dqueries`, now with the block's part, and, where it takes one, the gradient at its passages."""
        self.dqueries, self.dpassages = dqueries, dpassages

    def add_targets(self, terms: Terms) -> None:
        """Adds the targets' part to both gradients."""
        weights = terms.target_gradient
        self.along = self.own.add_target_gradient(self.dqueries, self.dpassages, self.targets, weights)


def first_pass(passages: Passages, targets: Tensor, weights: Tensor, *, symmetric: bool) -> Terms:
    """The losses [B] and what the second pass needs; targets [B]: the column of each query's target among own passages,
    weights [B] ≥ 0: of its loss, 0 where it is ignored.
    """
    for step in passages.forward():
        passages.add_lse(step, *step.block.lse(symmetric))
    return Terms.of(passages.row_lse, passages.column_lse, passages.target_logits(), targets, weights)


def second_pass(passages: Passages, terms: Terms) -> None:
    """Leaves the gradients of Σ weights · loss with `passages`."""
    for step in passages.backward(terms):
        row_log_weights = terms.row_log_weights[step.rows]
        gradients: Any = step.block.gradient(
            row_log_weights, step.column_log_weights, step.dqueries, of_passages=step.takes_gradient
        )
        passages.add_gradients(step, *gradients)
