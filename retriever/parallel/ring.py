"""The ranks in a ring: rows pass by block by block, and sums travel with them, so that no rank holds what all ranks
have.

`Ring.forth` brings every rank's block, the own one first, each from the rank before; `Ring.back` returns them the other
way round, beginning with the block that `forth` ended on and ending with the own one. So the second of two sweeps need
not wait for its first block, and a sum that travels with the blocks of `back` is complete on its home rank at the end,
without a hop for it alone.

The next block is in flight while the caller works on the present one: transfers wait for what was queued before them
and for nothing that is queued later (NCCL runs them on a stream of its own). There is no barrier, and the host waits
for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from retriever.parallel.world import Transfer, World


class Ring:
    """One rank's rows among those of all ranks, on their way round. With W ranks, two further blocks are held at
    most.
    """

    def __init__(self, world: World, counts: Sequence[int], own: Tensor) -> None:
        """own [counts[world.rank], ...]; `counts`: rows of every rank's block."""
        if len(own) != counts[world.rank]:
            raise ValueError(
                f"expected {counts[world.rank]} rows on rank {world.rank}, as counts says, received {len(own)}"
            )
        self._world, self._counts, self._own = world, tuple(counts), own.contiguous()
        shape = (max(counts), *own.shape[1:])
        # Explicit buffers, written in turn: the caller's name for a past block must not keep a third one alive.
        self._buffers = [own.new_empty(shape) for _ in range(min(2, world.size - 1))]
        self._written = 0  # transfers begun
        self._held = (world.rank, self._own)

    def forth(self) -> Iterator[tuple[int, Tensor]]:
        """(owner, block) of rank r, r − 1, …, r + 1 for this rank r. A block is valid until the next one is asked for.

        The first hop begins here, before a block is asked for.
        """
        self._held = (self._world.rank, self._own)
        return self._sweep(range(self._world.size), 1, self._begin_hop(0, 1))

    def back(self) -> Iterator[tuple[int, Tensor]]:
        """(owner, block) of rank r + 1, r + 2, …, r for this rank r; the first is at hand where `forth` has just
        ended.
        """
        following = (self._world.rank + 1) % self._world.size
        if self._held[0] != following:
            self._held = (following, self._pass_on(self._own, following, step=-1).wait())
        return self._sweep(range(1, self._world.size + 1), -1, self._begin_hop(1, -1))

    def _sweep(self, distances: range, step: int, arriving: Transfer | None) -> Iterator[tuple[int, Tensor]]:
        """Blocks whose owners are `distances` ranks away, against the direction `step` in which they travel; the second
        is `arriving`.
        """
        for distance in distances:
            yield self._held
            if distance + 1 in distances:
                following = (self._world.rank - step * (distance + 1)) % self._world.size
                self._held = (following, self._own if arriving is None else arriving.wait())
                arriving = self._begin_hop(distance + 1, step) if distance + 2 in distances else None

    def _begin_hop(self, distance: int, step: int) -> Transfer | None:
        """Sends the block from `distance` ranks away on, and fetches the next; None where that is the own one, which is
        here already.
        """
        following = (self._world.rank - step * (distance + 1)) % self._world.size
        return None if following == self._world.rank else self._pass_on(self._held[1], following, step)

    def _pass_on(self, block: Tensor, following: int, step: int) -> Transfer:
        buffer = self._buffers[self._written % len(self._buffers)][: self._counts[following]]
        self._written += 1
        return self._world.pass_on(block, buffer, step)


class TravellingSum:
    """A sum over ranks for every row of every block, on its way with the blocks of one sweep.

    Each rank combines its term with what came from the ranks before. The sums of `back` are home with its last block;
    those of `forth` take one hop more.
    """

    def __init__(
        self, world: World, counts: Sequence[int], step: int, combine: Callable[[Tensor, Tensor], Tensor] = Tensor.add_
    ) -> None:
        """`step`: 1 with `forth`, −1 with `back`. `combine(term, arrived)` may overwrite `term`."""
        self._world, self._counts, self._step, self._combine = world, counts, step, combine
        self._arriving: Transfer | None = None
        self._total: Tensor | None = None
        self._added = 0

    def add(self, owner: int, term: Tensor) -> None:
        """Adds this rank's `term` [counts[owner], ...] for the rows of `owner`, in the order of the sweep; the sum owns
        it from now on.
        """
        total = term if self._arriving is None else self._combine(term, self._arriving.wait())
        self._arriving, self._added = None, self._added + 1
        if self._added == self._world.size and owner == self._world.rank:
            self._total = total
            return
        following = (owner - self._step) % self._world.size
        self._arriving = self._world.pass_on(
            total, total.new_empty(self._counts[following], *total.shape[1:]), self._step
        )

    def home(self) -> Tensor:
        """The complete sum for this rank's own rows [counts[rank], ...], after every block has been added."""
        if self._total is None:
            if self._arriving is None or self._added != self._world.size:
                raise ValueError(f"expected a term for each of {self._world.size} blocks, received {self._added}")
            self._total = self._arriving.wait()
        return self._total
