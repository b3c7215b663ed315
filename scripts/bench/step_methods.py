"""Bigbatch's training step for `scripts.bench.step`, its single pass (the floor), and the checks made before timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, ModernBertConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from retriever import preflight
from retriever.config import Config
from retriever.config_file import load
from retriever.data.batch import Batch, BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store
from retriever.encoder.bundle import AUTOCAST_DTYPES
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution
from retriever.encoder.lora import adapt
from retriever.gradcache import backward_through_encoder, encode_without_graph, representation_gradients
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS
from retriever.optim import Optimizer
from retriever.parallel.world import World
from retriever.plan.sizes import StepPlanner
from retriever.retention import EVERYTHING, NOTHING, Retention
from retriever.rng import seed_step
from retriever.step import StepReport, train_step
from scripts.bench.measure import timed
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE
from scripts.bench.step_forms import ALL_GRAPHS

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert-base": BertConfig,
    "bert-large": lambda: BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "modernbert-base": ModernBertConfig,
    "qwen3-0.6b": lambda: Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 1000,
}
_STEPS = 1_000_000  # of the learning-rate schedule; none is ever reached
_SEED = 0


@dataclass(frozen=True)
class Work:
    """The model, data and settings that all methods of a table share."""

    model: PreTrainedConfig
    store: Store
    world: World
    settings: tuple[str, ...] = ()  # key=value of every run of ours

    @property
    def device(self) -> torch.device:
        return self.world.device

    def tower(self) -> PreTrainedModel:
        """A model with the same random weights at every call."""
        torch.manual_seed(_SEED)
        with self.device:
            return random_model(self.model).train()

    def configuration(self, queries: int, *overrides: str) -> Config:
        """The configuration of a run over batches of `queries` pairs."""
        base = (
            *("model.name_or_path=random", "model.pooling=mean", "data.train=[{path: random}]", "data.negatives=0"),
            *(f"model.query_max_tokens={QUERY_MAX_TOKENS}", f"model.passage_max_tokens={PASSAGE_MAX_TOKENS}"),
            *(f"batch.queries={queries}", f"train.max_steps={_STEPS}", "optim.lr=1e-5", "run.trackers=[]"),
            *("run.preflight=off", "batch.retain=false", "batch.retain_products=false"),
        )
        return load(None, [*base, *self.settings, *overrides])


def resized(config: PreTrainedConfig, **sizes: Any) -> PreTrainedConfig:
    """`config` itself, with other sizes; None changes nothing."""
    for name, size in sizes.items():
        if size is not None:
            setattr(config, name, size)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, without a pooler."""
    own = type(config)(**config.to_diff_dict())
    model: PreTrainedModel = AutoModel.from_config(
        own, **({"add_pooling_layer": False} if own.model_type == "bert" else {})
    )
    return model


def table_names(model: nn.Module) -> set[str]:
    """The names of a model's embedding tables."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


class Trainer:
    """A training run over random weights, wired as in training."""

    def __init__(self, work: Work, config: Config, *, retention: Retention | None = None) -> None:
        """`retention`: None takes what the plan decides."""
        tower = work.tower()
        self.work, self.world = work, work.world
        self.encoder = DualEncoder(tower, tower, pooling="mean", autocast_dtype=AUTOCAST_DTYPES[config.optim.precision])
        if config.model.lora is not None:
            adapt(self.encoder.towers, config.model.lora, _SEED)
        resolved = preflight.resolve(config, self.encoder, self.world)
        if config.model.gradient_checkpointing:
            self.encoder.enable_gradient_checkpointing()
        apply_execution(self.encoder, resolved.model)
        block_rows = BLOCK_ROWS if config.batch.offload else None
        objective = ContrastiveObjective(resolved.loss, unit_norm=resolved.model.normalize, block_rows=block_rows)
        self.objective = objective.to(self.world.device)
        planner = Planner.from_config(work.store, resolved)
        plan = StepPlanner(resolved, self.encoder, self.objective, work.store, planner, TEMPLATE, self.world)
        self.config, self.forecast = plan.decide()
        self.optimizer = Optimizer(self.config.optim, [self.encoder, self.objective], _STEPS, self.world.device)
        self.retention = Retention.from_config(self.config.batch) if retention is None else retention

    def batches(self, queries: int, last: int = _STEPS) -> Iterator[Batch]:
        """Batches of `queries` pairs from the run's own planner and loader."""
        config = replace(self.config, batch=replace(self.config.batch, queries=queries))
        return BatchLoader(
            self.work.store, Planner.from_config(self.work.store, config), TEMPLATE, config, self.world
        ).batches(0, last)

    def first_batch(self, queries: int) -> Batch:
        """The first of `batches`."""
        with closing(self.batches(queries, 1)) as batches:  # type: ignore[type-var]
            return next(batches)

    def step(self, batch: Batch) -> StepReport:
        """One step of training."""
        return train_step(self.encoder, self.objective, batch, self.optimizer, self.world, _SEED, self.retention)

    def single_pass(self, batch: Batch) -> None:
        """A step without the gradient cache: every chunk is encoded once with its graph, a fixed gradient is propagated
        back, and the weights are updated.
        """
        shapes = zip(("query", "passage"), batch.sizes, strict=True)
        gradients = {
            side: torch.full((n, self.encoder.dimension), 1e-3, device=self.world.device) for side, n in shapes
        }
        for chunk in batch.chunks:
            self.encoder(chunk.side, chunk.tokens).backward(gradients[chunk.side][chunk.rows])
        self.optimizer.clip_and_step(batch.step)

    def gradients(self, batch: Batch, retention: Retention, *, tables: bool = True) -> Tensor:
        """The gradients of one batch in one vector; without `tables` those of the embedding tables are left out."""
        seed_step(_SEED, 0, 0)
        offload = self.objective.offload
        representations, passes = encode_without_graph(self.encoder, batch, retention, offload=offload)
        _, gradients = representation_gradients(self.objective, representations, batch, self.world)
        backward_through_encoder(self.encoder, batch, gradients, passes)
        tensors = {name: p.grad for name, p in self.encoder.named_parameters() if p.grad is not None}
        left_out = set() if tables else table_names(self.encoder)
        found = torch.cat([grad.flatten() for name, grad in tensors.items() if name not in left_out])
        self.encoder.zero_grad(set_to_none=True)
        return found


class Sample(NamedTuple):
    """The measured steps of a method."""

    seconds: float  # of one step
    tokens: float  # of one step, padding not counted
    peak_gib: float | None
    waited: float | None = None  # share of the time in which data was waited for; None where it was there beforehand


def sample(
    step: Callable[[Batch], object], batches: Iterator[Batch], device: torch.device, seconds: float, warm: int = 1
) -> Sample:
    """The mean over steps that together take about `seconds`, after `warm` unmeasured ones."""
    for _ in range(warm):
        step(next(batches))
    done: list[tuple[int, float]] = []  # (tokens, seconds waited) of each step

    def one() -> None:
        batch = next(batches)
        step(batch)
        done.append((batch.tokens, batch.chunks.waited_s))

    taken, peak_gib = timed(device, one, seconds)
    tokens, waited = (sum(column) for column in zip(*done, strict=True))
    return Sample(sum(taken) / len(done), tokens / len(done), peak_gib, waited / sum(taken))


def gradient_error(trainer: Trainer, reference: Trainer, queries: int) -> float:
    """‖g − g*‖/‖g*‖ for the gradient g of one batch without dropout, all graphs kept. g* is the gradient of
    `reference`.
    """
    found = []
    for one in (trainer, reference):
        one.encoder.eval()
        found.append(one.gradients(one.first_batch(queries), ALL_GRAPHS))
        one.encoder.train()
    return float((found[0] - found[1]).norm() / found[1].norm())


def replays_bitwise(trainer: Trainer, queries: int) -> bool:
    """Whether chunks that are encoded again, wholly or in part, give the same gradient as kept ones, bit for bit, with
    dropout.

    Embedding tables are left out: on a GPU torch sums their rows in any order, so two runs differ in any case.
    """
    others = [NOTHING, Retention(products=EVERYTHING)] if trainer.encoder.keeps_products else [NOTHING]
    kept, *replayed = (trainer.gradients(trainer.first_batch(queries), r, tables=False) for r in (ALL_GRAPHS, *others))
    return all(torch.equal(kept, again) for again in replayed) and float(kept.norm()) > 0
