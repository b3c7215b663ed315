"""Measures a chunk, the loss and the update on this device before step 1: seconds, and on a GPU bytes.

Everything here leaves the run as it found it: the state of the generators, no gradients, no memory, the peak counted
from zero.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels.infonce.rules import Pairs
from kernels.layers.layer import SavedActivations
from retriever.config import OptimConfig
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.data.targets import KnownPairs, Targets
from retriever.data.teacher import Groups
from retriever.data.tokens import Side
from retriever.encoder.batch_norm import running_values_kept
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.rng import RngState

_REPEATS = 3
_MARGIN = 0.06  # of a GPU's memory: fragments, the libraries' own workspaces, batches that are larger than the first
_SCRATCH_PARAMETERS = 2**26


class ChunkCost(NamedTuple):
    """One chunk: seconds of each way through it, bytes it adds to what was allocated before (0 on a CPU)."""

    tokens: float  # computed ones: padding counts
    first_s: float  # encoding without a graph
    forward_s: float  # encoding with one
    again_s: float  # the same where the products of the layers were kept; as long where they cannot be
    backward_s: float
    products_bytes: float  # by these products, 0 where they cannot be kept
    kept_bytes: float  # by the graph, until its backward pass
    first_bytes: float  # at the peak of encoding without a graph
    forward_bytes: float  # at the peak of encoding with one
    backward_bytes: float  # at the peak of the backward pass, the graph included


COST_FIELDS = [(name, float) for name in ChunkCost._fields]  # of an array of them


class Cost(NamedTuple):
    """Seconds, and bytes at the peak above what was allocated before (0 on a CPU)."""

    seconds: float
    peak_bytes: float


def usable_bytes(device: torch.device) -> float | None:
    """Bytes that torch may have allocated at once on a GPU, those of now included; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - _MARGIN * total


def allocated_bytes(device: torch.device) -> float:
    """Bytes that torch has allocated on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def undisturbed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Restores the generators on exit, clears the gradients of `modules`, and frees cached memory.

    Running values of batch normalisation do not change inside.
    """
    try:
        with RngState.capture(device).restored(), ExitStack() as stack:
            for module in modules:
                stack.enter_context(running_values_kept(module))
            yield
    finally:
        for module in modules:
            module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def measure_chunk(encoder: DualEncoder, side: Side, lengths: np.ndarray) -> ChunkCost:
    """The cost of a chunk of random texts of `lengths` [n], each time the median of a few; call it `undisturbed`.

    Raises torch.cuda.OutOfMemoryError where it does not fit.
    """
    device = encoder.device
    vocabulary = getattr(encoder, f"{side}_tower").config.vocab_size
    texts = np.split(np.random.default_rng(0).integers(vocabulary, size=lengths.sum()), lengths.cumsum()[:-1])
    layout: Padded | Packed = pack_rows(texts) if encoder.packed else pad_rows(texts, 0)
    tokens = layout.map(lambda t: t.to(device))

    def encode(graph: bool, saved: deque[SavedActivations] | None = None) -> Tensor:
        with torch.set_grad_enabled(graph):
            return encoder(side, tokens, saved)

    direction = torch.full_like(encode(False), 1e-3)
    encode(True).backward(direction)  # compiles, tunes, and makes the parameters' gradients
    rounds = []
    for _ in range(_REPEATS):
        before = allocated_bytes(device)
        first = _measured(device, encode, False)[0]
        forward, output = _measured(device, encode, True)
        kept = allocated_bytes(device) - before
        backward = _measured(device, output.backward, direction)[0]
        del output
        again, products_bytes = forward, 0.0
        if encoder.keeps_products:
            before, saved = allocated_bytes(device), deque[SavedActivations]()
            encode(False, saved)
            products_bytes = allocated_bytes(device) - before
            again = _measured(device, encode, True, saved)[0]
        seconds = first.seconds, forward.seconds, again.seconds, backward.seconds
        rounds.append(
            (*seconds, products_bytes, kept, first.peak_bytes, forward.peak_bytes, kept + backward.peak_bytes)
        )
    return ChunkCost(tokens.input_ids.numel(), *np.median(rounds, axis=0).tolist())


def measure_loss(
    objective: ContrastiveObjective, queries: int, passages: int, dimension: int, device: torch.device
) -> Cost:
    """The loss and its gradients over `queries` random unit vectors and `passages` of them, on this rank alone; call it
    `undisturbed`.

    Both are in host memory where the objective takes them from there.
    Raises torch.cuda.OutOfMemoryError where it does not fit.
    """
    home = torch.device("cpu") if objective.offload else device
    sides = [nn.functional.normalize(torch.randn(n, dimension, device=home), dim=1) for n in (queries, passages)]
    positives = torch.arange(queries) % passages
    ptr = torch.arange(queries + 1)
    groups = Groups(ptr, positives, torch.ones(queries))  # a teacher's, where one is distilled
    none = torch.empty(0, dtype=torch.int64)
    known = KnownPairs(Pairs(none, none), (passages,))  # but the targets
    targets = Targets(
        positives, torch.arange(passages), ptr, positives, queries, groups, known_pairs=known, ignores=False
    )
    targets = targets.pinned() if device.type == "cuda" else targets
    alone = World(device)
    _measured(device, objective, *sides, targets, alone)  # tunes
    costs = [_measured(device, objective, *sides, targets, alone)[0] for _ in range(_REPEATS)]
    return Cost(float(np.median([cost.seconds for cost in costs])), max(cost.peak_bytes for cost in costs))


def measure_update(config: OptimConfig, parameters: Sequence[nn.Parameter], device: torch.device) -> float:
    """Seconds of clipping and updating parameters of these shapes, on stand-ins of at most a few hundred MiB in
    proportion.
    """
    sizes = np.cumsum([p.numel() for p in parameters])
    count = max(1, int(np.searchsorted(sizes, _SCRATCH_PARAMETERS, side="right")))
    scratch = nn.ParameterList(torch.zeros_like(p) for p in parameters[:count])
    optimizer = Optimizer(replace(config, weight_decay=0.0), [scratch], 1, device)
    rounds = []
    for _ in range(1 + _REPEATS):  # the first makes the optimizer's state
        for parameter in scratch:
            parameter.grad = torch.zeros_like(parameter)
        rounds.append(_measured(device, optimizer.clip_and_step, 0)[0].seconds)
    return float(np.median(rounds[1:]) * sizes[-1] / sizes[count - 1])


def _measured(device: torch.device, call: Callable[..., Any], *given: Any) -> tuple[Cost, Any]:
    """Seconds and bytes of `call(*given)`, and its result."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before, started = allocated_bytes(device), time.perf_counter()
    result = call(*given)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return Cost(seconds, torch.cuda.max_memory_allocated(device) - before if cuda else 0), result
