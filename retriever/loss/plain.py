"""The objective written out plainly over full similarity matrices, for autograd: what `run.verify` compares with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, mse_loss, normalize

from kernels.infonce.api import Lists
from retriever.config import LossConfig
from retriever.data.targets import Targets
from retriever.data.teacher import Groups
from retriever.loss.contrastive import false_negatives_from
from retriever.loss.custom import CustomLoss, LossTargets
from retriever.loss.embedding import distances


def plain_objective(
    queries: Tensor, passages: Tensor, targets: Targets, loss: LossConfig, unit_norm: bool, custom: CustomLoss | None
) -> Tensor:
    """The loss [] of queries [B, D] and passages [N, D] of one rank, differentiable; memory is B · N.

    `unit_norm`: leading dimensions of `loss.dims` are normalised again. `custom` takes the place of the contrastive
    loss.
    """
    targets, total = targets.to(queries.device), queries.new_zeros(())
    dims = loss.dims or (queries.shape[1],)
    for d, weight in zip(dims, loss.dim_weights or (1.0,) * len(dims), strict=True):
        q, p = queries[:, :d], passages[:, :d]
        if loss.dims and unit_norm:
            q, p = normalize(q, dim=1), normalize(p, dim=1)
        value = _infonce(q, p, targets, loss) if custom is None else _custom_loss(q, p, targets, loss, custom)
        total = total + weight * value
    if targets.teacher is not None:
        total = total + _teacher_distance(queries, passages, targets, loss)
    return total


def _custom_loss(queries: Tensor, passages: Tensor, targets: Targets, loss: LossConfig, custom: CustomLoss) -> Tensor:
    """The function of `loss.custom`, called once with all queries that are not ignored."""
    contrasted = targets.positives >= 0
    active = (contrasted if targets.in_batch is None else contrasted & targets.in_batch).nonzero()[:, 0]
    column = targets.positives[active]
    excluded = torch.zeros(len(queries), len(passages), dtype=torch.bool, device=queries.device)
    scores = queries.new_full(excluded.shape, torch.nan)
    for i in active.tolist():
        known = targets.known_ids[targets.known_ptr[i] : targets.known_ptr[i + 1]]
        excluded[i] = torch.isin(targets.passage_ids, known)
        if targets.groups is not None:
            group = slice(int(targets.groups.ptr[i]), int(targets.groups.ptr[i + 1]))
            place = (targets.passage_ids[None, :] == targets.groups.ids[group, None]).nonzero()[:, 1]
            scores[i, place] = targets.groups.scores[group].to(scores.dtype)
    if targets.pools is not None:
        of_rows, of_columns = targets.pools.of_columns(targets.passage_ids)
        excluded |= of_rows[:, None] != of_columns[None, :]
    excluded, q = excluded[active], queries[active]
    if targets.guide is not None:
        of_queries, of_passages, limit = targets.guide
        excluded |= of_queries[active].double() @ of_passages.double().T > limit[active, None]
    if loss.false_negative_margin is not None:
        threshold = false_negatives_from(q.detach(), passages.detach()[column], loss.false_negative_margin)
        excluded |= (q @ passages.T).detach() > threshold[:, None]
    excluded[torch.arange(len(column), device=column.device), column] = False
    given = scores[active] if targets.groups is not None else None
    losses = custom.function(q, passages, LossTargets(column, excluded, given, loss.temperature))
    return loss.contrastive_weight * losses.sum() / targets.global_queries


def _infonce(queries: Tensor, passages: Tensor, targets: Targets, loss: LossConfig) -> Tensor:
    """Contrastive loss and a teacher's terms."""
    active, column = targets.positives >= 0, targets.positives.clamp(min=0)
    contrasted = active if targets.in_batch is None else active & targets.in_batch
    temperature = loss.temperature if targets.temperature is None else targets.temperature
    known, own = _listed(targets.exclusions.known, targets.passage_ids), torch.zeros_like(active)[:, None]
    if targets.own is not None:
        own = _listed(targets.own, targets.passage_ids)
    if targets.pools is not None:
        pools, of_passages = targets.pools.of_columns(targets.passage_ids)
        known = known | (pools[:, None] != of_passages[None, :])
    similarities = queries @ passages.T
    positive = similarities.gather(1, column[:, None])[:, 0]
    threshold = torch.full_like(positive, torch.inf)
    if loss.false_negative_margin is not None:
        threshold = false_negatives_from(queries.detach(), passages.detach()[column], loss.false_negative_margin)

    def negatives(x: Tensor, excluded: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """The logits of similarities x [B, n], −inf where a pair is none of row i's negatives; `rows` [B, G] and
        `columns` [n, G] are a guide's vectors.
        """
        excluded = excluded | ~contrasted[:, None] | (x.detach() > threshold[:, None])
        if targets.guide is not None and rows is not None and columns is not None:
            excluded |= rows.double() @ columns.double().T > targets.guide.limit[:, None]
        return (x / temperature).masked_fill(excluded, -torch.inf)

    guide_q, guide_p, _ = targets.guide or (None, None, None)
    guide_t = None if guide_p is None else guide_p[column]
    plain = negatives(similarities, known, guide_q, guide_p)
    harder = {"none": torch.zeros_like(own), "own": own, "in_batch": ~own, "all": torch.ones_like(own)}[loss.hardness]
    of_queries = (
        known[:, column] | ~contrasted[None, :]
    )  # a query whose target is known to another is no negative of it
    logits = {
        "query_to_passage": plain + loss.hardness_strength * harder * similarities.detach(),
        "passage_to_query": plain.T[column],
        "query_to_query": negatives(queries @ queries.T, of_queries, guide_q, guide_q),
        "passage_to_passage": negatives(passages[column] @ passages.T, known | own, guide_t, guide_p),
    }
    directions, partition = loss.softmaxes
    s = positive / temperature
    if partition == "joint":
        count = 1 + ("passage_to_query" in directions)  # the target stands in both of these
        losses = torch.cat([*(logits[d] for d in directions), s[:, None].expand(-1, count)], 1).logsumexp(1) - s
    else:
        each = [torch.cat([logits[d], s[:, None]], 1).logsumexp(1) - s for d in directions]
        losses = torch.stack(each).mean(0)
    shares = torch.ones_like(positive) if targets.shares is None else targets.shares
    total = loss.contrastive_weight * (shares * losses).where(contrasted, 0.0).sum()
    rows, students = active.nonzero()[:, 0].tolist(), similarities / temperature
    if targets.own_groups is not None:
        among_own = [shares[i] * _own_loss(students[i], targets, i) for i in rows]
        total = total + loss.contrastive_weight * torch.stack(among_own).sum()
    if loss.cosent_weight > 0:
        total = total + loss.cosent_weight * targets.global_queries * _cosent(similarities, targets, loss)
    if loss.compares_negatives:
        total = total + sum(shares[i] * _taught_loss(students[i], targets, i, loss) for i in rows)
    return total / targets.global_queries


def _listed(lists: Lists, passage_ids: Tensor) -> Tensor:
    """[B, N] bool: which passages each row's list has."""
    rows = [torch.isin(passage_ids, ids) for ids in lists.ids.split(lists.ptr.diff().tolist())]
    return torch.stack(rows) if rows else passage_ids.new_empty(0, len(passage_ids), dtype=torch.bool)


def _teacher_distance(queries: Tensor, passages: Tensor, targets: Targets, loss: LossConfig) -> Tensor:
    """Half the mean distance of queries from the teacher's, and half that of passages."""
    assert targets.teacher is not None
    of_queries = distances(queries, targets.teacher.queries, loss)
    of_passages = distances(passages, targets.teacher.passages, loss)
    shares = torch.ones_like(of_queries) if targets.shares is None else targets.shares
    return loss.embedding_weight / 2 * ((shares * of_queries).sum() / targets.global_queries + of_passages.mean())


def _cosent(similarities: Tensor, targets: Targets, loss: LossConfig) -> Tensor:
    """log(1 + Σ e^{s_a − s_b}) over all scored pairs a and b of which b has the higher score."""
    assert targets.groups is not None
    ptr, ids, scores = targets.groups
    rows = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
    kept = targets.positives[rows] >= 0
    columns = (targets.passage_ids[None, :] == ids[:, None]).nonzero()[:, 1]
    s, t = similarities[rows, columns][kept] / loss.temperature, scores[kept]
    differences = (s[:, None] - s[None, :])[t[:, None] < t[None, :]]
    return torch.cat([s.new_zeros(1), differences]).logsumexp(0)


def _of_group(logits: Tensor, targets: Targets, groups: Groups, i: int) -> tuple[Tensor, Tensor]:
    """The logits of query i with the passages of its group, and the teacher's scores of these."""
    group = slice(int(groups.ptr[i]), int(groups.ptr[i + 1]))
    columns = (targets.passage_ids[None, :] == groups.ids[group, None]).nonzero()[:, 1]
    return logits[columns], groups.scores[group].to(logits.dtype)


def _own_loss(logits: Tensor, targets: Targets, i: int) -> Tensor:
    """InfoNCE of query i among its own passages, whose logits with all passages are [N]; 0 where it has no group."""
    assert targets.own_groups is not None
    student, _ = _of_group(logits, targets, targets.own_groups, i)
    return student.logsumexp(0) - student[0] if len(student) else logits.new_zeros(())


def _taught_loss(logits: Tensor, targets: Targets, i: int, loss: LossConfig) -> Tensor:
    """The teacher's terms of query i, whose logits with all passages are [N]."""
    assert targets.groups is not None
    student, scores = _of_group(logits, targets, targets.groups, i)
    if len(student) < 2:
        return logits.new_zeros(())
    teacher = scores / loss.teacher_temperature
    kl = kl_div(student.log_softmax(0), teacher.log_softmax(0), reduction="sum", log_target=True)
    margin_mse = mse_loss(student[0] - student[1:], teacher[0] - teacher[1:])
    return loss.kl_weight * kl + loss.margin_mse_weight * margin_mse
