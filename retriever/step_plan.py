"""The plan of a run's steps: the sizes that `auto` asks for, decided by measuring, and what a step will take, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import numpy as np
import torch
from torch import nn

from retriever.capacity import allocated_bytes, measure_chunk, measure_loss, measure_update, random_chunk, undisturbed, usable_bytes
from retriever.config import BatchConfig, Config, ConfigError, OptimConfig
from retriever.data.planner import Planner, slice_for_rank
from retriever.data.store import Store
from retriever.data.tokens import Side, TokenTemplate
from retriever.encoder.dual_encoder import DualEncoder
from retriever.forecast import SIDES, Forecast, Memory, Workload, costs_of, most_retained, scaled_loss, settled_size
from retriever.loss.contrastive import ContrastiveObjective
from retriever.parallel.world import World

EVERYTHING = 2**62  # tokens: more than any batch has
_SIZES = (65_536, 32_768, 16_384)  # tokens of a chunk that are tried on a GPU
_LEAST_SIZE = 1024
_CPU_SIZE = 8_192
_GIB = 2**30
# Query-passage pairs over which the loss is measured; a larger one follows from it.
_MEASURED_PAIRS = {("cuda", True): 2**32, ("cuda", False): 2**28, ("cpu", True): 2**22, ("cpu", False): 2**22}


def retained_tokens(batch: BatchConfig) -> int:
    """Tokens whose graphs a step keeps under a resolved `batch.retain`."""
    return EVERYTHING if batch.retain is True else int(batch.retain)


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
        self._lengths = _step_lengths(config, store, planner, template, world)
        trained = [p for module in (encoder, objective) for p in module.parameters() if p.requires_grad]
        own = sum(t.nbytes for module in (encoder, objective) for t in [*module.parameters(), *module.buffers()])
        self._parameters = trained
        rows = sum(len(own) for own in self._lengths.values())
        self._memory = Memory(
            weights=max(allocated_bytes(self._device), own),
            gradients=sum(p.nbytes for p in trained),
            optimizer=_state_bytes(config.optim, trained),
            representations=rows * encoder.dimension * next(encoder.parameters()).itemsize,
            loss=0.0,
        )

    def decide(self) -> tuple[Config, Forecast | None]:
        """The configuration without `auto` in `batch`, the same on every rank, and the step it makes where that was measured.

        A GPU is measured unless everything is given and `run.preflight` is off, a CPU for `run.preflight=only`.
        Raises ConfigError where no chunk fits, or `batch.retain=true` and not all graphs do.
        """
        batch, gpu, preflight = self._config.batch, self._device.type == "cuda", self._config.run.preflight
        open_ends = "auto" in (batch.tokens_per_chunk, batch.retain) or batch.retain is True
        forecast = None
        with undisturbed(self._device, self._encoder, self._objective):
            size = self._agreed(self._tokens_per_chunk()) if batch.tokens_per_chunk == "auto" else batch.tokens_per_chunk
            if size == 0:
                raise ConfigError(f"batch.tokens_per_chunk: not even a chunk of {self._sizes()[-1]:,} tokens fits on a rank's device")
            if preflight == "only" or (gpu and (open_ends or preflight == "auto")):
                forecast = self._forecast(size)
        retain: bool | int = batch.retain if batch.retain != "auto" else 0
        if forecast is not None:
            if gpu and batch.retain == "auto":
                retain = self._agreed(most_retained(forecast, self._usable))
            forecast = replace(forecast, retain=retained_tokens(replace(batch, retain=retain)))
            missing = forecast.peak_bytes - self._usable
            if self._agreed(int(retain is True and missing <= 0)) == 0 and retain is True:
                raise ConfigError(
                    f"batch.retain: true, but keeping all graphs takes {forecast.peak_bytes / _GIB:.1f} GiB, "
                    f"{max(0.0, missing) / _GIB:.1f} GiB more than can be used on rank {self._world.rank}; set it to auto"
                )
        return replace(self._config, batch=replace(batch, tokens_per_chunk=size, retain=retain)), forecast

    @property
    def _usable(self) -> float:
        usable = usable_bytes(self._device)
        return float("inf") if usable is None else usable

    def _agreed(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return -int(self._world.max(torch.tensor(-value, device=self._device)))

    def _sizes(self) -> list[int]:
        """Sizes to try, from the largest; no text is longer than one of them."""
        longest = max(self._config.model.query_max_tokens, self._config.model.passage_max_tokens)
        return sorted({max(longest, size) for size in _SIZES}, reverse=True)

    def _tokens_per_chunk(self) -> int:
        """The size beyond which a token costs no less, of those that fit; 0 where none does."""
        longest = max(self._config.model.query_max_tokens, self._config.model.passage_max_tokens)
        if self._device.type != "cuda":
            return max(_CPU_SIZE, longest)
        side: Side = max(SIDES, key=lambda side: int(self._lengths[side].sum()))
        tried = [(size, cost) for size in self._sizes() if (cost := self._seconds_per_token(side, size)) is not None]
        smaller = self._sizes()[-1] // 2
        while not tried and smaller >= max(longest, _LEAST_SIZE):
            cost = self._seconds_per_token(side, smaller)
            tried = [(smaller, cost)] if cost is not None else []
            smaller //= 2
        return settled_size(tried) if tried else 0

    def _seconds_per_token(self, side: Side, size: int) -> float | None:
        """Of a middle chunk through both passes; None where a step of such chunks does not fit."""
        chunks = self._workload(size).chunks[side]
        chunk = random_chunk(chunks[len(chunks) // 2], self._vocabulary(side), packed=self._encoder.packed)
        try:
            cost = measure_chunk(self._encoder, side, chunk)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        part = self._memory
        needed = part.weights + part.optimizer + part.gradients + 2 * part.representations + cost.backward_bytes
        return (cost.first_s + cost.forward_s + cost.backward_s) / cost.tokens if needed <= self._usable else None

    def _workload(self, size: int) -> Workload:
        return Workload(self._lengths, size, self._encoder.packed)

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
        memory = replace(self._memory, loss=loss.peak_bytes)
        return Forecast(workload, costs_of(workload, measured), loss.seconds, update_s, memory, retain=0)

    def _loss(self):  # type: ignore[no-untyped-def]
        config, tiled = self._config.loss, self._config.loss.strategy == "tiled"
        queries, passages = (len(self._lengths[side]) for side in SIDES)
        if config.strategy != "local":
            passages *= self._world.size
        share = min(1.0, sqrt(_MEASURED_PAIRS[self._device.type, tiled] / (queries * passages)))
        part = max(1, int(share * queries)), max(1, int(share * passages))
        cost = measure_loss(self._objective, *part, self._encoder.dimension, self._device)
        fixed = int(config.workspace_mib) * 2**20 if tiled else 0
        return scaled_loss(cost, part, (queries, passages), linear_memory=tiled, fixed_bytes=fixed)


def _step_lengths(config: Config, store: Store, planner: Planner, template: TokenTemplate, world: World) -> dict[Side, np.ndarray]:
    """Lengths of the texts that this rank encodes in the first step."""
    whole, model = planner.plan(0), config.model
    query = template.lengths(store.queries.lengths_of(whole.queries), model.query_max_tokens)
    passage = template.lengths(store.passages.lengths_of(whole.passages), model.passage_max_tokens)
    mine = slice_for_rank(whole, query, passage, world.rank, world.size)
    return {
        "query": template.lengths(store.queries.lengths_of(mine.queries), model.query_max_tokens),
        "passage": template.lengths(store.passages.lengths_of(mine.passages), model.passage_max_tokens),
    }


def _state_bytes(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> float:
    """Of AdamW's two moments, or Adafactor's rows and columns."""
    if config.name == "adamw":
        return 2 * sum(p.nbytes for p in parameters)
    matrices = sum((p.nbytes / p.shape[-1] + p.nbytes / p.shape[-2]) for p in parameters if p.ndim >= 2)
    return matrices + sum(p.nbytes for p in parameters if p.ndim < 2)
