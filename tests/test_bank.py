"""A run with a memory bank: what is put into it, and that a resumed run has the bits of an undisturbed one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retriever.config import Config, LossConfig
from retriever.config_file import load
from retriever.encoder.dual_encoder import DualEncoder
from retriever.errors import RefusedError
from retriever.gradcache import encode_without_graph
from retriever.loss.bank import Bank, Part
from retriever.parallel.world import World
from retriever.run import Run
from tests.problems import random_batch, rank_batch

MOMENTUM = 0.7


def _config(workplace: Path, output: str, bank: str, *overrides: str) -> Config:
    settings = [f"run.output_dir={workplace / output}", "run.trackers=[]", "eval=null", "train.eval_every=0"]
    settings += [f"loss.bank={bank}", "loss.bank_steps=2", "train.max_steps=5"]
    settings += [f"loss.bank_momentum={MOMENTUM}"] if bank == "moco" else []
    return load(workplace / "run.yaml", [*settings, *overrides])


def _state(run: Run) -> dict[str, Tensor]:
    held = {} if run.objective.bank is None else run.objective.bank.tensors(run.done)
    return {name: x.detach().clone() for name, x in (run.encoder.state_dict() | held).items()}


def _train(config: Config, until: int) -> tuple[dict[str, Tensor], list[float]]:
    """The weights and the bank after `until` steps, and the losses of the steps that were made here."""
    losses = []
    with Run(config) as run:
        for batch in run.batches():
            run.forward_backward(batch)
            losses.append(run.optimizer_step().loss)  # saves after step 3
            if run.done == until:
                break
        return _state(run), losses


@pytest.mark.parametrize("bank", ["moco", "contaccum"])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(workplace: Path, bank: str) -> None:
    whole, losses = _train(_config(workplace, f"{bank}-whole", bank), 5)
    _train(_config(workplace, f"{bank}-parts", bank), 3)
    resumed, last_losses = _train(_config(workplace, f"{bank}-parts", bank), 5)
    assert losses[3:] == last_losses
    assert whole.keys() == resumed.keys() and "4/passages" in whole
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())
    assert losses[2] > losses[0] + 0.3, "the bank adds no negatives"


def test_passages_of_moco_are_encoded_by_the_mean_of_the_weights(workplace: Path) -> None:
    """φ ← m·φ + (1 − m)·θ after every update, from the first weights on; entries are φ's, without dropout, by id."""
    with Run(_config(workplace, "mean", "moco")) as run:
        mean = copy.deepcopy(run.encoder).eval()
        for batch in run.batches():
            expected, _ = encode_without_graph(mean, batch)
            run.forward_backward(batch)
            run.optimizer_step()
            with torch.no_grad():
                for own, followed in zip(mean.parameters(), run.encoder.parameters(), strict=True):
                    own.copy_(MOMENTUM * own + (1 - MOMENTUM) * followed)
            if run.done == 3:
                break
        held = _state(run)
    assert {name.split("/")[0] for name in held if "/queries" in name} == {"1", "2"}
    by_id = batch.targets.passage_ids.argsort()
    assert torch.equal(held["2/passage_ids"], batch.targets.passage_ids[by_id]) and len(held["2/queries"]) == 0
    apart = held["2/passages"].float() - expected.passage[by_id]
    assert apart.abs().max() < 4e-3, "more than rounding to bf16"
    weights = {name.removeprefix("follower/"): x for name, x in held.items() if name.startswith("follower/")}
    assert weights and all(torch.allclose(x, mean.passage_tower.get_parameter(name)) for name, x in weights.items())
    assert any(not torch.equal(x, run.encoder.passage_tower.get_parameter(name)) for name, x in weights.items())


@pytest.mark.parametrize("tied", [True, False])
def test_moco_follows_the_projection_head_too(workplace: Path, tied: bool) -> None:
    """At first the follower has the encoder's embeddings; then its head is a mean, too, and in checkpoints."""
    encoder = DualEncoder.from_pretrained(replace(load(workplace / "run.yaml").model, tied=tied)).eval()
    encoder.project(int(encoder.passage_tower.config.hidden_size), seed=0)
    bank = Bank(LossConfig(bank="moco", bank_momentum=MOMENTUM), World(torch.device("cpu")), torch.device("cpu"))
    bank.follow(encoder)
    batch, _, _ = rank_batch(random_batch(), 0, 10**6)
    representations, _ = encode_without_graph(encoder, batch)
    bank.add(batch, Part(representations.query, representations.passage, batch.targets))
    found = bank.tensors(batch.step + 1)[f"{batch.step}/passages"].float()
    expected = representations.passage[batch.targets.passage_ids.argsort()]
    assert (found - expected).abs().max() < 4e-3, "more than rounding to bf16"

    head = encoder.projections.get_parameter("shared.0.weight" if tied else "passage.0.weight")
    before = head.detach().clone()
    with torch.no_grad():
        head.add_(1.0)
    bank.follow_update()
    held = bank.tensors(batch.step)
    torch.testing.assert_close(held["follower/1.0.weight"], before + 1 - MOMENTUM)


def test_a_bank_beside_a_teacher_is_refused(workplace: Path) -> None:
    with pytest.raises(RefusedError, match=r"loss\.kl_weight: expected 0 with loss\.bank=moco"):
        _config(workplace, "taught", "moco", "loss.kl_weight=1", "data.negatives=1")
