"""What a step will take, from what its parts were measured to take: seconds by stage, bytes by part, and which chunks keep their graphs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import numpy as np

from retriever.capacity import ChunkCost, Cost
from retriever.data.chunks import plan_chunks
from retriever.data.tokens import Side

SIDES: tuple[Side, Side] = ("query", "passage")


@dataclass(frozen=True)
class Workload:
    """One rank's part of a step: the lengths of its texts, cut into chunks in the order in which the encoder sees them."""

    queries: int  # of the global batch
    lengths: dict[Side, np.ndarray]  # [B] and [N] int64: of all of this rank's texts of a side
    tokens_per_chunk: int
    packed: bool

    @cached_property
    def chunks(self) -> dict[Side, list[np.ndarray]]:
        """Lengths [n_c] of each chunk's texts."""
        plans = {side: plan_chunks(own, self.tokens_per_chunk, packed=self.packed) for side, own in self.lengths.items()}
        return {side: [self.lengths[side][rows] for rows in plan] for side, plan in plans.items()}

    def computed(self, chunk: np.ndarray) -> int:
        """Tokens that the encoder computes for a chunk of these lengths, padding included."""
        return int(chunk.sum() if self.packed else len(chunk) * chunk.max())

    def measured_places(self, side: Side) -> list[int]:
        """Which of a side's chunks stand for all of them: that of the longest texts, the middle one, and the last, which may be small."""
        count = len(self.chunks[side])
        return sorted({0, middle(count), count - 1}) if count else []

    @property
    def tokens(self) -> int:
        """Real tokens of both sides."""
        return sum(int(own.sum()) for own in self.lengths.values())


@dataclass(frozen=True)
class Memory:
    """Bytes of a step's parts on one GPU. The representations' gradients are as large as they are themselves."""

    weights: float  # parameters, buffers and all else that is there before step 1
    gradients: float
    optimizer: float
    representations: float
    loss: float  # at its peak, above the representations
    host: float = 0.0  # in host memory instead: representations, their gradients and the copies that the loss makes


@dataclass(frozen=True)
class Forecast:
    """A step as it is expected to be, `retain` tokens of graphs kept."""

    workload: Workload
    costs: list[ChunkCost]  # of every chunk, in order
    loss_s: float
    update_s: float
    memory: Memory
    retain: int

    @cached_property
    def kept(self) -> int:
        """How many chunks, from the first on, keep their graphs."""
        return int(np.searchsorted(np.cumsum([cost.tokens for cost in self.costs]), self.retain, side="right"))

    @property
    def computed(self) -> int:
        """Tokens that one pass computes, padding included."""
        return sum(cost.tokens for cost in self.costs)

    @property
    def retained_share(self) -> float:
        """Of the computed tokens, those that are encoded once."""
        return sum(cost.tokens for cost in self.costs[: self.kept]) / self.computed

    @property
    def first_pass_s(self) -> float:
        return sum(cost.forward_s for cost in self.costs[: self.kept]) + sum(cost.first_s for cost in self.costs[self.kept :])

    @property
    def second_pass_s(self) -> float:
        return sum(cost.backward_s for cost in self.costs) + sum(cost.forward_s for cost in self.costs[self.kept :])

    @property
    def step_s(self) -> float:
        return self.first_pass_s + self.loss_s + self.second_pass_s + self.update_s

    @property
    def pairs_per_s(self) -> float:
        """Queries of the global batch a second."""
        return self.workload.queries / self.step_s

    @property
    def retained_bytes(self) -> float:
        """Of the graphs that are kept until the second pass."""
        return sum(cost.kept_bytes for cost in self.costs[: self.kept])

    @property
    def working_bytes(self) -> float:
        """Of a chunk that is encoded and differentiated at once."""
        return max(max(cost.backward_bytes, cost.forward_bytes) for cost in self.costs)

    @property
    def peak_bytes(self) -> float:
        """The largest of the stages' peaks, from the second step on, when the optimizer has its state."""
        part = self.memory
        kept, replayed = self.costs[: self.kept], self.costs[self.kept :]
        before = np.concatenate([[0.0], np.cumsum([cost.kept_bytes for cost in kept])])  # kept when a chunk's turn comes
        first = [b + cost.forward_bytes for b, cost in zip(before, kept, strict=False)]
        first += [before[-1] + cost.first_bytes for cost in replayed]
        second = [before[-1] - b + cost.backward_bytes - cost.kept_bytes for b, cost in zip(before, kept, strict=False)]
        second += [max(cost.forward_bytes, cost.backward_bytes) for cost in replayed]
        stages = (
            part.representations + max(first),
            part.representations + before[-1] + part.loss,
            2 * part.representations + part.gradients + max(second),
        )
        return part.weights + part.optimizer + max(stages)


def costs_of(workload: Workload, measured: dict[Side, dict[int, ChunkCost]]) -> list[ChunkCost]:
    """The cost of every chunk from those of `measured_places`: by token, linear from the first chunk to the middle one, then even."""
    costs = []
    for side in SIDES:
        chunks, own = workload.chunks[side], measured[side]
        half = middle(len(chunks))
        for place, chunk in enumerate(chunks):
            if place in own:
                costs.append(own[place])
            else:
                costs.append(_scaled(own[0], own[half], min(1.0, place / half), workload.computed(chunk)))
    return costs


def middle(count: int) -> int:
    """The middle one of so many chunks; not the last, which may be small, unless it is alone."""
    return max(0, count - 1) // 2


def _scaled(first: ChunkCost, middle: ChunkCost, share: float, tokens: int) -> ChunkCost:
    """A chunk of `tokens` between two others, whose costs by token are mixed."""
    a, b = (np.array(astuple(cost)) / cost.tokens for cost in (first, middle))
    return ChunkCost(tokens, *((1 - share) * a + share * b)[1:] * tokens)


def most_retained(forecast: Forecast, usable_bytes: float) -> int:
    """Tokens of graphs that can be kept in `usable_bytes`; more than these chunks have where there is room, as batches differ a little.

    0 where not even one chunk's graph fits.
    """
    sums = np.cumsum([cost.tokens for cost in forecast.costs]).tolist()
    fitting = bisect_right(sums, usable_bytes, key=lambda tokens: replace(forecast, retain=tokens).peak_bytes)
    if fitting == 0:
        return 0
    room = usable_bytes - replace(forecast, retain=sums[fitting - 1]).peak_bytes
    dearest = max(cost.kept_bytes / cost.tokens for cost in forecast.costs)
    return sums[fitting - 1] + (int(room / dearest) if dearest > 0 else 0)


def settled_size(seconds_per_token: Sequence[tuple[int, float]], tolerance: float = 0.04) -> int:
    """The smallest of the sizes beyond which seconds a token fall by no more than `tolerance`, from (size, seconds a token)."""
    least = min(seconds for _, seconds in seconds_per_token)
    return min(size for size, seconds in seconds_per_token if seconds <= (1 + tolerance) * least)


def scaled_loss(cost: Cost, measured: tuple[int, int], actual: tuple[int, int], *, linear_memory: bool, fixed_bytes: float) -> Cost:
    """The loss over `actual` (queries, passages) from one over `measured`: time by pairs; memory above `fixed_bytes` by rows or pairs."""
    pairs = actual[0] * actual[1] / (measured[0] * measured[1])
    rows = sum(actual) / sum(measured) if linear_memory else pairs
    fixed = min(fixed_bytes, cost.peak_bytes)
    return Cost(cost.seconds * pairs, fixed + (cost.peak_bytes - fixed) * rows)
