"""The tiled loss over a ring: passages pass by block by block, and no rank ever holds those of all.

Sweep 1 adds up each row's log-sum-exp over the blocks; where symmetric, the columns' sums travel with them. With these
known, sweep 2 takes the same blocks in reverse order and gives the gradient: the queries' adds up here, the passages'
travels home in float32. 8·b²·d operations over all ranks, against 6·b²·d where passages are gathered and the loss is
one-directional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.infonce.api import Exclusions, MaskTables, negatives_gradient, negatives_lse
from kernels.infonce.exclusions import known_pairs
from kernels.infonce.targets import add_target_gradient, target_similarities
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

    A rank holds its own rows, two blocks of passages and three of their gradients, whatever the number of ranks. `lse`
    and `gradient` work on one block; others than the tiled ones serve comparisons. (Cheng et al. 2024,
    arXiv:2410.17243)
    """
    queries, passages = problem.queries.to(problem.wire_dtype), problem.passages.to(problem.wire_dtype)
    targets, precision = problem.columns, problem.precision
    counts = world.counts(len(passages))
    # Ids go round ahead of the passages, whose first hop is under way while known pairs are looked up.
    ids, blocks = Ring(world, counts, problem.exclusions.passage_ids).forth(), Ring(world, counts, passages)
    sweep = blocks.forth()
    masks = BlockMasks.of(problem, ids, counts, world.rank)
    positive = problem.scale * target_similarities(queries, passages, targets, precision=precision)  # [B]

    row_lse, column_lse = lse_of_sweep(problem, world, counts, queries, sweep, masks.of_block, lse)
    terms = Terms.of(problem, positive, row_lse, column_lse)
    dqueries, dpassages = gradient_of_sweep(
        problem,
        world,
        counts,
        queries,
        blocks.back(),
        terms.row_log_weights,
        terms.column_log_weights,
        masks.of_block,
        gradient=gradient,
    )
    add_target_gradient(dqueries, dpassages, queries, passages, targets, terms.target_gradient, precision=precision)
    return terms.losses, dqueries, dpassages


def lse_of_sweep(
    problem: Problem,
    world: World,
    counts: Sequence[int],
    queries: Tensor,
    sweep: Iterable[tuple[int, Tensor]],
    masks: Callable[[int], MaskTables],
    lse: Callable[..., tuple[Tensor, Tensor | None]] = negatives_lse,
) -> tuple[Tensor, Tensor | None]:
    """Sweep 1, `forth`: row_lse of `queries` over every (owner, block) and, where symmetric, column_lse of own passages
    over all ranks'.

    `masks` gives the tables of an owner's block, `counts` its rows; of `problem` only settings are read.
    """
    row_lse = queries.new_full((len(queries),), -torch.inf, dtype=torch.promote_types(queries.dtype, torch.float32))
    column_sums = TravellingSum(world, counts, step=1, combine=torch.logaddexp)
    settings: Any = {"columns": problem.symmetric, "precision": problem.precision, "largest": problem.largest}
    for owner, block in sweep:
        rows, columns = lse(queries, block, problem.scale, masks(owner), **settings)
        row_lse = torch.logaddexp(row_lse, rows)
        if columns is not None:
            column_sums.add(owner, columns)
    return row_lse, column_sums.home() if problem.symmetric else None


def gradient_of_sweep(
    problem: Problem,
    world: World,
    counts: Sequence[int],
    queries: Tensor,
    sweep: Iterable[tuple[int, Tensor]],
    row_log_weights: Tensor,
    column_log_weights: Tensor | None,
    masks: Callable[[int], MaskTables],
    dqueries: Tensor | None = None,
    gradient: Callable[..., tuple[Tensor, Tensor]] = negatives_gradient,
) -> tuple[Tensor, Tensor]:
    """Sweep 2, `back`: the negatives' part of dqueries, added to what is given, and of own dpassages over all ranks'
    queries.
    """
    column_weights = None if column_log_weights is None else Ring(world, counts, column_log_weights).back()
    dpassages = TravellingSum(world, counts, step=-1)
    for owner, block in sweep:
        weights = None if column_weights is None else next(column_weights)[1]  # [rows of block]
        dqueries, term = gradient(
            queries, block, problem.scale, row_log_weights, weights, masks(owner),
            dqueries=dqueries, precision=problem.precision, workspace_mib=problem.workspace_mib, largest=problem.largest,
        )  # fmt: skip
        dpassages.add(owner, term)
    assert dqueries is not None
    return dqueries, dpassages.home()


@dataclass(frozen=True)
class BlockMasks:
    """The pairs of own queries and every block's passages that are no negatives: all known pairs, whatever the number
    of ranks.
    """

    pairs: dict[int, tuple[Tensor, Tensor]]  # owner -> rows, columns of the block; without the rows' own targets
    targets: Tensor  # [B] int32, −1 where a row is ignored
    threshold: Tensor | None  # [B]
    counts: tuple[int, ...]
    rank: int

    @staticmethod
    def of(problem: Problem, ids: Iterable[tuple[int, Tensor]], counts: tuple[int, ...], rank: int) -> BlockMasks:
        """Finds the pairs of every block's (owner, passage ids). How many there are the host asks here, not in a
        sweep.
        """
        own, targets = problem.exclusions, problem.positives
        pairs = {}
        for owner, passage_ids in ids:
            rows, columns = known_pairs(Exclusions(passage_ids, own.known_ptr, own.known_ids))
            if owner == rank:
                further = columns != targets[rows]
                rows, columns = rows[further], columns[further]
            pairs[owner] = rows, columns
        return BlockMasks(pairs, targets.int(), own.threshold, counts, rank)

    def of_block(self, owner: int) -> MaskTables:
        """The tables of one rank's block."""
        targets = self.targets if owner == self.rank else torch.full_like(self.targets, -1)
        return MaskTables(*self.pairs[owner], targets, self.threshold, self.counts[owner])
