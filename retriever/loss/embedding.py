"""Distillation of a teacher's embeddings: the distance of every text's embedding from the teacher's. (Kim et al. 2023,
arXiv:2301.12005)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from retriever.config import ConfigError, LossConfig


def distances(embeddings: Tensor, teacher: Tensor, config: LossConfig) -> Tensor:
    """The distance of each row [n] of embeddings and teacher [n, D]. Raises ConfigError for other dimensions."""
    if embeddings.shape != teacher.shape:
        size, other = embeddings.shape[1], teacher.shape[1]
        raise ConfigError(f"loss.teacher: expected a model with embeddings of {size} dimensions, received {other}")
    teacher = teacher.to(embeddings.dtype)
    if config.embedding_distance == "cosine":
        return 1 - cosine_similarity(embeddings, teacher, dim=1)
    return mse_loss(embeddings, teacher, reduction="none").mean(dim=1)


def distil_embeddings(
    embeddings: Tensor, teacher: Tensor, weights: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """½ · embedding_weight · Σ weights · distance [], and its gradient [n, D]; weights [n] sum to 1 over ranks."""
    with torch.enable_grad():
        leaf = embeddings.detach().requires_grad_()
        each = distances(leaf, teacher, config)
        loss = config.embedding_weight / 2 * (weights * each).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
