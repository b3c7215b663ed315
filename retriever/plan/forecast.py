"""A step's seconds and bytes from those of its parts, and how many of its chunks can keep something between the
passes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from retriever.data.chunks import plan_chunks
from retriever.data.tokens import SIDES, Side
from retriever.parallel.world import World
from retriever.plan.measure import COST_FIELDS, ChunkCost, Cost
from retriever.retention import NOTHING, Budget, Keeps, Retention


@dataclass(frozen=True)
class Workload:
    """One rank's part of a step: the lengths of its texts, cut into chunks in the order in which the encoder sees
    them.
    """

    queries: int  # of the global batch
    lengths: dict[Side, np.ndarray]  # [B] and [N] int64: of all of this rank's texts of a side
    tokens_per_chunk: int
    packed: bool

    @cached_property
    def chunks(self) -> dict[Side, list[np.ndarray]]:
        """Lengths [n_c] of each chunk's texts."""
        plans = {
            side: plan_chunks(own, self.tokens_per_chunk, packed=self.packed) for side, own in self.lengths.items()
        }
        return {side: [self.lengths[side][rows] for rows in plan] for side, plan in plans.items()}

    @property
    def tokens(self) -> int:
        """Real tokens of both sides."""
        return sum(int(own.sum()) for own in self.lengths.values())

    def measured_places(self, side: Side) -> tuple[int, ...]:
        """The chunks of a side that are measured for all: that of the longest texts, the middle one, and the
        last, often small.
        """
        count = len(self.chunks[side])
        return (0, (count - 1) // 2, count - 1) if count else ()

    def costs(self, measured: Mapping[Side, Mapping[int, ChunkCost]]) -> np.recarray:
        """Every chunk's cost from those at `measured_places`, as an array [chunks] with the fields of ChunkCost.

        Costs a token change linearly from the first chunk to the middle one, and then no more; the last chunk stands
        for itself alone.
        """
        rows = []
        for side in SIDES:
            per_token = {place: np.array(cost) / cost.tokens for place, cost in measured[side].items()}
            for place, chunk in enumerate(self.chunks[side]):
                first, middle, last = self.measured_places(side)
                share = min(1.0, place / middle) if middle else 1.0
                rate = per_token[last] if place == last else (1 - share) * per_token[first] + share * per_token[middle]
                rows.append(tuple(rate * (chunk.sum() if self.packed else len(chunk) * chunk.max())))
        return np.rec.fromrecords(rows, dtype=COST_FIELDS)


@dataclass(frozen=True)
class Memory:
    """Bytes of what is on one GPU in each step. The representations' gradients are as large as they are themselves."""

    weights: float  # parameters, buffers and all else that is there before step 1
    gradients: float
    optimizer: float
    representations: float
    bank: float = 0.0  # a full memory bank, and this rank's share of it beside the batch
    host: float = 0.0  # in host memory instead: representations, their gradients and the copies that the loss makes


@dataclass(frozen=True)
class Forecast:
    """Predicted time and memory of one step at a given retention."""

    workload: Workload
    costs: np.recarray  # [chunks], as `Workload.costs` gives them
    loss: Cost
    update_s: float
    memory: Memory
    retention: Retention = NOTHING

    @cached_property
    def keeps(self) -> np.ndarray:
        """The retention of each chunk: [chunks] of Keeps."""
        budget = Budget(self.retention)
        return np.array([budget.take(tokens) for tokens in self.costs.tokens])

    @property
    def computed(self) -> int:
        """Tokens that one pass computes, padding included."""
        return int(self.costs.tokens.sum())

    def count(self, kept: Keeps) -> int:
        """The number of chunks that keep it."""
        return int((self.keeps == kept).sum())

    def share(self, kept: Keeps) -> float:
        """The share of computed tokens in chunks that keep their graphs, the products of their layers, or nothing."""
        return float(self.costs.tokens[self.keeps == kept].sum() / self.computed)

    @property
    def first_pass_s(self) -> float:
        return float(np.where(self.keeps == "graph", self.costs.forward_s, self.costs.first_s).sum())

    @property
    def second_pass_s(self) -> float:
        return float((self._of_kept(0.0, self.costs.again_s, self.costs.forward_s) + self.costs.backward_s).sum())

    @property
    def step_s(self) -> float:
        return self.first_pass_s + self.loss.seconds + self.second_pass_s + self.update_s

    @property
    def pairs_per_s(self) -> float:
        """Queries of the global batch a second."""
        return self.workload.queries / self.step_s

    @property
    def retained_bytes(self) -> np.ndarray:
        """Bytes that each chunk keeps between the passes: [chunks]."""
        return self._of_kept(self.costs.kept_bytes, self.costs.products_bytes, 0.0)

    @property
    def working_bytes(self) -> float:
        """Bytes of a chunk that is encoded and differentiated at once."""
        return float(np.maximum(self.costs.forward_bytes, self.costs.backward_bytes).max())

    @property
    def peak_bytes(self) -> float:
        """The largest of the stages' peaks, from the second step on, when the optimizer has its state."""
        costs, part, graph = self.costs, self.memory, self.keeps == "graph"
        kept = self.retained_bytes.cumsum()  # [chunks]: by each chunk and those before it
        first = np.where(graph, kept - costs.kept_bytes + costs.forward_bytes, kept + costs.first_bytes)
        second = np.maximum(costs.backward_bytes, np.where(graph, 0.0, costs.forward_bytes)) + kept[-1] - kept
        stages = (
            part.representations + first.max(),
            part.representations + kept[-1] + self.loss.peak_bytes,
            2 * part.representations + part.gradients + second.max(),
        )
        return float(part.weights + part.optimizer + part.bank + max(stages))

    def _of_kept(self, graph: np.ndarray | float, products: np.ndarray, nothing: np.ndarray | float) -> np.ndarray:
        """Each chunk's value of these three, by what it keeps: [chunks]."""
        return np.select([self.keeps == "graph", self.keeps == "products"], [graph, products], nothing)


def most_retained(
    forecast: Forecast, usable_bytes: float, given: tuple[int | None, int | None], world: World
) -> Retention:
    """Tokens of graphs and of products: those `given`, or else as many as fit into `usable_bytes` on every rank.

    Products, which mostly spare more time by the byte, come before graphs; or there are none, where the slowest rank is
    faster so.
    """
    plans = []
    for products in [None, 0] if given[1] is None else [given[1]]:
        graphs = given[0]
        if graphs is None:
            beside = _most(forecast, usable_bytes, "products", NOTHING) if products is None else products
            graphs = int(world.least(_most(forecast, usable_bytes, "graphs", Retention(products=beside))))
        if products is None:
            products = int(world.least(_most(forecast, usable_bytes, "products", Retention(graphs))))
        plans.append(Retention(graphs, products))
    return max(plans, key=lambda plan: world.least(-replace(forecast, retention=plan).step_s))


def _most(forecast: Forecast, usable_bytes: float, kind: Literal["graphs", "products"], beside: Retention) -> int:
    """Tokens of a kind that there is room for beside what `beside` keeps of the other; 0 where not even one chunk's
    fit.

    Half of the room that is left then is for more of them, up to a chunk's, as batches differ a little.
    """
    costs = forecast.costs
    own = costs.kept_bytes if kind == "graphs" else costs.products_bytes
    if not own.all():
        return 0
    behind = costs.tokens[replace(forecast, retention=beside).keeps == "graph"].sum()
    counts = [int(tokens - behind) for tokens in costs.tokens.cumsum() if tokens > behind]

    def peak_bytes(tokens: int) -> float:
        return replace(forecast, retention=beside._replace(**{kind: tokens})).peak_bytes

    fitting = bisect_right(counts, usable_bytes, key=peak_bytes)
    if fitting == 0:
        return 0
    room = usable_bytes - peak_bytes(counts[fitting - 1])
    return counts[fitting - 1] + int(min(room / 2 / (own / costs.tokens).max(), forecast.workload.tokens_per_chunk))
