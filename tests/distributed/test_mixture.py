"""Four sources with different prompts, lengths and policies, trained on two ranks and resumed to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retriever import checkpoint
from retriever.config import Config
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store, build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.step import train_step
from retriever.verify import gradient_error
from tests.distributed.processes import run_on_ranks
from tests.mixture import mixture
from tests.tiny import save_tiny_model, tiny_tokenizer

STEPS = 16  # more than an epoch


def _config(folder: Path, one_source: bool) -> Config:
    config = mixture(folder, str(folder / "model"), one_source=one_source)
    if one_source:
        return config
    train = (replace(source, temperature=None, apart=i == 3) for i, source in enumerate(config.data.train))
    return replace(config, data=replace(config.data, train=tuple(train)))


class _Training:
    """A run's parts on one rank, from its beginning or from a checkpoint."""

    def __init__(self, config: Config, world: World, store: Store, last: Path | None = None) -> None:
        self.config, self.world = config, world
        self.encoder = DualEncoder.from_pretrained(config.model).train()
        self.objective = ContrastiveObjective(config.loss, unit_norm=True)
        self.optimizer = Optimizer(config.optim, [self.encoder, self.objective], STEPS, world.device)
        self.state = checkpoint.TrainingState(self.encoder, self.objective, self.optimizer)
        template = TokenTemplate.from_tokenizer(tiny_tokenizer())
        self.loader = BatchLoader(store, Planner.from_config(store, config), template, config, world)
        self.done = 0 if last is None else checkpoint.load(last, self.state, store.fingerprint)

    def run(self, last: int) -> list[float]:
        """The losses up to step `last`."""
        losses = []
        for batch in self.loader.batches(self.done, last):
            losses.append(train_step(self.encoder, self.objective, batch, self.optimizer, self.world, seed=1).loss)
        self.done = last
        return losses


def _train(world: World, folder: Path) -> list[dict[str, Any]]:
    return [_train_one(world, folder, one_source) for one_source in (True, False)]


def _train_one(world: World, folder: Path, one_source: bool) -> dict[str, Any]:
    config = _config(folder, one_source)
    store = build_or_open(config, tiny_tokenizer(), progress=False)
    whole = _Training(config, world, store)
    losses = whole.run(STEPS // 2)
    if world.is_first:
        snapshot = checkpoint.snapshot(whole.state)
        checkpoint.save(folder / str(one_source), STEPS // 2, snapshot, config, store.fingerprint, Path.mkdir)
    world.barrier()
    losses += whole.run(STEPS)
    resumed = _Training(config, world, store, checkpoint.folder_of(folder / str(one_source), STEPS // 2))
    later = resumed.run(STEPS)
    pairs = zip(whole.encoder.parameters(), resumed.encoder.parameters(), strict=True)
    equal = all(torch.equal(p, q) for p, q in pairs)
    return {"losses": losses, "later": later, "equal": equal}


def test_a_mixture_on_two_ranks_is_that_on_one_and_resumes_bitwise(tmp_path: Path) -> None:
    """One source a batch, and mixed, where one source stands apart."""
    save_tiny_model(tmp_path / "model", num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for one_source in (True, False):
        config = _config(tmp_path, one_source)
        store = build_or_open(config, tiny_tokenizer(), progress=False)
    ranks = run_on_ranks(_train, 2, tmp_path)
    assert ranks[0] == ranks[1]
    for one_source, result in zip((True, False), ranks[0], strict=True):
        assert result["equal"] and result["later"] == result["losses"][STEPS // 2 :]
        config = _config(tmp_path, one_source)
        alone = _Training(config, World(torch.device("cpu")), store)
        assert alone.run(STEPS) == pytest.approx(result["losses"], rel=1e-3)
        for step in range(4):
            batch = alone.loader.load(step)
            exact = gradient_error(alone.encoder, config.loss, batch)
            assert max(exact.gradient_error, exact.loss_error) < 1e-9
