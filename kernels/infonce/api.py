"""InfoNCE over query–passage similarities and its gradients, without the similarity matrix.

`infonce` computes all of it where all passages are at hand. For passages that arrive block by block, `block_of` makes a
block whose `lse` and `gradient` add up over blocks, and `two_pass` drives both. Memory is O(B + N) beside inputs and
outputs. (Cheng et al. 2024, arXiv:2410.17243)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.dispatch import on_kernels
from kernels.infonce.deferred import Deferred
from kernels.infonce.exclusions import Exclusions, MaskTables
from kernels.infonce.pooled import PooledBlock
from kernels.infonce.reference import Block, Precision
from kernels.infonce.rules import Guide, Hardness, Lists
from kernels.infonce.two_pass import Passages, Source, first_pass, second_pass

__all__ = [
    "Block", "Exclusions", "Guide", "Hardness", "InfoNCE", "Lists", "MaskTables", "Precision", "block_of", "infonce",
]  # fmt: skip


@dataclass(frozen=True)
class InfoNCE:
    """Per-row losses and, where asked for, the gradients of Σ weight · loss."""

    loss: Tensor  # [B] float32, 0 for an ignored row
    dqueries: Tensor | None = None  # [B, D] float32
    dpassages: Tensor | None = None  # [N, D] float32
    dscale: Tensor | None = None  # []


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
    query i being log(e^{x_it} + Σ_{k : (k,t) ∈ neg} e^{x_kt}) − x_it. A negative's x_ij is larger by its hardness ·
    stop_gradient(s_ij). A row with target −1 has loss 0 and is no negative of any passage; a row without negatives has
    loss 0 and gradient 0.

    queries [B, D], passages [N, D]: one floating dtype and device, rows may be strided. targets [B] int64 in −1..N−1.
    weights [B] ≥ 0, None: ones; the gradients are of Σ_i weights_i · loss_i. `precision`: "bf16" (rounded inputs, fp32
    accumulation), "high" (error ≤ 1e-5), "fp32". On a GPU, blocks of exponentials take at most `workspace_mib` MiB,
    None: up to 1 GiB of what is free; more makes fewer, larger matrix products. `MaskTables` are of the same targets.
    Results are float32 (float64 for float64 inputs), the same bits every time.

    What the caller knows spares the host waiting for the device, and is taken on trust: `ignored`, whether any target
    is −1, all being in range; `largest`, what no |⟨q_i, p_j⟩| exceeds but by rounding to bf16 (1 for unit vectors).
    With ignored=False, `MaskTables` and largest · scale ≤ 53, a GPU is asked nothing. Raises ValueError where shapes,
    dtypes, devices or targets do not fit. (Gao et al. 2021, arXiv:2101.06983; Cheng et al. 2024, arXiv:2410.17243)
    """
    _check(queries, passages, scale, precision, workspace_mib)
    _check_vector("targets", targets, len(queries), queries)
    if targets.dtype != torch.int64:
        raise ValueError(f"expected targets as int64, received {targets.dtype}")
    if weights is not None:
        _check_vector("weights", weights, len(queries), queries)
    masks, N = _tables(exclusions, targets, queries, passages), len(passages)
    accumulated = torch.float64 if queries.dtype == torch.float64 else torch.float32
    weights = queries.new_ones(len(queries), dtype=accumulated) if weights is None else weights.to(accumulated)
    if not len(queries) or not N:
        if not gradients:
            return InfoNCE(torch.zeros_like(weights))
        dqueries, dpassages = (x.new_zeros(x.shape, dtype=accumulated) for x in (queries, passages))
        return InfoNCE(torch.zeros_like(weights), dqueries, dpassages, weights.new_zeros(()))
    extent = Deferred(torch.stack(torch.aminmax(targets))) if ignored is None else None
    if extent is not None and symmetric:  # looked at first, since leaving rows out of the columns takes time
        ignored, extent = _some_ignored(extent, N), None
    active = None
    if ignored is not False:  # queued before the targets are known to be right: the check then waits for nothing more
        active = targets >= 0
        weights, targets = weights * active, targets.clamp(0, N - 1)
        masks = masks.without_rows(~active) if symmetric else masks
    block = _block(queries, passages, scale, masks, precision, workspace_mib, largest)
    found = _infonce(block, targets, weights, symmetric=symmetric, gradients=gradients)
    if extent is not None:
        _some_ignored(extent, N)
    return found if active is None else replace(found, loss=found.loss.where(active, 0.0))


def _infonce(block: Block, targets: Tensor, weights: Tensor, *, symmetric: bool, gradients: bool) -> InfoNCE:
    """`infonce` of targets in 0..N−1, in one pass where that is possible and the workspace has room for it."""
    if on_kernels(block.queries) and gradients and not symmetric:
        from kernels.infonce import one_pass

        if isinstance(block, one_pass.TiledBlock) and one_pass.has_room(block):
            loss, dqueries, dpassages, along = one_pass.infonce(block, targets, weights)
            return InfoNCE(loss, dqueries, dpassages, along.sum() / block.scale)
    passages = Passages(block, targets)
    loss, terms = first_pass([Source(passages, columns=symmetric)], targets, weights)
    if not gradients:
        return InfoNCE(loss)
    return InfoNCE(loss, *second_pass(passages, terms[0]), passages.along.sum() / block.scale)


def block_of(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    exclusions: Exclusions | MaskTables | None = None,
    *,
    precision: Precision = "fp32",
    workspace_mib: int | None = None,
    largest: float | None = None,
) -> Block:
    """A block of queries [B, D] and passages [N, D], one dtype and device, for `Block.lse` and `Block.gradient`.

    `MaskTables`, made beforehand, spare a block that comes by twice the second look-up of its known pairs. `precision`
    names what the similarities are computed from: "bf16" rounds the inputs first, "fp32" takes them as they are, "high"
    promises an error below 1e-5. `workspace_mib` and `largest` are those of `infonce`. Raises ValueError where shapes,
    dtypes or devices do not fit.
    """
    _check(queries, passages, scale, precision, workspace_mib)
    masks = _tables(exclusions, None, queries, passages)
    return _block(queries, passages, scale, masks, precision, workspace_mib, largest)


def _block(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    masks: MaskTables,
    precision: Precision,
    workspace_mib: int | None,
    largest: float | None,
) -> Block:
    kind = Block
    if on_kernels(queries) and len(queries) and len(passages):
        from kernels.infonce.passes import TiledBlock

        kind = TiledBlock
    if masks.pools is not None and len(queries) and len(passages):
        return PooledBlock(queries, passages, scale, masks, precision, workspace_mib, largest, kind)
    return kind(queries, passages, scale, masks, precision, workspace_mib, largest)


def _tables(
    exclusions: Exclusions | MaskTables | None, targets: Tensor | None, queries: Tensor, passages: Tensor
) -> MaskTables:
    """The tables of `exclusions`, which fit the block, and of targets [B] (None: none of its queries has one here)."""
    B, N = len(queries), len(passages)
    if isinstance(exclusions, MaskTables):
        if (len(exclusions.targets), exclusions.N) != (B, N):
            received = f"{len(exclusions.targets)} rows and {exclusions.N} columns"
            raise ValueError(f"exclusions: expected tables of {B} rows and {N} columns, received {received}")
        return exclusions
    if exclusions is not None:
        _check_vector("exclusions.passage_ids", exclusions.passage_ids, N, queries)
        _check_vector("exclusions.known_ptr", exclusions.known_ptr, B + 1, queries)
        if any(
            ids.dtype != torch.int64 for ids in (exclusions.passage_ids, exclusions.known_ptr, exclusions.known_ids)
        ):
            raise ValueError("expected exclusions.passage_ids, known_ptr and known_ids as int64")
        if exclusions.threshold is not None:
            _check_vector("exclusions.threshold", exclusions.threshold, B, queries)
        if exclusions.guide is not None:
            _check_guide(exclusions.guide, B, N, queries)
    return MaskTables.of(exclusions, torch.full((B,), -1, device=queries.device) if targets is None else targets, N)


def _check(queries: Tensor, passages: Tensor, scale: float, precision: str, workspace_mib: int | None) -> None:
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"expected queries [B, D] and passages [N, D], received {list(queries.shape)} and {list(passages.shape)}"
        )
    if queries.dtype != passages.dtype or queries.device != passages.device or not queries.is_floating_point():
        raise ValueError(
            "expected queries and passages of one floating dtype on one device, received "
            f"{queries.dtype} on {queries.device} and {passages.dtype} on {passages.device}"
        )
    if not scale > 0:
        raise ValueError(f"expected scale = 1/temperature above 0, received {scale}")
    if precision not in ("bf16", "high", "fp32"):
        raise ValueError(f"expected precision bf16, high or fp32, received {precision!r}")
    if workspace_mib is not None and workspace_mib < 1:
        raise ValueError(f"expected workspace_mib of at least 1, received {workspace_mib}")


def _check_guide(guide: Guide, B: int, N: int, like: Tensor) -> None:
    _check_vector("exclusions.guide.limit", guide.limit, B, like)
    rows, half = (len(guide.queries), len(guide.passages)), guide.queries.dtype == guide.passages.dtype == torch.float16
    if rows != (B, N) or not half or guide.queries.shape[1:] != guide.passages.shape[1:]:
        received = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (guide.queries, guide.passages))
        raise ValueError(f"exclusions.guide: expected float16 [{B}, G] and [{N}, G], received {received}")


def _some_ignored(extent: Deferred, N: int) -> bool:
    """Whether the smallest target of `extent`, smallest and largest, is −1. Raises ValueError where one is out of
    range.
    """
    least, most = extent.get()
    if least < -1 or most >= N:
        raise ValueError(
            f"expected targets between -1 and {N - 1} (a column of passages), received {least:.0f} to {most:.0f}"
        )
    return least < 0


def _check_vector(name: str, vector: Tensor, length: int, like: Tensor) -> None:
    if vector.shape != (length,) or vector.device != like.device:
        raise ValueError(
            f"{name}: expected shape [{length}] on {like.device}, received {list(vector.shape)} on {vector.device}"
        )
