"""One rank's part of the loss, as every strategy takes it: its rows and columns, and which pairs count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.infonce.api import Block, Exclusions, Hardness, MaskTables, Precision, block_of
from kernels.infonce.two_pass import Passages, Source, first_pass, second_pass
from retriever.data.targets import KnownPairs

_QUERY_TO_PASSAGE = ("query_to_passage",)


class _Part(NamedTuple):
    """Some rows against some columns, and of which query or passage each of these is; None: of that in its place."""

    problem: Problem
    rows: tuple[Literal["query", "passage"], Tensor | None] = ("query", None)
    columns: tuple[Literal["query", "passage"], Tensor | None] = ("passage", None)
    rows_count: bool = True  # whether its sums over columns, of every row, are a direction


@dataclass(frozen=True)
class Problem:
    """One rank's part of the loss. B queries, N passages; float32, or float64 for float64 representations."""

    queries: Tensor  # [B, D], with the values of the precision tier
    passages: Tensor  # [N, D]
    positives: Tensor  # [B] int64: column of each query's positive, -1 for an ignored row
    exclusions: Exclusions  # the positive of a row is among its exclusions
    scale: float
    weight: float  # of each query's loss in the gradient: 1 / global queries, times the gradient scale
    precision: Precision
    directions: tuple[str, ...] = _QUERY_TO_PASSAGE
    partition: Literal["joint", "per_direction"] = "joint"
    workspace_mib: int | None = None  # of the tiled strategy on a GPU; None: up to 1 GiB of what is free
    exchange: Literal["ring", "gather"] = "gather"  # how the ranks of the tiled strategy see each other's passages
    block_rows: int | None = None  # of the tiled strategy's blocks where queries and passages are in host memory
    # What is known beforehand, so that the host need not wait for the device to say it; None: it is asked.
    known_pairs: KnownPairs | None = None  # those of `exclusions`
    ignores: bool | None = None  # whether any row is ignored
    shares: Tensor | None = None  # [B] of each row in its query's loss; None: 1 each
    largest: float | None = None  # similarity that none exceeds, rounding apart

    @cached_property
    def active(self) -> Tensor:
        """Rows [B] that are not ignored."""
        return self.positives >= 0

    @cached_property
    def columns(self) -> Tensor:
        """Column [B] of each row's positive; column 0 stands in where the row is ignored."""
        return self.positives.clamp(min=0)

    @cached_property
    def weights(self) -> Tensor:
        """The weight of each row's loss [B] in the gradient, 0 where the row is ignored."""
        weights = torch.zeros_like(self.columns, dtype=torch.promote_types(self.queries.dtype, torch.float32))
        weights.masked_fill_(self.active, self.weight)
        return weights if self.shares is None else weights * self.shares.to(weights)

    @property
    def guide_passages(self) -> Tensor | None:
        """A guide's vectors [N, G] of own passages, where there is one."""
        return None if self.exclusions.guide is None else self.exclusions.guide.passages

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype in which representations go to other ranks and to host memory: their values are exact in it."""
        return torch.bfloat16 if self.precision == "bf16" else self.passages.dtype

    def of_rows(self, rows: Tensor) -> Problem:
        """The problem with every row ignored that is not in `rows` [B] bool."""
        threshold = self.exclusions.threshold
        threshold = self.queries.new_full(rows.shape, torch.inf) if threshold is None else threshold
        exclusions = replace(self.exclusions, threshold=threshold.masked_fill(~rows, -torch.inf))
        return replace(self, positives=self.positives.where(rows, -1), exclusions=exclusions, ignores=True)

    def block(self, queries: Tensor, passages: Tensor, masks: MaskTables) -> Block:
        """A block of some of the queries and of any rank's passages, under this problem's settings."""
        return block_of(
            queries, passages, self.scale, masks,
            precision=self.precision, workspace_mib=self.workspace_mib, largest=self.largest,
        )  # fmt: skip

    @property
    def symmetric(self) -> bool:
        """Whether a target is compared with all queries."""
        return "passage_to_query" in self.directions

    def contrast(self, passages_of: Callable[[Problem], Passages]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B] and both gradients in two passes over the blocks of every direction, which `passages_of` brings.
        (Cheng et al. 2024, arXiv:2410.17243)
        """
        parts = list(self._parts())
        sources = [Source(passages_of(part.problem), part.rows_count, part.problem.symmetric) for part in parts]
        joint_targets = 0 if self.partition == "per_direction" else 1 + self.symmetric
        loss, terms = first_pass(sources, self.columns, self.weights, joint_targets)
        found = [second_pass(source.passages, term) for source, term in zip(sources, terms, strict=True)]
        gradients = {"query": found[0][0], "passage": found[0][1]}
        for part, further in zip(parts[1:], found[1:], strict=True):
            for (side, rows), gradient in zip((part.rows, part.columns), further, strict=True):
                if rows is None:
                    gradients[side] += gradient
                else:
                    gradients[side].index_put_((rows,), gradient, accumulate=True)
        return loss.where(self.active, 0.0), gradients["query"], gradients["passage"]

    @cached_property
    def _askers(self) -> Tensor:
        """Rows of the queries that are not ignored."""
        if self.ignores is False:
            return torch.arange(len(self.queries), device=self.queries.device)
        return self.active.nonzero()[:, 0]

    def _parts(self) -> Iterator[_Part]:
        """Problems of one query or target against others, whose sums make up the directions. The first has the queries
        and the passages.
        """
        apart = self.symmetric and any(self.exclusions.hardness)
        yield _Part(replace(self, directions=_QUERY_TO_PASSAGE) if apart else self)
        if apart:  # hardness is of query to passage alone
            plain = replace(self.exclusions, hardness=Hardness())
            yield _Part(replace(self, exclusions=plain, directions=("passage_to_query",)), rows_count=False)
        if "query_to_query" in self.directions:
            yield _Part(self._among_queries(), columns=("query", self._askers))
        if "passage_to_passage" in self.directions:
            yield _Part(self._among_passages(), rows=("passage", self.columns))

    def _among_queries(self) -> Problem:
        """Queries against queries: one whose target is known to a query is no negative of it."""
        own, askers = self.exclusions, self._askers
        place = torch.full_like(self.positives, -1)
        place[askers] = torch.arange(len(askers), device=place.device)
        guide = None if own.guide is None else own.guide._replace(passages=own.guide.queries[askers])
        exclusions = replace(
            own, passage_ids=own.passage_ids[self.columns[askers]], guide=guide, hardness=Hardness(), own=None
        )
        return replace(
            self,
            passages=self.queries[askers],
            positives=place,
            exclusions=exclusions,
            directions=_QUERY_TO_PASSAGE,
            known_pairs=None,
        )

    def _among_passages(self) -> Problem:
        """Targets in place of their queries, against passages: a query's own negatives are none of its target."""
        own, known = self.exclusions, self.known_pairs
        lists = own.known if own.own is None else own.known.joined(own.own)
        guide = None if own.guide is None else own.guide._replace(queries=own.guide.passages[self.columns])
        exclusions = replace(own, known_ptr=lists.ptr, known_ids=lists.ids, guide=guide, hardness=Hardness(), own=None)
        return replace(
            self,
            queries=self.passages[self.columns],
            exclusions=exclusions,
            directions=_QUERY_TO_PASSAGE,
            known_pairs=None if known is None else known._replace(pairs=known.pairs._replace(term=None)),
        )
