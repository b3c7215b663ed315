"""The run's folder: checkpoints, the newest and the best export, the report."""

from __future__ import annotations

import filecmp
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from retriever import checkpoint, files, run_folder
from retriever.checkpoint import TrainingState
from retriever.config import Config, to_yaml
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.export import export
from retriever.parallel.sharded import PlacedEncoder
from retriever.parallel.world import World
from retriever.report import write_report
from retriever.telemetry import read_metrics

_PROBES = 8  # texts that the export's parity check embeds


class Outputs:
    """Writes a run's artefacts on the first rank while the others wait."""

    def __init__(
        self, config: Config, state: TrainingState, placed: PlacedEncoder, tokenizer: PreTrainedTokenizerBase, store: Store, world: World
    ) -> None:
        self._config, self._state, self._placed, self._tokenizer, self._world = config, state, placed, tokenizer, world
        self._store_fingerprint = store.fingerprint
        self.folder = Path(config.run.output_dir)
        self.metrics = self.folder / "metrics.jsonl"
        self.embeddings = self.folder / run_folder.EMBEDDINGS  # of evaluations while training, overwritten by each
        self._checkpoints = self.folder / checkpoint.FOLDER
        rows = range(min(_PROBES, len(store.passages)))
        longest = max(config.model.query_max_tokens, config.model.passage_max_tokens)  # of a text of 20 MB, all that can matter
        self._probe_texts = [str(tokenizer.decode(store.passages.tokens(row)[:longest])) for row in rows]
        if world.is_first:
            run_folder.take(config)
            files.make_folder(self._checkpoints)
            files.clean(self._checkpoints)
            files.clean(self.folder)
            files.write_text(self.folder / "config.yaml", to_yaml(config))
            self._publish(written=False)

    def holds(self, folder: Path) -> bool:
        """Whether a checkpoint is one of this run's folder; every rank finds the same."""
        return folder.resolve().parent == self._checkpoints.resolve()

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps, its export as the run's newest and perhaps its best, older ones removed."""
        first = self._world.is_first
        snapshot = checkpoint.snapshot(self._state, keep=first)
        encoder = self._placed.whole(torch.device("cpu"), keep=first)
        if first:
            export = partial(self._export, encoder)
            if self.metrics.exists():
                files.sync(self.metrics)  # before the checkpoint that goes on behind their last line
            checkpoint.save(self._checkpoints, step, snapshot, self._config, self._store_fingerprint, export)
            self._publish(written=True)
            checkpoint.keep_last(self._checkpoints, self._config.train.keep_last)
        self._world.barrier()

    def finish(self) -> None:
        """Writes the report."""
        if self._world.is_first:
            run_folder.remove_embeddings(self.folder)
            write_report(self.folder / "report.html", self._config, self._logged())
        self._world.barrier()

    def _publish(self, *, written: bool) -> None:
        """Brings `export/` and `best/` up to the newest checkpoint, which was `written` just now.

        At a start too, as a kill right after saving leaves them behind, and they may have been damaged since: then what is whole and
        recorded of this step is not copied again.
        """
        newest = checkpoint.newest(self._checkpoints)
        if newest is None:
            return
        step = checkpoint.step_of(newest)
        if written or not self._shows("export", newest):
            checkpoint.publish(newest / "export", self.folder / "export")
            files.write_text(self.folder / checkpoint.EXPORTED, json.dumps({"step": step}))
        metric, values = self._evaluations()
        if values and max(values, key=lambda at: (values[at], at)) == step and (written or not self._shows("best", newest)):
            checkpoint.publish(newest / "export", self.folder / "best")
            files.write_text(self.folder / "best.json", json.dumps({"step": step, metric: values[step]}))

    def _evaluations(self) -> tuple[str, dict[int, float]]:
        """The first evaluation metric's name and its value by step."""
        lines = [line for line in self._logged() if any(key.startswith("eval/") for key in line)]
        metric = next((key for line in lines for key in line if key.startswith("eval/")), "")
        return metric, {line["step"]: line[metric] for line in lines}

    def _shows(self, name: str, newest: Path) -> bool:
        """Whether a published folder is recorded as the newest checkpoint's export, and every file of it is there as it was."""
        record, source = self.folder / f"{name}.json", newest / "export"
        try:
            recorded = json.loads(record.read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError, TypeError, KeyError):
            return False  # there is none, or it is damaged too
        ours = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        there = (self.folder / name / path for path in ours)
        return recorded == checkpoint.step_of(newest) and all(
            copy.is_file() and filecmp.cmp(source / path, copy, shallow=False) for path, copy in zip(ours, there, strict=True)
        )

    def _export(self, encoder: DualEncoder, folder: Path) -> None:
        export(encoder, self._tokenizer, self._config, folder, probe_texts=self._probe_texts)

    def _logged(self) -> list[dict[str, Any]]:
        return read_metrics(self.metrics)
