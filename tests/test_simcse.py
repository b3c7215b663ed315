"""Texts that are their own positives: the two encodings of a text differ by their dropout masks, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retriever.config import Config
from retriever.config_file import load
from retriever.data.layout import Padded
from retriever.errors import RefusedError
from retriever.gradcache import encode_without_graph
from retriever.rng import seed_step
from retriever.run import Run
from tests.tiny import random_texts, save_tiny_model


def _config(folder: Path, *overrides: str, **model: Any) -> Config:
    save_tiny_model(folder / "model", num_hidden_layers=1, **model)
    texts = random_texts(30, shortest=4, longest=12, seed=1)
    (folder / "texts.txt").write_text("\n".join([*texts, "", texts[0]]) + "\n")
    (folder / "run.yaml").write_text(
        f"""
run: {{output_dir: {folder}/run, trackers: []}}
model: {{name_or_path: {folder}/model, query_max_tokens: 16, passage_max_tokens: 16}}
data: {{train: [{{path: {folder}/texts.txt, format: texts}}], cache_dir: {folder}/cache, negatives: 0}}
batch: {{queries: 31, tokens_per_chunk: 64}}
optim: {{precision: fp32}}
train: {{max_steps: 1}}
"""
    )
    return load(folder / "run.yaml", overrides)


def test_a_text_is_its_own_positive_and_its_views_differ(tmp_path: Path) -> None:
    """Every text stands once as a passage; a repeated one is two queries of the same passage; a blank line is none."""
    with Run(_config(tmp_path)) as run:
        batch = next(iter(run.batches()))
        targets = batch.targets
        assert batch.sizes == (31, 30)
        positives = targets.passage_ids[targets.positives]
        assert torch.equal(targets.known_ids, positives), "a query knows its own text and no other"
        assert positives.bincount().max() == 2
        tokens: dict[str, dict[int, list[int]]] = {"query": {}, "passage": {}}
        for chunk in batch.chunks:
            assert isinstance(chunk.tokens, Padded)
            both = zip(chunk.tokens.input_ids, chunk.tokens.attention_mask, strict=True)
            texts = [ids[mask.bool()].tolist() for ids, mask in both]
            tokens[chunk.side] |= dict(zip(chunk.rows.tolist(), texts, strict=True))
        assert all(tokens["query"][i] == tokens["passage"][t] for i, t in enumerate(targets.positives.tolist()))
        for training, equal in ((False, True), (True, False)):
            seed_step(0, 0, 0)
            views, _ = encode_without_graph(run.encoder.train(training), batch)
            apart = (views.query - views.passage[targets.positives]).abs().amax(dim=1)
            assert bool((apart < 1e-6).all()) == equal and bool((apart > 1e-3).all()) != equal


def test_a_model_without_dropout_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(RefusedError, match=r"data\.train\.0\.format: texts, but .* has no dropout"), Run(config):
        pass


def test_views_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"model\.query_max_tokens: expected 16, .*; received 8"):
        _config(tmp_path, "model.query_max_tokens=8")
