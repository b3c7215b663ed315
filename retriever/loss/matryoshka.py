"""The loss at several leading dimensions of the embeddings, so that they can be cut short afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

Contrast = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def over_leading_dimensions(
    contrast: Contrast,
    queries: Tensor,
    passages: Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    unit_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_d w_d · L(q[:d], p[:d]) and its gradients, [], [B, D] and [N, D]. (Kusupati et al. 2022, arXiv:2205.13147)

    `contrast(queries, passages, w)` gives a loss and w times its gradients. Slices are unit vectors again where
    `unit_norm`. Raises ValueError where a dimension is larger than D.
    """
    if max(dims) > queries.shape[1]:
        raise ValueError(f"loss.dims: {max(dims)} is more than the {queries.shape[1]} dimensions of the embeddings")
    total, dqueries, dpassages = queries.new_zeros(()), torch.zeros_like(queries), torch.zeros_like(passages)
    for d, weight in zip(dims, weights, strict=True):
        with torch.enable_grad():
            whole = queries.detach().requires_grad_(), passages.detach().requires_grad_()
            cut = [normalize(x[:, :d], dim=1) if unit_norm else x[:, :d] for x in whole]
        loss, *at_cut = contrast(cut[0].detach(), cut[1].detach(), weight)
        dq, dp = torch.autograd.grad(cut, whole, at_cut)
        total, dqueries, dpassages = total + weight * loss, dqueries + dq, dpassages + dp
    return total, dqueries, dpassages
