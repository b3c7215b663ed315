"""The check that users see: tiny on a sound setup, large on each broken one, and it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kernels.infonce.reference import Block
from kernels.layers.layer import SavedActivations, without_graph
from retriever import verify
from retriever.config import Direction, LossConfig, ModelConfig
from retriever.data.batch import Batch
from retriever.data.teacher import Groups
from retriever.data.text_vectors import TeacherVectors
from retriever.encoder import fused_layers
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import FirstPass, backward_through_encoder
from retriever.loss import custom, distill
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.custom import CustomLoss, LossTargets
from retriever.loss.strategies import STRATEGIES, excluded_pairs
from retriever.parallel.host import HostRows
from retriever.representations import Representations
from retriever.verify import GradientCheck, gradient_error
from tests.kernels.oracle import gradient
from tests.problems import random_batch, rank_batch

BOUND = 1e-9
BROKEN = 1e-4


@pytest.fixture(scope="module")
def encoder(one_layer: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(ModelConfig(str(one_layer), query_max_tokens=32, passage_max_tokens=32))


@pytest.fixture
def batch() -> Batch:
    return rank_batch(random_batch(queries=8, passages=14), 0, 40)[0]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize(
    "loss",
    [
        {"temperature": 0.02},
        {"temperature": 0.07, "symmetric": True, "false_negative_margin": 0.1, "learn_temperature": True},
        {"temperature": 0.05, "symmetric": True, "false_negative_margin": 0.0},  # at .1 no passage of these is left out
        {"temperature": 0.05, "precision": "bf16", "mask_known_positives": False},
    ],
)
def test_a_sound_setup_is_exact(encoder: DualEncoder, batch: Batch, strategy: str, loss: dict[str, Any]) -> None:
    """Any loss setting, on a model in train mode and any precision: what is measured is the method, to 1e-9."""
    check = gradient_error(encoder, LossConfig(strategy=strategy, **loss), batch)  # type: ignore[arg-type]
    assert check.gradient_error < BOUND and check.loss_error < BOUND
    assert (check.queries, check.passages, check.chunks) == (8, 14, len(batch.chunks)) and check.chunks > 4
    assert f"{check.gradient_error:.1e}" in str(check)


@pytest.mark.parametrize(
    "loss",
    [
        {"directions": get_args(Direction), "hardness": "in_batch", "hardness_strength": 5.0},
        {"directions": get_args(Direction), "partition": "per_direction", "false_negative_margin": 0.05},
        {"hardness": "own", "hardness_strength": 9.0, "symmetric": True},
        {"positives": 3},
        {"embedding_weight": 2.0, "teacher": "given"},
        {"embedding_weight": 2.0, "embedding_distance": "cosine", "positives": 3, "teacher": "given"},
    ],
)
def test_kinds_of_negatives_are_checked(encoder: DualEncoder, loss: dict[str, Any]) -> None:
    """Directions, hardness, a guide model, several positives, a teacher's embeddings; a guide left out is found."""
    batch = rank_batch(
        random_batch(queries=8, passages=14, ignored=1, own=True, guide=True, shared="positives" in loss), 0, 40
    )[0]
    if "teacher" in loss:
        teacher = TeacherVectors(*(torch.randn(n, encoder.dimension).half() for n in batch.sizes))
        batch = replace(batch, targets=replace(batch.targets, teacher=teacher))
    check = gradient_error(encoder, LossConfig(temperature=0.1, **loss), batch)
    assert check.gradient_error < BOUND and check.loss_error < BOUND
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "_guided", lambda block, logits, i, j: logits)
        assert gradient_error(encoder, LossConfig(temperature=0.1, **loss), batch).gradient_error > BROKEN


def test_a_loss_of_ones_own_is_checked(encoder: DualEncoder) -> None:
    """By one call on the whole batch, with every rule of what is no negative; one that is left out is found."""

    def rows(queries: Tensor, passages: Tensor, targets: LossTargets) -> Tensor:
        logits = (queries @ passages.T / targets.temperature).masked_fill(targets.excluded, -torch.inf)
        return cross_entropy(logits, targets.positives, reduction="none")

    whole = random_batch(queries=8, passages=14, ignored=1, guide=True, pools=2)
    batch = rank_batch(whole, 0, 40)[0]
    loss = LossConfig(temperature=0.1, false_negative_margin=0.02, dims=(8, 32), custom="rows")
    check = gradient_error(encoder, loss, batch, custom=CustomLoss(rows))
    assert check.gradient_error < BOUND and check.loss_error < BOUND

    def without(rule: str) -> Callable[..., Tensor]:
        return lambda similarities, exclusions: excluded_pairs(similarities, replace(exclusions, **{rule: None}))

    for rule in ("guide", "pools", "threshold"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(custom, "excluded_pairs", without(rule))
            assert gradient_error(encoder, loss, batch, custom=CustomLoss(rows)).gradient_error > BROKEN, rule


@pytest.mark.parametrize("normalize", [True, False])
def test_leading_dimensions_are_checked_of_any_vectors(encoder: DualEncoder, batch: Batch, normalize: bool) -> None:
    """They are brought to unit length again where embeddings are unit vectors, and nowhere else."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoder, "normalize", normalize)
        check = gradient_error(encoder, LossConfig(temperature=0.5, dims=(8, 32), dim_weights=(1.0, 0.5)), batch)
    assert check.gradient_error < BOUND and check.loss_error < BOUND


def test_representations_in_host_memory_are_checked_in_blocks(
    encoder: DualEncoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offloaded loss is exact as well, and a gradient that keeps its last block alone is found."""
    loss = LossConfig(temperature=0.07, symmetric=True, false_negative_margin=0.1)
    check = gradient_error(encoder, loss, batch, block_rows=5)
    assert check.gradient_error < BOUND and check.loss_error < BOUND
    accumulate = HostRows.accumulate
    monkeypatch.setattr(HostRows, "accumulate", lambda rows, fresh: accumulate(rows, fresh=True))
    assert gradient_error(encoder, loss, batch, block_rows=5).gradient_error > BROKEN


def test_chunks_of_every_kind_are_checked(encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept graphs, kept products and neither; a product that is another one's is found."""
    fused = copy.deepcopy(encoder)
    fused.pack()
    fused.fuse_layers()
    batch = rank_batch(random_batch(queries=8, passages=14), 0, 40, packed=True)[0]
    kinds: list[tuple[int, int, int]] = []

    def noted(encoder: DualEncoder, batch: Batch, gradients: Representations, first: FirstPass) -> None:
        kinds.append((len(first.kept), len(first.partial), len(first.states)))
        backward_through_encoder(encoder, batch, gradients, first)

    monkeypatch.setattr(verify, "backward_through_encoder", noted)
    assert gradient_error(fused, LossConfig(temperature=0.07), batch).gradient_error < BOUND
    assert (
        gradient_error(
            encoder, LossConfig(temperature=0.07), rank_batch(random_batch(queries=8, passages=14), 0, 40)[0]
        ).gradient_error
        < BOUND
    )
    assert [kind[:2] for kind in kinds[::2]] == [(0, 0), (0, 0)]  # first all of them are encoded again
    assert min(kinds[1]) >= 2 and kinds[3][0] >= 2 and kinds[3][1] == 0 and kinds[3][2] >= 2
    monkeypatch.setattr(fused_layers, "without_graph", lambda *given, **form: _swapped(*given, **form))
    assert gradient_error(fused, LossConfig(temperature=0.07), batch).gradient_error > BROKEN


@pytest.mark.parametrize("side", ["query", "passage"])
def test_a_replay_that_is_wrong_on_one_side_is_found(
    encoder: DualEncoder, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few chunks as there are, each is encoded again at least once."""
    batch = rank_batch(random_batch(queries=4, passages=14), 0, 40)[0]
    forward = DualEncoder.forward

    def wrong(self: DualEncoder, own: Any, *given: Any) -> Tensor:
        embeddings = forward(self, own, *given)
        return 3 * embeddings if own == side and replaying else embeddings

    replaying = False

    def noted(encoder: DualEncoder, batch: Batch, gradients: Representations, first: FirstPass) -> None:
        nonlocal replaying
        replaying = True
        backward_through_encoder(encoder, batch, gradients, first)
        replaying = False

    monkeypatch.setattr(DualEncoder, "forward", wrong)
    monkeypatch.setattr(verify, "backward_through_encoder", noted)
    assert gradient_error(encoder, LossConfig(temperature=0.07), batch).gradient_error > BROKEN


def _swapped(*given: Any, **form: Any) -> tuple[Any, Tensor, SavedActivations]:
    stream, rounded, products = without_graph(*given, **form)
    return stream, rounded, products._replace(ffn_out=products.ffn_out.roll(1, 0))


def test_a_teachers_terms_are_checked_too(encoder: DualEncoder, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation is exact as well, and half of one of its gradients is found."""
    rows, columns = batch.sizes
    ids = torch.cat(
        [batch.targets.passage_ids[[t, (t + 1) % columns, (t + 5) % columns]] for t in batch.targets.positives.tolist()]
    )
    groups = Groups(
        torch.arange(0, 3 * rows + 1, 3), ids, torch.randn(3 * rows, generator=torch.Generator().manual_seed(0))
    )
    batch = replace(batch, targets=replace(batch.targets, groups=groups))
    loss = LossConfig(
        temperature=0.1, contrastive_weight=0.5, kl_weight=1.0, margin_mse_weight=0.1, teacher_temperature=2.0
    )
    check = gradient_error(encoder, loss, batch)
    assert check.gradient_error < BOUND and check.loss_error < BOUND
    kl = distill._kl
    monkeypatch.setattr(distill, "_kl", lambda *given: (kl(*given)[0], 0.5 * kl(*given)[1]))
    assert gradient_error(encoder, loss, batch).gradient_error > BROKEN


def test_nothing_is_changed(encoder: DualEncoder, batch: Batch) -> None:
    """Weights, gradients, modes, autocast and the RNG state are afterwards what they were."""
    encoder.autocast_dtype = torch.bfloat16
    for p in encoder.parameters():
        p.grad = torch.full_like(p, 0.5)
    weights, state = [p.detach().clone() for p in encoder.parameters()], torch.get_rng_state()
    assert gradient_error(encoder, LossConfig(), batch).gradient_error < BOUND
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(p, w) and (gradient(p) == 0.5).all() for p, w in zip(encoder.parameters(), weights, strict=True)
    )
    assert (
        encoder.training
        and encoder.autocast_dtype == torch.bfloat16
        and next(encoder.parameters()).dtype == torch.float32
    )
    encoder.zero_grad(set_to_none=True)
    encoder.autocast_dtype = None


def test_a_lost_chunk_is_found(encoder: DualEncoder, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk whose gradient is not pulled back shows."""

    def without_first_rows(encoder: DualEncoder, batch: Batch, gradients: Representations, first: FirstPass) -> None:
        chunk = next(iter(batch.chunks))
        getattr(gradients, chunk.side)[chunk.rows] = 0
        backward_through_encoder(encoder, batch, gradients, first)

    monkeypatch.setattr(verify, "backward_through_encoder", without_first_rows)
    assert gradient_error(encoder, LossConfig(), batch).gradient_error > BROKEN


@pytest.mark.parametrize("broken", ["loss", "dqueries", "dpassages"])
def test_a_wrong_objective_is_found(
    encoder: DualEncoder, batch: Batch, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A loss or either gradient that is off by a thousandth shows, each by itself."""

    class Wrong(ContrastiveObjective):
        def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            results = dict(zip(("loss", "dqueries", "dpassages"), super().forward(*arguments), strict=True))
            results[broken] = results[broken] * 1.001
            return tuple(results.values())  # type: ignore[return-value]

    monkeypatch.setattr(verify, "ContrastiveObjective", Wrong)
    check = gradient_error(encoder, LossConfig(), batch)
    assert max(check.loss_error, check.gradient_error) > BROKEN


def test_an_encoder_that_mixes_rows_is_found(encoder: DualEncoder, batch: Batch) -> None:
    """Where an embedding depends on what else is in its chunk, chunking changes the gradient, and the check says so."""

    def centre(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state - 0.1 * output.last_hidden_state.mean(dim=0, keepdim=True)
        return output

    handle = encoder.passage_tower.register_forward_hook(centre)
    try:
        assert gradient_error(encoder, LossConfig(), batch).gradient_error > BROKEN
    finally:
        handle.remove()
    assert gradient_error(encoder, LossConfig(), batch).gradient_error < BOUND


def test_a_part_of_a_larger_batch_is_weighed_as_such(encoder: DualEncoder) -> None:
    """Global queries beyond this rank's, and rows without a target, enter the reference as they enter the loss."""
    part = rank_batch(random_batch(queries=8, passages=14, ranks=3, ignored=2), 0, 40)[0]
    assert part.sizes[0] > 1 and part.targets.positives.min() == -1
    object.__setattr__(part.targets, "global_queries", 32)
    check = gradient_error(encoder, LossConfig(), part)
    assert max(check.loss_error, check.gradient_error) < BOUND


def test_a_batch_that_proves_nothing_is_refused(encoder: DualEncoder) -> None:
    """Without a negative, loss and gradient are 0: equality would mean nothing."""
    lonely = rank_batch(random_batch(queries=2, passages=3), 0, 40)[0]
    object.__setattr__(lonely.targets, "known_ids", lonely.targets.passage_ids.repeat(2))
    object.__setattr__(lonely.targets, "known_ptr", torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match="proves nothing"):
        gradient_error(encoder, LossConfig(), lonely)


def test_the_check_reads_as_a_sentence() -> None:
    assert str(GradientCheck(1, 2048, 1, 0.0, 0.0)).startswith("1 query and 2,048 passages in 1 chunk: gradient equal")
