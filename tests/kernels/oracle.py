"""InfoNCE by its definition: one matrix of logits in float64, and autograd."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kernels.infonce.api import Exclusions


def excluded_matrix(queries: Tensor, passages: Tensor, exclusions: Exclusions) -> Tensor:
    """[B, N] bool: the pairs that `exclusions` names, row by row."""
    excluded = torch.zeros(len(queries), len(passages), dtype=torch.bool, device=queries.device)
    ptr = exclusions.known_ptr.tolist()  # at once: a GPU would be waited for twice a row
    for row in range(len(queries)):
        known = exclusions.known_ids[ptr[row] : ptr[row + 1]]
        excluded[row] = torch.isin(exclusions.passage_ids, known)
    if exclusions.guide is not None:
        guide = exclusions.guide
        excluded |= guide.queries.double() @ guide.passages.double().T > guide.limit.double()[:, None]
    if exclusions.threshold is not None:
        excluded |= queries.double() @ passages.double().T > exclusions.threshold.double()[:, None]
    return excluded


def hardness_matrix(exclusions: Exclusions) -> Tensor:
    """[B, N] float64: α of every pair, row by row."""
    assert exclusions.own is not None
    own, in_batch = exclusions.hardness
    ids = [exclusions.own.ids[a:b] for a, b in itertools.pairwise(exclusions.own.ptr.tolist())]
    return torch.stack([torch.where(torch.isin(exclusions.passage_ids, row), own, in_batch).double() for row in ids])


def dense_infonce(
    queries: Tensor,
    passages: Tensor,
    targets: Tensor,
    scale: float,
    weights: Tensor,
    excluded: Tensor,
    symmetric: bool,
    hardness: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [B], dqueries, dpassages, dscale) in float64; the gradients are of Σ weights · loss."""
    q, p = queries.double().requires_grad_(), passages.double().requires_grad_()
    s = torch.tensor(float(scale), dtype=torch.float64, device=q.device, requires_grad=True)
    logits = s * (q @ p.T)
    kept, rows = targets >= 0, torch.arange(len(q), device=q.device)
    column = targets.clamp(min=0)
    dropped = excluded.clone()
    dropped[rows[kept], targets[kept]] = True
    dropped[~kept] = True
    harder = logits + hardness * (q @ p.T).detach()
    negatives = harder.masked_fill(dropped, -1e300)  # finite: −inf has no gradient
    target = logits[rows, column]
    loss = torch.logaddexp(negatives.logsumexp(1), target) - target
    if symmetric:
        loss = (loss + torch.logaddexp(negatives.logsumexp(0)[column], target) - target) / 2
    loss = torch.where(kept, loss, 0.0)
    (weights.double() * loss).sum().backward()
    assert q.grad is not None and p.grad is not None and s.grad is not None
    return loss.detach(), q.grad, p.grad, s.grad


def gradient(leaf: Tensor) -> Tensor:
    """The gradient that `leaf` has got."""
    assert leaf.grad is not None
    return leaf.grad


def relative_error(got: Tensor | None, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; NaN where `got` has one."""
    assert got is not None
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)).item()
