"""From sums over negatives to losses, and to the weights that turn exponentials into gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.infonce.terms import log_one_plus_exp, sum_by_target
from retriever.loss.problem import Problem


@dataclass(frozen=True)
class Terms:
    """What follows from the rows' and columns' log-sum-exps; a row that is ignored has no weight."""

    losses: Tensor  # [B], 0 for an ignored row
    row_log_weights: (
        Tensor  # [B]: log of what exp(scale · s_ij) is multiplied with in row i's part of the gradient at the logits
    )
    column_log_weights: Tensor | None  # [N]: likewise for the columns of own passages, where symmetric
    target_gradient: Tensor  # [B]: −scale · the gradient at the target's logit

    @staticmethod
    def of(problem: Problem, positive: Tensor, row_lse: Tensor, column_lse: Tensor | None) -> Terms:
        """positive [B]: scale · s_it with the target t; row_lse [B] over the negatives of the row; column_lse [N] of
        own passages or None.

        With z = positive, w the weight of a row's direction: loss = log(1 + e^{lse − z}), gradient at z −w·σ(lse − z),
        at a negative's logit s w·e^{s − log(e^z + e^lse)} = w·σ(lse − z)·e^{s − lse}; nothing cancels where the
        positive dominates.
        """
        active, columns = problem.active, problem.columns
        weight = problem.weight if column_lse is None else problem.weight / 2
        losses, share = log_one_plus_exp(row_lse - positive), torch.sigmoid(row_lse - positive)
        row_log_weights = (math.log(weight) - torch.logaddexp(positive, row_lse)).where(active, -torch.inf)
        column_log_weights = None
        if column_lse is not None:
            of_targets = column_lse[columns]  # [B]
            losses = (losses + log_one_plus_exp(of_targets - positive)) / 2
            column_share = torch.sigmoid(of_targets - positive)
            share = share + column_share
            # A passage that several queries have as target has a term for each.
            pulled = sum_by_target((weight * column_share).where(active, 0.0), columns, len(column_lse))
            column_log_weights = torch.where(pulled > 0, pulled.log() - column_lse, -torch.inf)
        target_gradient = (problem.scale * weight * share).where(active, 0.0)
        return Terms(losses.where(active, 0.0), row_log_weights, column_log_weights, target_gradient)
