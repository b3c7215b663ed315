"""A training run from Python: `Run`, which `retriever/train.py` trains with too. docs/run.md shows its use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from retriever import evaluation
from retriever.assembly import assembled, open_folder
from retriever.callbacks import Callback
from retriever.config import Config, ConfigError
from retriever.data.batch import Batch
from retriever.encoder.settings import SETTINGS_FILE
from retriever.errors import Stopped
from retriever.history import RECORDED
from retriever.inputs import Eval, Train, configuration
from retriever.loss.custom import Loss
from retriever.retention import Retention
from retriever.screen import say
from retriever.signals import StopSignals
from retriever.step import Backward, StepReport, forward_backward, update
from retriever.telemetry import Telemetry
from retriever.wording import counted

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_LAST_WRITE_S = 60.0  # for the checkpoint that is being written when another rank ends the run


class Run:
    """One training run, from its configuration to its last export.

        run = Run("run.yaml", ["batch.queries=64"], train=dataset, eval={"dev": (queries, corpus, qrels)})
        run.train()
        model = run.to_sentence_transformer()

    `train` enters the run and leaves it. For a loop of your own, enter it with `with`, in the main thread: entering
    locks the run's folder, tokenises the data, joins the other ranks, resolves every `auto` and loads the checkpoint
    that `run.resume` asks for. Leaving writes the report, or after an error closes what is open, and puts back signal
    handlers, environment, process group and generators. Every method is called on every rank, in the same order.
    Inside, these are set: `config`, every `auto` resolved; `world`, the ranks and their collectives; `encoder`,
    `objective` (the loss) and `optimizer`; `done` and `total`, optimizer steps. `should_stop`, set to True on any rank,
    ends `batches` after the step at hand.

    With `run.preflight=only` the plan is printed, `batches` is empty, `optimizer` is not set, and nothing is left
    behind.

    Raises RefusedError (ConfigError, DataError, LockedError) on entering, for what cannot be run; Stopped on leaving
    where a signal stopped the run, which is saved; RankError where another rank ended it; FloatingPointError on leaving
    where every update was skipped.
    """

    _batches: Iterator[Batch]

    def __init__(
        self,
        config: str | Path | Config | None = None,
        overrides: Sequence[str] = (),
        *,
        model: Any = None,
        train: Train | None = None,
        eval: Eval | None = None,  # noqa: A002
        loss: Loss | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """`config`: a YAML file, a Config or nothing; `overrides`: `key.sub=value` settings that replace its own.

        What else is given replaces its sections, see `retriever.inputs`. `model`: a name, a folder or a
        SentenceTransformer. `train`: a file, folder or SourceConfig or a list of them, a `datasets.Dataset`, or any
        iterable of dicts. `eval`: a BEIR folder or `{name: (queries, corpus, qrels)}`. `loss`: what `loss.custom`
        would name, see `retriever.loss.custom`.
        """
        self._asked = self.config = configuration(
            config, overrides, model=model, train=train, evaluation=eval, loss=loss
        )
        self.done = self.total = 0
        self.should_stop = self._running = False
        self._saved = self._stopping = 0  # the step saved last, the signal that stops the run
        self._loss, self._callbacks = loss, tuple(callbacks)
        self._backward: Backward | None = None
        self._why = ""  # the run ends before its last step

    def __enter__(self) -> Run:
        self._lifetime = self._live()
        self._lifetime.__enter__()
        self._running = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._running = False
        return self._lifetime.__exit__(kind, error, trace)

    def __getattr__(self, name: str) -> NoReturn:
        """Names the attribute that is not set, or not yet."""
        raise AttributeError(f"a Run has no {name!r} before it is entered, by train() or by `with`", name=name)

    def train(self, *, resume: bool = True) -> None:
        """Trains to the last step, saves and evaluates on the way; enters and leaves the run unless that was done.

        `resume=False` refuses a folder that holds a run already, as `run.resume=never` does.
        """
        if not resume:
            if self._running:
                raise ValueError("resume: expected True inside `with`, which has loaded a checkpoint; received False")
            self._asked = replace(self._asked, run=replace(self._asked.run, resume="never"))
        with nullcontext() if self._running else self:
            for batch in self.batches():
                self.forward_backward(batch)
                self.optimizer_step()

    def batches(self) -> Iterator[Batch]:
        """This rank's part of the batch of each step that is left, in order, until the run is to stop.

        Pass each to `forward_backward`, and then call `optimizer_step`, before the next. An evaluation that is due and
        that an earlier start of the run did not come to is made up first.
        """
        if self.config.run.preflight == "only":
            return
        if not self._stops() and self._due("evaluate"):
            self.evaluate()
        else:
            self.should_stop = self._has_lost_patience() or self.should_stop
        for batch in () if self._stops() else self._batches:
            self._outputs.check()
            yield batch
            if self._stops():  # leaving saves
                return

    def forward_backward(self, batch: Batch) -> Backward:
        """The batch's loss; leaves this rank's part of its gradient in the parameters' `grad`.

        Raises ValueError if the batch is not that of the step after those that are done.
        """
        if batch.step != self.done:
            raise ValueError(f"expected the batch of step {self.done + 1}, received that of step {batch.step + 1}")
        self._backward = forward_backward(
            self.encoder, self.objective, batch, self.optimizer, self.world, self.config.run.seed, self.retention
        )
        return self._backward

    def optimizer_step(self) -> StepReport:
        """Sums the gradient over ranks, clips it and updates the parameters; logs, saves and evaluates where it is
        time. Raises ValueError without `forward_backward` before it.
        """
        if self._backward is None:
            raise ValueError("expected forward_backward before optimizer_step")
        report = update(self._backward, self.optimizer, self.world)
        self._backward = None
        self.done = report.step + 1
        self._call("on_step_end", report)
        self._stops()
        if self._due("evaluate"):
            self.evaluate()
        elif self._due("save"):
            self.save()
        return report

    def _stops(self) -> bool:
        """Whether a signal or a callback of any rank ends the run; the same on every rank."""
        self._stopping, self.should_stop = self._stop.agreed(self.should_stop)
        return bool(self._stopping) or self.should_stop

    def _due(self, what: Literal["save", "evaluate"]) -> bool:
        """Whether the run is to be saved or evaluated after the steps that are done.

        By `train.save_every` and `train.eval_every`, and after the last step. A run that stops is saved and not
        evaluated.
        """
        if self.done == 0:
            at_start = self.config.eval is not None and self.config.eval.at_start
            return what == "evaluate" and at_start and self._outputs.lacks_evaluation(0)
        stops = bool(self._stopping) or self.should_stop
        evaluates = self.config.eval is not None and self._is_turn(self.config.train.eval_every)
        if what == "save":
            return stops or evaluates or self._is_turn(self.config.train.save_every)
        if not evaluates or stops:
            return False
        unsaved = self.done > self._begun_at and self._saved != self.done  # `evaluate` saves first
        return unsaved or self._outputs.lacks_evaluation(self.done)

    def save(self, path: str | Path | None = None) -> None:
        """Begins a checkpoint and its export, which a thread writes while training goes on.

        With `path` it writes an export of the present weights to that folder instead, on the first rank; also after
        leaving. Raises ConfigError if the folder holds something else than an export.
        """
        if path is None:
            self._begin_save()
            self._call("on_save")
            return
        folder = Path(path)
        if folder.exists() and not (folder / SETTINGS_FILE).exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds no export; expected a folder that is empty or need not exist yet")
        self._outputs.export(folder, self.done, keep=self.world.is_first)

    def _begin_save(self) -> None:
        with self._telemetry.paused("save"):
            self._outputs.save(self.done)
        self._saved = self.done

    def to_sentence_transformer(self, **options: Any) -> SentenceTransformer:
        """The present weights as a SentenceTransformer of its own, made with `options`; also after leaving."""
        from sentence_transformers import SentenceTransformer

        with tempfile.TemporaryDirectory(prefix="bigbatch-") as folder:
            self._outputs.export(Path(folder) / "export", self.done, keep=True)
            return SentenceTransformer(str(Path(folder) / "export"), **options)

    def evaluate(self) -> dict[str, float]:
        """Measures the present weights as section `eval` says and records it: `eval/<measure>` -> mean over queries.

        Saves first if these steps are not saved, for `best/` is made from a checkpoint; after leaving, nothing is
        written. Empty on ranks other than the first. Raises ConfigError where there is no section `eval`.
        """
        if not self._running:
            return evaluation.evaluate(self._parts, self.optimizer, None, self.done)
        unsaved = self._saved != self.done and self.config.eval is not None
        if unsaved:
            self._begin_save()  # a failed evaluation costs no training
        with self._stop.between_steps(), self._telemetry.paused("evaluate"):
            measures = evaluation.evaluate(self._parts, self.optimizer, self._outputs.embeddings, self.done)
        self._record(measures)
        if self.world.is_first:
            with self._telemetry.paused("record"):
                self._outputs.publish_best(self.done)
        self.should_stop = self._has_lost_patience() or self.should_stop  # asked of all ranks, whoever wants to stop
        self._call("on_evaluate", measures)
        if unsaved:
            self._call("on_save")
        return measures

    def record(self, values: Mapping[str, float | None]) -> None:
        """Writes `values` of the steps that are done to `metrics.jsonl` and the trackers, on the first rank.

        Raises ValueError for a value named `step`, `epoch`, `time` or `eval/…`, as those of `evaluate` are.
        """
        if taken := sorted(name for name in values if name in RECORDED or name.startswith("eval/")):
            raise ValueError(f"expected other names than {', '.join(taken)}, which the run writes itself")
        self._record(values)

    def _record(self, values: Mapping[str, float | None]) -> None:
        if self.world.is_first:
            self._call("on_log", {name: value if value is None else float(value) for name, value in values.items()})

    def _has_lost_patience(self) -> bool:
        """Whether `eval.patience` evaluations in a row were no better than the best one."""
        patience = None if self.config.eval is None else self.config.eval.patience
        if patience is None or self._outputs.evaluations_since_best() < patience:
            return False
        self._why = f"the last {counted(patience, 'evaluation')} brought nothing better (eval.patience)"
        return True

    @property
    def epoch(self) -> float:
        """Passes over the sources that are done."""
        return self.done / self._parts.planner.steps_per_epoch

    def _is_turn(self, every: int) -> bool:
        return self.done > 0 and (self.done == self.total or (every > 0 and self.done % every == 0))

    @contextmanager
    def _live(self) -> Iterator[None]:
        self.should_stop, self._stopping, self._backward = False, 0, None
        self._why = "run.should_stop"
        with assembled(self._asked, evaluation.check, self._loss) as parts:
            self._parts, self.world, self.config, self.total = parts, parts.world, parts.config, parts.total
            self.encoder, self.objective = parts.encoder, parts.objective
            self.retention = Retention.from_config(parts.config.batch)
            if parts.config.run.preflight == "only":
                yield
            else:
                yield from self._opened()
        if self._stopping:
            raise Stopped(self._stopping, self.done)

    def _opened(self) -> Iterator[None]:
        """Opens the run's folder; then the loop runs."""
        opened = open_folder(self._parts)
        self.optimizer, self._outputs, self.done = opened.optimizer, opened.outputs, opened.done
        self._begun_at, self._saved = opened.done, opened.saved
        self._telemetry = Telemetry(self._parts.accelerator, self._outputs.history, self._parts.forecast)
        if self.world.watch is not None:
            self.world.watch.before_leaving = partial(self._outputs.close, _LAST_WRITE_S)
        self._stop = StopSignals(self.world, self._outputs.save_last_update)
        loaded = self._parts.loader.batches(self.done, self.total)
        # Closed also after an error: else whichever thread collects it would wait.
        with closing(self._outputs), self._stop, closing(loaded) as self._batches:
            self._call("on_train_begin")
            yield
            if self._stops() and self._saved != self.done:
                self.save()
            if self.should_stop and self.done < self.total and self.world.is_first:
                say(f"ended after step {self.done:,} of {self.total:,}: {self._why}", "end")
            with self._stop.between_steps():
                self._outputs.finish()
                self._call("on_train_end")

    def _call(self, event: str, *arguments: object) -> None:
        """Calls every callback; the telemetry last, so that a step's own events come before those of its logging."""
        for callback in (*self._callbacks, self._telemetry):
            getattr(callback, event)(self, *arguments)
