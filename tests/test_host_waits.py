"""The host queues loss and backward pass without asking the device anything.

A stand-in for the device: tensors without data. What would make the host wait for a GPU (a number read back, a shape
that depends on data, a copy from memory that is not page-locked) they refuse, or the watch below does. Triton's kernels
are called but not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel
from triton.runtime.jit import JITFunction

# Compiled, not interpreted, whatever is said to `on_kernels` below.
import kernels.attention.long
import kernels.attention.short
import kernels.infonce.one_pass
import kernels.layers.embeddings_triton
import kernels.layers.gelu
import kernels.layers.norm  # noqa: F401
from retriever.config import BatchConfig, Config, LossConfig, ModelConfig
from retriever.data.batch import Batch, BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from retriever.retention import Retention
from scripts.bench.step_data import TEMPLATE, random_store

QUERIES = 48
NOWHERE = torch.device("meta")
MODEL = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, vocab_size=500)


class _Watch(TorchDispatchMode):
    """Refuses copies to the device for which the host waits, and counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        leaves = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        crosses = {x.device.type for x in tensors} == {"cpu"} and any(x.device == NOWHERE for x in leaves)
        mixed = {x.device.type for x in tensors} == {"cpu", "meta"}
        if (crosses and not options.get("non_blocking")) or (
            mixed and "copy" in function.__name__ and not _non_blocking(arguments)
        ):
            raise RuntimeError(f"the host waits: {function} copies from the host to the device")
        self.operations += any(x.device == NOWHERE for x in leaves)
        return result


def _non_blocking(arguments: Any) -> bool:
    return len(arguments) > 2 and bool(arguments[2])  # of copy_(to, from, non_blocking)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched; from here on everything but float64 is on kernels."""
    found: list[str] = []

    def run(self: JITFunction, *_: Any, **__: Any) -> None:
        found.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return found


@contextmanager
def _watched() -> Iterator[_Watch]:
    with _Watch() as watch:
        yield watch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every third query knows the passage of its neighbour as positive, too."""
    folder = tmp_path_factory.mktemp("waits") / "store"
    random_store(folder, QUERIES, MODEL.vocab_size)
    known = [[i, (i + 1) % QUERIES][: 1 + (i % 3 == 0)] for i in range(QUERIES)]
    np.save(folder / "known.ptr.npy", np.cumsum([0, *map(len, known)]))
    np.save(folder / "known.ids.npy", np.concatenate(known))
    return Store(folder)


def _batch(store: Store, device: torch.device = NOWHERE) -> Batch:
    planner = Planner(store, queries=QUERIES, negatives=0, seed=0)
    model = ModelConfig(query_max_tokens=32, passage_max_tokens=256, attention="packed")
    config = Config(model=model, batch=BatchConfig(tokens_per_chunk=1024))
    return BatchLoader(store, planner, TEMPLATE, config, World(device)).load(0)


def _encoder() -> DualEncoder:
    tower = BertModel(MODEL, add_pooling_layer=False)
    encoder = DualEncoder(tower, tower, pooling="mean")
    encoder.pack()
    encoder.fuse_layers()
    return encoder.to(NOWHERE).train()


@pytest.mark.parametrize("retention", [Retention(), Retention(1500, 1500), Retention(graphs=10**6)])
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(temperature=0.05, precision="high"),
        LossConfig(false_negative_margin=0.05),
        LossConfig(symmetric=True),
        LossConfig(symmetric=True, false_negative_margin=0.05, workspace_mib=1),
        LossConfig(dims=(16, 64), dim_weights=(1.0, 1.0)),
        LossConfig(learn_temperature=True, temperature=0.05),
    ],
    ids=lambda loss: ",".join(f"{k}={v}" for k, v in vars(loss).items() if v != getattr(LossConfig(), k)) or "default",
)
def test_nothing_is_waited_for_between_the_passes(
    store: Store, launches: list[str], loss: LossConfig, retention: Retention
) -> None:
    """From the first chunk to the last backward pass, hard positives and all."""
    encoder, objective, world = _encoder(), ContrastiveObjective(loss, unit_norm=True).to(NOWHERE), World(NOWHERE)
    batch = _batch(store)
    assert len(batch.targets.known_pairs.pairs.rows) == QUERIES // 3  # type: ignore[union-attr]
    with _watched() as watch:
        representations, first = encode_without_graph(encoder, batch, retention)
        value, gradients = representation_gradients(
            objective, representations, batch, world, temperature=loss.temperature
        )
        backward_through_encoder(encoder, batch, gradients, first)
    assert value.device == NOWHERE and all(p.grad is not None for p in encoder.parameters())
    assert watch.operations > 100 and {"_tile_pass", "_finish_queries", "_finish_passages"} <= set(launches)


def test_the_watch_sees_waits(store: Store, launches: list[str]) -> None:
    """Guard: what may not be known beforehand is asked of the device, and refused."""
    targets, world = _batch(store).targets, World(NOWHERE)
    q, p = (torch.empty(QUERIES, 64, device=NOWHERE) for _ in range(2))

    def loss(targets: Any, **settings: Any) -> None:
        with _watched():
            ContrastiveObjective(LossConfig(**settings), unit_norm=True)(q, p, targets, world)

    loss(targets)
    loss(replace(targets, ignores=True), symmetric=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor|torch.nonzero|the host waits"):
        loss(replace(targets, known_pairs=None), symmetric=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor|torch.nonzero|the host waits"):
        loss(targets, temperature=0.01)  # a constant shift might lose terms: sums are looked at
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"), _watched():
        ContrastiveObjective(LossConfig(), unit_norm=False)(q, p, targets, world)  # norms are asked for
    with pytest.raises(RuntimeError, match="the host waits"), _watched():
        targets.positives.to(NOWHERE)
