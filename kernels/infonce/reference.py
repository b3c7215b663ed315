"""A block of queries and passages in plain torch, tile by tile: what a CPU and float64 use, and what the kernels are
compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.infonce.exclusions import MaskTables

Precision = Literal["bf16", "high", "fp32"]  # what similarities are computed from: see `kernels.infonce.api`

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096
_TARGETS_AT_ONCE = 65_536  # rows whose targets' vectors are held beside their own


def rounded(x: Tensor, precision: str) -> Tensor:
    """`x` with the values that a tier computes from, in float32 (float64 for float64 inputs)."""
    accumulated = torch.float64 if x.dtype == torch.float64 else torch.float32
    if precision == "bf16" and x.dtype != torch.float16:  # half-precision inputs multiply exactly
        x = x.to(torch.bfloat16)
    return x.to(accumulated)


@dataclass(frozen=True)
class Block:
    """Some queries against some passages: the log-sum-exp over their negatives and its gradient, without the similarity
    matrix.

    With s_ij = ⟨q_i, p_j⟩ and neg the pairs that `masks` leave. A target is a known positive and so never a negative:
    its own term is added by the caller. A negative's logit is scale · s_ij + α · stop_gradient(s_ij), α being the
    pair's hardness in `masks`, mostly 0. Results are float32 (float64 for float64 inputs). Blocks are made by
    `kernels.infonce.api.block_of`, which checks what they are made of and takes the subclass on Triton's kernels.
    """

    queries: Tensor  # [B, D]
    passages: Tensor  # [N, D]
    scale: float
    masks: MaskTables
    precision: Precision = "fp32"
    workspace_mib: int | None = None
    largest: float | None = None

    @property
    def in_batch_scale(self) -> float:
        """The factor from a negative's similarity to its logit."""
        return self.scale + self.masks.hardness.in_batch

    @property
    def own_scale(self) -> float:
        """`in_batch_scale` of a query's own negatives."""
        return self.scale + self.masks.hardness.own

    def lse(self, columns: bool = False) -> tuple[Tensor, Tensor | None]:
        """row_lse_i = log Σ_{j : (i,j) ∈ neg} exp(logit_ij), [B], and, where `columns`, the same over i, [N] (else
        None); −inf where nothing is left to sum.
        """
        queries, passages = self._values()
        row_lse = queries.new_full((len(queries),), -torch.inf)
        column_lse = queries.new_full((len(passages),), -torch.inf)
        for i, j, logits in self._tiles(queries, passages):  # [tile rows, tile columns]
            row_lse[i] = torch.logaddexp(row_lse[i], logits.logsumexp(dim=1))
            if columns:
                column_lse[j] = torch.logaddexp(column_lse[j], logits.logsumexp(dim=0))
        return row_lse, column_lse if columns else None

    def gradient(
        self,
        row_log_weights: Tensor,
        column_log_weights: Tensor | None = None,
        dqueries: Tensor | None = None,
        *,
        of_passages: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """dqueries [B, D] = scale · G P and, where `of_passages`, dpassages [N, D] = scale · Gᵀ Q (else None).

        G_ij = exp(logit_ij + row_log_weights_i) + exp(logit_ij + column_log_weights_j) on the negatives, else 0: with
        row_log_weights = log w − row_lse' this is the gradient of Σ_i w_i · row_lse'_i for any lse' that contains these
        negatives. row_log_weights [B], column_log_weights [N] or None: −inf leaves a row or column out.
        A `dqueries` [B, D] that is passed in, contiguous, is added to in place and returned, so that blocks sum up.
        """
        queries, passages = self._values()
        dqueries = torch.zeros_like(queries) if dqueries is None else dqueries
        dpassages = torch.zeros_like(passages) if of_passages else None
        for i, j, logits in self._tiles(queries, passages):
            dlogits = (logits + row_log_weights[i, None]).exp()
            if column_log_weights is not None:
                dlogits += (logits + column_log_weights[None, j]).exp()
            dqueries[i] += self.scale * (dlogits @ passages[j])
            if dpassages is not None:
                dpassages[j] += self.scale * (dlogits.T @ queries[i])
        return dqueries, dpassages

    def target_logits(self, targets: Tensor) -> Tensor:
        """scale · ⟨q_i, p_t⟩ [B] with t = targets_i, of the values that `precision` computes from; targets [B] in
        0..N−1.
        """
        queries, passages = self._values()
        rows = torch.arange(len(queries), device=queries.device).split(_TARGETS_AT_ONCE)
        return self.scale * torch.cat([(queries[i] * passages[targets[i]]).sum(dim=1) for i in rows])

    def add_target_gradient(
        self, dqueries: Tensor, dpassages: Tensor, targets: Tensor, target_gradient: Tensor
    ) -> Tensor:
        """dq_i −= scale · target_gradient_i · p_t and dp_t −= scale · target_gradient_i · q_i for every query i and its
        target t, in place, in the order of i; returns ⟨q_i, dq_i⟩ [B].

        dqueries [B, D], dpassages [N, D] and target_gradient [B], 0 for an ignored row: float32 (float64 for float64
        inputs), contiguous.
        """
        queries, passages = self._values()
        weights = self.scale * target_gradient[:, None]
        for i in torch.arange(len(queries), device=queries.device).split(_TARGETS_AT_ONCE):
            dqueries[i] -= weights[i] * passages[targets[i]]
            if dpassages.is_cuda:  # index_put_ sorts before it adds there: shared targets sum in one order every time
                dpassages.index_put_((targets[i],), -weights[i] * queries[i], accumulate=True)
            else:
                dpassages.index_add_(0, targets[i], -weights[i] * queries[i])
        return (queries * dqueries).sum(dim=1)

    def _values(self) -> tuple[Tensor, Tensor]:
        return rounded(self.queries, self.precision), rounded(self.passages, self.precision)

    def _tiles(self, queries: Tensor, passages: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Every tile of negatives' logits with −inf on the excluded pairs, and the slices it stands at."""
        excluded, own = self.masks.pairs(), self.masks.further.split()[1]
        for r in range(0, len(queries), _TILE_ROWS):
            i = slice(r, min(r + _TILE_ROWS, len(queries)))
            for c in range(0, len(passages), _TILE_COLUMNS):
                j = slice(c, min(c + _TILE_COLUMNS, len(passages)))
                similarities = queries[i] @ passages[j].T
                logits = self.in_batch_scale * similarities
                at = _inside(own.rows, own.columns, i, j)
                logits[at] = self.own_scale * similarities[at]
                logits[_inside(*excluded, i, j)] = -torch.inf
                if self.masks.threshold is not None:
                    logits.masked_fill_(similarities > self.masks.threshold[i, None], -torch.inf)
                yield i, j, self._guided(logits, i, j)

    def _guided(self, logits: Tensor, i: slice, j: slice) -> Tensor:
        """The tile of logits at `i` and `j` with −inf on the pairs that the guide excludes, in place."""
        guide = self.masks.guide
        if guide is None:
            return logits
        similarities = guide.queries[i].float() @ guide.passages[j].float().T
        return logits.masked_fill_(similarities > guide.limit[i, None], -torch.inf)


def _inside(rows: Tensor, columns: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor]:
    """The pairs inside the tile at (`i`, `j`), relative to its corner."""
    inside = (rows >= i.start) & (rows < i.stop) & (columns >= j.start) & (columns < j.stop)
    return rows[inside] - i.start, columns[inside] - j.start
