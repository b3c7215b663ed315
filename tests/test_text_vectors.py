"""A guide model's vectors: of every text, in its own prompts, computed once, and what a batch takes of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.infonce.rules import guide_vectors
from retriever import text_vectors
from retriever.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, SourceConfig
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.records import DataError
from retriever.data.store import Store, build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.encoder.bundle import load_encoder
from retriever.encoder.settings import SETTINGS_FILE, EncoderSettings
from retriever.parallel.world import World
from tests.tiny import random_texts, save_tiny_model, tiny_tokenizer

SETTINGS = EncoderSettings("mean", True, "the ", "a new ", 12, 20)
QUERIES = [f"{text} {i}" for i, text in enumerate(random_texts(12, longest=6, seed=1))]
PASSAGES = random_texts(24, shortest=6, longest=30, seed=2)


def _config(folder: Path, **loss: Any) -> Config:
    return Config(
        model=ModelConfig(name_or_path="unused", query_prompt="of ", query_max_tokens=16, passage_max_tokens=32),
        data=DataConfig(
            train=(SourceConfig(path=str(folder / "train.jsonl")),), negatives=2, cache_dir=str(folder / "cache")
        ),
        batch=BatchConfig(queries=8, tokens_per_chunk=64),
        loss=LossConfig(guide=str(folder / "guide"), **loss),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("guided")
    save_tiny_model(folder / "guide", num_hidden_layers=1)
    settings = asdict(SETTINGS) | {"format_version": 1}
    (folder / "guide" / SETTINGS_FILE).write_text(json.dumps(settings))
    records = [
        {
            "query_id": query,
            "query": query,
            "positive_passages": [{"docid": text, "title": "", "text": text} for text in PASSAGES[i : i + 1]],
            "negative_passages": [{"docid": text, "title": "", "text": text} for text in PASSAGES[i + 9 : i + 12]],
        }
        for i, query in enumerate(QUERIES)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    opened = build_or_open(_config(folder), tiny_tokenizer(), progress=False)
    opened.guide = text_vectors.vectors_of(_config(folder), opened, "guide")
    return opened


def test_every_text_has_the_vector_that_encode_gives_it(store: Store) -> None:
    bundle = load_encoder(store.folder.parents[1] / "guide")
    assert store.guide is not None
    for side, table, found in (
        ("query", store.queries, store.guide.queries),
        ("passage", store.passages, store.guide.passages),
    ):
        expected = bundle.encode(table.ids.to_pylist(), side)  # type: ignore[arg-type]
        assert found.shape == expected.shape and found.dtype == np.float16
        assert np.abs(found - expected).max() < 2**-11


def test_a_text_in_two_prompts_has_two_rows_and_the_guides_own_prompt(store: Store) -> None:
    """The second source brings the same passages in a prompt of its own, and some in another length."""
    config = _config(store.folder.parents[1])
    source = config.data.train[0]
    sources = (source, replace(source, passage_prompt="in "), replace(source, passage_max_tokens=24))
    config = replace(config, data=replace(config.data, train=sources))
    several = build_or_open(config, tiny_tokenizer(), progress=False)
    found = text_vectors.vectors_of(config, several, "guide")
    assert len(several.passages) == len(found.passages) == 3 * len(store.passages)
    assert len(several.queries) == len(found.queries) == 3 * len(store.queries)
    assert store.guide is not None
    of_text = dict(zip(store.passages.ids.to_pylist(), store.guide.passages, strict=True))
    for text, vector in zip(several.passages.ids.to_pylist(), found.passages, strict=True):
        assert np.abs(vector - of_text[text]).max() < 2**-10


def test_they_are_computed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one guide: another prompt makes others."""
    config, encoded = _config(store.folder.parents[1]), []
    monkeypatch.setattr(text_vectors, "_encode", lambda config, kind, precision, folder: encoded.append(folder))
    assert store.guide is not None
    assert np.array_equal(text_vectors.vectors_of(config, store, "guide").queries, store.guide.queries)
    assert not encoded
    other = replace(SETTINGS, query_prompt="an old ")
    settings = store.folder.parents[1] / "guide" / SETTINGS_FILE
    before = settings.read_text()
    settings.write_text(json.dumps(asdict(other) | {"format_version": 1}))
    with pytest.raises(FileNotFoundError):
        text_vectors.vectors_of(config, store, "guide")
    settings.write_text(before)
    assert len(encoded) == 1


def _loader(store: Store, **loss: Any) -> BatchLoader:
    config = _config(store.folder.parents[1], **loss)
    template = TokenTemplate.from_tokenizer(tiny_tokenizer())
    return BatchLoader(store, Planner.from_config(store, config), template, config, World(torch.device("cpu")))


@pytest.mark.parametrize(("kind", "margin"), [("absolute", 0.1), ("relative", 0.25)])
def test_a_batch_has_its_texts_vectors_and_limits(store: Store, kind: Any, margin: float) -> None:
    targets = _loader(store, guide_margin=margin, guide_margin_kind=kind).load(0).targets
    assert targets.guide is not None and store.guide is not None
    rows = targets.passage_ids.numpy()
    assert np.array_equal(targets.guide.passages.numpy(), store.guide.passages[rows])
    similarity = (targets.guide.queries.double() * targets.guide.passages[targets.positives].double()).sum(1)
    expected = similarity - margin if kind == "absolute" else similarity * (1 - margin)
    assert torch.equal(targets.guide.limit, expected.float())


def test_a_share_of_a_similarity_below_zero_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.guide is not None
    monkeypatch.setattr(store.guide, "queries", -store.guide.queries)
    with pytest.raises(DataError, match=r"similarity of -0\.\d+; expected one above 0 with loss.guide_margin_kind=rel"):
        _loader(store, guide_margin=0.1, guide_margin_kind="relative").load(0)
    _loader(store, guide_margin=0.1).load(0)


def test_a_similarity_is_the_same_in_any_order() -> None:
    """Sums of float32 that are exact; those of vectors as they are depend on the order."""
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(200, 384, generator=draw)
    order = torch.randperm(384, generator=draw)
    for x, exact in ((guide_vectors(vectors).float(), True), (torch.nn.functional.normalize(vectors), False)):
        sums = [(x[:, None] * x[None]).flip(2).sum(2), x @ x.T, x[:, order] @ x[:, order].T]
        assert (torch.equal(sums[0], sums[1]) and torch.equal(sums[1], sums[2])) == exact
        assert exact == bool((sums[1].double() == x.double() @ x.double().T).all())
