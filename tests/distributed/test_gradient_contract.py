"""The gradient contract: on any number of ranks, in any chunks, loss and gradient are those of one process and one
batch.
"""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retriever.config import LossConfig, ModelConfig
from retriever.encoder.batch_norm import batch_norms
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.sharded import PlacedEncoder, whole_tensors
from retriever.parallel.world import World
from retriever.retention import Retention
from retriever.rng import seed_step
from tests.distributed.processes import run_on_ranks
from tests.problems import (
    WholeBatch,
    cached_gradients,
    encode_in_chunks,
    encode_whole,
    oracle_loss,
    random_batch,
    rank_batch,
    views_batch,
)
from tests.tiny import add_batch_norm, save_tiny_model

BOUND = 1e-9
DIM_WEIGHTS = (1.0, 0.3)


@dataclass(frozen=True)
class Case:
    """One way to compute the gradient. Chunk budgets: 19 holds one long passage, 10**6 a whole side."""

    strategy: str
    tokens_per_chunk: int = 57
    tied: bool = True
    symmetric: bool = False
    learn_temperature: bool = False
    margin: float | None = None
    ignored: int = 0
    dims: tuple[int, ...] = ()
    layers: str = "padded"  # or packed, or fused
    retain: int = 0  # tokens of graphs
    products: int = 0  # and behind them of products
    sharded: bool = False
    checkpointing: bool = False
    block_rows: int | None = None  # representations in host memory
    views: bool = False  # texts that are their own positives, with dropout
    batch_norm: bool = False  # of the chunks' tokens, with dropout
    looked_up: bool = False  # known pairs beforehand, as a run's loader has them
    pools: int = 0  # of queries and passages

    @property
    def by_chunk(self) -> bool:
        """Whether an embedding depends on its chunk."""
        return self.views or self.batch_norm

    def __str__(self) -> str:
        given = [f"{f.name}={value}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return ", ".join(given)


# What a strategy makes of the representations, in each of its forms.
LOSSES = {
    strategy: [
        Case(strategy),
        Case(strategy, tokens_per_chunk=19, tied=False),
        Case(strategy, symmetric=True),
        Case(strategy, learn_temperature=True),
        Case(strategy, margin=0.05),
        Case(strategy, ignored=3),
        Case(strategy, dims=(8, 32), learn_temperature=True),
        Case(strategy, tied=False, symmetric=True, learn_temperature=True, margin=0.1, ignored=2),
    ]
    for strategy in ("dense", "tiled", "local", "disco")
}
# How the texts are encoded, which no strategy sees.
ENCODINGS = [
    *(Case("tiled", tokens, tied) for tokens, tied in itertools.product((19, 57, 10**6), (True, False))),
    Case("tiled", layers="packed", tied=False),
    Case("tiled", layers="fused"),
    Case("tiled", 19, layers="fused", retain=60),
    Case("tiled", 19, layers="fused", tied=False, retain=30, products=60),
    Case("tiled", retain=10**6),
]
LOOKED_UP = [Case("tiled", looked_up=True), Case("tiled", symmetric=True, margin=0.05, ignored=2, looked_up=True)]
SHARDED = [
    Case("tiled", 19, sharded=True),  # chunks of one long text each make the ranks' numbers of them most unequal
    Case("tiled", 40, tied=False, layers="packed", sharded=True),
    Case("dense", 57, tied=False, symmetric=True, learn_temperature=True, sharded=True),
    Case("tiled", 57, sharded=True, checkpointing=True),
    Case("tiled", 19, sharded=True, block_rows=4),
]
OFFLOADED = [
    Case("tiled", 19, block_rows=5),
    Case("tiled", 40, tied=False, layers="packed", retain=60, block_rows=4),
    Case("tiled", symmetric=True, learn_temperature=True, margin=0.1, ignored=2, looked_up=True, block_rows=3),
    Case("tiled", dims=(8, 32), learn_temperature=True, block_rows=8),
    Case("tiled", 19, layers="fused", products=10**6, block_rows=5),
]
BY_CHUNK = [  # the reference is one graph over the same chunks
    Case("tiled", batch_norm=True),
    Case("dense", 40, tied=False, symmetric=True, retain=60, batch_norm=True),
    Case("tiled", 40, block_rows=4, views=True, batch_norm=True),
    Case("tiled", views=True),
    Case("dense", 19, tied=False, symmetric=True, learn_temperature=True, views=True),
    Case("tiled", 40, layers="packed", retain=60, block_rows=4, views=True),
    Case("tiled", 40, layers="fused", retain=30, products=60, views=True),
]
POOLED = [
    *(Case(strategy, symmetric=True, margin=0.1, ignored=2, pools=3) for strategy in ("dense", "local", "disco")),
    Case("tiled", learn_temperature=True, pools=3),
    Case("tiled", margin=0.05, looked_up=True, pools=3),
    Case("tiled", symmetric=True, margin=0.1, ignored=2, pools=3),
    Case("tiled", symmetric=True, dims=(8, 32), pools=3, block_rows=4),
]
EVERY_CASE = [*itertools.chain(*LOSSES.values()), *ENCODINGS, *LOOKED_UP, *OFFLOADED, *BY_CHUNK, *POOLED]
CASES = {
    1: EVERY_CASE,
    2: EVERY_CASE + SHARDED,
    4: [*LOSSES["dense"], *LOSSES["tiled"], *LOOKED_UP, SHARDED[1], *OFFLOADED[1:3]],
}


@cache
def _loaded(folder: Path, tied: bool) -> DualEncoder:
    config = ModelConfig(name_or_path=str(folder), tied=tied, query_max_tokens=32, passage_max_tokens=32)
    return DualEncoder.from_pretrained(config)


def _encoder(folder: Path, case: Case) -> DualEncoder:
    encoder = deepcopy(_loaded(folder, case.tied))
    if not case.tied:  # towers that differ, so that a gradient on the wrong one is seen
        torch.manual_seed(7)
        with torch.no_grad():
            for p in encoder.query_tower.parameters():
                p.add_(0.02 * torch.randn_like(p))
    if case.batch_norm:
        add_batch_norm(encoder)
    if case.layers != "padded":
        encoder.pack()
    if case.layers == "fused":
        encoder.fuse_layers()
    return encoder.double().train(case.by_chunk)


def _whole(case: Case, ranks: int) -> WholeBatch:
    if case.views:
        return views_batch(ranks=ranks)
    return random_batch(ranks=ranks, ignored=case.ignored, pools=case.pools)


def _named_gradients(encoder: DualEncoder, objective: ContrastiveObjective) -> dict[str, Tensor]:
    modules = torch.nn.ModuleDict({"encoder": encoder, "objective": objective})
    gradients = {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
    return whole_tensors(gradients, torch.device("cpu"))


def _measure(world: World, folder: Path) -> dict[str, dict[str, Any]]:
    return {str(case): _measure_case(world, folder, case) for case in CASES[world.size]}


def _measure_case(world: World, folder: Path, case: Case) -> dict[str, Any]:
    whole = _whole(case, world.size)
    encoder, objective = _encoder(folder, case), _objective(case)
    if case.checkpointing:
        encoder.train().enable_gradient_checkpointing()  # is off in eval mode
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if case.sharded:
        world = World(world.device, world.rank, world.size, sharded=True)
        PlacedEncoder(encoder, world)
    cut = partial(
        rank_batch, whole, tokens_per_chunk=case.tokens_per_chunk, packed=encoder.packed, looked_up=case.looked_up
    )
    most = max(len(cut(rank)[0].chunks) for rank in range(world.size)) if case.sharded else 0
    batch, _, _ = cut(world.rank, chunks_a_side=most)
    seed_step(0, 0, world.rank)
    loss = cached_gradients(encoder, objective, batch, world, Retention(case.retain, case.products))
    found = _named_gradients(encoder, objective)

    plain = replace(
        case,
        strategy="dense",
        retain=0,
        products=0,
        sharded=False,
        checkpointing=False,
        looked_up=False,
        block_rows=None,
    )
    if not case.by_chunk:
        plain = replace(plain, tokens_per_chunk=0, layers="padded")
    expected_loss, expected, running = _oracle(folder, plain, world.size)
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = {name: (found[name] - g).norm() for name, g in expected.items() if name in found}
    return {
        "missing": sorted(expected.keys() ^ found.keys()),
        "norm": total.item(),
        "running": float(
            world.size == 1 and not all(map(torch.equal, _running_values(encoder), running))  # each rank has its own
        ),
        "loss": abs(loss.item() / expected_loss - 1),
        "together": (torch.stack(list(errors.values())).norm() / total).item(),
        "worst": max(
            (errors[name] / g.norm()).item()
            for name, g in expected.items()
            if g.norm() > 1e-12 * total and name in errors
        ),
    }


@cache
def _oracle(folder: Path, case: Case, ranks: int) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Loss and gradients of the whole batch in one process and one graph: of the padded batch, whatever the strategy,
    chunks and layers of `case`; or, with dropout, of the same chunks in the same layers under the same random states.
    """
    whole = _whole(case, ranks)
    encoder, objective = _encoder(folder, case), _objective(case)
    if case.by_chunk:
        parts = [rank_batch(whole, rank, case.tokens_per_chunk, packed=encoder.packed) for rank in range(ranks)]
        sizes = len(whole.query_tokens), len(whole.passage_tokens)
        queries, passages = encode_in_chunks(encoder, parts, sizes)
    else:
        queries = encode_whole(encoder, whole.query_tokens, "query")
        passages = encode_whole(encoder, whole.passage_tokens, "passage")
    cuts = [(normalize(queries[:, :d]), normalize(passages[:, :d])) for d in case.dims] or [(queries, passages)]
    losses = [
        oracle_loss(q, p, whole, objective.log_scale, symmetric=case.symmetric, margin=case.margin) for q, p in cuts
    ]
    loss = torch.stack([w * value for w, value in zip(DIM_WEIGHTS, losses, strict=False)]).sum()
    loss.backward()
    return loss.item(), _named_gradients(encoder, objective), _running_values(encoder)


def _running_values(encoder: DualEncoder) -> list[Tensor]:
    return [buffer for norm in batch_norms(encoder).values() for buffer in norm.buffers()]


def _objective(case: Case) -> ContrastiveObjective:
    config = LossConfig(
        strategy=case.strategy,  # type: ignore[arg-type]
        precision="fp32",
        temperature=0.1,
        learn_temperature=case.learn_temperature,
        symmetric=case.symmetric,
        false_negative_margin=case.margin,
        dims=case.dims,
        dim_weights=DIM_WEIGHTS[: len(case.dims)],
    )
    return ContrastiveObjective(config, block_rows=case.block_rows, unit_norm=True).double()


@pytest.fixture(scope="module", params=sorted(CASES))
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, dict[str, Any]]]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return request.param, run_on_ranks(_measure, request.param, folder)


def test_loss_and_gradient_equal_one_process_over_the_whole_batch(
    measured: tuple[int, list[dict[str, dict[str, Any]]]],
) -> None:
    world_size, ranks = measured
    failures = []
    for case in map(str, CASES[world_size]):
        for rank, result in enumerate(r[case] for r in ranks):
            assert result["norm"] > 1e-3, f"{case}: the oracle's gradient is zero"
            if result["missing"] or max(result[name] for name in ("loss", "together", "worst", "running")) > BOUND:
                failures.append(f"W={world_size} rank {rank} {case}: {result}")
    assert not failures, "\n".join(failures)
