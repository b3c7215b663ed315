"""Torch reference of `kernels.infonce.api`, tile by tile: what a CPU run uses and what the kernels are compared
with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels.infonce.exclusions import Exclusions, MaskTables, known_pairs
from kernels.infonce.terms import Terms

Precision = Literal["bf16", "high", "fp32"]  # what similarities are computed from: see `kernels.infonce.api`

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096


def rounded(x: Tensor, precision: str) -> Tensor:
    """`x` with the values that a tier computes from, in float32 (float64 for float64 inputs)."""
    accumulated = torch.float64 if x.dtype == torch.float64 else torch.float32
    if precision == "bf16" and x.dtype != torch.float16:  # half-precision inputs multiply exactly
        x = x.to(torch.bfloat16)
    return x.to(accumulated)


def negatives_lse(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    exclusions: Exclusions | MaskTables | None = None,
    *,
    columns: bool = False,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.infonce.api.negatives_lse`."""
    queries, passages = rounded(queries, precision), rounded(passages, precision)
    row_lse = queries.new_full((len(queries),), -torch.inf)
    column_lse = queries.new_full((len(passages),), -torch.inf)
    for i, j, logits in _tiles(queries, passages, scale, exclusions):  # [tile rows, tile columns]
        row_lse[i] = torch.logaddexp(row_lse[i], logits.logsumexp(dim=1))
        if columns:
            column_lse[j] = torch.logaddexp(column_lse[j], logits.logsumexp(dim=0))
    return row_lse, column_lse if columns else None


def negatives_gradient(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    row_log_weights: Tensor,
    column_log_weights: Tensor | None = None,
    exclusions: Exclusions | MaskTables | None = None,
    *,
    dqueries: Tensor | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """See `kernels.infonce.api.negatives_gradient`."""
    queries, passages = rounded(queries, precision), rounded(passages, precision)
    dqueries = torch.zeros_like(queries) if dqueries is None else dqueries
    dpassages = torch.zeros_like(passages)
    for i, j, logits in _tiles(queries, passages, scale, exclusions):
        dlogits = (logits + row_log_weights[i, None]).exp()
        if column_log_weights is not None:
            dlogits += (logits + column_log_weights[None, j]).exp()
        dqueries[i] += scale * (dlogits @ passages[j])
        dpassages[j] += scale * (dlogits.T @ queries[i])
    return dqueries, dpassages


def infonce(
    queries: Tensor,
    passages: Tensor,
    targets: Tensor,
    scale: float,
    *,
    exclusions: Exclusions | MaskTables | None = None,
    weights: Tensor,
    symmetric: bool = False,
    precision: str = "fp32",
    gradients: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See `kernels.infonce.api.infonce`; every row has a target. Returns (loss, dqueries, dpassages, dscale)."""
    if not isinstance(exclusions, MaskTables):  # whose targets are among its pairs
        exclusions = with_targets(exclusions, targets, len(passages))
    row_lse, column_lse = negatives_lse(queries, passages, scale, exclusions, columns=symmetric, precision=precision)
    q, p = rounded(queries, precision), rounded(passages, precision)
    logit = scale * (q * p[targets]).sum(dim=1)  # [B]
    terms = Terms.of(row_lse, column_lse, logit, targets, weights)
    if not gradients:
        return terms.loss, None, None, None
    dqueries, dpassages = negatives_gradient(
        queries, passages, scale, terms.row_log_weights, terms.column_log_weights, exclusions, precision=precision
    )
    at_targets = scale * terms.target_gradient[:, None]
    dqueries -= at_targets * p[targets]
    dpassages.index_add_(0, targets, -at_targets * q)
    return terms.loss, dqueries, dpassages, (q * dqueries).sum() / scale


def with_targets(exclusions: Exclusions | None, targets: Tensor, N: int) -> Exclusions:
    """`exclusions` by column, with every row's target among them."""
    rows = torch.arange(len(targets), device=targets.device)
    columns, threshold = targets, None
    if exclusions is not None:
        known_rows, known_columns = known_pairs(exclusions)
        order = torch.cat([rows, known_rows]).sort(stable=True).indices
        rows, columns = torch.cat([rows, known_rows])[order], torch.cat([columns, known_columns])[order]
        threshold = exclusions.threshold
    ptr = torch.searchsorted(rows, torch.arange(len(targets) + 1, device=targets.device))
    return Exclusions(torch.arange(N, device=targets.device), ptr, columns, threshold)


def _tiles(
    queries: Tensor, passages: Tensor, scale: float, exclusions: Exclusions | MaskTables | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every tile of scale · Q Pᵀ with −inf on the excluded pairs, and the slices it stands at."""
    rows, columns = None, None
    if exclusions is not None:
        rows, columns = exclusions.pairs() if isinstance(exclusions, MaskTables) else known_pairs(exclusions)
    for r in range(0, len(queries), _TILE_ROWS):
        i = slice(r, min(r + _TILE_ROWS, len(queries)))
        for c in range(0, len(passages), _TILE_COLUMNS):
            j = slice(c, min(c + _TILE_COLUMNS, len(passages)))
            similarities = queries[i] @ passages[j].T
            logits = scale * similarities
            if exclusions is not None and rows is not None and columns is not None:
                inside = (rows >= i.start) & (rows < i.stop) & (columns >= j.start) & (columns < j.stop)
                logits[rows[inside] - i.start, columns[inside] - j.start] = -torch.inf
                if exclusions.threshold is not None:
                    logits.masked_fill_(similarities > exclusions.threshold[i, None], -torch.inf)
            yield i, j, logits
