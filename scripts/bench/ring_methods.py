"""The losses over several ranks that `scripts.bench.ring` compares, each from one rank's shard to (mean loss, dqueries, dpassages)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kernels.infonce.api import Exclusions, Precision
from kernels.infonce.exclusions import MaskTables, Pairs
from retriever.data.batch import KnownPairs
from retriever.loss.problem import Problem
from retriever.loss.ring import ring
from retriever.loss.strategies import STRATEGIES
from retriever.loss.tiled import tiled
from retriever.parallel.world import World

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shard:
    """One rank's rows: query i's positive is passage i, every other passage of any rank is its negative. All ranks have equal shards."""

    queries: Tensor  # [B, D] bf16 unit vectors
    passages: Tensor  # [B, D]
    temperature: float
    world: World

    def problem(
        self, *, symmetric: bool = False, precision: Precision = "bf16", dtype: torch.dtype = torch.bfloat16, **more: Any
    ) -> Problem:
        """What the project's strategies are given in training: the loader has looked up that no pair but the targets is known."""
        B, device = len(self.queries), self.queries.device
        at = torch.arange(B, device=device)
        ids = at + self.world.rank * B
        exclusions = Exclusions(ids, torch.arange(B + 1, device=device), ids)
        weight = 1 / (B * self.world.size)
        queries, passages = self.queries.to(dtype), self.passages.to(dtype)
        none = at.new_empty(0)
        known = KnownPairs(Pairs(none, none), (B,) * self.world.size)
        beforehand: Any = {"known_pairs": known, "ignores": False, "largest": 1.0}  # of unit vectors
        return Problem(queries, passages, at, exclusions, 1 / self.temperature, weight, symmetric, precision, **beforehand, **more)


@dataclass(frozen=True)
class Method:
    """A loss under the name it has in the table, and what it was asked to do."""

    name: str
    condition: str  # what follows batch and ranks in the case, "" for the plain one
    run: Callable[[Shard], Result]
    largest: int  # global batch
    note: str = ""
    symmetric: bool = False


def methods() -> list[Method]:
    """Every method of the table; a peer is imported when it first runs."""
    return [
        Method("bigbatch", "gather", _bigbatch, 2**20, "fp32 gradients"),
        Method("bigbatch", "ring", partial(_bigbatch, exchange="ring", workspace_mib=256), 2**20, "256 MiB workspace, fp32 gradients"),
        Method("bigbatch", "gather,symmetric", partial(_bigbatch, symmetric=True), 131_072, "fp32 gradients", True),
        Method(
            "bigbatch", "ring,symmetric", partial(_bigbatch, symmetric=True, exchange="ring", workspace_mib=256), 131_072,
            "256 MiB workspace, fp32 gradients", True,
        ),
        Method("dense", "", partial(_strategy, "dense"), 32_768, "b × b fp32 logits of tf32 products on every rank"),
        Method("local", "", partial(_strategy, "local"), 65_536, "B × b fp32 logits of tf32 products"),
        Method("disco", "", partial(_strategy, "disco"), 65_536, "B × b fp32 logits of tf32 products"),
        Method("dense", "bf16 logits", _gathered_bf16, 131_072, "passages gathered, autocast, bf16 gradients"),
        Method("inf-cl", "ring", _inf_cl, 131_072, "its ring, fp32 inputs, tf32 products"),
        Method("memeff", "ring", _memeff, 131_072, "its ring (Qwen3 loss without mask), bf16 gradients"),
    ]  # fmt: skip


def ablation() -> list[Method]:
    """Neither tiling, that over ranks alone, both: in fp32, where their losses can be told apart."""
    dense_blocks = partial(_over_ring, lse=_dense_lse, gradient=_dense_gradient, precision="fp32")
    return [
        Method("dense", "neither", partial(_strategy, "dense", ieee=True), 32_768, "b × b fp32 logits"),
        Method("bigbatch", "cross-GPU", dense_blocks, 32_768, "the ring, B × B fp32 logits of a block"),
        Method("bigbatch", "both", partial(_over_ring, precision="high"), 32_768, "the ring, tiles"),
    ]


def _bigbatch(shard: Shard, **options: Any) -> Result:
    return _mean(shard, tiled(shard.problem(**options), shard.world))


def _over_ring(shard: Shard, precision: Precision, **kernels: Any) -> Result:
    return _mean(shard, ring(shard.problem(precision=precision, dtype=torch.float32, workspace_mib=256), shard.world, **kernels))


def _strategy(name: str, shard: Shard, ieee: bool = False) -> Result:
    with _fp32_products("ieee" if ieee else "tf32"):
        return _mean(shard, STRATEGIES[name](shard.problem(dtype=torch.float32), shard.world))


def _mean(shard: Shard, result: tuple[Tensor, Tensor, Tensor]) -> Result:
    losses, dqueries, dpassages = result
    return shard.world.sum(losses.sum()) / (len(losses) * shard.world.size), dqueries, dpassages


@contextmanager
def _fp32_products(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _dense_logits(queries: Tensor, passages: Tensor, scale: float, masks: MaskTables) -> Tensor:
    logits = scale * (queries @ passages.T)
    rows, columns = masks.pairs()
    logits[rows, columns] = -torch.inf
    return logits


def _dense_lse(queries: Tensor, passages: Tensor, scale: float, masks: MaskTables, **_: Any) -> tuple[Tensor, None]:
    with _fp32_products("ieee"):
        return _dense_logits(queries, passages, scale, masks).logsumexp(dim=1), None


def _dense_gradient(
    queries: Tensor,
    passages: Tensor,
    scale: float,
    row_log_weights: Tensor,
    column_log_weights: None,
    masks: MaskTables,
    *,
    dqueries: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    with _fp32_products("ieee"):
        dlogits = scale * (_dense_logits(queries, passages, scale, masks) + row_log_weights[:, None]).exp()
        term = dlogits @ passages
        return term if dqueries is None else dqueries.add_(term), dlogits.T @ queries


def _gathered_bf16(shard: Shard) -> Result:
    """All passages beside one another, cross-entropy over bf16 logits by autograd, gradients home by a reduce-scatter."""
    world, B = shard.world, len(shard.queries)
    gathered = world.gather_rows(shard.passages)
    queries, passages = shard.queries.detach().requires_grad_(), gathered.rows.detach().requires_grad_()
    targets = torch.arange(B, device=queries.device) + gathered.own.start
    loss = cross_entropy(queries @ passages.T / shard.temperature, targets) / world.size
    loss.backward()
    assert queries.grad is not None and passages.grad is not None
    return world.sum(loss.detach()), queries.grad, world.reduce_rows(passages.grad, gathered.counts)


def _with_autograd(shard: Shard, dtype: torch.dtype, part_of_loss: Callable[[Tensor, Tensor], Tensor]) -> Result:
    queries, passages = (x.to(dtype).detach().requires_grad_() for x in (shard.queries, shard.passages))
    loss = part_of_loss(queries, passages)
    loss.backward()
    assert queries.grad is not None and passages.grad is not None
    return shard.world.sum(loss.detach()), queries.grad, passages.grad


def _inf_cl(shard: Shard) -> Result:
    cal_inf_loss = import_module("inf_cl").cal_inf_loss
    return _with_autograd(shard, torch.float32, lambda q, p: cal_inf_loss(q / shard.temperature, p) / shard.world.size)


def _memeff(shard: Shard) -> Result:
    loss = import_module("memeff").DistributedMemoryEfficientQwen3Loss(
        temperature=shard.temperature, margin=2.0, use_qq_negatives=False, use_dd_negatives=False, normalized_inputs=True, stable=False
    )
    return _with_autograd(shard, torch.bfloat16, lambda q, p: loss(q, p))
