"""Query–passage pairs that are no negatives or count more: as the caller says it, as pairs, and as the tables
that a tile reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.infonce.rules import Guide, Hardness, Lists, Pairs, Pools


@dataclass(frozen=True)
class Exclusions:
    """Pairs that are not counted as negatives, and those that count more. A query's own target is excluded
    in any case.

    Row i excludes every column whose `passage_ids` entry stands in `known_ids[known_ptr[i] : known_ptr[i + 1]]`
    (any number a row), every column with s_ij > `threshold[i]` (−inf excludes the whole row), every column of another
    pool, and every column that `guide` excludes.
    """

    passage_ids: Tensor  # [N] int64
    known_ptr: Tensor  # [B + 1] int64
    known_ids: Tensor  # [known_ptr[-1]] int64
    threshold: Tensor | None = None  # [B] in similarity units, before scale
    guide: Guide | None = None
    hardness: Hardness = Hardness()
    own: Lists | None = None  # each row's own negatives, which are distinct
    pools: Pools | None = None

    @property
    def known(self) -> Lists:
        """The ids that each row excludes."""
        return Lists(self.known_ptr, self.known_ids)

    def of_rows(self, index: Tensor) -> Exclusions:
        """The exclusions of the rows `index` [n] int64."""
        known_ptr, known_ids = self.known.of_rows(index)
        return replace(
            self,
            known_ptr=known_ptr,
            known_ids=known_ids,
            threshold=None if self.threshold is None else self.threshold[index],
            guide=None if self.guide is None else self.guide.of_rows(index),
            own=None if self.own is None else self.own.of_rows(index),
            pools=None if self.pools is None else self.pools._replace(rows=self.pools.rows[index]),
        )


def known_pairs(exclusions: Exclusions) -> Pairs:
    """Every (row, column) with a known positive of the row, rows ascending."""
    return exclusions.known.pairs(exclusions.passage_ids)


def listed_pairs(exclusions: Exclusions) -> Pairs:
    """The `known_pairs` of `exclusions` and, where they are given, every row and its own negatives. Raises ValueError
    where these have another hardness than others and are not given.

    How many there are depends on ids alone, but on a GPU the host waits to be told.
    """
    known = known_pairs(exclusions)
    if exclusions.own is None:
        if exclusions.hardness.own != exclusions.hardness.in_batch:
            raise ValueError(f"expected each query's own negatives beside {exclusions.hardness}, received none")
        return known
    own = exclusions.own.pairs(exclusions.passage_ids)
    term = torch.zeros(len(known.rows) + len(own.rows), device=known.rows.device)
    term[: len(known.rows)] = -torch.inf
    return Pairs(torch.cat([known.rows, own.rows]), torch.cat([known.columns, own.columns]), term)


def further_pairs(exclusions: Exclusions, targets: Tensor) -> Pairs:
    """The `listed_pairs` of `exclusions` without those of a row and its own target, targets [B] int64 (−1: none)."""
    listed = listed_pairs(exclusions)
    return listed.select(listed.columns != targets[listed.rows])


@dataclass(frozen=True)
class MaskTables:
    """The exclusions of a block of B rows and N columns, and which of its pairs count more, in the form the kernels
    read.

    A tile compares its columns with every row's target, and goes through the list of the further pairs that lie in it:
    few tiles hold many, whatever their number a row.
    """

    further: Pairs  # without targets
    targets: Tensor  # [B] int32, −1 where a row has none in these columns
    threshold: Tensor | None  # [B] float32 (float64 for float64 inputs), similarity units
    N: int  # columns
    guide: Guide | None = None
    hardness: Hardness = Hardness()
    pools: tuple[Tensor, Tensor] | None = None  # of rows [B] and of columns [N], int64; None: all are in one
    _by_tile: dict[tuple[int, int], tuple[Tensor | None, ...]] = field(init=False, default_factory=dict)

    @staticmethod
    def of(exclusions: Exclusions | None, targets: Tensor, N: int) -> MaskTables:
        """Tables of `exclusions` and of every row's target [B] int64 (−1: none)."""
        if exclusions is None:
            nothing = targets.new_empty(0)
            return MaskTables(Pairs(nothing, nothing), targets.int(), None, N)
        return MaskTables.of_pairs(further_pairs(exclusions, targets), exclusions, targets, N)

    @staticmethod
    def of_pairs(further: Pairs, exclusions: Exclusions, targets: Tensor, N: int) -> MaskTables:
        """Tables of `further_pairs` found beforehand, every row's target [B] int64 (−1: none), and the other rules of
        `exclusions`; waits for nothing.
        """
        threshold = exclusions.threshold
        if threshold is not None:
            threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32)).contiguous()
        pools = None if exclusions.pools is None else exclusions.pools.of_columns(exclusions.passage_ids)
        return MaskTables(further, targets.int(), threshold, N, exclusions.guide, exclusions.hardness, pools)

    def without_rows(self, left_out: Tensor) -> MaskTables:
        """The tables with every pair of the rows `left_out` [B] bool excluded."""
        threshold = self.threshold
        if threshold is None:
            threshold = torch.full(left_out.shape, torch.inf, device=left_out.device)
        return replace(self, threshold=threshold.masked_fill(left_out, -torch.inf))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every excluded (row, column), targets and further ones, as two [E] int64 in no order."""
        excluded, with_target = self.further.split()[0], (self.targets >= 0).nonzero()[:, 0]
        columns = self.targets[with_target].long()
        return torch.cat([excluded.rows, with_target]), torch.cat([excluded.columns, columns])

    def pairs_by_tile(self, tile_rows: int, tile_columns: int) -> tuple[Tensor | None, ...]:
        """(ptr [row tiles · column tiles + 1] int32, rows int32, columns int32, term float32) of the further pairs by
        tile; Nones where there are none, term None where all are excluded.
        """
        rows, columns, term = self.further
        if not len(rows):
            return None, None, None, None
        if (tile_rows, tile_columns) not in self._by_tile:
            row_tiles, column_tiles = -(-len(self.targets) // tile_rows), -(-self.N // tile_columns)
            tile, order = (rows // tile_rows * column_tiles + columns // tile_columns).sort(stable=True)
            ptr = torch.searchsorted(
                tile, torch.arange(row_tiles * column_tiles + 1, device=tile.device), out_int32=True
            )
            term = None if term is None else term[order]
            self._by_tile[tile_rows, tile_columns] = ptr, rows[order].int(), columns[order].int(), term
        return self._by_tile[tile_rows, tile_columns]

    def select_rows(self, index: Tensor) -> MaskTables:
        """The tables of the rows `index` [n], ascending."""
        rows = _places(index, len(self.targets))[self.further.rows]
        return replace(
            self,
            further=self.further._replace(rows=rows).select(rows >= 0),
            targets=self.targets[index],
            threshold=None if self.threshold is None else self.threshold[index],
            guide=None if self.guide is None else self.guide.of_rows(index),
            pools=None if self.pools is None else (self.pools[0][index], self.pools[1]),
        )

    def select_columns(self, index: Tensor) -> MaskTables:
        """The tables of the columns `index` [n], ascending."""
        places = _places(index, self.N)
        columns = places[self.further.columns]
        return replace(
            self,
            further=self.further._replace(columns=columns).select(columns >= 0),
            targets=torch.where(self.targets >= 0, places[self.targets.clamp(min=0).long()], -1).int(),
            N=len(index),
            guide=None if self.guide is None else self.guide._replace(passages=self.guide.passages[index]),
            pools=None if self.pools is None else (self.pools[0], self.pools[1][index]),
        )


def _places(index: Tensor, count: int) -> Tensor:
    """The position in `index` of each of `count` numbers; −1: not there."""
    places = torch.full((count,), -1, device=index.device)
    places[index] = torch.arange(len(index), device=index.device)
    return places
