"""The sizes that `auto` asks for in `batch`, decided by measuring this rank's device, and the step they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod, sqrt

import numpy as np
import torch
from torch import nn

from retriever.config import Config, ConfigError, LossConfig, OptimConfig
from retriever.data.planner import GlobalBatch, Planner
from retriever.data.slices import RankSlice, slice_for_rank
from retriever.data.store import Store
from retriever.data.text_table import at
from retriever.data.tokens import SIDES, Side, TokenTemplate
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import host_bytes
from retriever.parallel.cost import RING_OPERATIONS, gathered_operations
from retriever.parallel.world import World
from retriever.plan.forecast import Forecast, Memory, Workload, most_retained
from retriever.plan.measure import (
    ChunkCost,
    Cost,
    allocated_bytes,
    measure_chunk,
    measure_loss,
    measure_update,
    undisturbed,
    usable_bytes,
)
from retriever.retention import Retention, given_tokens

_LARGEST_SIZE, _SMALLEST_USUAL = 131_072, 16_384  # tokens of a chunk that are tried on a GPU, halving
_LEAST_SIZE = 1024  # tried where none of those fits
_UNMEASURED_SIZE = {"cuda": 16_384, "cpu": 8_192}
_TOLERANCE = 0.04  # a chunk is no larger than it must be for its tokens to take this share more than the least
_GIB = 2**30
# Query-passage pairs over which the loss is measured, tiled or not; a larger one follows from it.
_MEASURED_PAIRS = {("cuda", True): 2**32, ("cuda", False): 2**28, ("cpu", True): 2**22, ("cpu", False): 2**22}


class StepPlanner:
    """Chooses the sizes that the configuration leaves to `auto`, by measuring parts of a step on this rank's device."""

    def __init__(
        self,
        config: Config,
        encoder: DualEncoder,
        objective: ContrastiveObjective,
        store: Store,
        planner: Planner,
        template: TokenTemplate,
        world: World,
    ) -> None:
        """`config` as `preflight.resolve` left it; `encoder` computing as it says, without gradients."""
        self._config, self._encoder, self._objective, self._world = config, encoder, objective, world
        self._longest = max(config.model.query_max_tokens, config.model.passage_max_tokens)  # tokens of a text
        self._usable = None if world.sharded else usable_bytes(world.device)  # None: memory is not measured
        self._queries, self._lengths = _step_lengths(config, store, planner, template, world)
        self._parameters = [p for module in (encoder, objective) for p in module.parameters() if p.requires_grad]
        own = sum(t.nbytes for module in (encoder, objective) for t in [*module.parameters(), *module.buffers()])
        numbers = sum(len(lengths) for lengths in self._lengths.values()) * encoder.dimension
        offload, itemsize = config.batch.offload, next(encoder.parameters()).itemsize
        at_loss = host_bytes(config.loss.precision, dims=bool(config.loss.dims)) if offload else itemsize
        texts = {side: len(lengths) for side, lengths in self._lengths.items()}
        bank = _bank_bytes(config.loss, texts, world.size, at_loss) * encoder.dimension
        self._memory = Memory(
            weights=max(allocated_bytes(world.device), own),
            gradients=sum(p.nbytes for p in self._parameters),
            optimizer=_state_bytes(config.optim, self._parameters),
            representations=0.0 if offload else numbers * itemsize,
            bank=0.0 if offload else bank,
            host=numbers * at_loss + bank if offload else 0.0,
        )

    def decide(self) -> tuple[Config, Forecast | None]:
        """The configuration without `auto` in `batch`, the same on every rank, and the step it makes where that was
        measured.

        A GPU is measured unless everything is given and `run.preflight` is off, a CPU for `run.preflight=only`. Nothing
        is measured of an encoder in shards, of which no rank can work alone. Raises ConfigError where no chunk fits,
        where all graphs or products are to be kept and do not fit or the layers keep none, or where representations are
        more than the host holds.
        """
        self._check()
        batch, preflight, usable = self._config.batch, self._config.run.preflight, self._usable
        if batch.retain_products == "auto" and not self._encoder.keeps_products:
            batch = replace(batch, retain_products=0)
        given = given_tokens(batch.retain), given_tokens(batch.retain_products)
        open_ends = any(x is True or x == "auto" for x in (batch.tokens_per_chunk, batch.retain, batch.retain_products))
        forecast, retention = None, Retention.from_config(batch)
        with undisturbed(self._world.device, self._encoder, self._objective):
            if batch.tokens_per_chunk == "auto":
                batch = replace(batch, tokens_per_chunk=int(self._world.least(self._chunk_size(given))))
            if batch.tokens_per_chunk == 0:
                least = max(_LEAST_SIZE, self._longest)
                raise ConfigError(
                    f"batch.tokens_per_chunk: not even chunks of {least:,} tokens fit beside the model on a GPU"
                )
            if preflight == "only" or (usable is not None and (open_ends or preflight == "auto")):
                forecast = self._forecast(int(batch.tokens_per_chunk))
        if forecast is not None:
            retention = most_retained(forecast, usable or 0.0, given, self._world)
            forecast = replace(forecast, retention=retention)
        if forecast is not None and usable is not None:
            room = self._world.least(usable - forecast.peak_bytes)
            for key, what in (("retain", "graphs"), ("retain_products", "products")):
                if getattr(batch, key) is True and room < 0:
                    more = f"{-room / _GIB:.1f} GiB more than a GPU has for it"
                    raise ConfigError(f"batch.{key}: true, but keeping all {what} takes {more}; set it to auto")
        graphs = retention.graphs if batch.retain == "auto" else batch.retain
        products = retention.products if batch.retain_products == "auto" else batch.retain_products
        return replace(self._config, batch=replace(batch, retain=graphs, retain_products=products)), forecast

    def _check(self) -> None:
        """Raises ConfigError for what needs no measuring to be refused."""
        products = self._config.batch.retain_products
        if products not in ("auto", 0) and not self._encoder.keeps_products:
            raise ConfigError(
                f"batch.retain_products: {str(products).lower()}, but only fused layers (model.fused=true) keep "
                "products; set it to auto"
            )
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if (taken := ranks * self._memory.host) > there:
            raise ConfigError(
                f"batch.offload: representations, their gradients and copies of them take about {taken / _GIB:,.1f} "
                f"GiB of host memory, and this machine has {there / _GIB:,.1f} GiB; lower batch.queries"
            )

    def _chunk_size(self, given: tuple[int | None, int | None]) -> int:
        """The smallest size in tokens beyond which a token takes no less time, of those that fit; 0 where none does."""
        if self._usable is None:
            return max(_UNMEASURED_SIZE[self._world.device.type], self._longest)
        longer: Side = max(SIDES, key=lambda side: int(self._lengths[side].sum()))
        # Of a token, by size, if all chunks are like the middle one and keep what fits.
        seconds: dict[int, float] = {}
        size = max(_LARGEST_SIZE, self._longest)
        while size >= max(_LEAST_SIZE, self._longest) and (size >= _SMALLEST_USUAL or not seconds):
            workload = self._workload(size)
            try:
                cost = measure_chunk(
                    self._encoder, longer, workload.chunks[longer][workload.measured_places(longer)[1]]
                )
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
            else:
                costs = workload.costs({side: dict.fromkeys(workload.measured_places(side), cost) for side in SIDES})
                forecast = Forecast(workload, costs, Cost(0.0, 0.0), 0.0, self._memory)
                if forecast.peak_bytes <= self._usable:
                    kept = most_retained(forecast, self._usable, given, World(self._world.device))
                    seconds[size] = replace(forecast, retention=kept).step_s / forecast.computed
            size //= 2
        return min((size for size, s in seconds.items() if s <= (1 + _TOLERANCE) * min(seconds.values())), default=0)

    def _workload(self, size: int) -> Workload:
        return Workload(self._queries, self._lengths, size, self._encoder.packed)

    def _forecast(self, size: int) -> Forecast:
        """The step in chunks of `size` tokens, nothing kept. Raises ConfigError where it does not fit."""
        workload, device = self._workload(size), self._world.device
        try:
            measured = {side: self._measured_chunks(workload, side) for side in SIDES}
            loss, update_s = self._loss(), measure_update(self._config.optim, self._parameters, device)
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"batch.tokens_per_chunk: {size:,} tokens do not fit beside the model; set it to auto"
            ) from error
        # What the encoder made for itself at its first chunk (rounded weights, workspaces) stays for the whole run.
        made = allocated_bytes(device) - sum(p.grad.nbytes for p in self._parameters if p.grad is not None)
        memory = replace(self._memory, weights=max(self._memory.weights, made))
        return Forecast(workload, workload.costs(measured), loss, update_s, memory)

    def _measured_chunks(self, workload: Workload, side: Side) -> dict[int, ChunkCost]:
        chunks, places = workload.chunks[side], dict.fromkeys(workload.measured_places(side))
        return {place: measure_chunk(self._encoder, side, chunks[place]) for place in places}

    def _loss(self) -> Cost:
        """The loss over this rank's queries and the passages they see: time by pairs and operations, memory by rows
        where tiled.
        """
        config, ranks = self._config.loss, self._world.size
        tiled, device = config.strategy == "tiled", self._world.device
        seen_ranks = 1 if config.strategy == "local" else ranks
        held = config.bank_steps if config.bank != "none" else 0  # batches in a full bank
        queries, passages = (len(self._lengths[side]) for side in SIDES)
        if config.bank == "contaccum":
            queries *= 1 + held
        whole = queries, passages * (1 + held) * seen_ranks
        share = min(1.0, sqrt(_MEASURED_PAIRS[device.type, tiled] / prod(whole)))
        part = max(1, int(share * whole[0])), max(1, int(share * whole[1]))
        seconds, peak_bytes = measure_loss(self._objective, *part, self._encoder.dimension, device)
        pairs = prod(whole) / prod(part)
        if self._config.batch.offload:  # blocks do not grow with the batch
            return Cost(seconds * pairs, peak_bytes)
        if not tiled:
            return Cost(seconds * pairs, peak_bytes * pairs)
        workspace_mib = float(config.workspace_mib)
        measured, operations = (
            gathered_operations(*n, len(config.softmaxes[0]) > 1, config.precision, workspace_mib)
            for n in (part, whole)
        )
        if config.exchange == "ring" and ranks > 1:
            operations = RING_OPERATIONS
        fixed = min(workspace_mib * 2**20, peak_bytes)
        return Cost(seconds * pairs * operations / measured, fixed + (peak_bytes - fixed) * sum(whole) / sum(part))


def _step_lengths(
    config: Config, store: Store, planner: Planner, template: TokenTemplate, world: World
) -> tuple[int, dict[Side, np.ndarray]]:
    """Queries of the first step over all ranks, and the lengths of the texts that this rank encodes in it."""

    texts = {"query": store.queries, "passage": store.passages}
    limits = {side: store.limits(config, side) for side in SIDES}

    def lengths(batch: GlobalBatch | RankSlice) -> dict[Side, np.ndarray]:
        rows: dict[Side, np.ndarray] = {"query": batch.queries, "passage": batch.passages}
        return {
            side: template.lengths(texts[side].lengths_of(rows[side]), at(limits[side], rows[side])) for side in SIDES
        }

    whole = planner.plan(0)
    every = lengths(whole)
    return whole.query_count, lengths(slice_for_rank(whole, every["query"], every["passage"], world.rank, world.size))


def _bank_bytes(loss: LossConfig, texts: dict[Side, int], ranks: int, at_loss: int) -> int:
    """Bytes of a full bank for each dimension: stored on each rank, and its share and the batch joined for the loss,
    `at_loss` for a number. `texts`: of this rank in a step.
    """
    if loss.bank == "none":
        return 0
    banked = texts["passage"] + (texts["query"] if loss.bank == "contaccum" else 0)
    stored = 2 if loss.precision == "bf16" else 4
    return loss.bank_steps * banked * (ranks * stored + at_loss) + sum(texts.values()) * at_loss


def _state_bytes(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> float:
    """Bytes of AdamW's two moments, also assumed for an unknown optimizer, or of Adafactor's rows and columns and, in
    one form of it, momentum in 16 bits; and of the running means.
    """
    weights = sum(p.nbytes for p in parameters)
    means = 0 if config.ema is None else weights
    if not config.name.startswith("adafactor"):
        return 2 * weights + means
    momentum = sum(2 * p.numel() for p in parameters) if config.name == "adafactor_momentum" else 0
    factors = (p.nbytes / p.shape[-1] + p.nbytes / p.shape[-2] if p.ndim >= 2 else p.nbytes for p in parameters)
    return means + momentum + sum(factors)
