"""The plan of a run's steps: the sizes that `auto` asks for, decided by measuring, and what a step will take, as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt

import numpy as np
import torch
from torch import nn

from retriever.config import BatchConfig, Config, ConfigError, OptimConfig
from retriever.data.planner import Planner, slice_for_rank
from retriever.data.store import Store
from retriever.data.tokens import Side, TokenTemplate
from retriever.encoder.dual_encoder import DualEncoder
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import host_bytes
from retriever.parallel.cost import RING_OPERATIONS, gathered_operations
from retriever.parallel.world import World
from retriever.plan.forecast import (
    SIDES,
    Forecast,
    Memory,
    Workload,
    costs_like,
    costs_of,
    filled,
    middle,
    most_retained,
    scaled_loss,
    settled_size,
)
from retriever.plan.measure import (
    Cost,
    allocated_bytes,
    measure_chunk,
    measure_loss,
    measure_update,
    random_chunk,
    undisturbed,
    usable_bytes,
)
from retriever.retention import NOTHING, Retention, given_tokens

_LARGEST_SIZE, _SMALLEST_USUAL = 131_072, 16_384  # tokens of a chunk that are tried on a GPU, halving
_LEAST_SIZE = 1024  # tried where none of those fits
_CPU_SIZE = 8_192
_GIB = 2**30
# Query-passage pairs over which the loss is measured; a larger one follows from it.
_MEASURED_PAIRS = {("cuda", True): 2**32, ("cuda", False): 2**28, ("cpu", True): 2**22, ("cpu", False): 2**22}


class StepPlanner:
    """Measures parts of a step on this rank's device, and decides what the configuration leaves to be measured."""

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
        self._device = world.device
        self._usable = usable_bytes(world.device)  # None: memory is not measured
        self._queries, self._lengths = _step_lengths(config, store, planner, template, world)
        trained = [p for module in (encoder, objective) for p in module.parameters() if p.requires_grad]
        own = sum(t.nbytes for module in (encoder, objective) for t in [*module.parameters(), *module.buffers()])
        self._parameters = trained
        numbers = sum(len(own) for own in self._lengths.values()) * encoder.dimension
        self._memory = Memory(
            weights=max(allocated_bytes(self._device), own),
            gradients=sum(p.nbytes for p in trained),
            optimizer=_state_bytes(config.optim, trained),
            representations=0.0 if config.batch.offload else numbers * next(encoder.parameters()).itemsize,
            loss=0.0,
            host=numbers * host_bytes(config.loss.precision, dims=bool(config.loss.dims)) if config.batch.offload else 0.0,
        )

    def decide(self) -> tuple[Config, Forecast | None]:
        """The configuration without `auto` in `batch`, the same on every rank, and the step it makes where that was measured.

        A GPU is measured unless everything is given and `run.preflight` is off, a CPU for `run.preflight=only`. Nothing is measured of
        an encoder in shards, of which no rank can work alone.
        Raises ConfigError where no chunk fits, where all graphs or products are to be kept and do not fit or the layers keep none, or
        where representations are more than the host holds.
        """
        self._check_host()
        self._check_products()
        if self._world.sharded:
            return replace(self._config, batch=_unmeasured(self._config.batch, self._device, self._longest)), None
        batch, usable, preflight = self._config.batch, self._usable, self._config.run.preflight
        kept = batch.retain, batch.retain_products
        open_ends = "auto" in (batch.tokens_per_chunk, batch.retain) or any(setting is True for setting in kept)
        open_ends |= batch.retain_products == "auto" and self._encoder.keeps_products and batch.retain is not True
        forecast = None
        with undisturbed(self._device, self._encoder, self._objective):
            size = self._agreed(self._tokens_per_chunk()) if batch.tokens_per_chunk == "auto" else batch.tokens_per_chunk
            if size == 0:
                raise ConfigError(f"batch.tokens_per_chunk: not even chunks of {self._least_size:,} tokens fit beside the model on a GPU")
            if preflight == "only" or (usable is not None and (open_ends or preflight == "auto")):
                try:
                    forecast = self._forecast(size)
                except torch.cuda.OutOfMemoryError as error:
                    raise ConfigError(f"batch.tokens_per_chunk: {size:,} tokens do not fit beside the model; set it to auto") from error
        fitting = NOTHING
        if forecast is not None and usable is not None:
            fitting = self._agreed_retention(forecast, usable)
        graphs, products = (tokens if setting == "auto" else setting for setting, tokens in zip(kept, fitting, strict=True))
        batch = replace(batch, tokens_per_chunk=size, retain=graphs, retain_products=products)
        if forecast is not None:
            forecast = replace(forecast, retention=Retention.from_config(batch))
            if usable is not None and any(setting is True for setting in kept):
                self._check_room(forecast.peak_bytes - usable)
        return replace(self._config, batch=batch), forecast

    def _agreed_retention(self, forecast: Forecast, usable_bytes: float) -> Retention:
        """Of plans that fit on every rank, with products and without, that whose slowest rank is the faster."""
        graphs, products = (given_tokens(setting) for setting in (self._config.batch.retain, self._config.batch.retain_products))
        plans = []
        for wanted in [None, 0] if products is None else [products]:
            kept = self._agreed(filled(forecast, usable_bytes, graphs, wanted).graphs)
            plans.append(Retention(kept, self._agreed(filled(forecast, usable_bytes, kept, wanted).products)))
        seconds = torch.tensor([replace(forecast, retention=plan).step_s for plan in plans], dtype=torch.float64, device=self._device)
        return plans[int(self._world.max(seconds).argmin())]

    def _check_products(self) -> None:
        given = self._config.batch.retain_products
        if given not in ("auto", 0) and not self._encoder.keeps_products:
            raise ConfigError(
                f"batch.retain_products: {str(given).lower()}, but only fused layers (model.fused=true) keep products; set it to auto"
            )

    def _check_host(self) -> None:
        ranks, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if (taken := ranks * self._memory.host) > there:
            raise ConfigError(
                f"batch.offload: representations, their gradients and copies of them take about {taken / _GIB:,.1f} GiB of host memory, "
                f"and this machine has {there / _GIB:,.1f} GiB; lower batch.queries"
            )

    def _check_room(self, missing_bytes: float) -> None:
        missing = -self._agreed(int(-missing_bytes))  # on the rank that lacks most
        if missing > 0:
            key, what = ("retain", "graphs") if self._config.batch.retain is True else ("retain_products", "products")
            raise ConfigError(
                f"batch.{key}: true, but keeping all {what} takes {missing / _GIB:.1f} GiB more than a GPU has for it; set it to auto"
            )

    def _agreed(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return -int(self._world.max(torch.tensor(-value, device=self._device)))

    @property
    def _least_size(self) -> int:
        return max(_LEAST_SIZE, self._longest)

    @property
    def _longest(self) -> int:
        """Tokens of the longest text there may be."""
        return max(self._config.model.query_max_tokens, self._config.model.passage_max_tokens)

    def _tokens_per_chunk(self) -> int:
        """The size beyond which a token costs no less, of those that fit; 0 where none does."""
        if self._usable is None:
            return max(_CPU_SIZE, self._longest)
        side: Side = max(SIDES, key=lambda side: int(self._lengths[side].sum()))
        tried: list[tuple[int, float]] = []
        size = max(_LARGEST_SIZE, self._longest)
        while size >= self._least_size and (size >= _SMALLEST_USUAL or not tried):
            seconds = self._seconds_per_token(side, size)
            if seconds is not None:
                tried.append((size, seconds))
            size //= 2
        return settled_size(tried) if tried else 0

    def _seconds_per_token(self, side: Side, size: int) -> float | None:
        """Of a step of chunks like the middle one, what fits of them kept; None where not one does."""
        workload, batch = self._workload(size), self._config.batch
        lengths = workload.chunks[side][middle(len(workload.chunks[side]))]
        chunk = random_chunk(lengths, self._vocabulary(side), packed=self._encoder.packed)
        try:
            cost = measure_chunk(self._encoder, side, chunk)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        forecast, usable = Forecast(workload, costs_like(workload, cost), 0.0, 0.0, self._memory), self._usable or 0.0
        if forecast.peak_bytes > usable:
            return None
        retention = most_retained(forecast, usable, given_tokens(batch.retain), given_tokens(batch.retain_products))
        return replace(forecast, retention=retention).step_s / forecast.computed

    def _workload(self, size: int) -> Workload:
        return Workload(self._queries, self._lengths, size, self._encoder.packed)

    def _vocabulary(self, side: Side) -> int:
        tower = self._encoder.query_tower if side == "query" else self._encoder.passage_tower
        return int(tower.config.vocab_size)

    def _forecast(self, size: int) -> Forecast:
        """The step in chunks of `size` tokens, no graph kept."""
        workload = self._workload(size)
        measured = {
            side: {
                place: measure_chunk(
                    self._encoder, side, random_chunk(workload.chunks[side][place], self._vocabulary(side), packed=workload.packed)
                )
                for place in workload.measured_places(side)
            }
            for side in SIDES
        }
        loss = self._loss()
        update_s = measure_update(self._config.optim, self._parameters, self._device)
        # What the encoder made for itself at its first chunk (rounded weights, workspaces) stays for the whole run.
        made = allocated_bytes(self._device) - sum(p.grad.nbytes for p in self._parameters if p.grad is not None)
        memory = replace(self._memory, weights=max(self._memory.weights, made), loss=loss.peak_bytes)
        return Forecast(workload, costs_of(workload, measured), loss.seconds, update_s, memory)

    def _loss(self) -> Cost:
        config, tiled = self._config.loss, self._config.loss.strategy == "tiled"
        queries, passages = (len(self._lengths[side]) for side in SIDES)
        if config.strategy != "local":
            passages *= self._world.size
        share = min(1.0, sqrt(_MEASURED_PAIRS[self._device.type, tiled] / (queries * passages)))
        part = max(1, int(share * queries)), max(1, int(share * passages))
        cost = measure_loss(self._objective, *part, self._encoder.dimension, self._device)
        fixed = float(config.workspace_mib) * 2**20 if tiled else 0.0
        if self._config.batch.offload:
            fixed = inf  # blocks do not grow with the batch
        elif tiled:
            cost = replace(cost, seconds=cost.seconds * self._operations(queries, passages) / self._operations(*part, alone=True))
        return scaled_loss(cost, part, (queries, passages), linear_memory=tiled, fixed_bytes=fixed)

    def _operations(self, queries: int, passages: int, *, alone: bool = False) -> int:
        """Of the tiled loss, for a number of a query and a passage; `alone`: as it is measured, on one rank."""
        loss = self._config.loss
        if loss.exchange == "ring" and self._world.size > 1 and not alone:
            return RING_OPERATIONS
        return gathered_operations(queries, passages, loss.symmetric, loss.precision, float(loss.workspace_mib))


def _unmeasured(batch: BatchConfig, device: torch.device, longest: int) -> BatchConfig:
    usual = max(_SMALLEST_USUAL if device.type == "cuda" else _CPU_SIZE, longest)
    size = usual if batch.tokens_per_chunk == "auto" else batch.tokens_per_chunk
    return replace(batch, tokens_per_chunk=size, retain=0, retain_products=0)


def _step_lengths(
    config: Config, store: Store, planner: Planner, template: TokenTemplate, world: World
) -> tuple[int, dict[Side, np.ndarray]]:
    """Queries of the first step over all ranks, and the lengths of the texts that this rank encodes in it."""
    whole, model = planner.plan(0), config.model
    query = template.lengths(store.queries.lengths_of(whole.queries), model.query_max_tokens)
    passage = template.lengths(store.passages.lengths_of(whole.passages), model.passage_max_tokens)
    mine = slice_for_rank(whole, query, passage, world.rank, world.size)
    return len(whole.queries), {
        "query": template.lengths(store.queries.lengths_of(mine.queries), model.query_max_tokens),
        "passage": template.lengths(store.passages.lengths_of(mine.passages), model.passage_max_tokens),
    }


def _state_bytes(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> float:
    """Of AdamW's two moments, or Adafactor's rows and columns."""
    if config.name == "adamw":
        return 2 * sum(p.nbytes for p in parameters)
    matrices = sum((p.nbytes / p.shape[-1] + p.nbytes / p.shape[-2]) for p in parameters if p.ndim >= 2)
    return matrices + sum(p.nbytes for p in parameters if p.ndim < 2)
