"""Train a dense retriever: `accelerate launch retriever/train.py --config configs/x.yaml key.sub=value ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: the project's root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from retriever.command import command_parser, option, run
from retriever.config import Config, EvalConfig, differences
from retriever.config_file import load
from retriever.environment import check_trackers
from retriever.errors import RESUMES, Stopped
from retriever.run_folder import held
from retriever.wording import counted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from retriever.data.store import Store
    from retriever.encoder.bundle import EncoderBundle
    from retriever.outputs import Outputs
    from retriever.parallel.world import World

_LAST_WRITE_S = 60.0  # for the checkpoint that is being written when another rank ends the run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `accelerate launch retriever/train.py`."""
    parser = command_parser(
        "retriever/train.py",
        __doc__,
        option("--config", help="a YAML file; configs/ has examples"),
        option("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"),
    )
    return run(
        parser,
        arguments,
        _train_as_told,
        resumes=RESUMES,
        lower="batch.tokens_per_chunk, batch.retain or batch.retain_products",
    )


def _train_as_told(args: argparse.Namespace) -> None:
    config = load(args.config, args.overrides)
    check_trackers(config.run.trackers)
    # Chunks differ a little in size: without it, what they leave free falls into pieces. Read by torch before it first
    # allocates.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from retriever.signals import die_with_launcher

    die_with_launcher()
    with held(config):
        train(config)


def train(config: Config) -> None:
    """One training run, from its configuration to its last export."""
    from retriever import checkpoint, launch, preflight
    from retriever.data.store import build_or_open
    from retriever.encoder.tokenizer import ends_texts, training_tokenizer
    from retriever.parallel.watch import watched

    last = checkpoint.find(config.run)
    if last is not None:
        config = checkpoint.continued(config, last)

    preflight.check_paths(config)
    # Texts are tokenised before the ranks meet: however long it takes, no collective waits for it.
    tokenizer = training_tokenizer(config.model)
    config = replace(config, model=replace(config.model, append_eos=ends_texts(tokenizer)))
    store = build_or_open(config, tokenizer)
    if config.run.preflight == "only":  # leaves nothing behind
        config = replace(config, run=replace(config.run, trackers=()))
    accelerator, world = launch.join(config)
    with watched(world, config.run.timeout_s):
        stopped = _train(config, last, tokenizer, store, accelerator, world)
    accelerator.end_training()  # trackers and the process group
    if stopped is not None:
        raise stopped


def _train(
    config: Config,
    last: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    accelerator: Accelerator,
    world: World,
) -> Stopped | None:
    """All steps that are left after the checkpoint `last`; returns what stopped them before the end."""
    from eval.evaluate import check_evaluation
    from retriever import checkpoint, launch, preflight
    from retriever.data.batch import BatchLoader
    from retriever.data.planner import Planner
    from retriever.data.tokens import TokenTemplate
    from retriever.encoder.bundle import AUTOCAST_DTYPES, EncoderBundle
    from retriever.encoder.dual_encoder import DualEncoder
    from retriever.encoder.lora import adapt
    from retriever.encoder.modes import use
    from retriever.encoder.settings import settings_of
    from retriever.loss.contrastive import ContrastiveObjective
    from retriever.loss.offload import BLOCK_ROWS
    from retriever.optim import Optimizer
    from retriever.outputs import Outputs
    from retriever.parallel.sharded import PlacedEncoder
    from retriever.plan.measure import usable_bytes
    from retriever.plan.report import plan_lines, plan_table
    from retriever.plan.sizes import StepPlanner
    from retriever.retention import Retention
    from retriever.signals import StopSignals
    from retriever.step import train_step
    from retriever.telemetry import Telemetry

    start = checkpoint.finished_steps(last) if last is not None else 0
    extended = last is not None and checkpoint.length_of(checkpoint.config_of(last)) != checkpoint.length_of(config)
    launch.agree(world, checkpoint=start, data=store.fingerprint, configuration=differences(Config(), config))
    if config.eval is not None:
        check_evaluation(
            config.eval.path, config.eval.split, config.eval.metrics, config.eval.k, index=config.eval.index
        )

    encoder = DualEncoder.from_pretrained(config.model, autocast_dtype=AUTOCAST_DTYPES[config.optim.precision]).train()
    if config.model.lora is not None:
        adapt(encoder.towers, config.model.lora, config.run.seed)
    placed = PlacedEncoder(encoder, world)
    block_rows = BLOCK_ROWS if config.batch.offload else None
    objective = ContrastiveObjective(config.loss, unit=config.model.normalize, block_rows=block_rows).to(world.device)
    config = preflight.resolve(config, encoder, world)
    use(encoder, config.model)
    planner = Planner.from_config(store, config)
    template = TokenTemplate.from_tokenizer(tokenizer)
    config, forecast = StepPlanner(config, encoder, objective, store, planner, template, world).decide()
    loader = BatchLoader.from_config(store, planner, template, config, world)
    total = config.train.max_steps or max(1, round((config.train.epochs or 0) * planner.steps_per_epoch))
    if config.run.preflight == "only" and forecast is not None:
        accelerator.print(plan_table(forecast, config, total, usable_bytes(world.device)))
        return None
    optimizer = Optimizer(config.optim, [encoder, objective], total, world.device)

    state = checkpoint.TrainingState(encoder, objective, optimizer)
    finished = checkpoint.load(last, state, store.fingerprint) if last is not None else 0
    outputs = Outputs(config, state, placed, tokenizer, store, world)
    if config.run.preflight != "off":
        accelerator.print(preflight.summary(config, encoder, store, planner, total, world))
        if forecast is not None:
            accelerator.print(plan_lines(forecast, total))
        for warning in preflight.warnings(config, tokenizer, total, planner.batch_queries[1], len(store.negatives.ids)):
            accelerator.print(f"warning: {warning}")
    if config.run.verify and finished < total:
        accelerator.print(f"verify  {preflight.verify(config, encoder, store, template)}")
    if finished:
        accelerator.print(
            f"{'already finished' if finished == total else 'resuming'} at step {finished:,} of {total:,}: {last}"
        )
        if extended:
            accelerator.print(
                f"note: this run is longer than it was planned before: from here on the learning rate follows the "
                f"schedule of {total:,} steps"
            )

    if last is not None and finished == total and not outputs.holds(last):
        outputs.save(total)  # another run's end: this run's folder gets it too

    settings = settings_of(config, encoder.pooling, encoder.truncate_dim)
    telemetry = Telemetry(
        accelerator,
        outputs.metrics,
        finished=finished,
        total=total,
        log_every=config.train.log_every,
        forecast=forecast,
    )

    def evaluate_and_record(done: int) -> None:
        """After saving, so that no error of an evaluation costs training; a run that ends in between makes it up when
        it goes on.
        """
        if config.eval is None or not _due(done, config.train.eval_every, total) or not outputs.lacks_evaluation(done):
            return
        with stop.between_steps(), telemetry.paused("evaluate"):
            bundle = EncoderBundle(placed.whole(world.device), tokenizer, settings)
            telemetry.log(done, _evaluate(config.eval, bundle, world, outputs))
            outputs.publish_best(done)

    stopping, done = 0, finished
    if world.watch is not None:
        world.watch.before_leaving = partial(outputs.close, _LAST_WRITE_S)
    stop = StopSignals(world, outputs.save_last_update)
    with (
        closing(outputs),
        stop,
        closing(loader.batches(finished, total)) as batches,
    ):  # also after an error: else whichever thread collects it would wait
        if finished:
            evaluate_and_record(finished)
        for batch in batches:
            outputs.check()
            report = train_step(
                encoder, objective, batch, optimizer, world, config.run.seed, Retention.from_config(config.batch)
            )
            telemetry.step(report)
            done, stopping = report.step + 1, stop.agreed()
            evaluated = config.eval is not None and _due(done, config.train.eval_every, total)
            if stopping or evaluated or _due(done, config.train.save_every, total):
                with telemetry.paused("save"):
                    outputs.save(done)
            if stopping:
                break
            evaluate_and_record(done)
        with stop.between_steps():
            outputs.finish()
    telemetry.close()
    if stopping:
        return Stopped(stopping, done)
    if not finished and not telemetry.applied:
        raise FloatingPointError(
            f"no update was made in {counted(total - finished, 'step')}: the gradients overflowed in fp16; "
            "set optim.precision=bf16, or train for more steps"
        )
    accelerator.print(
        f"finished {counted(total, 'step')}: model in {outputs.folder / 'export'}, curves in {outputs.folder / 'report.html'}"
    )
    return None


def _evaluate(config: EvalConfig, bundle: EncoderBundle, world: World, outputs: Outputs) -> dict[str, float]:
    """Measures of the present weights, encoded by all ranks; empty on ranks other than the first."""
    from eval.evaluate import evaluate

    result = evaluate(
        bundle,
        config.path,
        config.split,
        config.metrics,
        config.k,
        index=config.index,
        shards_dir=outputs.embeddings,
        world=world,
        progress=world.is_first,
    )
    return {f"eval/{name}": value for name, value in result.means.items()} if result is not None else {}


def _due(done: int, every: int, total: int) -> bool:
    return done == total or (every > 0 and done % every == 0)


if __name__ == "__main__":
    sys.exit(main())
