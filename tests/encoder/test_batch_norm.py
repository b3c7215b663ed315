"""Batch normalisation is by chunk, so the user says what a chunk is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retriever import preflight
from retriever.config import BatchConfig, Config, ConfigError, DataConfig, ModelConfig, SourceConfig
from retriever.encoder.batch_norm import batch_norms, running_values_kept
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import check_replay
from retriever.parallel.world import World
from tests.tiny import add_batch_norm, save_tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folder = save_tiny_model(tmp_path, num_hidden_layers=1)
    return Config(model=ModelConfig(str(folder)), data=DataConfig(train=(SourceConfig(path="x"),)))


def test_chunks_of_a_measured_size_and_several_ranks_are_refused(config: Config) -> None:
    encoder, world = DualEncoder.from_pretrained(config.model), World(torch.device("cpu"))
    preflight.resolve(config, encoder, world)
    add_batch_norm(encoder)
    with pytest.raises(ConfigError, match=r"batch\.tokens_per_chunk: auto, but .* has batch normalisation \(towers\."):
        preflight.resolve(config, encoder, world)
    fixed = Config(model=config.model, data=config.data, batch=BatchConfig(tokens_per_chunk=256))
    preflight.resolve(fixed, encoder, world)
    world.size = 2
    with pytest.raises(ConfigError, match="would differ among 2 ranks"):
        preflight.resolve(fixed, encoder, world)


def test_running_values_stay_where_they_are_kept(config: Config) -> None:
    encoder = DualEncoder.from_pretrained(config.model)
    add_batch_norm(encoder.train())
    (norm,) = batch_norms(encoder).values()
    x, counted = torch.randn(5, 32), norm.num_batches_tracked
    assert counted is not None
    with running_values_kept(encoder):
        inside = norm(x)
    check_replay(encoder, config.model)
    assert counted == 0 and norm.running_mean is not None and not norm.running_mean.any()
    assert torch.equal(norm(x), inside) and counted == 1 and norm.running_mean.any()
