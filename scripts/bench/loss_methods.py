"""The losses that `scripts.bench.loss` compares, each as one function from a problem to (mean loss, dqueries, dpassages)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from kernels.infonce.api import Exclusions, infonce

Result = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Problem:
    """Query i's positive is passage i; all other passages are its negatives."""

    queries: Tensor  # [b, d] bf16
    passages: Tensor  # [b, d] bf16
    temperature: float
    exclusions: Exclusions  # every query's own passage and one more

    @property
    def targets(self) -> Tensor:
        return torch.arange(len(self.queries), device=self.queries.device)


@dataclass(frozen=True)
class Method:
    """A loss under the name it has in the table, and what it was asked to do."""

    name: str
    condition: str  # what follows the batch size in the case, "" for the plain one
    run: Callable[[Problem, bool], Result]  # (problem, with gradients)
    largest: int = 131_072
    note: str = ""
    symmetric: bool = False
    masked: bool = False


def methods() -> list[Method]:
    """Every method of the table; a peer is imported when it first runs."""
    return [
        Method("bigbatch", "", _bigbatch, note="fp32 gradients"),
        Method("bigbatch", "workspace=256", lambda p, g: _bigbatch(p, g, workspace_mib=256), note="fp32 gradients"),
        Method("bigbatch", "symmetric", lambda p, g: _bigbatch(p, g, symmetric=True), note="fp32 gradients", symmetric=True),
        Method("bigbatch", "known=1", lambda p, g: _bigbatch(p, g, exclusions=p.exclusions), note="fp32 gradients", masked=True),
        Method("bigbatch", "high", lambda p, g: _bigbatch(p, g, precision="high"), 65_536, "fp32 gradients"),
        Method("dense", "", _dense, 65_536, "fp32 logits of tf32 products, fp32 gradients"),
        Method("dense", "bf16 logits", _dense_bf16, 65_536, "autocast, bf16 gradients"),
        Method("dense", "checkpointed", _checkpointed, note="1,024 rows of fp32 logits of tf32 products at a time, fp32 gradients"),
        Method("inf-cl", "", _inf_cl, note="fp32 inputs, tf32 products, fp32 gradients"),
        Method("memeff", "", _memeff, note="one direction (its Qwen3 loss without mask), bf16 gradients"),
        Method("cce", "", _cce, note="exact (no filter), bf16 gradients; scale folded into the bf16 queries"),
        Method("liger", "", lambda p, g: _liger(p, g, 1), note="bf16 gradients; scale folded into the bf16 queries"),
        Method("liger", "8x chunks", lambda p, g: _liger(p, g, 8), note="chunk_mem_const=8, as above"),
    ]


def _bigbatch(problem: Problem, gradients: bool, **options: Any) -> Result:
    b = len(problem.queries)
    weights = torch.full((b,), 1 / b, device=problem.queries.device)
    out = infonce(
        problem.queries, problem.passages, problem.targets, 1 / problem.temperature, weights=weights, gradients=gradients, **options
    )  # fmt: skip
    return out.loss.mean(), out.dqueries, out.dpassages


def _with_autograd(
    problem: Problem, gradients: bool, loss_of: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.bfloat16
) -> Result:
    queries, passages = (x.to(dtype).detach().requires_grad_(gradients) for x in (problem.queries, problem.passages))
    with torch.set_grad_enabled(gradients):
        loss = loss_of(queries, passages)
    if not gradients:
        return loss, None, None
    loss.backward()
    return loss.detach(), queries.grad, passages.grad


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _dense(problem: Problem, gradients: bool) -> Result:
    with _tf32():
        return _with_autograd(
            problem, gradients, lambda q, p: cross_entropy(q @ p.T / problem.temperature, problem.targets), torch.float32
        )  # fmt: skip


def _dense_bf16(problem: Problem, gradients: bool) -> Result:
    return _with_autograd(problem, gradients, lambda q, p: cross_entropy(q @ p.T / problem.temperature, problem.targets))


def _checkpointed(problem: Problem, gradients: bool) -> Result:
    targets, b = problem.targets, len(problem.queries)

    def chunk(q: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(q @ p.T / problem.temperature, t, reduction="sum")

    def loss_of(q: Tensor, p: Tensor) -> Tensor:
        total = q.new_zeros(())
        for rows, t in zip(q.split(1024), targets.split(1024), strict=True):
            total = total + checkpoint(chunk, rows, p, t, use_reentrant=False)
        return total / b

    with _tf32():
        return _with_autograd(problem, gradients, loss_of, torch.float32)


def _inf_cl(problem: Problem, gradients: bool) -> Result:
    cal_flash_loss = import_module("inf_cl").cal_flash_loss

    return _with_autograd(
        problem, gradients, lambda q, p: cal_flash_loss(q, p, problem.targets, scale=1 / problem.temperature).mean(), torch.float32
    )  # fmt: skip


def _memeff(problem: Problem, gradients: bool) -> Result:
    loss = import_module("memeff").MemoryEfficientQwen3Loss(
        temperature=problem.temperature, margin=2.0, use_qq_negatives=False, use_dd_negatives=False, normalized_inputs=True, stable=False
    )
    return _with_autograd(problem, gradients, lambda q, p: loss(q, p))


def _cce(problem: Problem, gradients: bool) -> Result:
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy

    return _with_autograd(
        problem, gradients, lambda q, p: linear_cross_entropy(q / problem.temperature, p, problem.targets, filter_eps=None)
    )


def _liger(problem: Problem, gradients: bool, chunks: int) -> Result:
    ops = import_module("liger_kernel.ops.fused_linear_cross_entropy")

    if not gradients:  # its autograd function computes gradients in the forward; this is the loss alone
        scaled = problem.queries / problem.temperature
        return ops.fused_linear_cross_entropy_forward(scaled, problem.passages, problem.targets, chunk_mem_const=chunks)[0], None, None

    def loss_of(q: Tensor, p: Tensor) -> Tensor:
        scaled = q / problem.temperature
        if chunks == 1:
            return ops.LigerFusedLinearCrossEntropyFunction.apply(scaled, p, problem.targets)[0]
        return _LigerChunks.apply(scaled, p, problem.targets, chunks)

    return _with_autograd(problem, gradients, loss_of)


class _LigerChunks(torch.autograd.Function):
    """Liger's forward with larger chunks, which its autograd function has no argument for."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, queries: Tensor, passages: Tensor, targets: Tensor, chunks: int) -> Tensor:
        ops = import_module("liger_kernel.ops.fused_linear_cross_entropy")
        results = ops.fused_linear_cross_entropy_forward(
            queries, passages, targets, chunk_mem_const=chunks, compute_gradients=True, weight_requires_grad=True
        )
        dqueries, dpassages = (x for x in results[1:] if isinstance(x, Tensor) and x.shape == queries.shape)
        ctx.save_for_backward(dqueries, dpassages)
        return results[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dqueries, dpassages = ctx.saved_tensors  # type: ignore[attr-defined]
        return dqueries, dpassages, None, None
