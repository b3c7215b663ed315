"""How blocks and sums go round, seen from one rank: which transfers begin when, and what is held meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retriever.parallel.ring import Ring, TravellingSum
from retriever.parallel.world import Transfer, World

COUNTS = (3, 1, 4, 2)


class _Log(World):
    """Rank 1 of four, whose neighbours send rows filled with a number that tells the transfer; writes down what begins
    and arrives.
    """

    def __init__(self) -> None:
        self.device, self.rank, self.size = torch.device("cpu"), 1, 4
        self.events: list[str] = []
        self.received: list[Tensor] = []

    def pass_on(self, x: Tensor, arriving: Tensor, step: int) -> Transfer:
        number = len(self.received)
        self.events.append(f"begin {number} {'on' if step > 0 else 'back'}: {len(x)} out, {len(arriving)} in")
        self.received.append(arriving)
        log = self.events

        class Arriving(Transfer):
            def wait(self) -> Tensor:
                log.append(f"arrived {number}")
                return arriving.fill_(number)

        return Arriving(x, arriving, [])


def _sweep(world: _Log, sweep: object) -> None:
    for owner, block in sweep:  # type: ignore[attr-defined]
        assert len(block) == COUNTS[owner]
        world.events.append(f"work on {owner}")


def test_the_next_block_is_in_flight_while_one_is_worked_on() -> None:
    """Own block first and then against the ring; back again from the last one without fetching it, own block last."""
    world = _Log()
    ring = Ring(world, COUNTS, torch.zeros(1, 2))
    forth = ring.forth()
    assert world.events == ["begin 0 on: 1 out, 3 in"], "before a block is asked for"
    _sweep(world, forth)
    there = ["begin 0 on: 1 out, 3 in", "work on 1", "arrived 0", "begin 1 on: 3 out, 2 in", "work on 0", "arrived 1"]
    assert world.events == [*there, "begin 2 on: 2 out, 4 in", "work on 3", "arrived 2", "work on 2"]
    world.events.clear()
    _sweep(world, ring.back())
    there = [
        "begin 3 back: 4 out, 2 in",
        "work on 2",
        "arrived 3",
        "begin 4 back: 2 out, 3 in",
        "work on 3",
        "arrived 4",
    ]
    assert world.events == [*there, "work on 0", "work on 1"]


def test_two_blocks_are_held_beside_the_own_one() -> None:
    """Whatever the number of hops, rows arrive in two buffers by turns, never in the one that is worked on."""
    world = _Log()
    ring = Ring(world, COUNTS, torch.zeros(1, 2))
    for sweep in (ring.forth, ring.back):
        for _, block in sweep():
            assert not world.events[-1].startswith("begin") or world.received[-1].data_ptr() != block.data_ptr()
    assert len(world.received) == 5 and len({x.data_ptr() for x in world.received}) == 2


def test_back_alone_fetches_its_first_block() -> None:
    world = _Log()
    _sweep(world, Ring(world, COUNTS, torch.zeros(1, 2)).back())
    assert world.events[:3] == ["begin 0 back: 1 out, 4 in", "arrived 0", "begin 1 back: 4 out, 2 in"]
    assert [e for e in world.events if e.startswith("work")] == [f"work on {owner}" for owner in (2, 3, 0, 1)]


def test_a_sum_is_under_way_while_the_next_term_is_worked_out() -> None:
    """Forth it takes one hop more to come home; back it is complete with the own block."""
    world = _Log()
    total = TravellingSum(world, COUNTS, step=1)
    for owner in (1, 0, 3, 2):
        world.events.append(f"work on {owner}")
        total.add(owner, torch.full((COUNTS[owner], 2), 10.0))
    assert len(total.home()) == COUNTS[1] and total.home().eq(3).all()
    assert world.events[:5] == [
        "work on 1",
        "begin 0 on: 1 out, 3 in",
        "work on 0",
        "arrived 0",
        "begin 1 on: 3 out, 2 in",
    ]
    assert world.events[-3:] == ["arrived 2", "begin 3 on: 4 out, 1 in", "arrived 3"]
    world, back = _Log(), None
    back = TravellingSum(world, COUNTS, step=-1)
    for owner in (2, 3, 0, 1):
        back.add(owner, torch.full((COUNTS[owner], 2), 10.0))
    assert back.home().eq(12).all(), "the own term and what transfer 2 brought"
    assert world.events[-1] == "arrived 2"


def test_a_sum_that_lacks_terms_is_no_sum() -> None:
    world = _Log()
    total = TravellingSum(world, COUNTS, step=1)
    total.add(1, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="a term for each of 4 blocks, received 1"):
        total.home()


def test_rows_that_counts_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rows on rank 1"):
        Ring(_Log(), COUNTS, torch.zeros(2, 2))


def test_alone_a_ring_is_the_own_block() -> None:
    world, own = World(torch.device("cpu")), torch.ones(3, 2)
    ring = Ring(world, [3], own)
    for sweep, step in ((ring.forth(), 1), (ring.back(), -1)):
        total = TravellingSum(world, [3], step)
        for owner, block in sweep:
            assert block is own
            total.add(owner, 2 * block)
        assert total.home().eq(2).all()
