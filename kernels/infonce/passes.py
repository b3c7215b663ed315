"""A block of queries and passages on the Triton kernels: passes over its tiles, a block of rows at a time.

The pass of `lse` sums rows and columns at once. That of `gradient` writes the gradient at the logits, block by block in
a bounded workspace, and matrix products read it.

A row's shift only has to bring its sum into the range of bf16, 2^±100 or so wide. Where the norms bound every logit to
that range one constant does; else shifts are estimated from a sample of columns, and the rows whose sums fell outside
of it are done again with their true maxima.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.infonce import tiles, tiles_hopper
from kernels.infonce.deferred import Deferred
from kernels.infonce.reference import Block
from kernels.infonce.rows import LARGEST_SUM, SMALLEST_SUM, finish_passages, finish_queries, target_similarities
from kernels.infonce.tiles import LOG2E, Pass, aligned
from kernels.matmul import add_product, parts_of

_ROUNDING = 1.01  # a product of two vectors, each rounded to bf16, is longer by less
_SAFE_BOUND = 78.0  # |logit| in base 2 below which the constant shift loses nothing
_HEADROOM = 60.0  # how far a shift stays below the largest logit there may be
_UNIT_SCALE = 105.0  # with unit vectors, the constant shift nearly always does up to here
_SAMPLE = 256
_ROW_MULTIPLE = 256  # a multiple of every tile's rows and columns
LEAST_ROWS = 2048  # fewer rows at once make reading and writing dP, block by block, the bulk of the work
# Of a tier's sums over the batch, how much goes through the accumulator at a time.
INNER = {"bf16": None, "high": 2048, "fp32": None}
_PARTIAL_ELEMENTS = 2**31  # logits of a pass whose partial sums are kept at a time
_AUTO_WORKSPACE = 2**30
_SMALL_WORKSPACE = 2**26  # bytes that are used without asking what is free


@dataclass(frozen=True)
class Shifts:
    """Offsets subtracted from the base-2 logits before exponentiation."""

    rows: Tensor  # [B]; one constant, which serves columns too, unless `estimated`
    top: Tensor  # [1]: the constant, which no shift needs to exceed
    bound: Deferred  # [1]: no logit is larger
    estimated: bool  # rows are from a sample: exponentials may overflow

    @property
    def constant(self) -> float | None:
        """The one shift under which no sum loses terms; None: there is none. Waits for a bound that was measured."""
        unsafe = self.estimated or self.bound.get()[0] > _SAFE_BOUND  # NaN is as good as any: the loss is NaN
        return None if unsafe else self.bound.get()[0] - _HEADROOM


@dataclass(frozen=True)
class TiledBlock(Block):
    """`Block` on the kernels; float32, bfloat16 or float16."""

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Queries and passages as the kernels read them: half-precision inputs multiply exactly in each tier."""
        dtype = self.queries.dtype
        if self.precision == "fp32" or (self.precision == "bf16" and dtype == torch.float32):
            dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        return aligned(self.queries.to(dtype)), aligned(self.passages.to(dtype))

    @cached_property
    def shifts(self) -> Shifts:
        """One constant where the norms, or the guess that vectors have unit length, say that it will do, else from
        samples.

        `largest`, what no |⟨q_i, p_j⟩| exceeds but by rounding, spares measuring the norms, and waiting for them.
        """
        queries, passages = self.operands
        if self.largest is None:
            lengths = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in self.operands)
            norms = [length.amax(0, keepdim=True) for length in lengths]
            most = norms[0] * norms[1] * (self._largest_scale * LOG2E)
            top, bound = most - _HEADROOM, Deferred(most)
        else:
            known = self.largest * _ROUNDING * self._largest_scale * LOG2E
            top = queries.new_full((1,), known - _HEADROOM, dtype=torch.float32)
            bound = Deferred(torch.tensor([known], device="cpu"))
        if self._largest_scale <= _UNIT_SCALE or bound.get()[0] <= _SAFE_BOUND:
            return Shifts(top.expand(len(queries)).contiguous(), top, bound, False)
        return Shifts(self._sampled_shifts(queries, passages, top), top, bound, True)

    def lse(self, columns: bool = False) -> tuple[Tensor, Tensor | None]:
        shifts, (queries, passages) = self.shifts, self.operands
        column_shift = self._sampled_shifts(passages, queries, shifts.top) if columns and shifts.estimated else None
        row_sum, column_sum = self._reduce(
            Pass(shifts.rows, column_shift, rows=True, columns=columns, clamp=shifts.estimated)
        )
        assert row_sum is not None
        row_lse, column_lse = log_of(row_sum, shifts.rows), None
        if column_sum is not None:
            column_lse = log_of(column_sum, shifts.rows[:1] if column_shift is None else column_shift)
        if shifts.constant is not None:
            return row_lse, column_lse
        if len(again := outside(row_sum)):
            some = self.select_rows(again)
            row_lse[again] = some._exact_lse(columns=False)
        if column_sum is not None and column_lse is not None and len(again := outside(column_sum)):
            masks = self.masks.select_columns(again)
            some = replace(self, queries=queries, passages=passages[again], masks=masks)
            column_lse[again] = some._exact_lse(columns=True)
        return row_lse, column_lse

    def select_rows(self, index: Tensor) -> TiledBlock:
        """The block of the queries `index` [n], ascending."""
        queries, passages = self.operands
        return replace(self, queries=queries[index], passages=passages, masks=self.masks.select_rows(index))

    def exact_shifts(self, *, columns: bool = False) -> Tensor:
        """The largest logit of every row [B] or column [N], base 2; 0 where there is none."""
        maxima = self._reduce(Pass(rows=not columns, columns=columns, maximum=True))[columns]
        assert maxima is not None
        return maxima.nan_to_num_(neginf=0.0)

    def _exact_lse(self, *, columns: bool) -> Tensor:
        exact = self.exact_shifts(columns=columns)
        asked = Pass(None, exact, columns=True) if columns else Pass(exact, rows=True)
        sums = self._reduce(asked)[columns]
        assert sums is not None
        return log_of(sums, exact)

    def gradient(
        self,
        row_log_weights: Tensor,
        column_log_weights: Tensor | None = None,
        dqueries: Tensor | None = None,
        *,
        of_passages: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        queries, passages = (parts_of(x, self.precision) for x in self.operands)
        (B, D), N, inner = self.queries.shape, len(self.passages), INNER[self.precision]
        rows, columns = self.rows_at_once(), N
        fresh = dqueries is None
        dqueries = self.queries.new_empty(B, D, dtype=torch.float32) if dqueries is None else dqueries
        dpassages = self.passages.new_empty(N, D, dtype=torch.float32) if of_passages else None
        if rows < min(B, 2 * LEAST_ROWS):  # square blocks: the fewest reads and writes of the sums
            rows = columns = max(256, int((self.workspace_bytes // self._bytes_each) ** 0.5) // 256 * 256)
        workspace = self.workspace(min(rows, B), min(columns, N))
        asked = self._gradient_pass(row_log_weights, column_log_weights)
        for i in slices(B, rows):
            for j in slices(N, columns):
                e = [part[: i.stop - i.start, : j.stop - j.start] for part in workspace]
                self.tile_pass(asked, i, j, e)
                add_product(dqueries[i], e, [p[j] for p in passages], fresh=fresh and j.start == 0, inner=inner)
                if dpassages is not None:
                    left, right = [part.T for part in e], [q[i] for q in queries]
                    add_product(dpassages[j], left, right, fresh=i.start == 0, inner=inner)
        return dqueries, dpassages

    def target_logits(self, targets: Tensor) -> Tensor:
        return self.scale * target_similarities(*self.operands, targets)

    def add_target_gradient(
        self, dqueries: Tensor, dpassages: Tensor, targets: Tensor, target_gradient: Tensor
    ) -> Tensor:
        (queries, passages), weights = self.operands, self.scale * target_gradient
        along = finish_queries(dqueries, queries, passages, targets, None, weights)
        finish_passages(dpassages, queries, targets, weights)
        return along

    def tile_pass(
        self, asked: Pass, i: slice, j: slice, written: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, Tensor | None]:
        """The partial reductions that `asked` names of the rows `i` and columns `j`, and the exponentials `written`; on
        Hopper's kernel where that can do it.
        """
        queries, passages = self.operands
        asked = asked._replace(
            row_shift=None if asked.row_shift is None else asked.row_shift[i],
            column_shift=None if asked.column_shift is None else asked.column_shift[j],
            own_factor=self.own_scale / self.in_batch_scale,
            written=written[0] if written else None,
            residual=written[1] if len(written) > 1 else None,
            accurate=self.precision == "high",
            row_start=i.start,
            column_start=j.start,
        )
        hopper = self.masks.guide is None and tiles_hopper.can_do(asked) and tiles_hopper.fits(queries)
        kernel = tiles_hopper if hopper else tiles
        return kernel.tile_pass(queries[i], passages[j], self.in_batch_scale, self.masks, asked)

    def rows_at_once(self) -> int:
        """Rows of logits, over all columns, that fit in the workspace; whole waves of dQ's tiles if possible."""
        (B, D), N = self.queries.shape, len(self.passages)
        rows = self.workspace_bytes // (self._bytes_each * -(-N // 64) * 64)
        if rows >= B:
            return B
        device = self.queries.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if self.queries.is_cuda else 1
        wave = max(1, processors // -(-D // 256)) * 128
        if rows >= wave:
            return rows // wave * wave
        return max(256, rows // 256 * 256)

    def workspace(self, rows: int, columns: int) -> list[Tensor]:
        """Memory for exponentials: a bf16 matrix, two of them (value and residual), or an fp32 one; rows are padded."""
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        parts = 2 if self.precision == "high" else 1
        return [self.queries.new_empty(rows, -(-columns // 64) * 64, dtype=dtype) for _ in range(parts)]

    @cached_property
    def workspace_bytes(self) -> int:
        """Bytes that blocks of exponentials may take."""
        if self.workspace_mib is not None:
            return self.workspace_mib * 2**20
        if not self.queries.is_cuda:
            return _AUTO_WORKSPACE
        if 4 * len(self.queries) * (len(self.passages) + 64) <= _SMALL_WORKSPACE:  # all similarities
            return _SMALL_WORKSPACE
        free = torch.cuda.mem_get_info(self.queries.device)[0]
        if free < 2 * _AUTO_WORKSPACE:  # what PyTorch holds without using it counts, but takes longer to ask for
            free += torch.cuda.memory_reserved(self.queries.device) - torch.cuda.memory_allocated(self.queries.device)
        return min(_AUTO_WORKSPACE, free // 2)

    @property
    def _largest_scale(self) -> float:
        return max(self.in_batch_scale, self.own_scale)

    @property
    def _bytes_each(self) -> int:
        return 2 if self.precision == "bf16" else 4

    def _reduce(self, asked: Pass) -> tuple[Tensor | None, Tensor | None]:
        """Sums (or maxima) of rows [B] and of columns [N], as asked, a block of rows at a time."""
        B, N = len(self.queries), len(self.passages)
        size = max(_ROW_MULTIPLE, _PARTIAL_ELEMENTS // N // _ROW_MULTIPLE * _ROW_MULTIPLE)
        row_result = self.queries.new_empty(B, dtype=torch.float32) if asked.rows else None
        column_result = None
        if asked.columns:
            column_result = self.queries.new_full((N,), -torch.inf if asked.maximum else 0.0, dtype=torch.float32)
        for i in slices(B, size):
            row_partial, column_partial = self.tile_pass(asked, i, slice(0, N))
            if row_result is not None and row_partial is not None:
                row_result[i] = row_partial.amax(dim=0) if asked.maximum else row_partial.sum(dim=0)
            if column_result is not None and column_partial is not None:
                if asked.maximum:
                    torch.maximum(column_result, column_partial.amax(dim=0), out=column_result)
                else:
                    column_result += column_partial.sum(dim=0)
        return row_result, column_result

    def _sampled_shifts(self, x: Tensor, others: Tensor, top: Tensor) -> Tensor:
        """A shift below the largest logit of each row of x with a sample of `others`, and at most `top`."""
        sample = others[:: max(1, len(others) // _SAMPLE)][:_SAMPLE]
        largest = torch.cat([(x[i] @ sample.T).amax(dim=1).float() for i in slices(len(x), 65536)])
        return torch.minimum((largest * (self.in_batch_scale * LOG2E)).add_(_HEADROOM / 2), top)

    def _gradient_pass(self, row_log_weights: Tensor, column_log_weights: Tensor | None) -> Pass:
        """The pass that writes scale · 2^x · weight, by factors and an offset where that is safe, else by shifts."""
        rows = row_log_weights.float() * LOG2E + math.log2(self.scale)
        if column_log_weights is None:
            return Pass(-rows)
        columns, constant = column_log_weights.float() * LOG2E + math.log2(self.scale), self.shifts.constant
        if constant is None:
            return Pass(-rows, -columns)
        return Pass((rows + constant).exp2(), (columns + constant).exp2(), constant)


def slices(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(total)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def outside(sums: Tensor) -> Tensor:
    """Indices of the sums that may have lost terms; an infinite one is among them."""
    return ((sums >= SMALLEST_SUM) & (sums <= LARGEST_SUM)).logical_not_().nonzero()[:, 0]


def log_of(sums: Tensor, shift: Tensor) -> Tensor:
    """The natural logarithm of sums that were taken with a shift in base 2."""
    return (sums.log2() + shift) / LOG2E
