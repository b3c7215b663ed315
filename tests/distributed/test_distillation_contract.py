"""The gradient contract with a teacher: groups that cross ranks, ragged and empty ones, alone and beside the
contrastive term.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss, normalize

from retriever.config import LossConfig, ModelConfig
from retriever.data.teacher import Groups
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss import distill as distill_module
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.problems import WholeBatch, cached_gradients, encode_whole, oracle_loss, random_batch, rank_batch
from tests.tiny import save_tiny_model

BOUND = 1e-9


@dataclass(frozen=True)
class Case:
    """The weights of the three terms, and what else may be asked of the objective."""

    contrastive: float = 1.0
    kl: float = 0.0
    margin_mse: float = 0.0
    strategy: str = "tiled"
    learn_temperature: bool = False
    ignored: int = 0
    dims: tuple[int, ...] = ()
    cosent: float = 0.0
    temperature: float = 1.0  # the teacher's
    policies: bool = False  # rows are contrasted with the batch, their own group or nothing, in turn

    def config(self) -> LossConfig:
        """The objective's configuration."""
        return LossConfig(
            strategy=self.strategy,  # type: ignore[arg-type]
            precision="fp32",
            temperature=0.1,
            learn_temperature=self.learn_temperature,
            dims=self.dims,
            contrastive_weight=self.contrastive,
            kl_weight=self.kl,
            margin_mse_weight=self.margin_mse,
            cosent_weight=self.cosent,
            teacher_temperature=self.temperature,
        )


CASES = (
    Case(contrastive=0, kl=1.0),
    Case(contrastive=0, margin_mse=1.0),
    Case(contrastive=0.3, kl=0.7, margin_mse=0.02, learn_temperature=True, temperature=2.5),
    Case(contrastive=0.3, kl=0.7, margin_mse=0.02, strategy="dense", ignored=3),
    Case(kl=2.0, margin_mse=0.5, dims=(8, 32), learn_temperature=True, ignored=2),
    Case(contrastive=0, cosent=1.0),
    Case(contrastive=0.3, kl=0.5, cosent=0.2, dims=(8, 32), learn_temperature=True, ignored=3),
    Case(contrastive=0.6, kl=0.4, policies=True, learn_temperature=True, ignored=2),
    Case(contrastive=0.6, policies=True, strategy="dense"),
)


def _groups(whole: WholeBatch) -> list[list[tuple[int, float]]]:
    """(passage id, score) of each query's group, its target first; some are empty, some hold the target alone."""
    draw, groups = random.Random(1), []
    for row, column in enumerate(whole.positives):
        others = draw.sample(whole.passage_ids, draw.choice([0, 2, 3, 7]))
        ids = [whole.passage_ids[max(column, 0)], *(i for i in others if i not in whole.known[row])]
        groups.append([(i, round(draw.gauss(0, 3), 1)) for i in ids] if row % 5 else [])  # some are equal
    return groups


def _in_batch(row: int, case: Case) -> bool:
    return not case.policies or row % 3 == 0


def _as_tensors(groups: list[list[tuple[int, float]]]) -> Groups:
    ptr = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)
    entries = [entry for group in groups for entry in group]
    return Groups(ptr, torch.tensor([i for i, _ in entries], dtype=torch.int64), torch.tensor([s for _, s in entries]))


def _oracle(queries: Tensor, passages: Tensor, whole: WholeBatch, log_scale: Tensor, case: Case) -> Tensor:
    """The terms of the whole batch by autograd; the teacher's are torch's own kl_div and mse_loss, query by query, and
    CoSENT pair by pair.
    """
    in_batch = [c if _in_batch(row, case) else -1 for row, c in enumerate(whole.positives)]
    total = case.contrastive * oracle_loss(queries, passages, replace(whole, positives=in_batch), log_scale)
    logits, column = log_scale.exp() * queries @ passages.T, {i: c for c, i in enumerate(whole.passage_ids)}
    for row, group in enumerate(_groups(whole)):
        if len(group) > 1 and whole.positives[row] >= 0 and case.policies and row % 3 == 1:
            student = torch.stack([logits[row, column[i]] for i, _ in group])
            own = cross_entropy(student[None], torch.tensor([0]))
            total = total + case.contrastive * own / len(whole.positives)
        if len(group) > 1 and whole.positives[row] >= 0:
            student = torch.stack([logits[row, column[i]] for i, _ in group])
            teacher = torch.tensor([s for _, s in group]).to(student.dtype) / case.temperature
            kl = kl_div(student.log_softmax(0), teacher.softmax(0), reduction="sum")
            mse = mse_loss(student[0] - student[1:], teacher[0] - teacher[1:])
            total = total + (case.kl * kl + case.margin_mse * mse) / len(whole.positives)
    scored = [
        (logits[row, column[i]], score)
        for row, group in enumerate(_groups(whole))
        for i, score in group
        if whole.positives[row] >= 0
    ]
    differences = [low - high for low, a in scored for high, b in scored if a < b]
    return total + case.cosent * torch.stack([logits.new_zeros(()), *differences]).logsumexp(0)


def _encoder(folder: Path) -> DualEncoder:
    model = ModelConfig(name_or_path=str(folder), query_max_tokens=32, passage_max_tokens=32)
    return DualEncoder.from_pretrained(model).double().eval()


def _gradients(encoder: DualEncoder, objective: ContrastiveObjective) -> dict[str, Tensor]:
    modules = torch.nn.ModuleDict({"encoder": encoder, "objective": objective})
    return {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}


def _measure(world: World, folder: Path) -> list[dict[str, Any]]:
    distill_module._PAIRS_AT_ONCE = 5  # several blocks of pairs
    return [_measure_case(world, folder, case) for case in CASES]


def _measure_case(world: World, folder: Path, case: Case) -> dict[str, Any]:
    whole = random_batch(ranks=world.size, ignored=case.ignored)
    encoder, objective = _encoder(folder), ContrastiveObjective(case.config(), unit_norm=True).double()
    batch, rows, columns = rank_batch(whole, world.rank, 57)
    groups = _groups(whole)
    targets = replace(batch.targets, groups=_as_tensors([groups[row] for row in rows]))
    if case.policies:
        own = _as_tensors([groups[row] if row % 3 == 1 else [] for row in rows])
        targets = replace(
            targets, own_groups=own, in_batch=torch.tensor([_in_batch(row, case) for row in rows], dtype=torch.bool)
        )
    batch = replace(batch, targets=targets)
    loss = cached_gradients(encoder, objective, batch, world)
    found = _gradients(encoder, objective)

    exact, reference = _encoder(folder), ContrastiveObjective(case.config(), unit_norm=True).double()
    queries, passages = (
        encode_whole(exact, whole.query_tokens, "query"),
        encode_whole(exact, whole.passage_tokens, "passage"),
    )
    cuts = [(normalize(queries[:, :d]), normalize(passages[:, :d])) for d in case.dims] or [(queries, passages)]
    expected_loss = torch.stack([_oracle(q, p, whole, reference.log_scale, case) for q, p in cuts]).sum()
    expected_loss.backward()
    expected = _gradients(exact, reference)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = [(found[name] - g).norm() for name, g in expected.items() if name in found]
    return {
        "missing": sorted(expected.keys() ^ found.keys()),
        "norm": norm.item(),
        "loss": abs(loss.item() / expected_loss.item() - 1),
        "gradient": (torch.stack(errors).norm() / norm).item(),
        "crossing": sum(i not in {whole.passage_ids[c] for c in columns} for row in rows for i, _ in groups[row]),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradient_equal_one_process_over_the_whole_batch(world_size: int, tmp_path: Path) -> None:
    ranks = run_on_ranks(_measure, world_size, save_tiny_model(tmp_path))
    crossing = [result["crossing"] for results in ranks for result in results]
    assert (max(crossing) > 5) == (world_size > 1), "no group reaches over ranks: this proves little"
    for results in ranks:
        for case, result in zip(CASES, results, strict=True):
            assert result["norm"] > 1e-3, f"{case}: the oracle's gradient is zero"
            assert not result["missing"] and max(result["loss"], result["gradient"]) < BOUND, f"{case}: {result}"
