"""Four ways to compute one loss over many ranks; they differ in memory, arithmetic and traffic, not in the result.

b = Σ B and n = Σ N over ranks. Per rank:

    dense   gathers queries and passages and holds b × n similarities; every rank computes the whole loss, so that no
            gradient travels
    local   gathers passages (queries too where symmetric) and holds B × n; gradients come home through the gather, by a
            reduce-scatter (OpenCLIP's local loss)
    disco   holds B × n too; the gradient's own-rank part never leaves the rank, the cross-rank part is all-reduced
            (Chen et al. 2023, arXiv:2304.08480)
    tiled   gathers passages and holds no similarities: O((B + n)·D) memory, see `tiled.py`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.infonce.api import Exclusions
from kernels.infonce.exclusions import known_pairs
from kernels.infonce.terms import log_one_plus_exp
from retriever.loss.problem import Problem
from retriever.loss.tiled import tiled
from retriever.parallel.world import Gathered, World


def dense(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D], dpassages [N, D] from all b × n similarities on every rank."""
    queries, passages = world.gather_rows(problem.queries), world.gather_rows(problem.passages)
    exclusions = exclusions_of_all_rows(problem, world, world.gather_rows(problem.exclusions.passage_ids).rows)
    offset = torch.where(problem.active, passages.own.start, 0)
    positives = world.gather_rows(problem.positives + offset).rows
    with torch.enable_grad():
        q, p = queries.rows.detach().requires_grad_(), passages.rows.detach().requires_grad_()
        whole = replace(problem, queries=q, passages=p, positives=positives)
        logits = _masked_logits(q, p, exclusions, problem.scale)
        losses = _losses(whole, logits, logits)
        dqueries, dpassages = torch.autograd.grad(problem.weight * losses.sum(), (q, p))
    return losses.detach()[queries.own], dqueries[queries.own], dpassages[passages.own]


def local(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D], dpassages [N, D]; gradients at what was gathered come home by a
    reduce-scatter.
    """
    return _own_rows(problem, world, lambda gradient, gathered: world.reduce_rows(gradient, gathered.counts))


def disco(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [B], dqueries [B, D], dpassages [N, D]; gradients at what was gathered come home by an all-reduce
    of what crosses ranks.
    """

    def own_plus_crossing(gradient: Tensor, gathered: Gathered) -> Tensor:
        kept = gradient[gathered.own].clone()
        gradient[gathered.own] = 0
        return kept + world.sum(gradient)[gathered.own]

    return _own_rows(problem, world, own_plus_crossing)


STRATEGIES: dict[str, Callable[[Problem, World], tuple[Tensor, Tensor, Tensor]]] = {
    "dense": dense,
    "local": local,
    "disco": disco,
    "tiled": tiled,
}


def _own_rows(
    problem: Problem, world: World, bring_home: Callable[[Tensor, Gathered], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients from own queries against every passage and, where symmetric, own passages against every
    query; `bring_home` makes a gradient at gathered rows that of own rows, summed over ranks.
    """
    queries, passages = world.gather_rows(problem.queries), world.gather_rows(problem.passages)
    own = problem.exclusions
    exclusions = replace(own, passage_ids=world.gather_rows(own.passage_ids).rows)
    with torch.enable_grad():
        q, p = problem.queries.detach().requires_grad_(), problem.passages.detach().requires_grad_()
        every_q, every_p = queries.rows.detach().requires_grad_(), passages.rows.detach().requires_grad_()
        rows, columns = _masked_logits(q, every_p, exclusions, problem.scale), None  # [B, n]
        if problem.symmetric:
            exclusions = exclusions_of_all_rows(problem, world, own.passage_ids)
            columns = _masked_logits(every_q, p, exclusions, problem.scale)  # [b, N]
        losses = _losses(replace(problem, queries=q, passages=p), rows, columns)
        inputs = (q, p, every_p, every_q) if problem.symmetric else (q, p, every_p)
        dqueries, dpassages, *gathered = torch.autograd.grad(problem.weight * losses.sum(), inputs)
    dpassages = dpassages + bring_home(gathered[0], passages)
    if problem.symmetric:
        dqueries = dqueries + bring_home(gathered[1], queries)
    return losses.detach(), dqueries, dpassages


def _losses(problem: Problem, rows: Tensor, columns: Tensor | None) -> Tensor:
    """Losses [B] from the negatives' logits: of every query in `rows`, of every passage in `columns`."""
    positive = problem.scale * (problem.queries * problem.passages[problem.columns]).sum(dim=1)
    losses = log_one_plus_exp(rows.logsumexp(dim=1) - positive)
    if problem.symmetric:
        assert columns is not None
        losses = 0.5 * (losses + log_one_plus_exp(columns.logsumexp(dim=0)[problem.columns] - positive))
    return losses.where(problem.active, 0.0)


def _masked_logits(queries: Tensor, passages: Tensor, exclusions: Exclusions, scale: float) -> Tensor:
    """scale · Q Pᵀ with −inf on the excluded pairs."""
    similarities = queries @ passages.T
    return (scale * similarities).masked_fill(excluded_pairs(similarities, exclusions), -torch.inf)


def excluded_pairs(similarities: Tensor, exclusions: Exclusions) -> Tensor:
    """[b, n] bool: the pairs that are no negatives, targets among them; a threshold alone reads similarities [b, n]."""
    excluded = torch.zeros(similarities.shape, dtype=torch.bool, device=similarities.device)
    rows, columns = known_pairs(exclusions)[:2]
    excluded[rows, columns] = True
    if exclusions.threshold is not None:
        excluded |= similarities > exclusions.threshold[:, None]
    if exclusions.pools is not None:
        rows, columns = exclusions.pools.of_columns(exclusions.passage_ids)
        excluded |= rows[:, None] != columns[None, :]
    if exclusions.guide is not None:
        of_queries, of_passages, limit = exclusions.guide
        excluded |= of_queries.float() @ of_passages.float().T > limit[:, None]
    return excluded


def exclusions_of_all_rows(problem: Problem, world: World, passage_ids: Tensor) -> Exclusions:
    """The exclusions of every rank's queries against the columns of `passage_ids`."""
    own = problem.exclusions
    counts = world.gather_rows(own.known_ptr.diff()).rows
    known_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    threshold = own.threshold
    if (
        world.max(torch.tensor(float(threshold is not None), device=problem.queries.device)) > 0
    ):  # some ranks may have none
        threshold = threshold if threshold is not None else problem.queries.new_full((len(problem.queries),), torch.inf)
        threshold = world.gather_rows(threshold).rows
    pools = None if own.pools is None else own.pools._replace(rows=world.gather_rows(own.pools.rows).rows)
    return Exclusions(passage_ids, known_ptr, world.gather_rows(own.known_ids).rows, threshold, pools=pools)
