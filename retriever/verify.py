"""The gradient contract on the user's own data, before step 1: the cached gradient against the whole batch's."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, mse_loss, normalize

from kernels.infonce.api import Lists
from retriever.config import ConfigError, LossConfig
from retriever.data.batch import Batch, Groups, Targets
from retriever.data.chunks import Chunk
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.data.tokens import Side
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective, false_negatives_from
from retriever.loss.custom import CustomLoss, LossTargets
from retriever.loss.embedding import distances
from retriever.parallel.world import World
from retriever.retention import NOTHING, Retention
from retriever.rng import RngState
from retriever.wording import counted

# A gradient below this is rounding: texts that truncate to the same tokens, or a batch without negatives.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class GradientCheck:
    """The distance of the cached gradient from the whole batch's."""

    queries: int
    passages: int
    chunks: int
    loss_error: float  # relative
    gradient_error: float  # ‖g − g*‖ / ‖g*‖ over all parameters together

    def __str__(self) -> str:
        return (
            f"{counted(self.queries, 'query')} and {counted(self.passages, 'passage')} in "
            f"{counted(self.chunks, 'chunk')}: gradient equal to the whole batch's to {self.gradient_error:.1e}, "
            f"loss to {self.loss_error:.1e}"
        )


def gradient_error(
    encoder: DualEncoder,
    loss: LossConfig,
    batch: Batch,
    *,
    block_rows: int | None = None,
    custom: CustomLoss | None = None,
) -> GradientCheck:
    """Compares the cached gradient of one rank's `batch` with that of a whole-batch forward pass and autograd.

    Returns the relative errors of the loss and of the gradient. Both sides use copies of the model in float64 without
    dropout, and the loss in full precision, so that the method is measured and not the rounding. With `block_rows`,
    representations are in host memory, in blocks of so many rows. The whole batch must fit in memory. The encoder and
    the global random state do not change. Raises ConfigError if the whole batch's gradient is zero but for rounding.
    """
    state = RngState.capture(encoder.device)
    exact = copy.deepcopy(encoder).double().eval()
    exact.autocast_dtype, custom = None, copy.deepcopy(custom)
    world = World(encoder.device)
    loss = replace(loss, precision="fp32", learn_temperature=False)

    with state.restored():
        objective = ContrastiveObjective(loss, unit_norm=exact.normalize, block_rows=block_rows, custom=custom)
        objective.double()
        cached = []
        # Every chunk encoded again; then some of them not, and some in part.
        for retention in (NOTHING, _some_of_each(exact, batch)):
            representations, first = encode_without_graph(exact, batch, retention, offload=objective.offload)
            value, gradients = representation_gradients(objective, representations, batch, world)
            backward_through_encoder(exact, batch, gradients, first)
            cached.append(_take_gradients(exact))

        whole = {side: _encode_whole(exact, batch, side) for side in ("query", "passage")}
        reference = torch.zeros((), dtype=torch.float64, device=exact.device)
        for d, weight in zip(
            loss.dims or (exact.dimension,), loss.dim_weights or (1.0,) * max(1, len(loss.dims)), strict=True
        ):
            queries, passages = (whole[side][:, :d] for side in ("query", "passage"))
            if loss.dims and exact.normalize:
                queries, passages = normalize(queries, dim=1), normalize(passages, dim=1)
            if custom is None:
                value_of = _autograd_loss(queries, passages, batch, loss)
            else:
                value_of = _custom_loss(queries, passages, batch.targets.to(queries.device), loss, custom)
            reference = reference + weight * value_of
        if batch.targets.teacher is not None:
            reference = reference + _teacher_distance(whole, batch.targets, loss)
        reference.backward()
        expected = _take_gradients(exact)

    norm = torch.linalg.vector_norm(expected)
    if not norm > _ROUNDING:
        raise ConfigError(
            f"run.verify: the gradient of {batch.sizes[0]} queries is {norm:.1e}, rounding alone, and proves nothing"
        )
    error = max(torch.linalg.vector_norm(gradient - expected) for gradient in cached) / norm
    return GradientCheck(*batch.sizes, len(batch.chunks), abs(value.item() / reference.item() - 1), error.item())


def _some_of_each(encoder: DualEncoder, batch: Batch) -> Retention:
    """The first third of the chunks keep their graphs, and the second third products where layers keep some."""
    sizes = [chunk.tokens.input_ids.numel() for chunk in batch.chunks]
    third = -(-len(sizes) // 3)
    return Retention(sum(sizes[:third]), sum(sizes[third : 2 * third]) if encoder.keeps_products else 0)


def _encode_whole(encoder: DualEncoder, batch: Batch, side: Side) -> Tensor:
    """All of one side in a single forward pass, in the batch's order."""
    chunks: list[Chunk] = [chunk for chunk in batch.chunks if chunk.side == side]
    texts = {row: text for chunk in chunks for row, text in zip(chunk.rows.tolist(), _texts(chunk.tokens), strict=True)}
    rows = [texts[row] for row in range(len(texts))]
    packed = isinstance(chunks[0].tokens, Packed)
    whole: Padded | Packed = pack_rows(rows) if packed else pad_rows(rows, pad_id=0)
    return encoder(side, whole.map(lambda t: t.to(encoder.device)))


def _texts(tokens: Padded | Packed) -> list[np.ndarray]:
    """Each text's own tokens."""
    if isinstance(tokens, Packed):
        return np.split(tokens.input_ids.cpu().numpy(), tokens.starts[1:-1].cpu().numpy())
    return [ids[mask.bool()].cpu().numpy() for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]


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


def _autograd_loss(queries: Tensor, passages: Tensor, batch: Batch, loss: LossConfig) -> Tensor:
    """The objective written out plainly over the full similarity matrices, for autograd."""
    targets = batch.targets.to(queries.device)
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


def _teacher_distance(whole: dict[str, Tensor], targets: Targets, loss: LossConfig) -> Tensor:
    """Half the mean distance of queries from the teacher's, and half that of passages."""
    assert targets.teacher is not None
    queries, passages = (
        distances(x, of_teacher.to(x.device), loss)
        for x, of_teacher in zip((whole["query"], whole["passage"]), targets.teacher, strict=True)
    )
    shares = 1.0 if targets.shares is None else targets.shares.to(queries.device)
    return loss.embedding_weight / 2 * ((shares * queries).sum() / targets.global_queries + passages.mean())


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


def _take_gradients(encoder: DualEncoder) -> Tensor:
    """All gradients in one vector, and clears them."""
    gradients = torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in encoder.parameters()]
    )
    encoder.zero_grad(set_to_none=True)
    return gradients
