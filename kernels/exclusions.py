"""Which query–passage pairs are no negatives: as the caller says it, as pairs, and as the tables a tile reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FEW = 7  # excluded columns a row, beside its target, that a tile compares directly; the rest go through lists of pairs


@dataclass(frozen=True)
class Exclusions:
    """Which query–passage pairs are no negatives.

    Row i excludes every column whose `passage_ids` entry stands in `known_ids[known_ptr[i] : known_ptr[i + 1]]`
    (any number a row), and every column with s_ij > `threshold[i]`; a threshold of −inf excludes the whole row.
    """

    passage_ids: Tensor  # [N] int64
    known_ptr: Tensor  # [B + 1] int64
    known_ids: Tensor  # [known_ptr[-1]] int64
    threshold: Tensor | None = None  # [B] in similarity units, before scale

    def of_rows(self, index: Tensor) -> Exclusions:
        """The exclusions of the rows `index` [n] int64."""
        counts = self.known_ptr.diff()[index]
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(ptr[-1]), device=index.device) - ptr[:-1].repeat_interleave(counts)
        known_ids = self.known_ids[self.known_ptr[:-1][index].repeat_interleave(counts) + within]
        return Exclusions(self.passage_ids, ptr, known_ids, None if self.threshold is None else self.threshold[index])


def known_pairs(exclusions: Exclusions) -> tuple[Tensor, Tensor]:
    """Every (row, column) with a known positive of the row, as two [E] int64, rows ascending; an id may stand in several columns."""
    ids, order = exclusions.passage_ids.sort(stable=True)
    first = torch.searchsorted(ids, exclusions.known_ids)
    count = torch.searchsorted(ids, exclusions.known_ids, right=True) - first  # columns each known id matches
    row_of = torch.repeat_interleave(exclusions.known_ptr.diff())
    offset = torch.arange(int(count.sum()), device=ids.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return row_of.repeat_interleave(count), order[first.repeat_interleave(count) + offset]


@dataclass(frozen=True)
class MaskTables:
    """The exclusions of a block of B rows and N columns, in the form the kernels read.

    A row's first few excluded columns stand in `slots`, its target first; the tile compares all of its columns with them.
    What does not fit there is listed by tile.
    """

    rows: Tensor  # [E] int64, ascending
    columns: Tensor  # [E] int64
    targets: Tensor  # [B] int64, −1 where a row has none in these columns
    threshold: Tensor | None  # [B] float32, similarity units
    N: int
    slots: Tensor = field(init=False)  # [S, B] int32, −1 where unused
    _overflow: tuple[Tensor, Tensor] | None = field(init=False)
    _by_tile: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(init=False, default_factory=dict)

    @staticmethod
    def of(exclusions: Exclusions | None, targets: Tensor, N: int) -> MaskTables:
        """Tables of `exclusions` and of every row's target (−1: none)."""
        if exclusions is None:
            nothing = targets.new_empty(0)
            return MaskTables(nothing, nothing, targets, None, N)
        rows, columns = known_pairs(exclusions)
        other = columns != targets[rows]
        threshold = exclusions.threshold
        return MaskTables(rows[other], columns[other], targets, None if threshold is None else threshold.float().contiguous(), N)

    def __post_init__(self) -> None:
        B, few = len(self.targets), 0
        rank = self.rows
        if len(self.rows):
            starts = torch.searchsorted(self.rows, torch.arange(B, device=self.rows.device))  # [B]
            rank = torch.arange(len(self.rows), device=self.rows.device) - starts[self.rows]  # place among the row's pairs
            most = int(rank.max()) + 1
            few = min(most, FEW)
            few = few if few < 2 else 3 if few < 4 else FEW  # few distinct kernels
        slots = torch.full((1 + few, B), -1, dtype=torch.int32, device=self.targets.device)
        slots[0] = self.targets
        overflow = None
        if few:
            inside = rank < few
            slots[1 + rank[inside], self.rows[inside]] = self.columns[inside].int()
            if most > few:
                overflow = (self.rows[~inside], self.columns[~inside])
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "_overflow", overflow)

    def pairs_by_tile(self, tile_rows: int, tile_columns: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(ptr [row tiles · column tiles + 1], rows, columns), int32, of the pairs that `slots` does not hold; None if it holds all."""
        if self._overflow is None:
            return None
        if (tile_rows, tile_columns) not in self._by_tile:
            rows, columns = self._overflow
            row_tiles, column_tiles = -(-len(self.targets) // tile_rows), -(-self.N // tile_columns)
            tile, order = (rows // tile_rows * column_tiles + columns // tile_columns).sort(stable=True)
            ptr = torch.searchsorted(tile, torch.arange(row_tiles * column_tiles + 1, device=tile.device), out_int32=True)
            self._by_tile[tile_rows, tile_columns] = ptr, rows[order].int(), columns[order].int()
        return self._by_tile[tile_rows, tile_columns]

    def select_rows(self, index: Tensor) -> MaskTables:
        """The tables of the rows `index` [n], ascending."""
        renamed = torch.full((len(self.targets),), -1, device=index.device)
        renamed[index] = torch.arange(len(index), device=index.device)
        rows = renamed[self.rows]
        keep = rows >= 0
        threshold = None if self.threshold is None else self.threshold[index]
        return MaskTables(rows[keep], self.columns[keep], self.targets[index], threshold, self.N)

    def select_columns(self, index: Tensor) -> MaskTables:
        """The tables of the columns `index` [n], ascending."""
        renamed = torch.full((self.N,), -1, device=index.device)
        renamed[index] = torch.arange(len(index), device=index.device)
        columns = renamed[self.columns]
        keep = columns >= 0
        targets = torch.where(self.targets >= 0, renamed[self.targets.clamp(min=0)], -1)
        return replace(self, rows=self.rows[keep], columns=columns[keep], targets=targets, N=len(index))
