"""A training run: everything that `retriever/train.py` loops over. docs/run.md shows a loop of your own.

This is the only module of `retriever` that imports `eval`: a run evaluates while it trains.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Literal

from eval.evaluate import EvalOptions, check_evaluation, evaluate
from retriever import checkpoint, launch, preflight
from retriever.config import Config, ConfigError, differences
from retriever.data.batch import Batch, BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.encoder.bundle import AUTOCAST_DTYPES, EncoderBundle
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution, check_replay
from retriever.encoder.lora import adapt
from retriever.encoder.settings import settings_of
from retriever.encoder.tokenizer import ends_texts, training_tokenizer
from retriever.errors import Stopped
from retriever.loss.contrastive import ContrastiveObjective
from retriever.loss.offload import BLOCK_ROWS
from retriever.optim import Optimizer
from retriever.outputs import Outputs
from retriever.parallel.sharded import PlacedEncoder
from retriever.plan.measure import usable_bytes
from retriever.plan.report import plan_lines, plan_table
from retriever.plan.sizes import StepPlanner
from retriever.retention import Retention
from retriever.run_folder import held
from retriever.signals import StopSignals, die_with_launcher
from retriever.step import StepReport
from retriever.telemetry import Telemetry
from retriever.wording import counted

_LAST_WRITE_S = 60.0  # for the checkpoint that is being written when another rank ends the run


class Run:
    """One training run, from its configuration to its last export.

    Entering it, in the main thread, locks the run's folder, tokenises the data, joins the other ranks, resolves every
    `auto` and loads the checkpoint that `run.resume` asks for. Leaving it writes the report, or after an error closes
    what is open. A signal that asks the run to stop ends `batches` after the step at hand. Every method is called on
    every rank, in the same order. Inside, these are set:

        config       Config, every `auto` resolved
        world        World: this rank, its device, and the collectives
        encoder      DualEncoder, in training mode on the rank's device
        objective    ContrastiveObjective: the loss and its temperature
        optimizer    Optimizer over the trainable parameters of both
        retention    Retention: the tokens whose graphs or products `train_step` keeps between its passes
        done, total  optimizer steps that are finished, and that the whole run takes

    With `run.preflight=only` the plan is printed, `batches` is empty, `optimizer` is not set, and nothing is left
    behind.

    Raises RefusedError (ConfigError, DataError, LockedError) on entering, for what cannot be run; Stopped on leaving
    where a signal stopped the run, which is saved; RankError where another rank ended it; FloatingPointError on leaving
    where every update was skipped.
    """

    _batches: Iterator[Batch]

    def __init__(self, config: Config) -> None:
        """`config`: as `config_file.load` reads it."""
        self.config = config
        self.done = self.total = 0
        self._saved = self._stopping = 0  # the step saved last, the signal that stops the run

    def __enter__(self) -> Run:
        self._lifetime = self._live()
        self._lifetime.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._lifetime.__exit__(kind, error, trace)

    def batches(self) -> Iterator[Batch]:
        """This rank's part of the batch of each step that is left, in order; pass each to `log` before the next.

        An evaluation that is due and that an earlier start of the run did not come to is made up first.
        """
        if self.due("evaluate"):
            self.record(self.evaluate())
        for batch in self._batches:
            self._outputs.check()
            yield batch
            if self._stopping:  # leaving saves
                return

    def log(self, report: StepReport) -> None:
        """Counts a finished step, shows it, and learns whether a signal asks some rank to stop.

        Raises ValueError if it is not the step after those that are done.
        """
        if report.step != self.done:
            raise ValueError(f"expected the report of step {self.done + 1}, received that of step {report.step + 1}")
        self._telemetry.step(report)
        self.done = report.step + 1
        self._stopping = self._stop.agreed()

    def due(self, what: Literal["save", "evaluate"]) -> bool:
        """Whether the run is to be saved or evaluated after the steps that are done.

        By `train.save_every` and `train.eval_every`, and after the last step. A run that stops is saved and not
        evaluated. A step is saved before it is evaluated, so that a failed evaluation costs no training.
        """
        evaluates = self.config.eval is not None and self._is_turn(self.config.train.eval_every)
        if what == "save":
            return bool(self._stopping) or evaluates or self._is_turn(self.config.train.save_every)
        if not evaluates or self._stopping:
            return False
        unsaved = self.done > self._begun_at and self._saved != self.done  # `evaluate` saves first
        return unsaved or self._outputs.lacks_evaluation(self.done)

    def save(self) -> None:
        """Begins a checkpoint and its export, which a thread writes while training goes on."""
        with self._telemetry.paused("save"):
            self._outputs.save(self.done)
        self._saved = self.done

    def evaluate(self) -> dict[str, float]:
        """Measures the present weights as section `eval` says: `eval/<measure>` -> mean over the queries.

        Saves first if these steps are not saved, for `best/` is made from a checkpoint. Empty on ranks other than the
        first. Raises ConfigError where there is no section `eval`.
        """
        asked = self.config.eval
        if asked is None:
            raise ConfigError("eval: expected a section with a path; received null")
        if self._saved != self.done:
            self.save()
        settings = settings_of(self.config, self.encoder.pooling, self.encoder.truncate_dim)
        with self._stop.between_steps(), self._telemetry.paused("evaluate"):
            bundle = EncoderBundle(self._placed.whole(self.world.device), self._tokenizer, settings)
            options = EvalOptions(index=asked.index, k=asked.k, progress=self.world.is_first)
            folder, world = self._outputs.embeddings, self.world
            result = evaluate(bundle, asked.path, asked.split, asked.metrics, options, folder, world)
        return {f"eval/{name}": value for name, value in result.means.items()} if result is not None else {}

    def record(self, values: Mapping[str, float]) -> None:
        """Writes `values` of the steps that are done to `metrics.jsonl` and the trackers, on the first rank.

        With those of `evaluate`, `best/` becomes the export of this step where it is the best one. Raises ValueError
        for a value named `step`.
        """
        if "step" in values:
            raise ValueError("expected other names than step, which record adds itself")
        with self._telemetry.paused("record"):
            self._telemetry.log(self.done, {name: float(value) for name, value in values.items()})
            if any(name.startswith("eval/") for name in values):
                self._outputs.publish_best(self.done)

    def _is_turn(self, every: int) -> bool:
        return self.done > 0 and (self.done == self.total or (every > 0 and self.done % every == 0))

    @contextmanager
    def _live(self) -> Iterator[None]:
        # Chunks differ a little in size: without it, what they leave free falls into pieces. Read by torch before it
        # first allocates.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        die_with_launcher()
        with held(self.config):
            self._prepare()
            self._accelerator, self.world = launch.join(self.config)
            with self.world.watched(self.config.run.timeout_s):
                self._build()
                if self.config.run.preflight == "only":
                    self._batches = iter(())
                    yield
                else:
                    self._restore()
                    with (
                        closing(self._outputs),
                        self._stop,
                        closing(self._loader.batches(self.done, self.total)) as self._batches,
                    ):  # also after an error: else whichever thread collects it would wait
                        yield
                        if self._stopping and self._saved != self.done:
                            self.save()
                        with self._stop.between_steps():
                            self._outputs.finish()
                    self._end()
            self._accelerator.end_training()  # trackers and the process group
            if self._stopping:
                raise Stopped(self._stopping, self.done)

    def _prepare(self) -> None:
        """Finds the checkpoint to go on from, and tokenises the texts before the ranks meet: however long it takes, no
        collective waits for it.
        """
        self._last = checkpoint.find(self.config.run)
        if self._last is not None:
            self.config = checkpoint.continued(self.config, self._last)
        preflight.check_paths(self.config)
        self._tokenizer = training_tokenizer(self.config.model)
        model = replace(self.config.model, append_eos=ends_texts(self._tokenizer))
        self.config = replace(self.config, model=model)
        self._store = build_or_open(self.config, self._tokenizer)
        if self.config.run.preflight == "only":  # leaves nothing behind
            self.config = replace(self.config, run=replace(self.config.run, trackers=()))

    def _build(self) -> None:
        """Builds the encoder, the objective and the batches, and resolves what is left to be measured."""
        config, world, last = self.config, self.world, self._last
        start = checkpoint.finished_steps(last) if last is not None else 0
        configuration = differences(Config(), config)
        launch.agree(world, checkpoint=start, data=self._store.fingerprint, configuration=configuration)
        if config.eval is not None:
            check_evaluation(
                config.eval.path, config.eval.split, config.eval.metrics, config.eval.k, index=config.eval.index
            )
        dtype = AUTOCAST_DTYPES[config.optim.precision]
        self.encoder = DualEncoder.from_pretrained(config.model, autocast_dtype=dtype).train()
        if config.model.lora is not None:
            adapt(self.encoder.towers, config.model.lora, config.run.seed)
        self._placed = PlacedEncoder(self.encoder, world)
        block_rows = BLOCK_ROWS if config.batch.offload else None
        objective = ContrastiveObjective(config.loss, unit_norm=config.model.normalize, block_rows=block_rows)
        self.objective = objective.to(world.device)
        config = preflight.resolve(config, self.encoder, world)
        apply_execution(self.encoder, config.model)
        check_replay(self.encoder, config.model)
        self._planner = Planner.from_config(self._store, config)
        self._template = TokenTemplate.from_tokenizer(self._tokenizer)
        parts = self.encoder, self.objective, self._store, self._planner, self._template, world
        self.config, self._forecast = StepPlanner(config, *parts).decide()
        self.retention = Retention.from_config(self.config.batch)
        self._loader = BatchLoader(self._store, self._planner, self._template, self.config, world)
        epochs = config.train.epochs or 0
        self.total = config.train.max_steps or max(1, round(epochs * self._planner.steps_per_epoch))
        if config.run.preflight == "only" and self._forecast is not None:
            table = plan_table(self._forecast, self.config, self.total, usable_bytes(world.device))
            self._accelerator.print(table)

    def _restore(self) -> None:
        """Makes the optimizer, loads the checkpoint to go on from, opens the run's folder and says what will run."""
        config, last, total = self.config, self._last, self.total
        self.optimizer = Optimizer(config.optim, [self.encoder, self.objective], total, self.world.device)
        state = checkpoint.TrainingState(self.encoder, self.objective, self.optimizer)
        if last is not None:
            self.done = checkpoint.load(last, state, self._store.fingerprint)
        self._begun_at = self.done
        self._outputs = Outputs(config, state, self._placed, self._tokenizer, self._store, self.world)
        self._announce()
        if last is not None and self.done == total and not self._outputs.holds(last):
            self._outputs.save(total)  # another run's end: this run's folder gets it too
        if last is not None and (self.done == total or self._outputs.holds(last)):
            self._saved = self.done
        self._telemetry = Telemetry(
            self._accelerator,
            self._outputs.metrics,
            finished=self.done,
            total=total,
            log_every=config.train.log_every,
            forecast=self._forecast,
        )
        if self.world.watch is not None:
            self.world.watch.before_leaving = partial(self._outputs.close, _LAST_WRITE_S)
        self._stop = StopSignals(self.world, self._outputs.save_last_update)

    def _announce(self) -> None:
        """Prints what will run, checks the gradient if asked to, and says where the run goes on."""
        say, config, last, total = self._accelerator.print, self.config, self._last, self.total
        if config.run.preflight != "off":
            say(preflight.summary(config, self.encoder, self._store, self._planner, total, self.world))
            if self._forecast is not None:
                say(plan_lines(self._forecast, total))
            queries, negatives = self._planner.batch_queries[1], len(self._store.negatives.ids)
            for warning in preflight.warnings(config, self._tokenizer, total, queries, negatives):
                say(f"warning: {warning}")
        if config.run.verify and self.done < total:
            say(f"verify  {preflight.verify(config, self.encoder, self._store, self._template)}")
        if last is None or not self.done:
            return
        say(f"{'already finished' if self.done == total else 'resuming'} at step {self.done:,} of {total:,}: {last}")
        if checkpoint.length_of(checkpoint.config_of(last)) != checkpoint.length_of(config):
            schedule = f"from here on the learning rate follows the schedule of {total:,} steps"
            say(f"note: this run is longer than it was planned before: {schedule}")

    def _end(self) -> None:
        """Says where the model is. Raises FloatingPointError where no step of the run made an update."""
        self._telemetry.close()
        if self._stopping or self.done < self.total:
            return
        if not self._begun_at and not self._telemetry.applied:
            raise FloatingPointError(
                f"no update was made in {counted(self.total, 'step')}: the gradients overflowed in fp16; "
                "set optim.precision=bf16, or train for more steps"
            )
        export, report = self._outputs.folder / "export", self._outputs.folder / "report.html"
        self._accelerator.print(f"finished {counted(self.total, 'step')}: model in {export}, curves in {report}")
