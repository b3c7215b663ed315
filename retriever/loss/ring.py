"""The tiled loss over a ring: passages pass by block by block, and no rank ever holds those of all.

Sweep 1 adds up each row's log-sum-exp over the blocks; where symmetric, the columns' sums travel with them. With these
known, sweep 2 takes the same blocks in reverse order and gives the gradient: the queries' adds up here, the passages'
travels home in float32. 8·b²·d operations over all ranks, against 6·b²·d where passages are gathered and the loss is
one-directional.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.infonce.api import Block, Exclusions, MaskTables
from kernels.infonce.exclusions import further_pairs
from kernels.infonce.rules import Pairs
from kernels.infonce.terms import Terms
from kernels.infonce.two_pass import FirstPass, Passages, SecondPass, Step
from retriever.loss.problem import Problem
from retriever.parallel.ring import Ring, TravellingSum
from retriever.parallel.world import World


def ring(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D] and dpassages [N, D], float32 (float64 for float64 problems).

    A rank holds its own rows, two blocks of passages and three of their gradients, whatever the number of ranks.
    """
    return problem.contrast(lambda part: RingPassages(part, world))


class RingPassages(Passages):
    """Every rank's passages, a rank's after the other's; own ones stay at hand."""

    def __init__(self, problem: Problem, world: World) -> None:
        self._problem, self._world = problem, world
        self._queries, own = problem.queries.to(problem.wire_dtype), problem.passages.to(problem.wire_dtype)
        self._counts = world.counts(len(own))
        # Ids go round ahead of the passages, whose first hop is under way while known pairs are looked up.
        ids = Ring(world, self._counts, problem.exclusions.passage_ids).forth()
        self._rings = [Ring(world, self._counts, rows) for rows in (own, problem.guide_passages) if rows is not None]
        self._forth = [ring.forth() for ring in self._rings]
        self._masks = BlockMasks.of(problem, ids, self._counts, world.rank)
        masks = self._masks.of_block(world.rank, problem.guide_passages)
        super().__init__(problem.block(self._queries, own, masks), problem.columns)

    def forward(self) -> FirstPass:
        row_lse, column_lse = yield from lse_of_round(self._world, self._counts, self._blocks(self._forth))
        return row_lse, column_lse, self.own.target_logits(self.targets)

    def backward(self, terms: Terms) -> SecondPass:
        blocks, weights = self._blocks([ring.back() for ring in self._rings]), terms.column_log_weights
        dqueries, dpassages = yield from gradient_of_round(self._world, self._counts, blocks, weights)
        self.own.add_target_gradient(dqueries, dpassages, self.targets, terms.target_gradient)
        return dqueries, dpassages

    def _blocks(self, sweeps: Sequence[Iterator[tuple[int, Tensor]]]) -> Iterator[tuple[int, Block]]:
        """The block of every owner; the sweeps bring passages and, where there is a guide, its vectors of them."""
        for arrived in zip(*sweeps, strict=True):
            owner, rows = arrived[0]
            guide = arrived[1][1] if len(arrived) > 1 else None
            yield owner, self._problem.block(self._queries, rows, self._masks.of_block(owner, guide))


def lse_of_round(
    world: World, counts: Sequence[int], blocks: Iterable[tuple[int, Block]], rows: slice = slice(None)
) -> Generator[Step, Any, tuple[Tensor, Tensor | None]]:
    """A first pass over every owner's block, `forth`: the row_lse of the queries `rows` and, where symmetric, the
    column_lse of own passages over all ranks'; `counts`: rows of every owner's block.
    """
    row_lse, columns = None, None
    column_sums = TravellingSum(world, counts, step=1, combine=torch.logaddexp)
    for owner, block in blocks:
        lse, columns = yield Step(block, rows)
        row_lse = lse if row_lse is None else torch.logaddexp(row_lse, lse)
        if columns is not None:
            column_sums.add(owner, columns)
    assert row_lse is not None
    return row_lse, None if columns is None else column_sums.home()


def gradient_of_round(
    world: World,
    counts: Sequence[int],
    blocks: Iterable[tuple[int, Block]],
    column_log_weights: Tensor | None,
    rows: slice = slice(None),
    dqueries: Tensor | None = None,
) -> Generator[Step, Any, tuple[Tensor, Tensor]]:
    """A second pass over every owner's block, `back`: the negatives' part of dqueries, added to what is passed in, and
    of own dpassages over all ranks' queries.
    """
    weights = None if column_log_weights is None else Ring(world, counts, column_log_weights).back()
    sums = TravellingSum(world, counts, step=-1)
    for owner, block in blocks:
        of_block = None if weights is None else next(weights)[1]  # [rows of block]
        dqueries, dpassages = yield Step(block, rows, of_block, dqueries)
        sums.add(owner, dpassages)
    assert dqueries is not None
    return dqueries, sums.home()


@dataclass(frozen=True)
class BlockMasks:
    """The pairs of own queries and every block's passages that are no negatives: all known pairs, whatever the number
    of ranks.
    """

    pairs: dict[int, Pairs]  # of each owner's block; without the rows' own targets
    targets: Tensor  # [B] int32, −1 where a row is ignored
    exclusions: Exclusions  # own ones
    counts: tuple[int, ...]
    rank: int
    pools: dict[int, tuple[Tensor, Tensor]] | None = None  # owner -> pools of own queries and of the block's passages

    @staticmethod
    def of(problem: Problem, ids: Iterable[tuple[int, Tensor]], counts: tuple[int, ...], rank: int) -> BlockMasks:
        """Finds the pairs of every block's (owner, passage ids). How many there are the host asks here, not in a
        sweep.
        """
        own, targets = problem.exclusions, problem.positives
        nowhere = torch.full_like(targets, -1)
        pairs, pools = dict[int, Pairs](), dict[int, tuple[Tensor, Tensor]]()
        for owner, passage_ids in ids:
            of_block = replace(own, passage_ids=passage_ids)
            pairs[owner] = further_pairs(of_block, targets if owner == rank else nowhere)
            if own.pools is not None:
                pools[owner] = own.pools.of_columns(passage_ids)
        return BlockMasks(pairs, targets.int(), replace(own, pools=None), counts, rank, pools or None)

    def of_block(self, owner: int, guide: Tensor | None) -> MaskTables:
        """The tables of one rank's block, whose vectors of the guide are `guide` [its passages, G]."""
        targets = self.targets if owner == self.rank else torch.full_like(self.targets, -1)
        exclusions, guided = self.exclusions, self.exclusions.guide
        if guided is not None and guide is not None:
            exclusions = replace(exclusions, guide=guided._replace(passages=guide))
        tables = MaskTables.of_pairs(self.pairs[owner], exclusions, targets, self.counts[owner])
        return tables if self.pools is None else replace(tables, pools=self.pools[owner])
