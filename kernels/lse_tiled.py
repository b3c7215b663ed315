"""Log-sum-exp over rows and columns of the logits, from the sums of `tile_pass`: the choice of shifts.

A row's shift only has to bring its sum into the range of bf16, 2^±100 or so wide. Where the norms bound every logit to that range
one constant does; else shifts are estimated from a sample of columns, and the rows whose sums fell outside of it are done again
with their true maxima.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.exclusions import MaskTables
from kernels.lse_triton import LOG2E, aligned, tile_pass
from kernels.rows_triton import LARGEST_SUM, SMALLEST_SUM

_SAFE_BOUND = 78.0  # |logit| in base 2 below which the constant shift loses nothing
_HEADROOM = 60.0  # how far a shift stays below the largest logit there may be
_SAMPLE = 256
_SLAB_MULTIPLE = 256  # a multiple of every tile's rows and columns
_PARTIAL_ELEMENTS = 2**31  # logits of a pass whose partial sums are kept at a time


@dataclass(frozen=True)
class Operands:
    """Queries and passages as the passes over tiles read them, and as the matrix products do."""

    queries: Tensor  # [B, D]
    passages: Tensor  # [N, D]
    precision: str

    @staticmethod
    def of(queries: Tensor, passages: Tensor, precision: str) -> Operands:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision, queries.dtype)
        return Operands(aligned(queries.to(dtype)), aligned(passages.to(dtype)), precision)

    @property
    def dot(self) -> str:
        """Precision of the logits' products; half-precision inputs multiply exactly in any case."""
        return "tf32x3" if self.precision == "high" else "ieee"


@dataclass(frozen=True)
class Shifts:
    """What is taken off the logits (base 2) before they are exponentiated, and whether that is known to be safe."""

    rows: Tensor  # [B]
    columns: Tensor | None  # [N]; None where one constant serves both
    safe: bool


def slabs(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def estimate_shifts(x: Operands, scale: float, columns: bool) -> Shifts:
    """Shifts from the norms where these bound the logits tightly, else from a sample of the columns (and rows)."""
    norms = [torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).max() for side in (x.queries, x.passages)]
    bound = float(norms[0] * norms[1]) * scale * LOG2E  # the one wait for the device in the common case
    top = bound - _HEADROOM
    if not bound > _SAFE_BOUND:  # NaN goes this way too, and on into the loss
        return Shifts(x.queries.new_full((len(x.queries),), top, dtype=torch.float32), None, True)
    rows = _sampled_maximum(x.queries, x.passages, scale).add_(_HEADROOM / 2).clamp_(max=top)
    if not columns:
        return Shifts(rows, None, False)
    return Shifts(rows, _sampled_maximum(x.passages, x.queries, scale).add_(_HEADROOM / 2).clamp_(max=top), False)


def _sampled_maximum(x: Tensor, others: Tensor, scale: float) -> Tensor:
    sample = others[:: max(1, len(others) // _SAMPLE)][:_SAMPLE]
    largest = [(x[i] @ sample.T).amax(dim=1).float() for i in slabs(len(x), 65536)]
    return torch.cat(largest) * (scale * LOG2E)


def outside(sums: Tensor) -> Tensor:
    """Indices of the sums that may have lost terms; an infinite one is among them."""
    return ((sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM)).logical_not_().nonzero()[:, 0]


def reduce_tiles(
    x: Operands, scale: float, masks: MaskTables, row_shift: Tensor | None, column_shift: Tensor | None, rows: bool, columns: bool,
    maximum: bool = False, clamp: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Sums (or maxima) of rows [B] and of columns [N], a slab of rows at a time."""
    (B, _), N = x.queries.shape, len(x.passages)
    size = max(_SLAB_MULTIPLE, _PARTIAL_ELEMENTS // N // _SLAB_MULTIPLE * _SLAB_MULTIPLE)
    row_result = x.queries.new_empty(B, dtype=torch.float32) if rows else None
    column_result = x.queries.new_full((N,), -torch.inf if maximum else 0.0, dtype=torch.float32) if columns else None
    for i in slabs(B, size):
        row_partial, column_partial = tile_pass(
            x.queries[i], x.passages, scale, masks, row_shift=None if row_shift is None else row_shift[i], column_shift=column_shift,
            rows=rows, columns=columns, maximum=maximum, clamp=clamp, row_start=i.start, precision=x.dot,
        )  # fmt: skip
        if row_result is not None and row_partial is not None:
            row_result[i] = row_partial.amax(dim=0) if maximum else row_partial.sum(dim=0)
        if column_result is not None and column_partial is not None:
            if maximum:
                torch.maximum(column_result, column_partial.amax(dim=0), out=column_result)
            else:
                column_result += column_partial.sum(dim=0)
    return row_result, column_result


def log_of(sums: Tensor, shift: Tensor) -> Tensor:
    """The natural logarithm of sums that were taken with a shift in base 2."""
    return (sums.log2() + shift) / LOG2E


def exact_row_shifts(x: Operands, scale: float, masks: MaskTables) -> Tensor:
    """The largest logit of every row [B], base 2; 0 where a row has none."""
    maxima = reduce_tiles(x, scale, masks, None, None, rows=True, columns=False, maximum=True)[0]
    assert maxima is not None
    return maxima.nan_to_num_(neginf=0.0)


def negatives_lse(x: Operands, scale: float, masks: MaskTables, columns: bool) -> tuple[Tensor, Tensor | None]:
    """See `kernels.lse.negatives_lse`."""
    shifts = estimate_shifts(x, scale, columns)
    row_sum, column_sum = reduce_tiles(x, scale, masks, shifts.rows, shifts.columns, rows=True, columns=columns, clamp=not shifts.safe)
    assert row_sum is not None
    row_lse = log_of(row_sum, shifts.rows)
    column_lse = None
    if column_sum is not None:
        column_lse = log_of(column_sum, shifts.rows[:1] if shifts.columns is None else shifts.columns)
    if shifts.safe:
        return row_lse, column_lse
    again = outside(row_sum)
    if len(again):
        some, some_masks = Operands(aligned(x.queries[again]), x.passages, x.precision), masks.select_rows(again)
        exact = exact_row_shifts(some, scale, some_masks)
        sums = reduce_tiles(some, scale, some_masks, exact, None, rows=True, columns=False)[0]
        row_lse[again] = log_of(sums, exact)
    if column_sum is not None and column_lse is not None and len(again := outside(column_sum)):
        some, some_masks = Operands(x.queries, aligned(x.passages[again]), x.precision), masks.select_columns(again)
        exact = reduce_tiles(some, scale, some_masks, None, None, rows=False, columns=True, maximum=True)[1].nan_to_num_(neginf=0.0)
        sums = reduce_tiles(some, scale, some_masks, None, exact, rows=False, columns=True)[1]
        column_lse[again] = log_of(sums, exact)
    return row_lse, column_lse
