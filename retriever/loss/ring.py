"""The tiled loss over a ring: passages pass by block by block, and no rank ever holds those of all.

Sweep 1 adds up each row's log-sum-exp over the blocks; where symmetric, the columns' sums travel with them. With these
known, sweep 2 takes the same blocks in reverse order and gives the gradient: the queries' adds up here, the passages'
travels home in float32. 8·b²·d operations over all ranks, against 6·b²·d where passages are gathered and the loss is
one-directional.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.infonce.api import Exclusions, MaskTables
from kernels.infonce.exclusions import known_pairs
from kernels.infonce.terms import Terms
from kernels.infonce.two_pass import Passages, Step
from retriever.loss.problem import Problem
from retriever.parallel.ring import Ring, TravellingSum
from retriever.parallel.world import World


def ring(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D], float32 (float64 for float64 problems).

    A rank holds its own rows, two blocks of passages and three of their gradients, whatever the number of ranks.
    """
    passages = RingPassages(problem, world)
    losses = problem.contrast(passages)
    return losses, passages.dqueries, passages.dpassages


class RingPassages(Passages):
    """Every rank's passages, a rank's after the other's; own ones stay at hand."""

    def __init__(self, problem: Problem, world: World) -> None:
        self._problem, self._world = problem, world
        self._queries, own = problem.queries.to(problem.wire_dtype), problem.passages.to(problem.wire_dtype)
        self._counts = world.counts(len(own))
        # Ids go round ahead of the passages, whose first hop is under way while known pairs are looked up.
        ids = Ring(world, self._counts, problem.exclusions.passage_ids).forth()
        self._ring = Ring(world, self._counts, own)
        self._forth = self._ring.forth()
        self._masks = BlockMasks.of(problem, ids, self._counts, world.rank)
        super().__init__(problem.block(self._queries, own, self._masks.of_block(world.rank)), problem.columns)

    def forward(self) -> Iterator[Step]:
        columns = self._columns = TravellingSum(self._world, self._counts, step=1, combine=torch.logaddexp)
        yield from self._steps(self._forth)
        self.column_lse = columns.home() if self._problem.symmetric else None

    def add_lse(self, step: Step, row_lse: Tensor, column_lse: Tensor | None) -> None:
        own = step.owner == self._world.rank
        self.row_lse = row_lse if own else torch.logaddexp(self.row_lse, row_lse)  # the own block comes first
        if column_lse is not None:
            self._columns.add(step.owner, column_lse)

    def backward(self, terms: Terms) -> Iterator[Step]:
        back, weights = self._ring.back(), None
        if terms.column_log_weights is not None:
            weights = Ring(self._world, self._counts, terms.column_log_weights).back()
        self._gradient = TravellingSum(self._world, self._counts, step=-1)
        dqueries = None
        for step in self._steps(back):
            of_block = None if weights is None else next(weights)[1]
            yield step._replace(column_log_weights=of_block, dqueries=dqueries)
            dqueries = self.dqueries
        self.dpassages = self._gradient.home()
        self.add_targets(terms)

    def add_gradients(self, step: Step, dqueries: Tensor, dpassages: Tensor) -> None:
        self.dqueries = dqueries
        self._gradient.add(step.owner, dpassages)

    def _steps(self, blocks: Iterable[tuple[int, Tensor]]) -> Iterator[Step]:
        for owner, passages in blocks:
            masks = self._masks.of_block(owner)
            yield Step(self._problem.block(self._queries, passages, masks), owner=owner)


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
