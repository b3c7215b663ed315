"""Log-sum-exp over the negatives of every query, and its gradient, without the similarity matrix.

With s_ij = ⟨q_i, p_j⟩ and neg the set of pairs that `Exclusions` leaves:

    row_lse_i    = log Σ_{j : (i,j) ∈ neg} exp(scale · s_ij)
    column_lse_j = log Σ_{i : (i,j) ∈ neg} exp(scale · s_ij)

The target of a query is a known positive and so never among the negatives; its own term is added by the caller from a
row-wise product. Memory is O(B + N) beside inputs and outputs. (Cheng et al. 2024, arXiv:2410.17243)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import lse_reference

Precision = Literal["bf16", "high", "fp32"]


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


def negatives_lse(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    exclusions: Exclusions | None = None,
    *,
    columns: bool = False,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """row_lse [B] and, where `columns`, column_lse [N] (else None); −inf where nothing is left to sum.

    queries [B, D], passages [N, D]: same dtype and device. Results are float32 (float64 for float64 inputs).
    `precision` names what the similarities are computed from: "bf16" rounds the inputs first, "fp32" takes them as they
    are, "high" promises an error below 1e-5. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check(queries, passages, scale, exclusions, precision)
    return lse_reference.negatives_lse(queries, passages, scale, exclusions, columns=columns, precision=precision)


def negatives_gradient(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    row_log_weights: Tensor,
    column_log_weights: Tensor | None = None,
    exclusions: Exclusions | None = None,
    *,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """dqueries [B, D] = scale · G P and dpassages [N, D] = scale · Gᵀ Q, both float32 (float64 for float64 inputs).

    G_ij = exp(scale · s_ij + row_log_weights_i) + exp(scale · s_ij + column_log_weights_j) on the negatives, else 0:
    with row_log_weights = log w − row_lse' this is the gradient of Σ_i w_i · row_lse'_i for any lse' that contains
    these negatives. row_log_weights [B], column_log_weights [N] or None: −inf leaves a row or column out.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check(queries, passages, scale, exclusions, precision)
    _check_vector("row_log_weights", row_log_weights, len(queries), queries)
    if column_log_weights is not None:
        _check_vector("column_log_weights", column_log_weights, len(passages), queries)
    return lse_reference.negatives_gradient(
        queries, passages, scale, row_log_weights, column_log_weights, exclusions, precision=precision
    )


def _check(queries: Tensor, passages: Tensor, scale: float, exclusions: Exclusions | None, precision: str) -> None:
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1]:
        raise ValueError(f"expected queries [B, D] and passages [N, D], received {list(queries.shape)} and {list(passages.shape)}")
    if queries.dtype != passages.dtype or queries.device != passages.device or not queries.is_floating_point():
        raise ValueError(
            f"expected queries and passages of one floating dtype on one device, received {queries.dtype} on {queries.device} "
            f"and {passages.dtype} on {passages.device}"
        )
    if not scale > 0:
        raise ValueError(f"expected scale = 1/temperature above 0, received {scale}")
    if precision not in ("bf16", "high", "fp32"):
        raise ValueError(f"expected precision bf16, high or fp32, received {precision!r}")
    if exclusions is None:
        return
    _check_vector("exclusions.passage_ids", exclusions.passage_ids, len(passages), queries)
    _check_vector("exclusions.known_ptr", exclusions.known_ptr, len(queries) + 1, queries)
    if exclusions.passage_ids.dtype != torch.int64 or exclusions.known_ptr.dtype != torch.int64 or exclusions.known_ids.dtype != torch.int64:
        raise ValueError("expected exclusions.passage_ids, known_ptr and known_ids as int64")
    if exclusions.threshold is not None:
        _check_vector("exclusions.threshold", exclusions.threshold, len(queries), queries)


def _check_vector(name: str, vector: Tensor, length: int, like: Tensor) -> None:
    if vector.shape != (length,) or vector.device != like.device:
        raise ValueError(f"{name}: expected shape [{length}] on {like.device}, received {list(vector.shape)} on {vector.device}")
