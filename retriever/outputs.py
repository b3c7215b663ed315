"""The run's folder: checkpoints, the newest and the best export, the report."""

from __future__ import annotations

import filecmp
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from retriever import checkpoint, files, run_folder
from retriever.checkpoint import TrainingState
from retriever.config import Config, to_yaml
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.export import Probe, export
from retriever.parallel.sharded import PlacedEncoder
from retriever.parallel.world import World
from retriever.report import write_report
from retriever.telemetry import read_metrics

_PROBES = 8  # texts that the export's parity check embeds


class Outputs:
    """Writes a run's artefacts on the first rank. A checkpoint is written while training goes on, from copies in host
    memory.
    """

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
        self._store_fingerprint = store.fingerprint
        self.folder = Path(config.run.output_dir)
        self.metrics = self.folder / "metrics.jsonl"
        self.embeddings = self.folder / run_folder.EMBEDDINGS  # of evaluations while training, overwritten by each
        self._checkpoints = self.folder / checkpoint.FOLDER
        self._saved, self._writing = 0, threading.Thread()
        self._failure: BaseException | None = None
        self._saving = threading.RLock()
        rows = range(min(_PROBES, len(store.passages)))
        longest = max(
            config.model.query_max_tokens, config.model.passage_max_tokens
        )  # of a text of 20 MB, all that can matter
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
        """Begins a checkpoint after `step` steps: copies the state, and writes it in a thread once the last one is
        written.

        Raises what went wrong with the last one. Every rank calls it.
        """
        with self._saving:
            self._begin(step, stepping=False)

    def _begin(self, step: int, *, stepping: bool) -> None:
        self.wait()
        # In the middle of a step, beside what the step has queued on the device and may wait for in vain.
        aside = stepping and self._world.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._world.device)) if aside else nullcontext():
            snapshot = checkpoint.snapshot(self._state, keep=self._world.is_first)
            encoder = self._placed.copy(keep=self._world.is_first)
        self._saved = step
        if self._world.is_first:
            # In the middle of a step the device may lack the memory, and in shards no rank can encode alone.
            live = encoder if stepping or self._world.sharded else self._placed.whole(self._world.device)
            probe = Probe.of(live, self._tokenizer, self._config, self._probe_texts)
            self._writing = threading.Thread(
                target=self._write, args=(step, snapshot, encoder, probe), name="checkpoint"
            )
            self._writing.start()

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
        """Writes a checkpoint of the last update, unless there is one, and returns its step. For any thread, and for
        one rank alone.

        The main thread may be in the middle of a step, which changes nothing that is saved before its update.
        """
        with self._saving, self._state.optimizer.updating:
            if self._state.optimizer.updates > self._saved:
                self._begin(self._state.optimizer.updates, stepping=True)
            self.wait()
            return self._saved

    def _write(self, step: int, snapshot: checkpoint.Snapshot, encoder: DualEncoder, probe: Probe) -> None:
        """Writes a checkpoint, its export as the run's newest, and removes older ones."""

        def write_export(folder: Path) -> None:
            export(encoder, self._tokenizer, self._config, folder, probe)

        try:
            if self.metrics.exists():
                files.sync(self.metrics)  # before the checkpoint that goes on behind their last line
            checkpoint.save(self._checkpoints, step, snapshot, self._config, self._store_fingerprint, write_export)
            self._publish_export(step)
            checkpoint.keep_last(self._checkpoints, self._config.train.keep_last)
        except BaseException as error:
            self._failure = error

    def lacks_evaluation(self, step: int) -> bool:
        """Whether this run saved `step` and recorded no evaluation of it. Every rank calls it and finds the same."""
        lacks = self._world.is_first and self._saved == step and step not in self._evaluations()[1]
        return bool(self._world.max(torch.tensor(int(lacks), device=self._world.device)))

    def publish_best(self, step: int) -> None:
        """Makes `best/` the export of `step`, the newest checkpoint's, where its recorded evaluation is the best
        one.
        """
        self.wait()
        if self._world.is_first:
            self._publish_best(step)

    def finish(self) -> None:
        """Writes the report."""
        self.wait()
        if self._world.is_first:
            run_folder.remove_embeddings(self.folder)
            write_report(self.folder / "report.html", self._config, self._logged())
        self._world.barrier()

    def _publish(self) -> None:
        """Brings `export/` and `best/` up to the newest checkpoint, behind which a kill may have left them, or mends
        them.
        """
        newest = checkpoint.newest(self._checkpoints)
        if newest is None:
            return
        self._saved = checkpoint.step_of(newest)
        if not self._shows("export", newest):
            self._publish_export(self._saved)
        if not self._shows("best", newest):
            self._publish_best(self._saved)

    def _publish_export(self, step: int) -> None:
        checkpoint.publish(checkpoint.folder_of(self._checkpoints, step) / "export", self.folder / "export")
        files.write_text(self.folder / checkpoint.EXPORTED, json.dumps({"step": step}))

    def _publish_best(self, step: int) -> None:
        metric, values = self._evaluations()
        if values and max(values, key=lambda at: (values[at], at)) == step:
            checkpoint.publish(checkpoint.folder_of(self._checkpoints, step) / "export", self.folder / "best")
            files.write_text(self.folder / "best.json", json.dumps({"step": step, metric: values[step]}))

    def _evaluations(self) -> tuple[str, dict[int, float]]:
        """The first evaluation metric's name and its value by step."""
        lines = [line for line in self._logged() if any(key.startswith("eval/") for key in line)]
        metric = next((key for line in lines for key in line if key.startswith("eval/")), "")
        return metric, {line["step"]: line[metric] for line in lines}

    def _shows(self, name: str, newest: Path) -> bool:
        """Whether a published folder is recorded as the newest checkpoint's export, and every file of it is there as it
        was.
        """
        record, source = self.folder / f"{name}.json", newest / "export"
        try:
            recorded = json.loads(record.read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError, TypeError, KeyError):
            return False  # there is none, or it is damaged too
        ours = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        there = (self.folder / name / path for path in ours)
        return recorded == checkpoint.step_of(newest) and all(
            copy.is_file() and filecmp.cmp(source / path, copy, shallow=False)
            for path, copy in zip(ours, there, strict=True)
        )

    def _logged(self) -> list[dict[str, Any]]:
        return read_metrics(self.metrics)
