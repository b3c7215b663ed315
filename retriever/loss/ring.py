"""The tiled loss over a ring: passages pass by block by block, and no rank ever holds those of all.

Sweep 1 adds up each row's log-sum-exp over the blocks; where symmetric, the columns' sums travel with them. With these known, sweep 2
takes the same blocks in reverse order and gives the gradient: the queries' adds up here, the passages' travels home in float32.
8·b²·d operations over all ranks, against 6·b²·d where passages are gathered and the loss is one-directional.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.exclusions import known_pairs
from kernels.lse import Exclusions, MaskTables, negatives_gradient, negatives_lse
from kernels.targets import pull_targets, target_similarities
from retriever.loss.problem import Problem
from retriever.loss.terms import Terms
from retriever.parallel.ring import Ring, TravellingSum
from retriever.parallel.world import World


def ring(
    problem: Problem,
    world: World,
    *,
    lse: Callable[..., tuple[Tensor, Tensor | None]] = negatives_lse,
    gradient: Callable[..., tuple[Tensor, Tensor]] = negatives_gradient,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D], float32 (float64 for float64 problems).

    A rank holds its own rows, two blocks of passages and three of their gradients, whatever the number of ranks. `lse` and `gradient`
    work on one block; others than the tiled ones serve comparisons. (Cheng et al. 2024, arXiv:2410.17243)
    """
    travelling = torch.bfloat16 if problem.precision == "bf16" else problem.passages.dtype
    queries, passages = problem.queries.to(travelling), problem.passages.to(travelling)
    targets, precision = problem.columns, problem.precision
    counts = world.counts(len(passages))
    masks, blocks = _BlockMasks.of(problem, world, counts), Ring(world, counts, passages)
    positive = problem.scale * target_similarities(queries, passages, targets, precision=precision)  # [B]

    row_lse = torch.full_like(positive, -torch.inf)
    column_sums = TravellingSum(world, counts, step=1, combine=torch.logaddexp)
    for owner, block in blocks.forth():
        rows, columns = lse(queries, block, problem.scale, masks.of_block(owner), columns=problem.symmetric, precision=precision)
        row_lse = torch.logaddexp(row_lse, rows)
        if columns is not None:
            column_sums.add(owner, columns)

    terms = Terms.of(problem, positive, row_lse, column_sums.home() if problem.symmetric else None)
    column_weights = None if terms.column_log_weights is None else Ring(world, counts, terms.column_log_weights).back()
    dqueries = None
    dpassages = TravellingSum(world, counts, step=-1)
    for owner, block in blocks.back():
        weights = None if column_weights is None else next(column_weights)[1]  # [rows of block]
        dqueries, term = gradient(
            queries, block, problem.scale, terms.row_log_weights, weights, masks.of_block(owner),
            dqueries=dqueries, precision=precision, workspace_mib=problem.workspace_mib,
        )  # fmt: skip
        dpassages.add(owner, term)
    assert dqueries is not None
    pull_targets(dqueries, dpassages.home(), queries, passages, targets, terms.pull, precision=precision)
    return terms.losses, dqueries, dpassages.home()


@dataclass(frozen=True)
class _BlockMasks:
    """The pairs of own queries and every block's passages that are no negatives: all known pairs, whatever the number of ranks."""

    pairs: dict[int, tuple[Tensor, Tensor]]  # owner -> rows, columns of the block; without the rows' own targets
    targets: Tensor  # [B] int32, −1 where a row is ignored
    threshold: Tensor | None  # [B]
    counts: tuple[int, ...]
    rank: int

    @staticmethod
    def of(problem: Problem, world: World, counts: tuple[int, ...]) -> _BlockMasks:
        """Finds every block's pairs. Ids go round ahead of the passages: how many pairs there are the host asks here, not in a sweep."""
        own, targets = problem.exclusions, problem.positives
        pairs = {}
        for owner, passage_ids in Ring(world, counts, own.passage_ids).forth():
            rows, columns = known_pairs(Exclusions(passage_ids, own.known_ptr, own.known_ids))
            if owner == world.rank:
                further = columns != targets[rows]
                rows, columns = rows[further], columns[further]
            pairs[owner] = rows, columns
        return _BlockMasks(pairs, targets.int(), own.threshold, counts, world.rank)

    def of_block(self, owner: int) -> MaskTables:
        """The tables of one rank's block."""
        targets = self.targets if owner == self.rank else torch.full_like(self.targets, -1)
        return MaskTables(*self.pairs[owner], targets, self.threshold, self.counts[owner])
