"""The step's benchmark at a size that says nothing about speed: every row comes, what is wrong is not timed, the page
shows it.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, modeling_flash_attention_utils
from transformers.utils import import_utils

from kernels.layers.layer import SavedActivations, without_graph
from retriever.encoder import fused_layers
from retriever.parallel.world import World
from retriever.retention import NOTHING
from scripts.bench import flash, step
from scripts.bench.step import Bench
from scripts.bench.step_data import TEMPLATE, random_store
from scripts.bench.step_forms import PADDED, PLAIN, Form
from scripts.bench.step_methods import TINY, Trainer, Work
from scripts.bench.step_peers import PEERS, MiniBatch, Peer, best_timing, padded_features, pairs_of
from scripts.bench.tables import Table


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    store = random_store(tmp_path_factory.mktemp("bench") / "store", 64, vocabulary=1000)
    settings = ("optim.precision=fp32", "loss.precision=fp32")
    return Work(BertConfig(**TINY), store, World(torch.device("cpu")), settings)


def test_every_row_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled layers are left out: compiling them takes longer than all the rest."""
    sizes = (MiniBatch(4), MiniBatch(8), MiniBatch(8, tokens=400))
    for name in step.PEERS:
        monkeypatch.setitem(step.MINI_BATCHES, name, sizes)
    output = tmp_path / "step.json"
    arguments = ["--tiny", "--sizes", "8", "16", "--peers-at", "16", "--recomputing-at", "8", "--seconds", "0.01"]
    arguments += ["--forms", "unretained", "packed", "padded"]
    settings = ["--settings", "batch.tokens_per_chunk=400", "optim.precision=fp32"]
    assert step.main([*arguments, *settings, "--output", str(output)]) == 0
    table = Table.load(output)
    ours = ["b=8", "b=16", "b=16,nothing kept", "b=16,packed", "b=16,padded", "b=8,checkpointing", "b=8,cache"]
    for case in ours:
        assert all((table.get(case, "bigbatch", name) or 0) > 0 for name in ("pairs_per_s", "tokens_per_s")), case
        assert 0 <= (table.get(case, "bigbatch", "waited") or 0) < 1
    for case in ("b=8", "b=16"):
        assert (table.get(case, "floor", "pairs_per_s") or 0) > 0
        assert (table.get(case, "bigbatch", "predicted_pairs_per_s") or 0) > 0
    for case, method in itertools.product(("b=16", "b=16,sorted"), step.PEERS):
        (row,) = (row for row in table.rows if (row.case, row.method, row.metric) == (case, method, "pairs_per_s"))
        assert row.value is None if method == "sentence-transformers-flash" else (row.value or 0) > 0
        assert row.value is not None or (
            "does not run" in row.note and "FlashAttention2 is not available on CPU" in row.note
        )
    timed = [(row.case, row.method) for row in table.rows if row.metric == "pairs_per_s"]
    assert (
        timed.index(("b=16,sorted", "gradcache"))
        < timed.index(("b=8", "bigbatch"))
        < timed.index(("b=16,packed", "bigbatch"))
    )


def test_a_wrong_gradient_is_not_timed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a form whose replayed chunks draw other dropout masks than the first time, or go on from other
    products.
    """
    bench = Bench(work, Table.begin("", ()), seconds=0.01)
    bench.measure_form(8, Form("warm", (*PLAIN, "loss.temperature=0.05")))
    bench.measure_form(8, Form("right", PLAIN))
    monkeypatch.setattr("retriever.rng.RngState._set", lambda state: None)
    bench.measure_form(8, Form("forgetful", PADDED))
    monkeypatch.undo()
    monkeypatch.setattr(
        fused_layers,
        "without_graph",
        lambda *given, **form: (kept := without_graph(*given, **form))[:2] + (_other(kept[2]),),
    )
    bench.measure_form(8, Form("mistaken", ("model.attention=packed", "model.fused=true")))
    rows = {row.case: row for row in bench.table.rows if row.metric == "pairs_per_s"}
    assert rows["b=8,right"].value is not None and rows["b=8,mistaken"].value is None
    assert (
        rows["b=8,warm"].value is None
        and rows["b=8,forgetful"].value is None
        and rows["b=8,warm"].note == "not timed: wrong"
    )
    errors = {row.case: row for row in bench.table.rows if row.metric == "gradient_error"}
    assert (errors["b=8,right"].value or 1) < 1e-4 < 0.1 < (errors["b=8,warm"].value or 0)
    assert "the replay differs" in errors["b=8,forgetful"].note and "bitwise" in errors["b=8,right"].note


def _other(products: SavedActivations) -> SavedActivations:
    return products._replace(ffn_out=products.ffn_out * 1.01)


def test_the_floor_is_one_pass(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    trainer = Trainer(work, work.configuration(8, "batch.tokens_per_chunk=400", *PADDED))
    trainer.encoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch = trainer.first_batch(8)
    before = [p.detach().clone() for p in trainer.encoder.parameters()]
    trainer.single_pass(batch)
    assert calls == [True] * len(batch.chunks)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.encoder.parameters(), strict=True))
    calls.clear()
    trainer.step(trainer.first_batch(8))
    assert calls == [False] * len(batch.chunks) + [True] * len(batch.chunks)


@pytest.fixture
def dropout_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Flash attention on a CPU, a text at a time in place of the kernels. Gives the dropout rates of the calls."""
    called: list[float] = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, *rest: Any, scale: float | None, **window: None
    ) -> tuple[Tensor]:
        longest, longest_key, dropout, causal, _ = rest
        assert (
            starts.dtype == torch.int32
            and starts[-1] == len(q)
            and longest == longest_key == starts.diff().max()
            and not causal
            and window == {"window_size_left": None, "window_size_right": None}
        )
        called.append(dropout)
        queries, keys, values = (x.bfloat16().transpose(0, 1).split(starts.diff().tolist(), dim=1) for x in (q, k, v))
        texts = zip(queries, keys, values, strict=True)
        out = [scaled_dot_product_attention(query, key, value, scale=scale) for query, key, value in texts]
        return (torch.cat(out, dim=1).transpose(0, 1),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", attention)
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    matrix = modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    monkeypatch.setitem(matrix, 2, {**matrix[2], "supported_devices": ((lambda: True, "cuda"),)})
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.startswith(tempfile.gettempdir())])
    flash.provide.cache_clear()
    yield called
    monkeypatch.undo()
    flash.provide.cache_clear()
    flash.forget_packages()
    for name in ("flash_attn", "flash_attn.bert_padding"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", PEERS)
def test_peers_arrive_at_our_gradient(
    work: Work, name: str, monkeypatch: pytest.MonkeyPatch, dropout_on_a_cpu: list[float]
) -> None:
    """Of the same pairs, in other chunks and another order, to what bf16 allows: nobody is timed on another problem."""
    undropped = replace(work, model=BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    trainer = Trainer(undropped, undropped.configuration(8, "batch.tokens_per_chunk=400", *PADDED))
    batch = trainer.first_batch(8)
    expected = trainer.gradients(batch, NOTHING)
    queries, passages = pairs_of(undropped, 8, by_length=True)
    assert sum(map(len, [*queries, *passages])) == batch.tokens
    lengths = list(map(len, passages))
    assert lengths == sorted(lengths, reverse=True)
    found: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def take(parameters: Iterable[nn.Parameter], _: float) -> None:
        found[:] = [(p, p.detach().clone(), p.grad.flatten().clone()) for p in parameters if p.grad is not None]

    peer = PEERS[name](undropped)
    features = [peer.features(side) for side in (queries, passages)]
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", take)
    for tokens in (None, 300)[: 1 + name.startswith("sentence-transformers")]:
        peer.step(features[0], features[1], MiniBatch(3, tokens))  # eight is no multiple of three
        gradient = torch.cat([gradient for _, _, gradient in found])
        assert float(expected.norm()) > 0.1
        assert float((gradient - expected).norm() / expected.norm()) < 0.05
        assert all(not torch.equal(p, before) for p, before, _ in found), "it trains"
    if name == "sentence-transformers-flash":
        assert features[1]["input_ids"].shape == (1, sum(lengths)), "nothing is padded"
        assert "flash-attn is not installed" in peer.note and set(dropout_on_a_cpu) == {0.0}


def test_flash_attention_drops_as_the_model_says(work: Work, dropout_on_a_cpu: list[float]) -> None:
    peer = PEERS["sentence-transformers-flash"](work)
    queries, passages = (peer.features(side) for side in pairs_of(work, 8, by_length=False))
    peer.step(queries, passages, MiniBatch(8, tokens=400))
    assert set(dropout_on_a_cpu) == {work.model.attention_probs_dropout_prob} == {0.1}


def test_queries_are_made_of_their_passages(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store", 2000, vocabulary=5000)
    lengths = store.queries.lengths + TEMPLATE.special_tokens, store.passages.lengths + TEMPLATE.special_tokens
    assert (lengths[0].min(), lengths[0].max(), lengths[1].min(), lengths[1].max()) == pytest.approx(
        (4, 25, 16, 256), abs=9
    )
    assert np.median(lengths[0]) == pytest.approx(8, abs=1) and np.median(lengths[1]) == pytest.approx(70, abs=3)
    own = np.mean([np.isin(store.queries.tokens(i), store.passages.tokens(i)).mean() for i in range(500)])
    other = np.mean([np.isin(store.queries.tokens(i), store.passages.tokens(i + 1)).mean() for i in range(500)])
    assert own == pytest.approx(0.8, abs=0.05) and other < 0.05


def test_a_peer_is_timed_at_the_fastest_size_that_fits(work: Work) -> None:
    calls: list[MiniBatch] = []

    def step(queries: dict[str, Tensor], passages: dict[str, Tensor], size: MiniBatch) -> None:
        calls.append(size)
        assert len(queries["input_ids"]) == len(passages["input_ids"]) == 64
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        if size.texts == 32:
            raise torch.cuda.OutOfMemoryError
        time.sleep(1 / size.texts)

    sizes, texts = [MiniBatch(n) for n in (4, 16, 8, 32)], pairs_of(work, 64, by_length=True)
    peer = Peer(step, partial(padded_features, work), "")
    found, size = best_timing(work, peer, texts, sizes, seconds=0.1)
    assert size == MiniBatch(16) and 1 / 16 <= min(found.seconds) < 1 / 8
    assert [calls.count(size) for size in sizes] == [2, 3, 2, 1]
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    with pytest.raises(torch.cuda.OutOfMemoryError, match="none of 32 texts at once"):
        best_timing(work, peer, texts, sizes[-1:], seconds=0.01)
