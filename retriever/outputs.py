"""The output folder of a run: checkpoints, from which the rest is published."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from retriever import checkpoint, files, run_folder
from retriever.checkpoint import TrainingState
from retriever.config import Config, to_yaml
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.export import Probe, export
from retriever.parallel.sharded import PlacedEncoder, whole_tensors
from retriever.parallel.world import World
from retriever.published import Published

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
        self.published = Published(config, store)
        self.history = self.published.history
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
            if (newest := checkpoint.newest(self._checkpoints)) is not None:
                self._saved = checkpoint.step_of(newest)
                self.published.catch_up(newest)
                checkpoint.keep_last(self._checkpoints, config.train.keep_last)

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
            export(encoder, self._tokenizer, self._config, folder, probe, (step, self.published.facts))

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
            export(encoder, self._tokenizer, self._config, folder, probe, (step, self.published.facts))

        try:
            if self.history.path.exists():
                files.sync(self.history.path)  # before the checkpoint that goes on behind their last line
            checkpoint.save(self._checkpoints, step, snapshot, self._config, self._store.fingerprint, write_export)
            self.published.export(step)
            checkpoint.keep_last(self._checkpoints, self._config.train.keep_last)
            self.published.report()
        except BaseException as error:
            self._failure = error

    def lacks_evaluation(self, step: int) -> bool:
        """Whether this run saved `step` and recorded no evaluation of it. Every rank calls it and finds the same."""
        lacks = self._world.is_first and self._saved == step and step not in self.history.logged.evaluations
        return bool(self._of_first(int(lacks)))

    def evaluations_since_best(self) -> int:
        """How many evaluations came after the first of the best ones. Every rank calls it and finds the same."""
        return self._of_first(self.history.logged.since_best if self._world.is_first else 0)

    def _of_first(self, value: int) -> int:
        """The first rank's `value`, which is 0 on the others."""
        return int(self._world.max(torch.tensor(value, device=self._world.device)))

    def publish_best(self, step: int) -> None:
        """Prints the evaluation recorded for `step`, the newest checkpoint; publishes its export if it is the best."""
        self.wait()
        if self._world.is_first:
            self.published.evaluated(step)

    def finish(self) -> None:
        """Prints the best evaluation and writes the report."""
        self.wait()
        if self._world.is_first:
            run_folder.remove_embeddings(self.folder)
            self.published.finish()
        self._world.barrier()
