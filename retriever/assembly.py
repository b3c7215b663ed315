"""Builds the parts of a run from its configuration: data before the ranks meet, then encoder, loss and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from retriever import checkpoint, launch, preflight, resume, trackers
from retriever.config import Config, differences
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store, build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.data_warnings import data_warnings
from retriever.encoder.bundle import AUTOCAST_DTYPES
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution, check_replay
from retriever.encoder.lora import adapt
from retriever.encoder.tokenizer import check_source_prompts, ends_texts, training_tokenizer
from retriever.loss.bank import Bank
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.custom import CustomLoss, Loss, load_loss
from retriever.loss.offload import BLOCK_ROWS
from retriever.named import check_named
from retriever.optim import Optimizer, freeze
from retriever.outputs import Outputs
from retriever.parallel.sharded import PlacedEncoder
from retriever.parallel.world import World
from retriever.plan.forecast import Forecast
from retriever.plan.measure import usable_bytes
from retriever.plan.report import plan_lines, plan_table
from retriever.plan.sizes import StepPlanner
from retriever.rng import RngState
from retriever.run_folder import held
from retriever.screen import Kind, say
from retriever.signals import die_with_launcher
from retriever.summary import summary
from retriever.text_vectors import vectors_of

EvalQueries = Mapping[str, Sequence[str]]  # the texts of each evaluation's queries, under its name


@dataclass(frozen=True)
class Prepared:
    """The parts of a run that exist before its ranks meet."""

    config: Config
    last: Path | None  # the checkpoint to go on from
    tokenizer: PreTrainedTokenizerBase
    store: Store

    def agree(self, world: World) -> None:
        """Raises ConfigError on every rank if ranks have other settings, data or checkpoints than others."""
        start = checkpoint.finished_steps(self.last) if self.last is not None else 0
        configuration = differences(Config(), self.config)
        launch.agree(world, checkpoint=start, data=self.store.fingerprint, configuration=configuration)


def _prepare(config: Config, loss: Loss | None) -> Prepared:
    """Finds the checkpoint to go on from, and tokenises the texts before the ranks meet: however long it takes, no
    collective waits for it.
    """
    last = resume.find(config.run)
    if last is not None:
        config = resume.continued(config, last)
    check_named(config, loss)
    tokenizer = training_tokenizer(config.model)
    check_source_prompts(tokenizer, config)
    config = replace(config, model=replace(config.model, append_eos=ends_texts(tokenizer)))
    store = build_or_open(config, tokenizer)
    if config.loss.guide is not None:
        store.guide = vectors_of(config, store, "guide")
    if config.loss.teacher is not None:
        store.teacher = vectors_of(config, store, "teacher")
    if config.run.preflight == "only":  # leaves nothing behind
        config = replace(config, run=replace(config.run, trackers=()))
    return Prepared(config, last, tokenizer, store)


@dataclass(frozen=True)
class Assembly:
    """The parts of a run on this rank; `config` is resolved."""

    prepared: Prepared
    accelerator: Accelerator
    world: World
    config: Config
    encoder: DualEncoder
    placed: PlacedEncoder
    objective: ContrastiveObjective
    planner: Planner
    template: TokenTemplate
    loader: BatchLoader
    forecast: Forecast | None  # None where nothing was measured
    total: int  # steps of the whole run
    eval_queries: EvalQueries


@contextmanager
def assembled(config: Config, check: Callable[[Config], EvalQueries], loss: Loss | None = None) -> Iterator[Assembly]:
    """Locks the run's folder, prepares, joins the ranks and builds the parts.

    `check` is called before they are built, and returns the queries of the evaluations. `loss`: the function that
    `loss.custom` names, if it is at hand.

    Says what would run if `run.preflight=only` asks for nothing else. Afterwards environment, process group and random
    generators are as they were.
    """
    die_with_launcher()
    with held(config), launch.environment_restored():
        prepared = _prepare(config, loss)
        with (
            launch.joined(prepared.config) as (accelerator, world),
            RngState.capture(world.device).restored(),
            world.watched(prepared.config.run.timeout_s),
        ):
            prepared.agree(world)
            eval_queries = check(prepared.config)
            parts = _assemble(prepared, accelerator, world, loss, eval_queries)
            if config.run.preflight == "only":
                _introduce(parts)
            yield parts


def _assemble(
    prepared: Prepared, accelerator: Accelerator, world: World, loss: Loss | None, eval_queries: EvalQueries
) -> Assembly:
    """Builds the encoder, the objective and the batches, and resolves what is left to be measured."""
    config, store = prepared.config, prepared.store
    dtype = AUTOCAST_DTYPES[config.optim.precision]
    encoder = DualEncoder.from_pretrained(config.model, seed=config.run.seed, autocast_dtype=dtype).train()
    if config.model.projection is not None:
        encoder.project(config.model.projection, config.run.seed)
    if config.model.lora is not None:
        adapt(encoder.towers, config.model.lora, config.run.seed)
    freeze(encoder.towers, config.optim.freeze)
    placed = PlacedEncoder(encoder, world)
    block_rows = BLOCK_ROWS if config.batch.offload else None
    custom = None if config.loss.custom is None else CustomLoss(loss or load_loss(config.loss.custom))
    unit_norm = config.model.normalize
    objective = ContrastiveObjective(config.loss, unit_norm=unit_norm, block_rows=block_rows, custom=custom)
    objective.to(world.device)
    if custom is not None:
        custom.start_from_first(world)
    config = preflight.resolve(config, encoder, world)
    apply_execution(encoder, config.model)
    check_replay(encoder, config.model)
    objective.bank = Bank.from_config(config, encoder, world)
    planner = Planner.from_config(store, config)
    template = TokenTemplate.from_tokenizer(prepared.tokenizer)
    if world.device.type == "cuda" and world.is_first:
        say("plan    measuring a step on the GPU")
    config, forecast = StepPlanner(config, encoder, objective, store, planner, template, world).decide()
    loader = BatchLoader(store, planner, template, config, world)
    total = config.train.max_steps or max(1, round((config.train.epochs or 0) * planner.steps_per_epoch))
    return Assembly(
        prepared,
        accelerator,
        world,
        config,
        encoder,
        placed,
        objective,
        planner,
        template,
        loader,
        forecast,
        total,
        eval_queries,
    )


@dataclass(frozen=True)
class Opened:
    """A run whose checkpoint is loaded and whose folder is open."""

    optimizer: Optimizer
    outputs: Outputs
    done: int  # finished steps
    saved: int  # of which this run's folder has a checkpoint


def open_folder(parts: Assembly) -> Opened:
    """Makes the optimizer, loads the checkpoint to go on from, opens the run's folder and says what will run."""
    config, prepared, world, total = parts.config, parts.prepared, parts.world, parts.total
    last = prepared.last
    optimizer = Optimizer(config.optim, [parts.encoder, parts.objective], total, world.device)
    bank = parts.objective.bank
    if bank is not None:
        optimizer.torch.register_step_post_hook(bank.follow_update)
    state = checkpoint.TrainingState(parts.encoder, parts.objective, optimizer, bank)
    done = 0 if last is None else checkpoint.load(last, state, prepared.store.fingerprint)
    outputs = Outputs(config, state, parts.placed, prepared.tokenizer, prepared.store, world)
    trackers.start(parts.accelerator, config)
    _announce(parts, done)
    if last is None:
        return Opened(optimizer, outputs, done, saved=0)
    if done == total and not outputs.holds(last):
        outputs.save(total)  # another run's end: this run's folder gets it too
    return Opened(optimizer, outputs, done, saved=done if done == total or outputs.holds(last) else 0)


def _announce(parts: Assembly, done: int) -> None:
    """Says what will run, checks the gradient if asked to, and says where the run goes on after `done` steps."""
    config, total, last = parts.config, parts.total, parts.prepared.last
    if config.run.preflight != "off":
        _introduce(parts)
    if config.run.verify and done < total:
        check = preflight.verify(config, parts.encoder, parts.prepared.store, parts.template, parts.objective.custom)
        _say(parts, f"verify  {check}", "summary")
    if last is None or not done:
        return
    if done == total:
        _say(parts, f"already finished at step {done:,} of {total:,}: {last}", "end")
    else:
        _say(parts, f"resuming at step {done:,} of {total:,}: {last}")
    if resume.length_of(checkpoint.config_of(last)) != resume.length_of(config):
        schedule = f"from here on the learning rate follows the schedule of {total:,} steps"
        _say(parts, f"note: this run is longer than it was planned before: {schedule}")


def _introduce(parts: Assembly) -> None:
    """Says what a run is made of, how long a step takes, and what is probably not meant."""
    if not parts.world.is_first:
        return
    config, prepared, total, forecast = parts.config, parts.prepared, parts.total, parts.forecast
    store, planner, tokenizer = prepared.store, parts.planner, prepared.tokenizer
    alone = config.run.preflight == "only"  # then it is what was asked for
    kind: Kind = "end" if alone else "summary"
    _say(parts, summary(config, parts.encoder, tokenizer, store, planner, total, parts.world), kind)
    if forecast is not None:
        table = plan_table(forecast, config, total, usable_bytes(parts.world.device)) if alone else None
        _say(parts, table or plan_lines(forecast, total), kind)
    found = preflight.warnings(config, parts.encoder, tokenizer, store, total, planner.batch_queries[1])
    for warning in [*found, *data_warnings(config, tokenizer, store, planner, parts.eval_queries)]:
        _say(parts, f"warning: {warning}", "warning")


def _say(parts: Assembly, text: str, kind: Kind = "remark") -> None:
    if parts.world.is_first:
        say(text, kind)
