"""The host runs ahead: between the passes of a step it waits for a GPU nowhere, and once at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import BertConfig

from kernels.infonce.api import infonce
from kernels.infonce.deferred import Deferred
from kernels.infonce.exclusions import Exclusions, MaskTables
from kernels.infonce.rules import Pairs
from retriever.data.batch import Batch
from retriever.data.store import Store
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.parallel.world import World
from retriever.retention import Retention
from retriever.rng import seed_step
from scripts.bench.step_data import random_store
from scripts.bench.step_methods import Trainer, Work
from tests.gpu.devices import toy
from tests.kernels.oracle import dense_infonce, excluded_matrix, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")

QUERIES = 512
MODEL: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
LOSSES = {
    "default": (),
    "margin": ("loss.false_negative_margin=0.05",),
    "symmetric": ("loss.symmetric=true",),
    "high": ("loss.precision=high", "loss.temperature=0.05"),
    "temperature": ("loss.learn_temperature=true", "loss.temperature=0.05"),
}
RETENTION = Retention(graphs=5000, products=5000)  # a chunk's graph, another one's products, nothing of the others


@contextmanager
def no_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error at whatever makes the host wait; torch does not count waiting for an event."""

    def get(self: Deferred) -> list[float]:
        assert self._arrived is None, "the host waits for a number from the device"
        return self._host.tolist()

    with monkeypatch.context() as patched:
        patched.setattr(Deferred, "get", get)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Every third query knows the passage of another one as positive, too."""
    model, folder = BertConfig(**MODEL), tmp_path_factory.mktemp("waits") / "store"
    random_store(folder, QUERIES, model.vocab_size)
    known = [[i, (i + 1) % QUERIES][: 1 + (i % 3 == 0)] for i in range(QUERIES)]
    np.save(folder / "known.ptr.npy", np.cumsum([0, *map(len, known)]))
    np.save(folder / "known.ids.npy", np.concatenate(known))
    return Work(model, Store(folder), World(torch.device("cuda")), ("batch.tokens_per_chunk=4096",))


def _between_the_passes(trainer: Trainer, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_step(0, batch.step, 0)
    temperature = trainer.objective.temperature
    with no_waits(monkeypatch):
        representations, first = encode_without_graph(trainer.encoder, batch, trainer.retention)
        assert first.kept and first.partial and first.states
        _, gradients = representation_gradients(
            trainer.objective, representations, batch, trainer.world, temperature=temperature
        )
        backward_through_encoder(trainer.encoder, batch, gradients, first)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_waited_for_between_the_passes(work: Work, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first chunk to the last backward pass, on batches from the run's own loader."""
    trainer = Trainer(work, work.configuration(QUERIES, *LOSSES[loss]), retention=RETENTION)
    with closing(trainer.batches(QUERIES, 3)) as batches:  # type: ignore[type-var]
        trainer.step(next(batches))  # compiles and allocates
        for batch in batches:
            assert batch.targets.positives.is_pinned() and len(batch.targets.known_pairs.pairs.rows) > 0  # type: ignore[union-attr]
            _between_the_passes(trainer, batch, monkeypatch)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainer.encoder.parameters())


def test_an_update_is_queued_before_it_is_asked_for(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wait of an update is for the gradient's norm, when all is queued; one that is not finite leaves all as
    it was.
    """
    trainer = Trainer(work, work.configuration(QUERIES))
    optimizer, made = trainer.optimizer, []
    monkeypatch.setattr(optimizer.scaler, "update", lambda: made.append(1))  # the last of what an update queues
    for size in (1.0, float("nan")):
        before = [p.detach().clone() for p in optimizer.parameters]
        for p in optimizer.parameters:
            p.grad = torch.full_like(p, size)
        made.clear()
        with pytest.raises(RuntimeError, match="synchroniz"), no_waits(monkeypatch):
            optimizer.clip_and_step(0)
        assert made, "waited before the update was queued"
        assert all(torch.equal(p, b) for p, b in zip(optimizer.parameters, before, strict=True)) == (size != 1.0)


@pytest.mark.parametrize(
    ("scale", "ignored", "symmetric"),
    [(50.0, True, False), (50.0, False, True), (100.0, False, False), (100.0, True, True)],
)
def test_what_is_known_beforehand_changes_no_result(symmetric: bool, ignored: bool, scale: float, device: str) -> None:
    """`ignored`, `largest` and pairs looked up on the host: errors against float64 stay those of the tier."""
    B, N, D = toy(device, 700, 1300, 256, most=90)
    generator = torch.Generator("cpu").manual_seed(1)
    queries, passages = (normalize(torch.randn(n, D, generator=generator), dim=1) for n in (B, N))
    targets = torch.randint(-1 if ignored else 0, N, (B,), generator=generator)
    targets[::7] = -1 if ignored else 0
    known = torch.randint(0, N, (2 * B,), generator=generator)
    exclusions = Exclusions(torch.arange(N), torch.arange(0, 2 * B + 1, 2), known)
    tables = MaskTables.of(exclusions, targets, N)
    tables = MaskTables(Pairs(*(x.to(device) for x in tables.further[:2])), tables.targets.to(device), None, N)
    queries, passages, targets = queries.to(device).bfloat16(), passages.to(device).bfloat16(), targets.to(device)
    weights = torch.rand(B, device=device) / B
    exclusions = Exclusions(torch.arange(N, device=device), exclusions.known_ptr.to(device), known.to(device))
    excluded = excluded_matrix(queries, passages, exclusions)
    want = dense_infonce(queries, passages, targets, scale, weights, excluded, symmetric)
    got = infonce(
        queries,
        passages,
        targets,
        scale,
        exclusions=tables,
        weights=weights,
        symmetric=symmetric,
        ignored=ignored,
        largest=1.0,
    )
    assert want[1].norm() > 0 and relative_error(got.loss, want[0]) <= 4e-4
    assert relative_error(got.dqueries, want[1]) <= 4e-3 and relative_error(got.dpassages, want[2]) <= 4e-3
