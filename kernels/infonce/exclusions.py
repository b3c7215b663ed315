"""Which query–passage pairs are no negatives: as the caller says it, as pairs, and as the tables a tile reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Pools(NamedTuple):
    """A partition of queries and passages, in which a query's negatives are passages of its own pool."""

    rows: Tensor  # [B] int64: the pool of each query
    ids: Tensor  # [n] int64, ascending: ids of passages, among them all that are asked for
    of_ids: Tensor  # [n] int64: the pool of each

    def of_columns(self, passage_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The pools of the rows [B] and of the passages `passage_ids` [N]."""
        return self.rows, self.of_ids[torch.searchsorted(self.ids, passage_ids)]


@dataclass(frozen=True)
class Exclusions:
    """Which query–passage pairs are not counted as negatives. A query's own target is excluded in any case.

    Row i excludes every column whose `passage_ids` entry stands in `known_ids[known_ptr[i] : known_ptr[i + 1]]`
    (any number a row), every column with s_ij > `threshold[i]` (a threshold of −inf excludes the whole row), and every
    column of another pool.
    """

    passage_ids: Tensor  # [N] int64
    known_ptr: Tensor  # [B + 1] int64
    known_ids: Tensor  # [known_ptr[-1]] int64
    threshold: Tensor | None = None  # [B] in similarity units, before scale
    pools: Pools | None = field(default=None, kw_only=True)

    def of_rows(self, index: Tensor) -> Exclusions:
        """The exclusions of the rows `index` [n] int64."""
        counts = self.known_ptr.diff()[index]
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(ptr[-1]), device=index.device) - ptr[:-1].repeat_interleave(counts)
        known_ids = self.known_ids[self.known_ptr[:-1][index].repeat_interleave(counts) + within]
        return Exclusions(
            self.passage_ids,
            ptr,
            known_ids,
            None if self.threshold is None else self.threshold[index],
            pools=None if self.pools is None else self.pools._replace(rows=self.pools.rows[index]),
        )


def known_pairs(exclusions: Exclusions) -> tuple[Tensor, Tensor]:
    """Every (row, column) with a known positive of the row, as two [E] int64, rows ascending; an id may stand in
    several columns.
    """
    ids, order = exclusions.passage_ids.sort(stable=True)
    first = torch.searchsorted(ids, exclusions.known_ids)
    count = torch.searchsorted(ids, exclusions.known_ids, right=True) - first  # columns each known id matches
    row_of = torch.repeat_interleave(exclusions.known_ptr.diff())
    offset = torch.arange(int(count.sum()), device=ids.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return row_of.repeat_interleave(count), order[first.repeat_interleave(count) + offset]


class Pairs(NamedTuple):
    """Some (row, column) of a block of rows and columns."""

    rows: Tensor  # [E] int64, ascending
    columns: Tensor  # [E] int64


def further_pairs(exclusions: Exclusions, targets: Tensor) -> Pairs:
    """The `known_pairs` of `exclusions` without those of a row and its own target, targets [B] int64 (−1: none).

    How many there are depends on ids alone, but on a GPU the host waits to be told.
    """
    rows, columns = known_pairs(exclusions)
    other = columns != targets[rows]
    return Pairs(rows[other], columns[other])


@dataclass(frozen=True)
class MaskTables:
    """The exclusions of a block of B rows and N columns, in the form the kernels read.

    A tile compares its columns with every row's target, and goes through the list of the further excluded pairs that
    lie in it: few tiles hold many, whatever their number a row.
    """

    rows: Tensor  # [E] int64, ascending
    columns: Tensor  # [E] int64
    targets: Tensor  # [B] int32, −1 where a row has none in these columns
    threshold: Tensor | None  # [B] float32 (float64 for float64 inputs), similarity units
    N: int  # columns
    pools: tuple[Tensor, Tensor] | None = None  # of rows [B] and of columns [N], int64; None: all are in one
    _by_tile: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(init=False, default_factory=dict)

    @staticmethod
    def of(exclusions: Exclusions | None, targets: Tensor, N: int) -> MaskTables:
        """Tables of `exclusions` and of every row's target [B] int64 (−1: none)."""
        nothing = targets.new_empty(0)
        if exclusions is None:
            return MaskTables.of_pairs(Pairs(nothing, nothing), targets, None, N)
        tables = MaskTables.of_pairs(further_pairs(exclusions, targets), targets, exclusions.threshold, N)
        if exclusions.pools is None:
            return tables
        return replace(tables, pools=exclusions.pools.of_columns(exclusions.passage_ids))

    @staticmethod
    def of_pairs(further: Pairs, targets: Tensor, threshold: Tensor | None, N: int) -> MaskTables:
        """Tables of `further_pairs` found beforehand, every row's target [B] int64 (−1: none) and its threshold; waits
        for nothing.
        """
        if threshold is not None:
            threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32)).contiguous()
        return MaskTables(*further, targets.int(), threshold, N)

    def without_rows(self, left_out: Tensor) -> MaskTables:
        """The tables with every pair of the rows `left_out` [B] bool excluded."""
        threshold = self.threshold
        if threshold is None:
            threshold = torch.full(left_out.shape, torch.inf, device=left_out.device)
        return replace(self, threshold=threshold.masked_fill(left_out, -torch.inf))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every excluded (row, column), targets and further ones, as two [E] int64 in no order."""
        with_target = (self.targets >= 0).nonzero()[:, 0]
        return torch.cat([self.rows, with_target]), torch.cat([self.columns, self.targets[with_target].long()])

    def pairs_by_tile(
        self, tile_rows: int, tile_columns: int
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """(ptr [row tiles · column tiles + 1], rows, columns), int32, of the excluded pairs; Nones where there are
        none.
        """
        if not len(self.rows):
            return None, None, None
        if (tile_rows, tile_columns) not in self._by_tile:
            row_tiles, column_tiles = -(-len(self.targets) // tile_rows), -(-self.N // tile_columns)
            tile, order = (self.rows // tile_rows * column_tiles + self.columns // tile_columns).sort(stable=True)
            ptr = torch.searchsorted(
                tile, torch.arange(row_tiles * column_tiles + 1, device=tile.device), out_int32=True
            )
            self._by_tile[tile_rows, tile_columns] = ptr, self.rows[order].int(), self.columns[order].int()
        return self._by_tile[tile_rows, tile_columns]

    def select_rows(self, index: Tensor) -> MaskTables:
        """The tables of the rows `index` [n], ascending."""
        rows = _places(index, len(self.targets))[self.rows]
        keep = rows >= 0
        threshold = None if self.threshold is None else self.threshold[index]
        pools = None if self.pools is None else (self.pools[0][index], self.pools[1])
        return MaskTables(rows[keep], self.columns[keep], self.targets[index], threshold, self.N, pools)

    def select_columns(self, index: Tensor) -> MaskTables:
        """The tables of the columns `index` [n], ascending."""
        places = _places(index, self.N)
        columns = places[self.columns]
        keep = columns >= 0
        targets = torch.where(self.targets >= 0, places[self.targets.clamp(min=0).long()], -1).int()
        pools = None if self.pools is None else (self.pools[0], self.pools[1][index])
        return replace(self, rows=self.rows[keep], columns=columns[keep], targets=targets, N=len(index), pools=pools)


def _places(index: Tensor, count: int) -> Tensor:
    """Where each of `count` numbers stands in `index`; −1: not there."""
    places = torch.full((count,), -1, device=index.device)
    places[index] = torch.arange(len(index), device=index.device)
    return places
