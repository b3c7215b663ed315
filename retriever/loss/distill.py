"""Terms over each query's group, its target and its own negatives: distillation from a teacher's scores, and InfoNCE.

With s_ij = scale·⟨q_i, p_j⟩ and t_ij the teacher's score over its temperature, for j in the group G_i, whose first
entry is the target 0:

    kl_i         = Σ_j softmax(t_i)_j · (log softmax(t_i)_j − log softmax(s_i)_j)
    margin_mse_i = mean over j ≠ 0 of ((s_i0 − s_ij) − (t_i0 − t_ij))²

    contrast_i   = −log softmax(s_i)_0

(Hinton et al. 2015, arXiv:1503.02531; Hofstätter et al. 2020, arXiv:2010.02666.) CoSENT (Su 2022,
kexue.fm/archives/8847) takes all scored pairs a, b of the batch together:

    cosent = log(1 + Σ_{a, b : t_a < t_b} exp(s_a − s_b))

by sorting the pairs and log-sum-exps of all that come before or behind one: its memory is linear.

A query lives on its target's rank, its negatives anywhere: passages are gathered, and their gradients summed over
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.infonce.terms import log_one_plus_exp
from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.data.teacher import Groups
from retriever.loss.problem import Problem
from retriever.parallel.world import World

# (students' logits [G], teachers' [G], the row of each [G], ptr [B + 1]): losses [B] and gradient at the students [G].
Term = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_PAIRS_AT_ONCE = 65_536  # whose embeddings are held beside one another


def distill(problem: Problem, targets: Targets, config: LossConfig, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """`over_groups` of kl_weight · kl + margin_mse_weight · margin_mse, 0 where the group has no negative, and a share
    of cosent_weight · cosent · global queries.
    """
    groups = targets.groups
    assert groups is not None
    teachers = groups.scores.to(problem.queries.dtype) / config.teacher_temperature

    def cosent(students: Tensor, teachers: Tensor, rows: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
        kept = problem.active[rows].nonzero()[:, 0]
        values, gradient = _cosent(students[kept], teachers[kept], world)
        losses = students.new_zeros(len(ptr) - 1).index_put((rows[kept],), values, accumulate=True)
        return losses, torch.zeros_like(students).index_put((kept,), gradient)

    cosent_weight = config.cosent_weight * targets.global_queries
    terms: list[tuple[Term, float]] = [(_kl, config.kl_weight), (_margin_mse, config.margin_mse_weight)]
    return over_groups(problem, groups._replace(scores=teachers), [*terms, (cosent, cosent_weight)], world)


def contrast_own(problem: Problem, groups: Groups, weight: float, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """`over_groups` of weight · contrast: InfoNCE whose negatives are a query's own."""
    return over_groups(problem, groups, [(_contrast, weight)], world)


def over_groups(
    problem: Problem, groups: Groups, terms: Sequence[tuple[Term, float]], world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], and `problem.weight` times their gradients dqueries [B, D] and dpassages [N, D].

    The loss of a row is the weighted sum of `terms`; 0 where the row is ignored. Every rank calls it. Raises ValueError
    where a group names a passage that no rank holds.
    """
    passages = world.gather_rows(problem.passages.to(problem.wire_dtype))  # [n, D]
    columns = columns_of(groups.ids, world.gather_rows(problem.exclusions.passage_ids).rows)  # [G]
    sizes = groups.ptr.diff()
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=columns.device), sizes)  # [G]
    pairs = torch.arange(len(rows), device=columns.device).split(_PAIRS_AT_ONCE)
    q, p = problem.queries, passages.rows
    students = (
        torch.cat([q.new_empty(0), *((q[rows[part]] * p[columns[part]]).sum(dim=1) for part in pairs)]) * problem.scale
    )  # [G]
    teachers = groups.scores.to(students.dtype)  # [G]

    losses, dstudents = torch.zeros_like(q[:, 0]), torch.zeros_like(students)
    for term, weight in terms:
        if weight > 0:
            values, gradient = term(students, teachers, rows, groups.ptr)
            losses, dstudents = losses + weight * values, dstudents + weight * gradient
    dstudents = (problem.weight * problem.scale * dstudents).where(problem.active[rows], 0.0)[:, None]  # [G, 1]
    if problem.shares is not None:
        dstudents = dstudents * problem.shares.to(dstudents)[rows, None]
    dqueries, dpassages = torch.zeros_like(q), torch.zeros_like(p, dtype=q.dtype)
    for part in pairs:  # index_put_ sorts before it adds: the same sums every time, on a GPU too
        dqueries.index_put_((rows[part],), dstudents[part] * p[columns[part]], accumulate=True)
        dpassages.index_put_((columns[part],), dstudents[part] * q[rows[part]], accumulate=True)
    return losses.where(problem.active, 0.0), dqueries, world.reduce_rows(dpassages, passages.counts)


def _contrast(students: Tensor, teachers: Tensor, rows: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of each group [B] and its gradient at the students' logits [G]: softmax(s) less 1 at the target."""
    log_s = _log_softmax(students, rows, len(ptr) - 1)
    is_target = (torch.arange(len(rows), device=rows.device) == ptr[rows]).to(students.dtype)
    return _sums(-log_s * is_target, rows, len(ptr) - 1), log_s.exp() - is_target


def _kl(students: Tensor, teachers: Tensor, rows: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of each group [B] and its gradient at the students' logits [G]: softmax(s) − softmax(t)."""
    log_s, log_t = (_log_softmax(x, rows, len(ptr) - 1) for x in (students, teachers))
    return _sums(log_t.exp() * (log_t - log_s), rows, len(ptr) - 1), log_s.exp() - log_t.exp()


def _margin_mse(students: Tensor, teachers: Tensor, rows: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of each group's margins [B] and its gradient at the students' logits [G]."""
    first = ptr[rows]  # [G]: where the target of each entry's group stands
    errors = (students[first] - students) - (teachers[first] - teachers)  # [G], 0 at the targets themselves
    negatives = (ptr.diff() - 1).clamp(min=1)[rows].to(students.dtype)  # [G]
    slopes = 2 * errors / negatives
    at_targets = torch.zeros_like(students).index_put((first,), slopes, accumulate=True)
    return _sums(errors * errors / negatives, rows, len(ptr) - 1), at_targets - slopes


def _cosent(students: Tensor, teachers: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The share of each of this rank's scored pairs [G] in the value over all ranks' pairs, and its gradient at the
    students' logits [G].
    """
    every = world.gather_rows(students)
    scores, order = world.gather_rows(teachers, every.counts).rows.sort(stable=True)
    x = every.rows[order]  # [n]
    lower, not_higher = (torch.searchsorted(scores, scores, right=right) for right in (False, True))
    below = _running_logsumexp(x)[lower] - x  # of the pairs in which each has the higher score
    above = _running_logsumexp(-x.flip(0))[len(x) - not_higher] + x  # the lower one
    total = below.logsumexp(0)
    shares, against = ((part - total.clamp(min=torch.finfo(x.dtype).min)).exp() for part in (below, above))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[every.own]
    return (log_one_plus_exp(total) * shares)[back], (total.sigmoid() * (against - shares))[back]


def _running_logsumexp(x: Tensor) -> Tensor:
    """log Σ e^x of the first 0, 1, … n of x [n]."""
    return torch.cat([x.new_full((1,), -torch.inf), x.logcumsumexp(0)])


def _log_softmax(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """log softmax of x [G] within each of `count` groups."""
    top = x.new_full((count,), -torch.inf).scatter_reduce(0, rows, x, "amax")
    shifted = x - top[rows]
    return shifted - _sums(shifted.exp(), rows, count).log()[rows]


def _sums(x: Tensor, rows: Tensor, count: int) -> Tensor:
    return x.new_zeros(count).index_put((rows,), x, accumulate=True)


def columns_of(ids: Tensor, passage_ids: Tensor) -> Tensor:
    """The column of each of ids [G] in the gathered passage_ids [n]. Raises ValueError for an id that is not there."""
    ordered, order = passage_ids.sort()
    place = torch.searchsorted(ordered, ids).clamp(max=len(ordered) - 1)
    missing = ordered[place] != ids
    if bool(missing.any()):
        raise ValueError(
            f"passage {int(ids[missing][0])} of a teacher's group is in no rank's batch; expected each group inside "
            "the batch"
        )
    return order[place]
