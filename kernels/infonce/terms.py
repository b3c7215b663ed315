"""InfoNCE's algebra, row by row: from log-sum-exps over the negatives to losses and to the weights of the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What follows from the log-sum-exps; −inf and 0 leave a row or a column out of the gradient."""

    loss: Tensor  # [B]
    row_log_weights: Tensor  # [B]: log of what e^logit is multiplied with in row i's part of the gradient at the logits
    column_log_weights: Tensor | None  # [N]: likewise for the columns; None in one direction
    target_gradient: Tensor  # [B]: −dL/dlogit of the row's target

    @staticmethod
    def of(row_lse: Tensor, column_lse: Tensor | None, logit: Tensor, targets: Tensor, weights: Tensor) -> Terms:
        """logit [B] is that of the target; row_lse [B] and column_lse [N] (None: one direction) are of the negatives;
        weights [B] ≥ 0.

        loss = log(1 + e^{lse − logit}), whose gradient at the target's logit is −w·σ(lse − logit), and at a negative's
        logit s w·σ(lse − logit)·e^{s − lse}. Symmetric, both directions count half.
        """
        against_row = row_lse - logit
        loss, of_rows = log_one_plus_exp(against_row), weights * against_row.sigmoid()
        target_gradient, column_log_weights = of_rows, None
        if column_lse is not None:
            against_column = column_lse[targets] - logit
            loss = (loss + log_one_plus_exp(against_column)) / 2
            of_rows, of_columns = of_rows / 2, weights * against_column.sigmoid() / 2
            target_gradient = of_rows + of_columns
            # A passage that several queries have as target has a term for each.
            column_log_weights = _log_weights(sum_by_target(of_columns, targets, len(column_lse)), column_lse)
        return Terms(loss, _log_weights(of_rows, row_lse), column_log_weights, target_gradient)


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


def _log_weights(target_gradient: Tensor, lse: Tensor) -> Tensor:
    return torch.where(target_gradient > 0, target_gradient.log() - lse, -torch.inf)
