"""Log-sum-exp over rows and columns of the logits, then gradients from it: InfoNCE in two passes over the tiles,
8·B·N·D operations.

The first pass sums rows and columns at once, the second writes the gradient at the logits, block by block in a bounded
workspace, and matrix products go over it.

A row's shift only has to bring its sum into the range of bf16, 2^±100 or so wide. Where the norms bound every logit to
that range one constant does; else shifts are estimated from a sample of columns, and the rows whose sums fell outside
of it are done again with their true maxima.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.infonce.deferred import Deferred
from kernels.infonce.exclusions import MaskTables
from kernels.infonce.rows import LARGEST_SUM, SMALLEST_SUM, finish_passages, finish_queries, target_similarities
from kernels.infonce.terms import Terms
from kernels.infonce.tile_pass import Pass, tile_pass
from kernels.infonce.tiles import LOG2E, aligned
from kernels.matmul import add_product, parts_of

_ROUNDING = 1.01  # a product of two vectors, each rounded to bf16, is longer by less
_SAFE_BOUND = 78.0  # |logit| in base 2 below which the constant shift loses nothing
_HEADROOM = 60.0  # how far a shift stays below the largest logit there may be
_UNIT_SCALE = 105.0  # with unit vectors, the constant shift nearly always does up to here
_SAMPLE = 256
_SLAB_MULTIPLE = 256  # a multiple of every tile's rows and columns
LEAST_SLAB_ROWS = 2048  # fewer rows a slab make reading and writing dP, slab by slab, the bulk of the work
INNER = {
    "bf16": None,
    "high": 2048,
    "fp32": None,
}  # of a tier's sums over the batch, how much goes through the accumulator at a time
_PARTIAL_ELEMENTS = 2**31  # logits of a pass whose partial sums are kept at a time


@dataclass(frozen=True)
class Operands:
    """Queries and passages as the passes over tiles read them, and as the matrix products do."""

    queries: Tensor  # [B, D]
    passages: Tensor  # [N, D]
    precision: str

    @staticmethod
    def of(queries: Tensor, passages: Tensor, precision: str) -> Operands:
        """The operands of a tier: half-precision inputs multiply exactly in each of them."""
        dtype = queries.dtype
        if precision == "fp32" or (precision == "bf16" and dtype == torch.float32):
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return Operands(aligned(queries.to(dtype)), aligned(passages.to(dtype)), precision)

    @property
    def accurate(self) -> bool:
        """Whether logits need more than plain products of these operands."""
        return self.precision == "high"


@dataclass(frozen=True)
class Shifts:
    """What is taken off the logits (base 2) before they are exponentiated."""

    rows: Tensor  # [B]
    columns: Tensor | None  # [N]; None where one constant serves both
    bound: Deferred  # [1]: no logit is larger
    estimated: bool  # from a sample: exponentials may overflow

    @property
    def safe(self) -> bool:
        """Whether no sum can have lost terms; waits for a bound that was measured."""
        return not (self.estimated or self.bound.get()[0] > _SAFE_BOUND)  # NaN is as good as any: the loss is NaN

    @property
    def constant(self) -> float | None:
        """The one shift that serves all logits, where that is safe."""
        return self.bound.get()[0] - _HEADROOM if self.safe else None


def slabs(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(total)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _largest_logit(x: Operands, scale: float) -> Tensor:
    """A bound on every |logit|, base 2, [1]."""
    norms = [
        torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).amax(dim=0, keepdim=True)
        for side in (x.queries, x.passages)
    ]
    return norms[0] * norms[1] * (scale * LOG2E)


def estimate_shifts(x: Operands, scale: float, columns: bool, largest: float | None = None) -> Shifts:
    """One constant where the norms, or the guess that vectors have unit length, say that it will do, else from samples.

    `largest`, what no |⟨q_i, p_j⟩| exceeds but by rounding, spares measuring the norms, and waiting for them.
    """
    if largest is None:
        measured = _largest_logit(x, scale)
        top, bound = measured - _HEADROOM, Deferred(measured)
    else:
        most = largest * _ROUNDING * scale * LOG2E
        top, bound = (
            x.queries.new_full((1,), most - _HEADROOM, dtype=torch.float32),
            Deferred(torch.tensor([most], device="cpu")),
        )
    if scale <= _UNIT_SCALE or bound.get()[0] <= _SAFE_BOUND:
        return Shifts(top.expand(len(x.queries)).contiguous(), None, bound, False)
    rows = torch.minimum(_sampled_maximum(x.queries, x.passages, scale).add_(_HEADROOM / 2), top)
    if not columns:
        return Shifts(rows, None, bound, True)
    return Shifts(
        rows, torch.minimum(_sampled_maximum(x.passages, x.queries, scale).add_(_HEADROOM / 2), top), bound, True
    )


def _sampled_maximum(x: Tensor, others: Tensor, scale: float) -> Tensor:
    sample = others[:: max(1, len(others) // _SAMPLE)][:_SAMPLE]
    largest = [(x[i] @ sample.T).amax(dim=1).float() for i in slabs(len(x), 65536)]
    return torch.cat(largest) * (scale * LOG2E)


def outside(sums: Tensor) -> Tensor:
    """Indices of the sums that may have lost terms; an infinite one is among them."""
    return ((sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM)).logical_not_().nonzero()[:, 0]


def reduce_tiles(
    x: Operands,
    scale: float,
    masks: MaskTables,
    row_shift: Tensor | None,
    column_shift: Tensor | None,
    rows: bool,
    columns: bool,
    maximum: bool = False,
    clamp: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Sums (or maxima) of rows [B] and of columns [N], a slab of rows at a time."""
    (B, _), N = x.queries.shape, len(x.passages)
    size = max(_SLAB_MULTIPLE, _PARTIAL_ELEMENTS // N // _SLAB_MULTIPLE * _SLAB_MULTIPLE)
    row_result = x.queries.new_empty(B, dtype=torch.float32) if rows else None
    column_result = x.queries.new_full((N,), -torch.inf if maximum else 0.0, dtype=torch.float32) if columns else None
    for i in slabs(B, size):
        asked = Pass(
            row_shift=None if row_shift is None else row_shift[i], column_shift=column_shift, rows=rows, columns=columns, maximum=maximum,
            clamp=clamp, accurate=x.accurate, row_start=i.start,
        )  # fmt: skip
        row_partial, column_partial = tile_pass(x.queries[i], x.passages, scale, masks, asked)
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


def negatives_lse(
    x: Operands, scale: float, masks: MaskTables, shifts: Shifts, columns: bool
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.infonce.api.negatives_lse`; `shifts` from `estimate_shifts`."""
    row_sum, column_sum = reduce_tiles(
        x, scale, masks, shifts.rows, shifts.columns, rows=True, columns=columns, clamp=shifts.estimated
    )
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
        assert sums is not None
        row_lse[again] = log_of(sums, exact)
    if column_sum is not None and column_lse is not None and len(again := outside(column_sum)):
        some, some_masks = Operands(x.queries, aligned(x.passages[again]), x.precision), masks.select_columns(again)
        maxima = reduce_tiles(some, scale, some_masks, None, None, rows=False, columns=True, maximum=True)[1]
        assert maxima is not None
        exact = maxima.nan_to_num_(neginf=0.0)
        sums = reduce_tiles(some, scale, some_masks, None, exact, rows=False, columns=True)[1]
        assert sums is not None
        column_lse[again] = log_of(sums, exact)
    return row_lse, column_lse


class Workspace:
    """Room for a slab of exponentials: a bf16 matrix, two of them (value and residual), or an fp32 one."""

    def __init__(self, like: Tensor, precision: str, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        width = -(-columns // 64) * 64
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.parts = [like.new_empty(rows, width, dtype=dtype) for _ in range(2 if precision == "high" else 1)]

    def views(self, rows: int, columns: int) -> list[Tensor]:
        """Its upper left corner."""
        return [part[:rows, :columns] for part in self.parts]


def slab_rows(B: int, N: int, D: int, precision: str, budget: int, processors: int) -> int:
    """Rows of a slab over all N columns within `budget` bytes, whole waves of dQ's 128 × 256 tiles where there is
    room.
    """
    rows = budget // ((2 if precision == "bf16" else 4) * -(-N // 64) * 64)
    if rows >= B:
        return B
    wave = max(1, processors // -(-D // 256)) * 128
    if rows >= wave:
        return rows // wave * wave
    return max(256, rows // 256 * 256)


def negatives_gradient(
    x: Operands,
    scale: float,
    masks: MaskTables,
    row_log_weights: Tensor,
    column_log_weights: Tensor | None,
    constant: float | None,
    budget: int,
    dqueries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.infonce.api.negatives_gradient`; `constant` from `Shifts`. A pass writes blocks of dlogits, two
    products use each.
    """
    (B, D), N = x.queries.shape, len(x.passages)
    fresh = dqueries is None
    dqueries = x.queries.new_empty(B, D, dtype=torch.float32) if dqueries is None else dqueries
    dpassages = x.passages.new_empty(N, D, dtype=torch.float32)
    rows = slab_rows(B, N, D, x.precision, budget, processors(x.queries))
    columns = N
    if rows < min(B, 2 * LEAST_SLAB_ROWS):  # square blocks: the fewest reads and writes of the sums
        rows = columns = max(256, int((budget // (2 if x.precision == "bf16" else 4)) ** 0.5) // 256 * 256)
    workspace = Workspace(x.queries, x.precision, min(rows, B), min(columns, N))
    queries, passages = parts_of(x.queries, x.precision), parts_of(x.passages, x.precision)
    row_shift, column_shift, offset = _gradient_shifts(scale, row_log_weights, column_log_weights, constant)
    for i in slabs(B, rows):
        for j in slabs(N, columns):
            e = workspace.views(i.stop - i.start, j.stop - j.start)
            asked = Pass(
                row_shift=row_shift[i], column_shift=None if column_shift is None else column_shift[j], offset=offset, written=e[0],
                residual=e[1] if len(e) > 1 else None, accurate=x.accurate, row_start=i.start, column_start=j.start,
            )  # fmt: skip
            tile_pass(x.queries[i], x.passages[j], scale, masks, asked)
            inner = INNER[x.precision]
            add_product(dqueries[i], e, [p[j] for p in passages], fresh=fresh and j.start == 0, inner=inner)
            add_product(dpassages[j], [part.T for part in e], [q[i] for q in queries], fresh=i.start == 0, inner=inner)
    return dqueries, dpassages


def _gradient_shifts(
    scale: float, row_log_weights: Tensor, column_log_weights: Tensor | None, constant: float | None
) -> tuple[Tensor, Tensor | None, float | None]:
    """What `tile_pass` needs to write scale · 2^x · weight for rows and columns: factors and an offset where that is
    safe, else shifts.
    """
    rows = row_log_weights.float() * LOG2E + math.log2(scale)
    if column_log_weights is None:
        return -rows, None, None
    columns = column_log_weights.float() * LOG2E + math.log2(scale)
    if constant is None:
        return -rows, -columns, None
    return (rows + constant).exp2(), (columns + constant).exp2(), constant


def processors(x: Tensor) -> int:
    """Multiprocessors of the device that `x` is on; 1 for a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def infonce(
    x: Operands, targets: Tensor, scale: float, masks: MaskTables, weights: Tensor, symmetric: bool, gradients: bool, budget: int,
    largest: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, dqueries, dpassages, dscale): sums first, then gradients; for both directions, forward alone, or little
    room.
    """
    shifts = estimate_shifts(x, scale, symmetric, largest)
    row_lse, column_lse = negatives_lse(x, scale, masks, shifts, symmetric)
    logit = scale * target_similarities(x.queries, x.passages, targets)
    terms = Terms.of(row_lse, column_lse, logit, targets, weights)
    if not gradients:
        return terms.loss, None, None, None
    dqueries, dpassages = negatives_gradient(
        x, scale, masks, terms.row_log_weights, terms.column_log_weights, shifts.constant, budget
    )
    at_targets = scale * terms.target_gradient
    along = finish_queries(dqueries, x.queries, x.passages, targets, None, at_targets)
    finish_passages(dpassages, x.queries, targets, at_targets)
    return terms.loss, dqueries, dpassages, along.sum() / scale
