"""The output folder of a run: checkpoints, the newest and the best export, the report."""

from __future__ import annotations

import filecmp
import json
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from retriever import checkpoint, files, run_folder
from retriever.checkpoint import TrainingState
from retriever.config import Config, to_yaml
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.export import CARD, Probe, export
from retriever.model_card import TrainingFacts, evaluation_section
from retriever.parallel.sharded import PlacedEncoder, whole_tensors
from retriever.parallel.world import World
from retriever.report import write_report
from retriever.telemetry import read_metrics

_PROBES = 8  # texts that the export's parity check embeds


class Outputs:
    """Writes a run's files on the first rank. Checkpoints are written during training, from copies in host memory."""

    def __init__(
        self,
        config: Config,
        state: TrainingState,
        placed: PlacedEncoder,
        tokenizer: PreTrainedTokenizerBase,
        store: Store,
        world: World,
    ) -> None:
        self._config, self._state, self._placed, self._tokenizer, self._world = config, state, placed, tokenizer, world
        self._store = store
        self.folder = Path(config.run.output_dir)
        self.metrics = self.folder / "metrics.jsonl"
        self.embeddings = self.folder / run_folder.EMBEDDINGS  # of evaluations while training, overwritten by each
        self._checkpoints = self.folder / checkpoint.FOLDER
        self._saved, self._writing = 0, threading.Thread()
        self._failure: BaseException | None = None
        self._saving = threading.RLock()
        rows = range(min(_PROBES, len(store.passages)))
        longest = max(config.model.query_max_tokens, config.model.passage_max_tokens)  # no more of a text matters
        self._probe_texts = [str(tokenizer.decode(store.passages.tokens(row)[:longest])) for row in rows]
        if world.is_first:
            run_folder.take(config)
            files.make_folder(self._checkpoints)
            files.clean(self._checkpoints)
            files.clean(self.folder)
            files.write_text(self.folder / "config.yaml", to_yaml(config))
            self._publish()

    def holds(self, folder: Path) -> bool:
        """Whether a checkpoint is one of this run's folder; every rank finds the same."""
        return folder.resolve().parent == self._checkpoints.resolve()

    def save(self, step: int) -> None:
        """Begins a checkpoint after `step` steps: waits for the last one, copies the state, and writes it in a thread.

        Raises what went wrong with the last one. Every rank calls it.
        """
        with self._saving:
            self._begin(step, stepping=False)

    def _begin(self, step: int, *, stepping: bool) -> None:
        self.wait()
        # In the middle of a step the copies must not wait for what the step has queued, which may never end.
        aside = stepping and self._world.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._world.device)) if aside else nullcontext():
            snapshot = checkpoint.snapshot(self._state, keep=self._world.is_first)
            encoder = self._copy(keep=self._world.is_first)
        self._saved = step
        if self._world.is_first:
            probe = self._probe(encoder, live=not stepping)  # in the middle of a step the device may lack the memory
            self._writing = threading.Thread(
                target=self._write, args=(step, snapshot, encoder, probe), name="checkpoint"
            )
            self._writing.start()

    def export(self, folder: Path, step: int, *, keep: bool) -> None:
        """Writes an export of the present weights, after `step` steps, where `keep`. Every rank calls it."""
        encoder = self._copy(keep=keep)
        if keep:
            probe = self._probe(encoder, live=True)
            export(encoder, self._tokenizer, self._config, folder, probe, (step, self._facts))

    def _copy(self, *, keep: bool) -> DualEncoder:
        """The encoder in host memory, of its averaged weights where there are any. Every rank calls it."""
        encoder = self._placed.copy(keep=keep)
        averages = whole_tensors(self._state.optimizer.averages, torch.device("cpu"), keep=keep)
        if averages:
            for name, parameter in encoder.named_parameters():
                parameter.data = averages.get(name, parameter.data)
        return encoder

    def _probe(self, encoder: DualEncoder, *, live: bool) -> Probe:
        """Embeddings by the `live` encoder, or by `encoder`, its copy: in shards no rank can encode alone, and only the
        copy has averaged weights.
        """
        alone = live and not self._world.sharded and not self._state.optimizer.averages
        encoder = self._placed.whole(self._world.device) if alone else encoder
        return Probe.of(encoder, self._tokenizer, self._config, self._probe_texts)

    def wait(self) -> None:
        """Returns once everything begun is written and durable. Raises what went wrong with it."""
        self.close()
        self.check()

    def close(self, limit_s: float | None = None) -> None:
        """Returns once nothing is being written any more, or after `limit_s`; also where an error ends the run."""
        if self._writing.ident is not None:
            self._writing.join(limit_s)

    def check(self) -> None:
        """Raises what went wrong with a checkpoint that was begun."""
        if self._failure is not None:
            raise self._failure

    def save_last_update(self) -> int:
        """Writes a checkpoint of the last update, unless there is one, and returns its step; 0 before the first update.

        Any thread may call it, on one rank alone, while the main thread is in a step: until its update a step changes
        nothing that is saved.
        """
        with self._saving:
            # An evaluation holds `updating` to its end, and begins with everything saved.
            if self._state.optimizer.updates > self._saved:
                with self._state.optimizer.updating:
                    self._begin(self._state.optimizer.updates, stepping=True)
            self.wait()
            return self._saved

    def _write(self, step: int, snapshot: checkpoint.Snapshot, encoder: DualEncoder, probe: Probe) -> None:
        """Writes a checkpoint, its export as the run's newest and the report, and removes older checkpoints."""

        def write_export(folder: Path) -> None:
            export(encoder, self._tokenizer, self._config, folder, probe, (step, self._facts))

        try:
            if self.metrics.exists():
                files.sync(self.metrics)  # before the checkpoint that goes on behind their last line
            checkpoint.save(self._checkpoints, step, snapshot, self._config, self._store.fingerprint, write_export)
            self._publish_export(step)
            checkpoint.keep_last(self._checkpoints, self._config.train.keep_last)
            self._report()
        except BaseException as error:
            self._failure = error

    @cached_property
    def _facts(self) -> TrainingFacts:
        return TrainingFacts.of(self._config, self._store)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether this run saved `step` and recorded no evaluation of it. Every rank calls it and finds the same."""
        lacks = self._world.is_first and self._saved == step and step not in self._measured()
        return bool(self._of_first(int(lacks)))

    def evaluations_since_best(self) -> int:
        """The number of evaluations after the first of the best ones. Every rank calls it and gets the same."""
        evaluations = self._evaluations() if self._world.is_first else {}
        values = [next(iter(measures.values())) for _, measures in sorted(evaluations.items())]
        return self._of_first(len(values) - 1 - values.index(max(values)) if values else 0)

    def _of_first(self, value: int) -> int:
        """The first rank's `value`, which is 0 on the others."""
        return int(self._world.max(torch.tensor(value, device=self._world.device)))

    def publish_best(self, step: int) -> None:
        """Prints the evaluation recorded for `step`, the newest checkpoint; publishes its export if it is the best."""
        self.wait()
        if self._world.is_first and (evaluations := self._evaluations()):
            self._write_card("export", step)
            self._publish_best(step)
            self._report()
            measures = ", ".join(f"{name} {value:.4f}" for name, value in evaluations[step].items())
            tqdm.write(f"eval    step {step:,}: {measures}; best {_best(evaluations)[1]}")

    def finish(self) -> None:
        """Prints the best evaluation and writes the report."""
        self.wait()
        if self._world.is_first:
            run_folder.remove_embeddings(self.folder)
            self._report()
            if evaluations := self._evaluations():
                tqdm.write(f"best    {_best(evaluations)[1]}: model in {self.folder / 'best'}")
        self._world.barrier()

    def _report(self) -> None:
        write_report(self.folder / "report.html", self._config, self._facts, read_metrics(self.metrics))

    def _publish(self) -> None:
        """Does what a kill may have left undone after the newest checkpoint was written.

        Publishes its export, also where the copies are damaged, and removes what `train.keep_last` does not keep.
        """
        newest = checkpoint.newest(self._checkpoints)
        if newest is None:
            return
        self._saved = checkpoint.step_of(newest)
        if not self._shows("export", newest):
            self._publish_export(self._saved)
            self._write_card("export", self._saved)
        if not self._shows("best", newest):
            self._publish_best(self._saved)
        checkpoint.keep_last(self._checkpoints, self._config.train.keep_last)

    def _export_of(self, step: int) -> Path:
        return checkpoint.folder_of(self._checkpoints, step) / "export"

    def _publish_export(self, step: int) -> None:
        checkpoint.publish(self._export_of(step), self.folder / "export")
        files.write_text(self.folder / checkpoint.EXPORTED, json.dumps({"step": step}))

    def _publish_best(self, step: int) -> None:
        evaluations = self._evaluations()
        if evaluations and _best(evaluations)[0] == step:
            checkpoint.publish(self._export_of(step), self.folder / "best")
            self._write_card("best", step)
            metric, value = next(iter(evaluations[step].items()))
            files.write_text(self.folder / "best.json", json.dumps({"step": step, f"eval/{metric}": value}))

    def _write_card(self, name: str, step: int) -> None:
        files.write_text(self.folder / name / CARD, self._card(step))

    def _card(self, step: int) -> str:
        """The card of a checkpoint's export, with the evaluation that came after it, if there was one."""
        card = (self._export_of(step) / CARD).read_text(encoding="utf-8")
        measures = self._evaluations().get(step)
        return card if measures is None else card + evaluation_section(self._config, step, measures)

    def _evaluations(self) -> dict[int, dict[str, float]]:
        """As `_measured`, of steps that were trained; the first measure chooses the best."""
        return {step: measures for step, measures in self._measured().items() if step > 0}

    def _measured(self) -> dict[int, dict[str, float]]:
        """Step -> measures of the evaluation after it."""
        found = {}
        for line in read_metrics(self.metrics):
            if measures := {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}:
                found[line["step"]] = measures
        return found

    def _shows(self, name: str, newest: Path) -> bool:
        """Whether a published folder is recorded as the newest checkpoint's export, with every file as it should be."""
        source, step = newest / "export", checkpoint.step_of(newest)
        try:
            recorded = files.read_json(self.folder / f"{name}.json")["step"]
            return recorded == step and all(
                (self.folder / name / CARD).read_text(encoding="utf-8") == self._card(step)
                if file == source / CARD
                else filecmp.cmp(file, self.folder / name / file.relative_to(source), shallow=False)
                for file in source.rglob("*")
                if file.is_file()
            )
        except (OSError, ValueError, TypeError, KeyError):
            return False  # a file is missing, or damaged


def _best(evaluations: Mapping[int, Mapping[str, float]]) -> tuple[int, str]:
    """The step of the best evaluation by its first measure, the later of equal ones, and how it is told."""
    first = {step: next(iter(measures.items())) for step, measures in evaluations.items()}
    step, (name, value) = max(first.items(), key=lambda item: (item[1][1], item[0]))
    return step, f"{name} {value:.4f} at step {step:,}"
