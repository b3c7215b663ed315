"""InfoNCE in two passes over blocks of queries and passages, wherever they come from: 8·B·N·D operations.

The first pass adds up the log-sum-exp of every query over its negatives and, where symmetric, of every passage. `terms`
turns these into losses and weights. The second pass takes the blocks again and adds up the gradients. A `Passages` says
where blocks come from, and adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.infonce.reference import Block
from kernels.infonce.terms import Losses, Terms, log_weights, sum_by_target


class Step(NamedTuple):
    """One block of a pass."""

    block: Block
    rows: slice = slice(None)  # which of this rank's queries the block has
    column_log_weights: Tensor | None = None  # [N] of the block; second pass of a symmetric loss
    dqueries: Tensor | None = None  # [B, D] of the block: what its part is added to; None: nothing yet
    takes_gradient: bool = True  # whether the gradient at its passages is wanted


# What a step is answered with, and what a pass returns; see `Passages`.
FirstPass = Generator[Step, tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None, Tensor]]
SecondPass = Generator[Step, tuple[Tensor, Any], tuple[Tensor, Tensor]]


class Passages:
    """A source of passages. This one gives all of them in one block; a ring and host memory are subclasses.

    Both passes are generators: each step is answered with what its block gives, and what they return are the sums over
    blocks. Own passages are those among which this rank's targets are.
    """

    along: Tensor  # [B]: ⟨q_i, dq_i⟩, where all passages are in one block

    def __init__(self, own: Block, targets: Tensor) -> None:
        """`own`: all queries and own passages; targets [B] int64 in 0..N−1: their columns in it."""
        self.own, self.targets = own, targets

    def forward(self) -> FirstPass:
        """Steps of the first pass, answered with row_lse and column_lse of the block. Returns row_lse [B], column_lse
        [own passages] (None: not symmetric) and the targets' logits [B].
        """
        row_lse, column_lse = yield Step(self.own)
        return row_lse, column_lse, self.own.target_logits(self.targets)

    def backward(self, terms: Terms) -> SecondPass:
        """Steps of the second pass, answered with the step's `dqueries`, now with the block's part, and dpassages of
        the block (None: the step takes none). Returns dqueries [B, D] and dpassages [own passages, D].
        """
        dqueries, dpassages = yield Step(self.own, column_log_weights=terms.column_log_weights)
        self.along = self.own.add_target_gradient(dqueries, dpassages, self.targets, terms.target_gradient)
        return dqueries, dpassages


class Source(NamedTuple):
    """Some of the blocks, and the sums over them that are a direction of the loss."""

    passages: Passages
    rows: bool = True  # every query among its passages
    columns: bool = False  # every target among its queries


def first_pass(
    sources: Sequence[Source], targets: Tensor, weights: Tensor, joint_targets: int = 0
) -> tuple[Tensor, list[Terms]]:
    """The losses [B] and what the second pass of each of `sources` needs.

    The first one's own passages hold the targets: targets [B] are columns among them. weights [B] ≥ 0: of a query's
    loss, 0 where it is ignored. `joint_targets` is that of `Losses.of`.
    """
    sums = [_answered(source.passages.forward(), partial(_lse, columns=source.columns)) for source in sources]
    lses = []
    for source, (row_lse, column_lse, _) in zip(sources, sums, strict=True):
        lses += [row_lse] if source.rows else []
        lses += [column_lse[targets]] if source.columns else []
    loss, shares, target_gradient = Losses.of(lses, sums[0][2], weights, joint_targets)
    terms: list[Terms] = []
    for source, (row_lse, column_lse, _) in zip(sources, sums, strict=True):
        of_rows = log_weights(shares.pop(0), row_lse) if source.rows else torch.full_like(row_lse, -torch.inf)
        of_columns = None
        if source.columns:  # a passage that several queries have as target has a term for each
            of_columns = log_weights(sum_by_target(shares.pop(0), targets, len(column_lse)), column_lse)
        terms.append(Terms(of_rows, of_columns, torch.zeros_like(loss) if terms else target_gradient))
    return loss, terms


def second_pass(passages: Passages, terms: Terms) -> tuple[Tensor, Tensor]:
    """dqueries [B, D] and dpassages [own passages, D] of Σ weights · loss."""

    def gradient(step: Step) -> tuple[Tensor, Any]:
        row_log_weights = terms.row_log_weights[step.rows]
        return step.block.gradient(
            row_log_weights, step.column_log_weights, step.dqueries, of_passages=step.takes_gradient
        )

    dqueries, dpassages = _answered(passages.backward(terms), gradient)
    return dqueries, dpassages


def _lse(step: Step, columns: bool) -> tuple[Tensor, Tensor | None]:
    return step.block.lse(columns)


def _answered(steps: Generator[Step, Any, Any], answer: Callable[[Step], Any]) -> Any:
    """Runs the generator `steps`, answers each step, and returns its result."""
    try:
        step = next(steps)
        while True:
            step = steps.send(answer(step))
    except StopIteration as end:
        return end.value
