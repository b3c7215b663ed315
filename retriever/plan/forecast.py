"""What a step will take, from what its parts were measured to take: seconds by stage, bytes by part, and which chunks keep their graphs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from retriever.data.chunks import plan_chunks
from retriever.data.tokens import Side
from retriever.plan.measure import ChunkCost, Cost
from retriever.retention import NOTHING, Budget, Keeps, Retention

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
    """A step as it is expected to be where so much is kept between its passes."""

    workload: Workload
    costs: list[ChunkCost]  # of every chunk, in order
    loss_s: float
    update_s: float
    memory: Memory
    retention: Retention = NOTHING

    @cached_property
    def kept_by_chunk(self) -> list[tuple[ChunkCost, Keeps]]:
        """Every chunk's cost, and what it keeps."""
        budget = Budget(self.retention)
        return [(cost, budget.take(cost.tokens)) for cost in self.costs]

    @property
    def computed(self) -> int:
        """Tokens that one pass computes, padding included."""
        return sum(cost.tokens for cost in self.costs)

    def share(self, kept: Keeps) -> float:
        """Of the computed tokens, those of chunks that keep their graphs, the products of their layers, or nothing."""
        return sum(cost.tokens for cost, keeps in self.kept_by_chunk if keeps == kept) / self.computed

    def count(self, kept: Keeps) -> int:
        """How many chunks keep it."""
        return sum(keeps == kept for _, keeps in self.kept_by_chunk)

    @property
    def first_pass_s(self) -> float:
        return sum(cost.forward_s if keeps == "graph" else cost.first_s for cost, keeps in self.kept_by_chunk)

    @property
    def second_pass_s(self) -> float:
        encoding = sum(cost.again_s if keeps == "products" else cost.forward_s for cost, keeps in self.kept_by_chunk if keeps != "graph")
        return encoding + sum(cost.backward_s for cost in self.costs)

    @property
    def step_s(self) -> float:
        return self.first_pass_s + self.loss_s + self.second_pass_s + self.update_s

    @property
    def pairs_per_s(self) -> float:
        """Queries of the global batch a second."""
        return self.workload.queries / self.step_s

    @cached_property
    def retained_bytes(self) -> list[float]:
        """Of what each chunk keeps between the passes."""
        return [{"graph": cost.kept_bytes, "products": cost.products_bytes, "nothing": 0.0}[keeps] for cost, keeps in self.kept_by_chunk]

    @property
    def working_bytes(self) -> float:
        """Of a chunk that is encoded and differentiated at once."""
        return max(max(cost.backward_bytes, cost.forward_bytes) for cost in self.costs)

    @property
    def peak_bytes(self) -> float:
        """The largest of the stages' peaks, from the second step on, when the optimizer has its state."""
        part = self.memory
        kept, first, second = 0.0, 0.0, 0.0
        for (cost, keeps), own in zip(self.kept_by_chunk, self.retained_bytes, strict=True):
            first = max(first, kept + (cost.forward_bytes if keeps == "graph" else cost.first_bytes + own))
            kept += own
        left = kept
        for (cost, keeps), own in zip(self.kept_by_chunk, self.retained_bytes, strict=True):
            left -= own
            second = max(second, left + (cost.backward_bytes if keeps == "graph" else max(cost.forward_bytes, cost.backward_bytes)))
        stages = (
            part.representations + first,
            part.representations + kept + part.loss,
            2 * part.representations + part.gradients + second,
        )
        return part.weights + part.optimizer + max(stages)


def costs_like(workload: Workload, cost: ChunkCost) -> list[ChunkCost]:
    """The cost of every chunk where each takes by token what one of them was measured to take."""
    return [_scaled(cost, cost, 0.0, workload.computed(chunk)) for side in SIDES for chunk in workload.chunks[side]]


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


def most_retained(forecast: Forecast, usable_bytes: float, graphs: int | None = None, products: int | None = None) -> Retention:
    """The faster of `filled` with products and without any; tokens that are given stay as they are."""
    plans = [filled(forecast, usable_bytes, graphs, wanted) for wanted in ([None, 0] if products is None else [products])]
    return min(plans, key=lambda plan: replace(forecast, retention=plan).step_s)


def filled(forecast: Forecast, usable_bytes: float, graphs: int | None, products: int | None) -> Retention:
    """What can be kept in `usable_bytes`: of graphs and of products as many tokens as given, or else as fit.

    Products, which mostly spare more time by the byte, come before graphs. A little more is allowed than these chunks have where there is
    room, as batches differ a little; nothing of a kind where not even one chunk's fit.
    """
    plan = replace(forecast, retention=Retention(graphs or 0, products or 0))
    if graphs is None:
        with_products = plan if products is not None else _with_most(plan, usable_bytes, "products")
        graphs = _with_most(with_products, usable_bytes, "graphs").retention.graphs
        plan = replace(plan, retention=Retention(graphs, products or 0))
    if products is None:
        plan = _with_most(plan, usable_bytes, "products")  # behind these graphs, and no further
    return plan.retention


def _with_most(plan: Forecast, usable_bytes: float, kind: Literal["graphs", "products"]) -> Forecast:
    """`plan` with as many tokens of a kind as there is room for, the other kind as it is."""
    own = [cost.kept_bytes if kind == "graphs" else cost.products_bytes for cost in plan.costs]
    if not all(own):
        return plan
    behind = sum(cost.tokens for cost, keeps in plan.kept_by_chunk if keeps == "graph") if kind == "products" else 0
    counts = [tokens - behind for tokens in np.cumsum([cost.tokens for cost in plan.costs]).tolist() if tokens > behind]

    def keeping(tokens: int) -> Forecast:
        return replace(plan, retention=plan.retention._replace(**{kind: tokens}))

    fitting = bisect_right(counts, usable_bytes, key=lambda tokens: keeping(tokens).peak_bytes)
    if fitting == 0:
        return plan
    room = usable_bytes - keeping(counts[fitting - 1]).peak_bytes
    dearest = max(of_chunk / cost.tokens for of_chunk, cost in zip(own, plan.costs, strict=True))
    return keeping(counts[fitting - 1] + min(int(room / 2 / dearest), plan.workload.tokens_per_chunk))


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
