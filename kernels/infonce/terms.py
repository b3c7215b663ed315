"""InfoNCE's algebra, row by row: from log-sum-exps over the negatives to losses and to the weights of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """Per-row and per-column terms of the gradient of one set of blocks; −inf and 0 leave a row or a column out."""

    row_log_weights: Tensor  # [B]: log of what e^logit is multiplied with in row i's part of the gradient at the logits
    column_log_weights: Tensor | None  # [N]: likewise for the columns; None: no direction sums over them
    target_gradient: Tensor  # [B]: −dL/dlogit of the row's target


class Losses(NamedTuple):
    """Every query's loss, and how its gradient is shared out."""

    loss: Tensor  # [B]
    shares: list[Tensor]  # of each direction [B]: the gradient at the log-sum-exp of its negatives
    target_gradient: Tensor  # [B]: −dL/dlogit of the row's target, the sum of the shares

    @staticmethod
    def of(lses: Sequence[Tensor], logit: Tensor, weights: Tensor, joint_targets: int = 0) -> Losses:
        """lses: of each direction [B], log Σ e^{negative's logit}; logit [B] of the target; weights [B] ≥ 0 of losses.

        Each direction has a softmax of its own, and the loss is their mean: log(1 + e^{lse − logit}), whose gradient at
        the target's logit is −w·σ(lse − logit), and at a negative's logit s w·σ(lse − logit)·e^{s − lse}. With
        `joint_targets` m ≥ 1 there is one softmax over all directions, in which the target stands m times: the loss is
        log(m + e^{lse − logit}) with the lse of all.
        """
        pools = [lses] if joint_targets else [[lse] for lse in lses]
        log_m = math.log(max(1, joint_targets))
        loss, target_gradient, shares = torch.zeros_like(logit), torch.zeros_like(logit), []
        for pool in pools:
            lse = pool[0] if len(pool) == 1 else torch.stack(list(pool)).logsumexp(dim=0)
            against = lse - logit - log_m
            of_pool = weights * against.sigmoid() / len(pools)
            loss = loss + (log_one_plus_exp(against) + log_m) / len(pools)
            target_gradient = target_gradient + of_pool
            shares += [of_pool * (part - lse).nan_to_num(nan=0.0).exp() for part in pool]  # NaN: both are −inf
        return Losses(loss, shares, target_gradient)


def log_one_plus_exp(x: Tensor) -> Tensor:
    """log(1 + eˣ) in full precision for any x, −inf included: the loss of a row whose negatives' lse exceeds the
    target's logit by x.
    """
    return torch.logaddexp(x, torch.zeros_like(x))


def sum_by_target(values: Tensor, targets: Tensor, N: int) -> Tensor:
    """Σ_{i : targets_i = j} values_i for each of N passages j, in a fixed order: [N] of the dtype of values [B];
    targets [B] in 0..N−1.
    """
    # As index_put_, which sorts before it adds, but without the question whether targets are in range: the host would
    # wait for the answer.
    return torch._index_put_impl_(values.new_zeros(N), (targets,), values, accumulate=True, unsafe=True)


def log_weights(share: Tensor, lse: Tensor) -> Tensor:
    """log of what e^logit is multiplied with in the gradient, where all e^logit sum to e^lse and their gradients to
    `share`.
    """
    return torch.where(share > 0, share.log() - lse, -torch.inf)
