"""Torch reference of `kernels.lse`, tile by tile: what a CPU run uses and what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.lse import Exclusions

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096


def rounded(x: Tensor, precision: str) -> Tensor:
    """`x` with the values that a tier computes from, in float32 (float64 for float64 inputs)."""
    if precision == "bf16":
        x = x.to(torch.bfloat16)
    return x if x.dtype == torch.float64 else x.float()


def negatives_lse(
    queries: Tensor, passages: Tensor, scale: float, exclusions: Exclusions | None = None, *, columns: bool = False, precision: str = "fp32"
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.lse.negatives_lse`."""
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
    exclusions: Exclusions | None = None,
    *,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """See `kernels.lse.negatives_gradient`."""
    queries, passages = rounded(queries, precision), rounded(passages, precision)
    dqueries, dpassages = torch.zeros_like(queries), torch.zeros_like(passages)
    for i, j, logits in _tiles(queries, passages, scale, exclusions):
        dlogits = (logits + row_log_weights[i, None]).exp()
        if column_log_weights is not None:
            dlogits += (logits + column_log_weights[None, j]).exp()
        dqueries[i] += scale * (dlogits @ passages[j])
        dpassages[j] += scale * (dlogits.T @ queries[i])
    return dqueries, dpassages


def _tiles(queries: Tensor, passages: Tensor, scale: float, exclusions: Exclusions | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every tile of scale · Q Pᵀ with −inf on the excluded pairs, and the slices it stands at."""
    rows, columns = _known_pairs(exclusions) if exclusions is not None else (None, None)
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


def _known_pairs(exclusions: Exclusions) -> tuple[Tensor, Tensor]:
    """The excluded pairs that stand in this block, as (rows [E], columns [E]); an id may stand in several columns."""
    ids, order = exclusions.passage_ids.sort()
    first = torch.searchsorted(ids, exclusions.known_ids)
    count = torch.searchsorted(ids, exclusions.known_ids, right=True) - first  # columns each known id matches
    row_of = torch.repeat_interleave(exclusions.known_ptr.diff())
    offset = torch.arange(int(count.sum()), device=ids.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return row_of.repeat_interleave(count), order[first.repeat_interleave(count) + offset]
