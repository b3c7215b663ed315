"""A block whose queries see only the passages of their own pool: a block for each pool, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.infonce.exclusions import MaskTables
from kernels.infonce.reference import Block


@dataclass(frozen=True)
class PooledBlock(Block):
    """`Block` of queries and passages whose `masks` have pools. It computes only pairs of one pool."""

    kind: type[Block] = Block  # what computes a pool

    @cached_property
    def _pools(self) -> list[tuple[Tensor, Tensor]]:
        """The rows and the columns of each pool that has both, ascending."""
        assert self.masks.pools is not None
        rows, columns = self.masks.pools
        count = int(torch.stack([pool.max() for pool in (rows, columns)]).max()) + 1
        both = zip(_members(rows, count), _members(columns, count), strict=True)
        return [(i, j) for i, j in both if len(i) and len(j)]

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Block]]:
        """The rows, the columns and the block of each pool."""
        for i, j in self._pools:
            masks = replace(self.masks.select_rows(i).select_columns(j), pools=None)
            yield i, j, self._plain(self.queries[i], self.passages[j], masks)

    def _plain(self, queries: Tensor, passages: Tensor, masks: MaskTables) -> Block:
        return self.kind(queries, passages, self.scale, masks, self.precision, self.workspace_mib, self.largest)

    def lse(self, columns: bool = False) -> tuple[Tensor, Tensor | None]:
        row_lse, column_lse = (self._sums(len(side)).fill_(-torch.inf) for side in (self.queries, self.passages))
        for i, j, block in self._parts():
            rows, of_columns = block.lse(columns)
            row_lse[i] = rows
            if of_columns is not None:
                column_lse[j] = of_columns
        return row_lse, column_lse if columns else None

    def gradient(
        self,
        row_log_weights: Tensor,
        column_log_weights: Tensor | None = None,
        dqueries: Tensor | None = None,
        *,
        of_passages: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        dqueries = self._sums(*self.queries.shape) if dqueries is None else dqueries
        dpassages = self._sums(*self.passages.shape) if of_passages else None
        for i, j, block in self._parts():
            weights = None if column_log_weights is None else column_log_weights[j]
            of_rows, of_columns = block.gradient(row_log_weights[i], weights, of_passages=of_passages)
            dqueries[i] += of_rows
            if dpassages is not None and of_columns is not None:
                dpassages[j] = of_columns
        return dqueries, dpassages

    def target_logits(self, targets: Tensor) -> Tensor:
        return self._plain(self.queries, self.passages, self.masks).target_logits(targets)

    def add_target_gradient(
        self, dqueries: Tensor, dpassages: Tensor, targets: Tensor, target_gradient: Tensor
    ) -> Tensor:
        whole = self._plain(self.queries, self.passages, self.masks)
        return whole.add_target_gradient(dqueries, dpassages, targets, target_gradient)

    def _sums(self, *shape: int) -> Tensor:
        dtype = torch.float64 if self.queries.dtype == torch.float64 else torch.float32
        return self.queries.new_zeros(shape, dtype=dtype)


def _members(pools: Tensor, count: int) -> tuple[Tensor, ...]:
    """The indices of `pools` that belong to each of `count` pools, ascending."""
    return pools.argsort(stable=True).split(pools.bincount(minlength=count).tolist())
