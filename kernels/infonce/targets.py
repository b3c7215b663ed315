"""What stands between a query and its own target, row by row: for losses whose negatives come block by block.

`kernels.infonce.api.infonce` does this itself; `negatives_lse` and `negatives_gradient` leave the targets to their
caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import on_kernels
from kernels.infonce.reference import Precision, rounded

__all__ = ["add_target_gradient", "target_similarities"]

_ROWS_AT_ONCE = 65_536  # of a target's embeddings held beside their queries'


def target_similarities(queries: Tensor, passages: Tensor, targets: Tensor, *, precision: Precision = "fp32") -> Tensor:
    """⟨q_i, p_t⟩ with t = targets_i, [B] float32 (float64 for float64 inputs), of the values that `precision` computes
    from.

    queries [B, D], passages [N, D]: one dtype and device. targets [B] int64 in 0..N−1.
    """
    queries, passages = _values(queries, precision), _values(passages, precision)
    if on_kernels(queries) and len(queries):
        from kernels.infonce import rows

        return rows.target_similarities(queries, passages, targets)
    parts = torch.arange(len(queries), device=queries.device).split(_ROWS_AT_ONCE)
    return torch.cat(
        [(rounded(queries[i], precision) * rounded(passages[targets[i]], precision)).sum(dim=1) for i in parts]
    )


def add_target_gradient(
    dqueries: Tensor,
    dpassages: Tensor,
    queries: Tensor,
    passages: Tensor,
    targets: Tensor,
    target_gradient: Tensor,
    *,
    precision: Precision = "fp32",
) -> None:
    """dq_i −= target_gradient_i · p_t and dp_t −= target_gradient_i · q_i for every query i and its target t, in place,
    in the order of i.

    dqueries [B, D] and dpassages [N, D]: float32 (float64 for float64 inputs), contiguous; target_gradient [B]
    likewise, 0 for an ignored row.
    """
    queries, passages = _values(queries, precision), _values(passages, precision)
    if on_kernels(queries) and len(queries):
        from kernels.infonce import rows

        rows.finish_queries(dqueries, queries, passages, targets, None, target_gradient)
        rows.finish_passages(dpassages, queries, targets, target_gradient)
        return
    for i in torch.arange(len(queries), device=queries.device).split(_ROWS_AT_ONCE):
        dqueries[i] -= target_gradient[i, None] * rounded(passages[targets[i]], precision)
        # index_put_ sorts before it adds, so that shared targets sum in the same order every time; index_add_ does not.
        dpassages.index_put_((targets[i],), -target_gradient[i, None] * rounded(queries[i], precision), accumulate=True)


def _values(x: Tensor, precision: Precision) -> Tensor:
    """`x` as it is read, without a copy where its dtype can hold the values of the tier."""
    return x.to(torch.bfloat16) if precision == "bf16" and x.dtype == torch.float32 else x
