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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.infonce.api import Block, Lists, MaskTables
from kernels.infonce.rules import Pairs, Pools
from kernels.infonce.terms import Terms
from kernels.infonce.two_pass import FirstPass, Passages, SecondPass
from retriever.loss.problem import Problem
from retriever.loss.ring import BlockMasks, gradient_of_round, lse_of_round
from retriever.parallel.host import CopyStream, HostRows, host_rows
from retriever.parallel.ring import Ring
from retriever.parallel.world import World

# In bf16 on an H100, the work on a block hides copies at 30 GB/s, those of a sweep's first block aside.
BLOCK_ROWS = 32_768

PairsByBlock = dict[tuple[int, int], Pairs]


def offloaded(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B] on the device, dqueries [B, D] and dpassages [N, D] in host memory, as `problem`'s own tensors
    are.

    8·b·n·D operations; the device holds about 28·R·D bytes of blocks of R rows in bf16 (40 with several ranks) and the
    workspace. (Cheng et al. 2024, arXiv:2410.17243)
    """
    copies = CopyStream(world.device)
    on_device = _without_rows(problem, world.device)
    return on_device.contrast(lambda part: HostPassages(problem, part, world, copies))


class HostPassages(Passages):
    """All ranks' passages in blocks from host memory, which go round the ring for each block of own queries."""

    def __init__(self, on_host: Problem, problem: Problem, world: World, copies: CopyStream) -> None:
        """`problem` without queries and passages, which those of `on_host` are, is on the device."""
        self.problem, self._world, self._copies = problem, world, copies
        self._tables = _Tables.of(problem, world)
        size, blocks = self._tables.size, _blocks(world.counts(len(problem.positives)), self._tables.size)
        passages = _host_copy(on_host.passages, problem, world)
        self._queries = HostRows(_host_copy(on_host.queries, problem, world), size, blocks, copies)
        self._passages = HostRows(passages, size, len(self._tables.counts), copies)

    def forward(self) -> FirstPass:
        logits = torch.zeros_like(self.problem.positives, dtype=self._queries.sums.dtype)  # [B]
        row_lse = torch.full_like(logits, -torch.inf)
        column_lse = logits.new_full((len(self.problem.exclusions.passage_ids),), -torch.inf)  # [N]
        for a, q in self._queries.read():
            i = self._queries.places[a]
            for k, p in self._passages.read():
                j, counts = self._passages.places[k], self._tables.counts[k]
                blocks = self._blocks(a, k, q, Ring(self._world, counts, p).forth())
                rows, columns = yield from lse_of_round(self._world, counts, blocks, i)
                row_lse[i] = torch.logaddexp(row_lse[i], rows)
                if columns is not None:
                    column_lse[j] = torch.logaddexp(column_lse[j], columns)
                at, targets = self._tables.targets_in(a, k)
                if len(at):
                    logits[i][at] = replace(self.own, queries=q[at]).target_logits(targets)
        return row_lse, column_lse if self.problem.symmetric else None, logits

    def backward(self, terms: Terms) -> SecondPass:
        for a, q, dq in self._queries.accumulate(fresh=True):
            i = self._queries.places[a]
            for k, p, dp in self._passages.accumulate(fresh=a == 0):
                j, counts = self._passages.places[k], self._tables.counts[k]
                weights = None if terms.column_log_weights is None else terms.column_log_weights[j]
                blocks = self._blocks(a, k, q, Ring(self._world, counts, p).back())
                _, term = yield from gradient_of_round(self._world, counts, blocks, weights, i, dq)
                at, targets = self._tables.targets_in(a, k)
                if len(at):
                    own, dq_at = replace(self.own, queries=q[at]), dq[at]
                    own.add_target_gradient(dq_at, term, targets, terms.target_gradient[i][at])
                    dq[at] = dq_at
                dp += term
        self._copies.finish()  # the host adds up the sums of several parts
        return self._queries.sums, self._passages.sums

    def _blocks(
        self, a: int, k: int, queries: Tensor, passages: Iterable[tuple[int, Tensor]]
    ) -> Iterator[tuple[int, Block]]:
        """Own queries in block a against every owner's block k; `own` is the block of own passages among them."""
        for owner, rows in passages:
            block = self.problem.block(queries, rows, self._tables.masks(a, k, owner))
            if owner == self._world.rank:
                self.own = block
            yield owner, block


def host_bytes(precision: str, *, dims: bool) -> int:
    """Host memory for a number of an embedding: itself, what it is rounded to, what is copied of it, and its gradient.

    With `loss.dims` leading parts, their gradients and sums of these come on top. Page-locked memory comes in powers of
    two.
    """
    return 4 + (4 + 2 if precision == "bf16" else 4) + 4 + (20 if dims else 0)


@dataclass(frozen=True)
class _Tables:
    """Exclusions and targets by blocks of own queries and of every rank's
    passages. All ranks have as many blocks, as the longest one fills.
    """

    size: int  # rows of a block
    counts: list[tuple[int, ...]]  # of each block of passages, the rows of every rank
    whole: BlockMasks  # of blocks that are ranks
    further: dict[int, PairsByBlock]  # owner -> pairs
    targets: PairsByBlock  # own rows that are not ignored, and their columns

    @staticmethod
    def of(problem: Problem, world: World) -> _Tables:
        """Looks all known pairs up, with the ids of all ranks' passages; here, and not in a sweep, the host asks how
        many there are. Every rank calls it.
        """
        ids, size = problem.exclusions.passage_ids, problem.block_rows
        assert size is not None
        ranks = world.counts(len(ids))
        blocks = _blocks(ranks, size)
        counts = [tuple(min(max(n - k * size, 0), size) for n in ranks) for k in range(blocks)]
        whole = BlockMasks.of(problem, Ring(world, ranks, ids).forth(), ranks, world.rank)
        further = {owner: _by_block(pairs, size, blocks) for owner, pairs in whole.pairs.items()}
        active = problem.active.nonzero()[:, 0]
        targets = _by_block(Pairs(active, problem.positives[active]), size, blocks)
        return _Tables(size, counts, whole, further, targets)

    def masks(self, a: int, k: int, owner: int) -> MaskTables:
        """The tables of own queries in block a and of the passages in an owner's block k."""
        whole, i = self.whole, slice(a * self.size, (a + 1) * self.size)
        targets, count = torch.full_like(whole.targets[i], -1), self.counts[k][owner]
        if owner == whole.rank:
            within = whole.targets[i] - k * self.size
            targets = torch.where((within >= 0) & (within < count), within, -1)
        own, pools = whole.exclusions, None
        if whole.pools is not None:
            rows, columns = whole.pools[owner]
            pools = rows[i], columns[k * self.size : k * self.size + count]
        threshold = None if own.threshold is None else own.threshold[i]
        further = self._of_block(self.further[owner], a, k)
        return MaskTables(further, targets, threshold, count, hardness=own.hardness, pools=pools)

    def targets_in(self, a: int, k: int) -> tuple[Tensor, Tensor]:
        """The rows of block a whose targets are in own block k, and these, both counted from the start of their
        block.
        """
        found = self._of_block(self.targets, a, k)
        return found.rows, found.columns

    def _of_block(self, pairs: PairsByBlock, a: int, k: int) -> Pairs:
        nothing = self.whole.targets.new_empty(0, dtype=torch.int64)
        return pairs.get((a, k), Pairs(nothing, nothing))


def _blocks(counts: Sequence[int], size: int) -> int:
    """The number of blocks of the rank with the most rows."""
    return max(1, -(-max(counts) // size))


def _by_block(pairs: Pairs, size: int, blocks: int) -> PairsByBlock:
    """The pairs of each two blocks that have some, counted from the start of the blocks; there are `blocks` of
    columns.
    """
    key, order = (pairs.rows // size * blocks + pairs.columns // size).sort(stable=True)
    present, counts = key.unique_consecutive(return_counts=True)
    within = pairs._replace(rows=pairs.rows % size, columns=pairs.columns % size)
    parts = order.split(counts.tolist())
    return {divmod(number, blocks): within.select(part) for number, part in zip(present.tolist(), parts, strict=True)}


def _without_rows(problem: Problem, device: torch.device) -> Problem:
    """`problem` with what is a number a row on the device, and without queries and passages."""
    on_host = problem.exclusions
    exclusions = replace(
        on_host,
        passage_ids=on_host.passage_ids.to(device),
        known_ptr=on_host.known_ptr.to(device),
        known_ids=on_host.known_ids.to(device),
        threshold=None if on_host.threshold is None else on_host.threshold.to(device),
        pools=None if on_host.pools is None else Pools(*(x.to(device) for x in on_host.pools)),
        own=None if on_host.own is None else Lists(*(x.to(device) for x in on_host.own)),
    )
    nothing = problem.queries.new_empty(0, problem.queries.shape[1], device=device)
    shares = None if problem.shares is None else problem.shares.to(device)
    positives = problem.positives.to(device)
    return replace(
        problem, queries=nothing, passages=nothing, positives=positives, exclusions=exclusions, shares=shares
    )


def _host_copy(rows: Tensor, problem: Problem, world: World) -> Tensor:
    """`rows` in `wire_dtype` and in page-locked memory."""
    return host_rows(rows.shape, problem.wire_dtype, world.device).copy_(rows)
