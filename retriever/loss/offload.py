"""The tiled loss over representations in host memory: the ring's two sweeps, over blocks that are copied there and
back.

A block is `Problem.block_rows` rows. The device holds a block of queries and the sum of its gradient, while all
passages pass by, the next ones on their way; with several ranks, each rank's block then goes round the ring before the
next ones come. Beside blocks the device holds a few numbers a row.

With b/R blocks of queries of R rows each, sweep 1 reads b/R · n·D numbers on one rank; sweep 2 reads as many, and takes
the sums of the passages' gradient in and out again in float32. A third sweep, with passages and their sums resident
while queries pass by, would halve what is copied, but compute the logits once more: 10·b·n·D operations for 8. Copies
hide behind the work on a block, so they are the cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.infonce.api import Exclusions, MaskTables
from kernels.infonce.terms import Terms
from kernels.infonce.two_pass import Passages, Step
from retriever.loss.problem import Problem
from retriever.loss.ring import BlockMasks
from retriever.parallel.host import CopyStream, HostRows, host_rows
from retriever.parallel.ring import Ring, TravellingSum
from retriever.parallel.world import World

BLOCK_ROWS = (
    32_768  # in bf16 on an H100, the work on a block hides copies at 30 GB/s, those of a sweep's first block aside
)

PairsByBlock = dict[tuple[int, int], tuple[Tensor, Tensor]]


def offloaded(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B] on the device, dqueries [B, D] and dpassages [N, D] in host memory, as `problem`'s own tensors
    are.

    8·b·n·D operations; the device holds about 28·R·D bytes of blocks of R rows in bf16 (40 with several ranks) and the
    workspace. (Cheng et al. 2024, arXiv:2410.17243)
    """
    passages = HostPassages(problem, world)
    losses = passages.problem.contrast(passages)
    passages.copies.finish()
    return losses, passages.queries.sums, passages.passages.sums


class HostPassages(Passages):
    """All ranks' passages in blocks from host memory, which go round the ring for each block of own queries."""

    def __init__(self, problem: Problem, world: World) -> None:
        self.problem, self._world = _without_rows(problem, world.device), world
        self._cut = _Cut.of(problem, world)
        self._tables, self.copies = _Tables.of(self.problem, self._cut, world), CopyStream(world.device)
        size = self._cut.size
        self.queries = HostRows(_host_copy(problem.queries, problem, world), size, self._cut.query_blocks, self.copies)
        self.passages = HostRows(_host_copy(problem.passages, problem, world), size, len(self._cut.counts), self.copies)
        self._logits = torch.zeros(len(problem.positives), dtype=self.queries.sums.dtype, device=world.device)  # [B]
        self.row_lse = torch.full_like(self._logits, -torch.inf)
        if problem.symmetric:
            self.column_lse = self._logits.new_full((len(problem.passages),), -torch.inf)

    def forward(self) -> Iterator[Step]:
        for a, q in self.queries.read():
            for k, p in self.passages.read():
                counts, i, j = self._cut.counts[k], self.queries.places[a], self.passages.places[k]
                self._columns = TravellingSum(self._world, counts, step=1, combine=torch.logaddexp)
                yield from self._steps(a, k, q, Ring(self._world, counts, p).forth())
                if self.column_lse is not None:
                    self.column_lse[j] = torch.logaddexp(self.column_lse[j], self._columns.home())
                at, targets = self._tables.targets_in(a, k)
                if len(at):
                    self._logits[i][at] = replace(self.own, queries=q[at]).target_logits(targets)

    def add_lse(self, step: Step, row_lse: Tensor, column_lse: Tensor | None) -> None:
        self.row_lse[step.rows] = torch.logaddexp(self.row_lse[step.rows], row_lse)
        if column_lse is not None:
            self._columns.add(step.owner, column_lse)

    def target_logits(self) -> Tensor:
        return self._logits

    def backward(self, terms: Terms) -> Iterator[Step]:
        for a, q, dq in self.queries.accumulate(fresh=True):
            for k, p, dp in self.passages.accumulate(fresh=a == 0):
                counts, i, j = self._cut.counts[k], self.queries.places[a], self.passages.places[k]
                self._gradient, weights = TravellingSum(self._world, counts, step=-1), None
                back = Ring(self._world, counts, p).back()
                if terms.column_log_weights is not None:
                    weights = Ring(self._world, counts, terms.column_log_weights[j]).back()
                for step in self._steps(a, k, q, back):
                    of_block = None if weights is None else next(weights)[1]
                    yield step._replace(column_log_weights=of_block, dqueries=dq)
                term = self._gradient.home()
                at, targets = self._tables.targets_in(a, k)
                if len(at):
                    own, dq_at = replace(self.own, queries=q[at]), dq[at]
                    own.add_target_gradient(dq_at, term, targets, terms.target_gradient[i][at])
                    dq[at] = dq_at
                dp += term

    def add_gradients(self, step: Step, dqueries: Tensor, dpassages: Tensor) -> None:
        self._gradient.add(step.owner, dpassages)

    def _steps(self, a: int, k: int, queries: Tensor, blocks: Iterable[tuple[int, Tensor]]) -> Iterator[Step]:
        """Own queries in block a against every rank's block k."""
        for owner, passages in blocks:
            block = self.problem.block(queries, passages, self._tables.masks(a, k, owner))
            if owner == self._world.rank:
                self.own = block
            yield Step(block, self.queries.places[a], owner)


def host_bytes(precision: str, *, dims: bool) -> int:
    """Host memory for a number of an embedding: itself, what it is rounded to, what is copied of it, and its gradient.

    With `loss.dims` leading parts, their gradients and sums of these come on top. Page-locked memory comes in powers of
    two.
    """
    return 4 + (4 + 2 if precision == "bf16" else 4) + 4 + (20 if dims else 0)


@dataclass(frozen=True)
class _Cut:
    """How all ranks cut their rows: the same numbers of blocks on each, as many as the longest rank fills."""

    size: int
    query_blocks: int
    counts: list[tuple[int, ...]]  # of each block of passages, the rows of every rank

    @staticmethod
    def of(problem: Problem, world: World) -> _Cut:
        """Every rank calls it."""
        assert problem.block_rows is not None
        size, passages = problem.block_rows, world.counts(len(problem.passages))
        query_blocks, passage_blocks = (
            max(1, -(-max(n) // size)) for n in (world.counts(len(problem.queries)), passages)
        )
        return _Cut(
            size,
            query_blocks,
            [tuple(min(max(n - k * size, 0), size) for n in passages) for k in range(passage_blocks)],
        )


@dataclass(frozen=True)
class _Tables:
    """Which pairs are no negatives, and where the targets are, by blocks of own queries and of every rank's
    passages.
    """

    whole: BlockMasks  # of blocks that are ranks
    known: dict[int, PairsByBlock]  # owner -> pairs
    targets: PairsByBlock  # own rows that are not ignored, and their columns
    cut: _Cut

    @staticmethod
    def of(problem: Problem, cut: _Cut, world: World) -> _Tables:
        """Looks all known pairs up, with the ids of all ranks' passages; here, and not in a sweep, the host asks how
        many there are.
        """
        ids = problem.exclusions.passage_ids
        counts = tuple(map(sum, zip(*cut.counts, strict=True)))
        whole = BlockMasks.of(problem, Ring(world, counts, ids).forth(), counts, world.rank)
        known = {owner: _by_block(rows, columns, cut) for owner, (rows, columns) in whole.pairs.items()}
        active = problem.active.nonzero()[:, 0]
        return _Tables(whole, known, _by_block(active, problem.positives[active], cut), cut)

    def masks(self, a: int, k: int, owner: int) -> MaskTables:
        """The tables of own queries in block a and of the passages in an owner's block k."""
        whole, i = self.whole, slice(a * self.cut.size, (a + 1) * self.cut.size)
        targets, count = torch.full_like(whole.targets[i], -1), self.cut.counts[k][owner]
        if owner == whole.rank:
            within = whole.targets[i] - k * self.cut.size
            targets = torch.where((within >= 0) & (within < count), within, -1)
        threshold = None if whole.threshold is None else whole.threshold[i]
        return MaskTables(*self._of_block(self.known[owner], a, k), targets, threshold, count)

    def targets_in(self, a: int, k: int) -> tuple[Tensor, Tensor]:
        """The rows of block a whose targets are in own block k, and these, both counted from the start of their
        block.
        """
        return self._of_block(self.targets, a, k)

    def _of_block(self, pairs: PairsByBlock, a: int, k: int) -> tuple[Tensor, Tensor]:
        nothing = self.whole.targets.new_empty(0, dtype=torch.int64)
        return pairs.get((a, k), (nothing, nothing))


def _by_block(rows: Tensor, columns: Tensor, cut: _Cut) -> PairsByBlock:
    """The pairs (rows, columns), rows ascending, of each two blocks that have some, counted from the start of the
    blocks.
    """
    blocks = len(cut.counts)
    key, order = (rows // cut.size * blocks + columns // cut.size).sort(stable=True)
    present, counts = key.unique_consecutive(return_counts=True)
    parts = [x[order].remainder(cut.size).split(counts.tolist()) for x in (rows, columns)]
    return {
        divmod(number, blocks): part for number, part in zip(present.tolist(), zip(*parts, strict=True), strict=True)
    }


def _without_rows(problem: Problem, device: torch.device) -> Problem:
    """`problem` with what is a number a row on the device, and without queries and passages."""
    own = problem.exclusions
    threshold = None if own.threshold is None else own.threshold.to(device)
    exclusions = Exclusions(own.passage_ids.to(device), own.known_ptr.to(device), own.known_ids.to(device), threshold)
    nothing = problem.queries.new_empty(0, problem.queries.shape[1], device=device)
    return replace(
        problem, queries=nothing, passages=nothing, positives=problem.positives.to(device), exclusions=exclusions
    )


def _host_copy(rows: Tensor, problem: Problem, world: World) -> Tensor:
    """`rows` in `wire_dtype` and in page-locked memory."""
    return host_rows(rows.shape, problem.wire_dtype, world.device).copy_(rows)
