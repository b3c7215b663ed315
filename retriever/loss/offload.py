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

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kernels.infonce.api import Exclusions, MaskTables
from kernels.infonce.targets import add_target_gradient, target_similarities
from retriever.loss.problem import Problem
from retriever.loss.ring import BlockMasks, gradient_of_sweep, lse_of_sweep
from retriever.loss.terms import Terms
from retriever.parallel.host import CopyStream, HostRows, host_rows
from retriever.parallel.ring import Ring
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
    here, cut = _without_rows(problem, world.device), _Cut.of(problem, world)
    tables, copies = _Tables.of(here, cut, world), CopyStream(world.device)
    queries = HostRows(_host_copy(problem.queries, problem, world), cut.size, cut.query_blocks, copies)
    passages = HostRows(_host_copy(problem.passages, problem, world), cut.size, len(cut.counts), copies)
    terms = _first_sweep(here, world, cut, tables, queries, passages)
    _second_sweep(here, world, cut, tables, queries, passages, terms)
    copies.finish()
    return terms.losses, queries.sums, passages.sums


def _first_sweep(
    problem: Problem, world: World, cut: _Cut, tables: _Tables, queries: HostRows, passages: HostRows
) -> Terms:
    """What follows from all log-sum-exps: of rows over their negatives and, where symmetric, of columns over all ranks'
    queries.
    """
    positive = torch.zeros(len(problem.positives), dtype=queries.sums.dtype, device=world.device)  # [B]
    row_lse = torch.full_like(positive, -torch.inf)
    column_lse = positive.new_full((len(problem.exclusions.passage_ids),), -torch.inf) if problem.symmetric else None
    for a, q in queries.read():
        i = queries.places[a]
        for k, p in passages.read():
            j, counts = passages.places[k], cut.counts[k]
            rows, columns = lse_of_sweep(
                problem, world, counts, q, Ring(world, counts, p).forth(), partial(tables.masks, a, k)
            )
            row_lse[i] = torch.logaddexp(row_lse[i], rows)
            if column_lse is not None and columns is not None:
                column_lse[j] = torch.logaddexp(column_lse[j], columns)
            at, targets = tables.targets_in(a, k)
            positive[i][at] = problem.scale * target_similarities(q[at], p, targets, precision=problem.precision)
    return Terms.of(problem, positive, row_lse, column_lse)


def _second_sweep(
    problem: Problem, world: World, cut: _Cut, tables: _Tables, queries: HostRows, passages: HostRows, terms: Terms
) -> None:
    """Leaves both gradients in the `sums` of their sides."""
    for a, q, dq in queries.accumulate(fresh=True):
        i = queries.places[a]
        for k, p, dp in passages.accumulate(fresh=a == 0):
            j, counts = passages.places[k], cut.counts[k]
            column_log_weights = None if terms.column_log_weights is None else terms.column_log_weights[j]
            _, term = gradient_of_sweep(
                problem, world, counts, q, Ring(world, counts, p).back(), terms.row_log_weights[i], column_log_weights,
                partial(tables.masks, a, k), dqueries=dq,
            )  # fmt: skip
            at, targets = tables.targets_in(a, k)
            dq_at = dq[at]
            add_target_gradient(
                dq_at, term, q[at], p, targets, terms.target_gradient[i][at], precision=problem.precision
            )
            dq[at] = dq_at
            dp += term


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
