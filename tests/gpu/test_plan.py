"""The plan against the step: memory and time as they were predicted before it, and nothing left of the measuring."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from transformers import BertConfig

from retriever.parallel.world import World
from scripts.bench.step_data import random_store
from scripts.bench.step_methods import Trainer, Work, sample

QUERIES = 4096


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    model = BertConfig()  # a smaller one, in chunks as small, would wait for the host, which a plan does not count
    store = random_store(tmp_path_factory.mktemp("plan") / "store", 4 * QUERIES, model.vocab_size)
    return Work(model, store, World(torch.device("cuda")), ("run.preflight=only", "batch.tokens_per_chunk=32768"))


@pytest.mark.parametrize(("graphs", "products"), [("100000", "0"), ("0", "200000"), ("auto", "auto")])
def test_a_step_is_as_it_was_predicted(work: Work, graphs: str, products: str) -> None:
    trainer = Trainer(work, work.configuration(QUERIES, f"batch.retain={graphs}", f"batch.retain_products={products}"))
    forecast = trainer.forecast
    assert forecast is not None
    with closing(trainer.batches(QUERIES)) as batches:  # type: ignore[type-var]
        found = sample(
            trainer.step, batches, work.device, seconds=2.0, warm=2
        )  # kernels of new shapes are loaded first
    assert found.peak_gib is not None
    assert forecast.peak_bytes / 2**30 == pytest.approx(found.peak_gib, rel=0.1)
    assert forecast.step_s == pytest.approx(found.seconds, rel=0.1)


def test_measuring_leaves_no_memory_and_no_trace(work: Work) -> None:
    Trainer(work, work.configuration(64))  # what libraries allocate once
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = Trainer(work, work.configuration(QUERIES))
    own = sum(p.nbytes for p in trainer.encoder.parameters())
    config = BertConfig()
    turned = 2 * config.num_hidden_layers * config.intermediate_size * config.hidden_size
    rounded = own / 2 + turned  # fused layers keep their weights in bf16 too, one of them twice
    assert torch.cuda.memory_allocated() - before <= own + rounded + 2**20
    assert all(p.grad is None for p in trainer.encoder.parameters())
