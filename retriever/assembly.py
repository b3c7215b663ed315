"""What a run is made of, from its configuration: the data before the ranks meet, then encoder, loss and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from retriever import checkpoint, launch, preflight
from retriever.config import Config, differences
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store, build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.encoder.bundle import AUTOCAST_DTYPES
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution, check_replay
from retriever.encoder.lora import adapt
from retriever.encoder.tokenizer import ends_texts, training_tokenizer
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS
from retriever.parallel.sharded import PlacedEncoder
from retriever.parallel.world import World
from retriever.plan.forecast import Forecast
from retriever.plan.measure import usable_bytes
from retriever.plan.report import plan_lines, plan_table
from retriever.plan.sizes import StepPlanner


@dataclass(frozen=True)
class Prepared:
    """What a run has before its ranks meet."""

    config: Config
    last: Path | None  # the checkpoint to go on from
    tokenizer: PreTrainedTokenizerBase
    store: Store

    def agree(self, world: World) -> None:
        """Raises ConfigError on every rank if ranks have other settings, data or checkpoints than others."""
        start = checkpoint.finished_steps(self.last) if self.last is not None else 0
        configuration = differences(Config(), self.config)
        launch.agree(world, checkpoint=start, data=self.store.fingerprint, configuration=configuration)


def prepare(config: Config) -> Prepared:
    """Finds the checkpoint to go on from, and tokenises the texts before the ranks meet: however long it takes, no
    collective waits for it.
    """
    last = checkpoint.find(config.run)
    if last is not None:
        config = checkpoint.continued(config, last)
    preflight.check_paths(config)
    tokenizer = training_tokenizer(config.model)
    config = replace(config, model=replace(config.model, append_eos=ends_texts(tokenizer)))
    store = build_or_open(config, tokenizer)
    if config.run.preflight == "only":  # leaves nothing behind
        config = replace(config, run=replace(config.run, trackers=()))
    return Prepared(config, last, tokenizer, store)


@dataclass(frozen=True)
class Assembly:
    """The parts of a run on this rank; `config` is resolved."""

    config: Config
    encoder: DualEncoder
    placed: PlacedEncoder
    objective: ContrastiveObjective
    planner: Planner
    template: TokenTemplate
    loader: BatchLoader
    forecast: Forecast | None  # None where nothing was measured
    total: int  # steps of the whole run

    def plan_table(self, world: World) -> str:
        """The predicted time and memory of a step; empty where nothing was measured."""
        if self.forecast is None:
            return ""
        return plan_table(self.forecast, self.config, self.total, usable_bytes(world.device))


def assemble(prepared: Prepared, world: World) -> Assembly:
    """Builds the encoder, the objective and the batches, and resolves what is left to be measured."""
    config, store = prepared.config, prepared.store
    dtype = AUTOCAST_DTYPES[config.optim.precision]
    encoder = DualEncoder.from_pretrained(config.model, autocast_dtype=dtype).train()
    if config.model.lora is not None:
        adapt(encoder.towers, config.model.lora, config.run.seed)
    placed = PlacedEncoder(encoder, world)
    block_rows = BLOCK_ROWS if config.batch.offload else None
    objective = ContrastiveObjective(config.loss, unit_norm=config.model.normalize, block_rows=block_rows)
    objective.to(world.device)
    config = preflight.resolve(config, encoder, world)
    apply_execution(encoder, config.model)
    check_replay(encoder, config.model)
    planner = Planner.from_config(store, config)
    template = TokenTemplate.from_tokenizer(prepared.tokenizer)
    config, forecast = StepPlanner(config, encoder, objective, store, planner, template, world).decide()
    loader = BatchLoader(store, planner, template, config, world)
    total = config.train.max_steps or max(1, round((config.train.epochs or 0) * planner.steps_per_epoch))
    return Assembly(config, encoder, placed, objective, planner, template, loader, forecast, total)


def announce(prepared: Prepared, assembly: Assembly, done: int, world: World, say: Callable[[str], object]) -> None:
    """Says what will run, checks the gradient if asked to, and says where the run goes on after `done` steps."""
    config, last, total = assembly.config, prepared.last, assembly.total
    store, planner = prepared.store, assembly.planner
    if config.run.preflight != "off":
        say(preflight.summary(config, assembly.encoder, store, planner, total, world))
        if assembly.forecast is not None:
            say(plan_lines(assembly.forecast, total))
        queries, negatives = planner.batch_queries[1], len(store.negatives.ids)
        for warning in preflight.warnings(config, prepared.tokenizer, total, queries, negatives):
            say(f"warning: {warning}")
    if config.run.verify and done < total:
        say(f"verify  {preflight.verify(config, assembly.encoder, store, assembly.template)}")
    if last is None or not done:
        return
    say(f"{'already finished' if done == total else 'resuming'} at step {done:,} of {total:,}: {last}")
    if checkpoint.length_of(checkpoint.config_of(last)) != checkpoint.length_of(config):
        schedule = f"from here on the learning rate follows the schedule of {total:,} steps"
        say(f"note: this run is longer than it was planned before: {schedule}")
