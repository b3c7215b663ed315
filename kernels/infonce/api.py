"""Log-sum-exp over the negatives of every query, and its gradient, without the similarity matrix.

With s_ij = ⟨q_i, p_j⟩ and neg the set of pairs that `Exclusions` leaves:

    row_lse_i    = log Σ_{j : (i,j) ∈ neg} exp(scale · s_ij)
    column_lse_j = log Σ_{i : (i,j) ∈ neg} exp(scale · s_ij)

The target of a query is a known positive and so never among the negatives; its own term is added by the caller from a
row-wise product. Memory is O(B + N) beside inputs and outputs. (Cheng et al. 2024, arXiv:2410.17243)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import on_kernels
from kernels.infonce import reference
from kernels.infonce.deferred import Deferred
from kernels.infonce.exclusions import Exclusions, MaskTables
from kernels.infonce.reference import Precision

__all__ = ["Exclusions", "InfoNCE", "MaskTables", "Precision", "infonce", "negatives_gradient", "negatives_lse"]

_AUTO_WORKSPACE = 2**30
_SMALL_WORKSPACE = 2**26  # bytes that are used without asking what is free


@dataclass(frozen=True)
class InfoNCE:
    """Per-row losses and, where asked for, the gradients of Σ weight · loss."""

    loss: Tensor  # [B] float32, 0 for an ignored row
    dqueries: Tensor | None  # [B, D] float32
    dpassages: Tensor | None  # [N, D] float32
    dscale: Tensor | None  # []


def infonce(
    queries: Tensor,
    passages: Tensor,
    targets: Tensor,
    scale: float,
    *,
    exclusions: Exclusions | MaskTables | None = None,
    weights: Tensor | None = None,
    symmetric: bool = False,
    precision: Precision = "bf16",
    workspace_mib: int | None = None,
    gradients: bool = True,
    ignored: bool | None = None,
    largest: float | None = None,
) -> InfoNCE:
    """loss_i = log(e^{x_it} + Σ_{j : (i,j) ∈ neg} e^{x_ij}) − x_it with x = scale · Q Pᵀ and t = targets_i, and its
    gradients.

    neg is what `exclusions` leaves, the target excepted in any case. `symmetric`: ½(row + column), the column term of
    query i being log(e^{x_it} + Σ_{k : (k,t) ∈ neg} e^{x_kt}) − x_it. A row with target −1 has loss 0 and is no
    negative of any passage; a row without negatives has loss 0 and gradient 0.

    queries [B, D], passages [N, D]: one floating dtype and device, rows may be strided. targets [B] int64 in −1..N−1.
    weights [B] ≥ 0, None: ones; the gradients are of Σ_i weights_i · loss_i. `precision`: "bf16" (rounded inputs, fp32
    accumulation), "high" (error ≤ 1e-5), "fp32". On a GPU, slabs of exponentials take at most `workspace_mib` MiB,
    None: up to 1 GiB of what is free; more makes fewer, larger matrix products. `MaskTables` are of the same targets.
    Results are float32 (float64 for float64 inputs), the same bits every time.

    What the caller knows spares the host waiting for the device, and is taken on trust: `ignored`, whether any target
    is −1, all being in range; `largest`, what no |⟨q_i, p_j⟩| exceeds but by rounding to bf16 (1 for unit vectors).
    With ignored=False, `MaskTables` and largest · scale ≤ 53, a GPU is asked nothing. Raises ValueError where shapes,
    dtypes, devices or targets do not fit. (Gao et al. 2021, arXiv:2101.06983; Cheng et al. 2024, arXiv:2410.17243)
    """
    _check(queries, passages, scale, exclusions, precision)
    _check_vector("targets", targets, len(queries), queries)
    if targets.dtype != torch.int64:
        raise ValueError(f"expected targets as int64, received {targets.dtype}")
    if weights is not None:
        _check_vector("weights", weights, len(queries), queries)
    if workspace_mib is not None and workspace_mib < 1:
        raise ValueError(f"expected workspace_mib of at least 1, received {workspace_mib}")
    accumulated = torch.float64 if queries.dtype == torch.float64 else torch.float32
    weights = queries.new_ones(len(queries), dtype=accumulated) if weights is None else weights.to(accumulated)
    if not len(queries):
        empty = passages.new_zeros(passages.shape, dtype=accumulated) if gradients else None
        return InfoNCE(
            weights, queries.to(accumulated) if gradients else None, empty, weights.sum() if gradients else None
        )
    extent = Deferred(torch.stack(torch.aminmax(targets))) if ignored is None else None
    if on_kernels(queries) and not symmetric and ignored is not False:
        # Queued before the targets are known to be right: the check at the end then waits for nothing more.
        results = _tiled_infonce(
            queries, passages, targets.clamp(0, len(passages) - 1), scale, exclusions, weights * (targets >= 0), False, precision,
            workspace_mib, gradients, largest,
        )  # fmt: skip
        if extent is not None:
            _check_extent(extent.get(), len(passages))
        return InfoNCE(torch.where(targets >= 0, results[0], 0.0), *results[1:])
    some_ignored = ignored if extent is None else _check_extent(extent.get(), len(passages))
    if some_ignored:
        return _without_ignored(
            queries, passages, targets, scale, exclusions, weights, symmetric, precision, workspace_mib, gradients
        )
    if on_kernels(queries):
        results = _tiled_infonce(
            queries,
            passages,
            targets,
            scale,
            exclusions,
            weights,
            symmetric,
            precision,
            workspace_mib,
            gradients,
            largest,
        )
        return InfoNCE(*results)
    found = reference.infonce(
        queries, passages, targets, scale, exclusions=exclusions, weights=weights, symmetric=symmetric,
        precision=precision, gradients=gradients,
    )  # fmt: skip
    return InfoNCE(*found)


def _tiled_infonce(
    queries: Tensor, passages: Tensor, targets: Tensor, scale: float, exclusions: Exclusions | MaskTables | None, weights: Tensor,
    symmetric: bool, precision: Precision, workspace_mib: int | None, gradients: bool, largest: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from kernels.infonce import one_pass, two_pass

    masks = exclusions if isinstance(exclusions, MaskTables) else MaskTables.of(exclusions, targets, len(passages))
    budget = _workspace_bytes(queries, passages, workspace_mib)
    x = two_pass.Operands.of(queries, passages, precision)
    (B, D), N = queries.shape, len(passages)
    rows = two_pass.slab_rows(B, N, D, precision, budget, two_pass.processors(queries))
    if symmetric or not gradients or rows < min(B, two_pass.LEAST_SLAB_ROWS):
        return two_pass.infonce(x, targets, scale, masks, weights, symmetric, gradients, budget, largest)
    return one_pass.infonce(
        x, targets, scale, masks, weights, two_pass.Workspace(x.queries, precision, rows, N), largest
    )


def _without_ignored(
    queries: Tensor, passages: Tensor, targets: Tensor, scale: float, exclusions: Exclusions | MaskTables | None, weights: Tensor,
    symmetric: bool, precision: Precision, workspace_mib: int | None, gradients: bool,
) -> InfoNCE:  # fmt: skip
    """`infonce` of the rows that have a target, spread over all rows again."""
    kept = (targets >= 0).nonzero()[:, 0]
    if exclusions is not None:
        exclusions = exclusions.select_rows(kept) if isinstance(exclusions, MaskTables) else exclusions.of_rows(kept)
    some = infonce(
        queries[kept], passages, targets[kept], scale, exclusions=exclusions,
        weights=weights[kept], symmetric=symmetric, precision=precision, workspace_mib=workspace_mib, gradients=gradients, ignored=False,
    )  # fmt: skip
    loss = some.loss.new_zeros(len(queries))
    loss[kept] = some.loss
    dqueries = None
    if some.dqueries is not None:
        dqueries = some.dqueries.new_zeros(queries.shape)
        dqueries[kept] = some.dqueries
    return InfoNCE(loss, dqueries, some.dpassages, some.dscale)


def _check_extent(extent: list[float], N: int) -> bool:
    """Whether rows are to be ignored, from the smallest and the largest target."""
    least, most = extent
    if least < -1 or most >= N:
        raise ValueError(
            f"expected targets between -1 and {N - 1} (a column of passages), received {least:.0f} to {most:.0f}"
        )
    return least < 0


def _workspace_bytes(queries: Tensor, passages: Tensor, workspace_mib: int | None) -> int:
    if workspace_mib is not None:
        return workspace_mib * 2**20
    if not queries.is_cuda:
        return _AUTO_WORKSPACE
    if 4 * len(queries) * (len(passages) + 64) <= _SMALL_WORKSPACE:  # all similarities
        return _SMALL_WORKSPACE
    free = torch.cuda.mem_get_info(queries.device)[0]
    if free < 2 * _AUTO_WORKSPACE:  # what PyTorch holds without using it counts, but takes longer to ask for
        free += torch.cuda.memory_reserved(queries.device) - torch.cuda.memory_allocated(queries.device)
    return min(_AUTO_WORKSPACE, free // 2)


def negatives_lse(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    exclusions: Exclusions | MaskTables | None = None,
    *,
    columns: bool = False,
    precision: Precision = "fp32",
    largest: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """row_lse [B] and, where `columns`, column_lse [N] (else None); −inf where nothing is left to sum.

    queries [B, D], passages [N, D]: same dtype and device. Results are float32 (float64 for float64 inputs).
    `MaskTables`, made beforehand, spare a block that comes by twice the second look-up of its known pairs. `precision`
    names what the similarities are computed from: "bf16" rounds the inputs first, "fp32" takes them as they are, "high"
    promises an error below 1e-5. `largest` is that of `infonce`. Raises ValueError where shapes, dtypes or devices do
    not fit.
    """
    _check(queries, passages, scale, exclusions, precision)
    if on_kernels(queries) and len(queries) and len(passages):
        from kernels.infonce import two_pass

        masks = _tables(exclusions, queries, passages)
        x = two_pass.Operands.of(queries, passages, precision)
        return two_pass.negatives_lse(x, scale, masks, two_pass.estimate_shifts(x, scale, columns, largest), columns)
    return reference.negatives_lse(queries, passages, scale, exclusions, columns=columns, precision=precision)


def negatives_gradient(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    row_log_weights: Tensor,
    column_log_weights: Tensor | None = None,
    exclusions: Exclusions | MaskTables | None = None,
    *,
    dqueries: Tensor | None = None,
    precision: Precision = "fp32",
    workspace_mib: int | None = None,
    largest: float | None = None,
) -> tuple[Tensor, Tensor]:
    """dqueries [B, D] = scale · G P and dpassages [N, D] = scale · Gᵀ Q, both float32 (float64 for float64 inputs).

    G_ij = exp(scale · s_ij + row_log_weights_i) + exp(scale · s_ij + column_log_weights_j) on the negatives, else 0:
    with row_log_weights = log w − row_lse' this is the gradient of Σ_i w_i · row_lse'_i for any lse' that contains
    these negatives. row_log_weights [B], column_log_weights [N] or None: −inf leaves a row or column out. A `dqueries`
    that is given is added to in place and returned, so that blocks sum up. `workspace_mib` and `largest` are those of
    `infonce`. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check(queries, passages, scale, exclusions, precision)
    _check_vector("row_log_weights", row_log_weights, len(queries), queries)
    if column_log_weights is not None:
        _check_vector("column_log_weights", column_log_weights, len(passages), queries)
    if dqueries is not None and (
        dqueries.shape != queries.shape or dqueries.device != queries.device or not dqueries.is_contiguous()
    ):
        raise ValueError(
            f"dqueries: expected a contiguous {list(queries.shape)} on {queries.device}, received {list(dqueries.shape)}"
        )
    if on_kernels(queries) and len(queries) and len(passages):
        from kernels.infonce import two_pass

        masks = _tables(exclusions, queries, passages)
        x = two_pass.Operands.of(queries, passages, precision)
        constant = None if column_log_weights is None else two_pass.estimate_shifts(x, scale, False, largest).constant
        budget = _workspace_bytes(queries, passages, workspace_mib)
        return two_pass.negatives_gradient(
            x, scale, masks, row_log_weights, column_log_weights, constant, budget, dqueries
        )
    return reference.negatives_gradient(
        queries,
        passages,
        scale,
        row_log_weights,
        column_log_weights,
        exclusions,
        dqueries=dqueries,
        precision=precision,
    )


def _tables(exclusions: Exclusions | MaskTables | None, queries: Tensor, passages: Tensor) -> MaskTables:
    if isinstance(exclusions, MaskTables):
        return exclusions
    return MaskTables.of(exclusions, torch.full((len(queries),), -1, device=queries.device), len(passages))


def _check(
    queries: Tensor, passages: Tensor, scale: float, exclusions: Exclusions | MaskTables | None, precision: str
) -> None:
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"expected queries [B, D] and passages [N, D], received {list(queries.shape)} and {list(passages.shape)}"
        )
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
    if isinstance(exclusions, MaskTables):
        if (len(exclusions.targets), exclusions.N) != (len(queries), len(passages)):
            received = f"{len(exclusions.targets)} rows and {exclusions.N} columns"
            raise ValueError(
                f"exclusions: expected tables of {len(queries)} rows and {len(passages)} columns, received {received}"
            )
        return
    _check_vector("exclusions.passage_ids", exclusions.passage_ids, len(passages), queries)
    _check_vector("exclusions.known_ptr", exclusions.known_ptr, len(queries) + 1, queries)
    if any(ids.dtype != torch.int64 for ids in (exclusions.passage_ids, exclusions.known_ptr, exclusions.known_ids)):
        raise ValueError("expected exclusions.passage_ids, known_ptr and known_ids as int64")
    if exclusions.threshold is not None:
        _check_vector("exclusions.threshold", exclusions.threshold, len(queries), queries)


def _check_vector(name: str, vector: Tensor, length: int, like: Tensor) -> None:
    if vector.shape != (length,) or vector.device != like.device:
        raise ValueError(
            f"{name}: expected shape [{length}] on {like.device}, received {list(vector.shape)} on {vector.device}"
        )
