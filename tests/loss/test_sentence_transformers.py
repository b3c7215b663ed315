"""Directions, hardness and a guide model beside sentence-transformers' own losses, in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score, pairwise_dot_score
from torch import Tensor, nn
from torch.nn.functional import normalize

from kernels.infonce.rules import Guide, Lists, guide_vectors
from retriever.config import Direction, LossConfig
from retriever.data.targets import Targets
from retriever.data.teacher import Groups
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World

B, D, NEGATIVES = 9, 8, 2
NAMES: dict[Direction, Any] = {
    "query_to_passage": "query_to_doc",
    "passage_to_query": "doc_to_query",
    "query_to_query": "query_to_query",
    "passage_to_passage": "doc_to_doc",
}
EVERY = tuple(NAMES)
SOFTMAXES: list[tuple[tuple[Direction, ...], str]] = [
    *((directions, "joint") for directions in (EVERY[:1], EVERY[:2], EVERY[:3], EVERY[::3], EVERY)),
    (EVERY[:2], "per_direction"),
]
MODES = {"none": None, "own": "hard_negatives", "in_batch": "in_batch_negatives", "all": "all_negatives"}


def _columns(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [
        normalize(torch.randn(B, D, generator=draw, dtype=torch.float64), dim=1).requires_grad_() for _ in range(count)
    ]


def _ours(
    columns: list[Tensor], guide: Guide | None = None, groups: Groups | None = None, **settings: Any
) -> list[Tensor]:
    """Loss and gradients at the columns: anchors, positives, negatives."""
    own = torch.arange(B)[:, None] + B * torch.arange(1, len(columns) - 1)
    lists = Lists(torch.arange(B + 1) * own.shape[1], own.flatten())
    ids = torch.arange(B * (len(columns) - 1))
    targets = Targets(torch.arange(B), ids, torch.arange(B + 1), torch.arange(B), B, groups, own=lists, guide=guide)
    objective = ContrastiveObjective(LossConfig(temperature=0.05, precision="fp32", **settings), unit_norm=True)
    queries, passages = columns[0].detach(), torch.cat(columns[1:]).detach()
    loss, dqueries, dpassages = objective(queries, passages, targets, World(torch.device("cpu")))
    return [loss, dqueries, *dpassages.split(B)]


def _compare(found: list[Tensor], loss: Tensor, columns: list[Tensor]) -> None:
    for x, y in zip(found, [loss.detach(), *torch.autograd.grad(loss, columns)], strict=True):
        assert y.norm() > 1e-4
        assert (x - y).norm() < 1e-10 * y.norm()


@pytest.mark.parametrize(("softmaxes", "hardness"), list(product(SOFTMAXES, MODES)))
def test_directions_and_hardness(softmaxes: tuple[tuple[Direction, ...], Any], hardness: Any) -> None:
    directions, partition = softmaxes
    strength = 5.0 if hardness != "none" else 0.0
    theirs = MultipleNegativesRankingLoss(
        nn.Identity(),  # type: ignore[arg-type]
        scale=20.0,
        similarity_fct=dot_score,
        directions=tuple(NAMES[d] for d in directions),
        partition_mode=partition,
        hardness_mode=MODES[hardness],  # type: ignore[arg-type]
        hardness_strength=strength,
    )
    columns = _columns(2 + NEGATIVES)
    found = _ours(columns, directions=directions, partition=partition, hardness=hardness, hardness_strength=strength)
    _compare(found, theirs.compute_loss_from_embeddings(columns, torch.empty(0)), columns)


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("directions", "negatives"), [(EVERY[:1], NEGATIVES), (EVERY[:3:2], NEGATIVES), (EVERY[:1] + EVERY[2:], 0)]
)
def test_a_guide(directions: tuple[Direction, ...], negatives: int, kind: Any) -> None:
    """Their target–target term has no hard negatives, and is compared without."""
    columns, draw = _columns(2 + negatives), torch.Generator().manual_seed(6)
    mixed = torch.randn(B, 6, generator=draw)  # what a query and its positive share
    vectors = [guide_vectors(mixed + 2 * torch.randn(B, 6, generator=draw)) for _ in columns]
    similarity = (vectors[0].float() * vectors[1].float()).sum(1)
    limit = similarity - 0.1 if kind == "absolute" else similarity - 0.1 * similarity.abs()
    theirs = CachedGISTEmbedLoss.__new__(CachedGISTEmbedLoss)
    nn.Module.__init__(theirs)
    theirs.temperature, theirs.margin_strategy, theirs.margin = 0.05, kind, 0.1
    theirs.mini_batch_size, theirs.show_progress_bar, theirs.gather_across_devices = B, False, False
    theirs.contrast_anchors, theirs.contrast_positives = EVERY[2] in directions, EVERY[3] in directions
    theirs.sim_matrix = lambda embed1, embed2: embed1 @ embed2.T  # type: ignore[method-assign]
    theirs.cross_entropy_loss = nn.CrossEntropyLoss()
    loss = theirs.calculate_loss([[c] for c in columns], [[v.double()] for v in vectors])
    plain = _ours(columns, directions=directions)
    found = _ours(columns, Guide(vectors[0], torch.cat(vectors[1:]), limit), directions=directions)
    assert abs(found[0] - plain[0]) > 1e-3, "the guide leaves nothing out"
    _compare(found, loss, columns)


def test_cosent() -> None:
    """Scored pairs, each a query and its positive; some scores are equal."""
    columns, scores = _columns(2), torch.tensor([1.0, 0.2, 0.2, 0.9, 0.0, 0.5, 0.5, 0.5, 0.7])
    theirs = CoSENTLoss(nn.Identity(), scale=20.0, similarity_fct=pairwise_dot_score)  # type: ignore[arg-type]
    found = _ours(
        columns, groups=Groups(torch.arange(B + 1), torch.arange(B), scores), contrastive_weight=0.0, cosent_weight=1.0
    )
    _compare(found, theirs.compute_loss_from_embeddings(columns, scores), columns)
