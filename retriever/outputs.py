"""The run's folder: checkpoints, the newest and the best export, the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from retriever import checkpoint
from retriever.atomic import write_text
from retriever.checkpoint import TrainingState
from retriever.config import Config, to_yaml
from retriever.data.store import Store
from retriever.encoder.dual_encoder import DualEncoder
from retriever.export import export
from retriever.parallel.world import World
from retriever.report import write_report

_PROBES = 8  # texts that the export's parity check embeds


class Outputs:
    """Writes a run's artefacts on the first rank while the others wait."""

    def __init__(
        self, config: Config, state: TrainingState, encoder: DualEncoder, tokenizer: PreTrainedTokenizerBase, store: Store, world: World
    ) -> None:
        self._config, self._state, self._encoder, self._tokenizer, self._world = config, state, encoder, tokenizer, world
        self._store_fingerprint = store.fingerprint
        self.folder = Path(config.run.output_dir)
        self.metrics = self.folder / "metrics.jsonl"
        self.embeddings = self.folder / "embeddings"  # of evaluations while training, overwritten by each
        self._checkpoints = self.folder / checkpoint.FOLDER
        rows = range(min(_PROBES, len(store.passages)))
        self._probe_texts = [str(tokenizer.decode(store.passages.tokens(row))) for row in rows]
        if world.is_first:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self._checkpoints)
            checkpoint.clean(self.folder)
            write_text(self.folder / "config.yaml", to_yaml(config))
            self._publish_newest()

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps, its export as the run's newest, older ones removed."""
        if self._world.is_first:
            checkpoint.save(self._checkpoints, step, self._state, self._config, self._store_fingerprint, self._export)
            self._publish_newest()
            checkpoint.keep_last(self._checkpoints, self._config.train.keep_last)
        self._world.barrier()

    def keep_if_best(self, metric: str, step: int) -> None:
        """Exports the present weights to `best/` where no evaluation before `step`'s logged a higher `metric`."""
        if self._world.is_first:
            values = {line["step"]: line[metric] for line in self._logged() if metric in line}
            if values[step] == max(values.values()):
                self._export(self.folder / "best")
        self._world.barrier()

    def finish(self) -> None:
        """Writes the report."""
        if self._world.is_first:
            shutil.rmtree(self.embeddings, ignore_errors=True)
            write_report(self.folder / "report.html", self._config, self._logged())
        self._world.barrier()

    def _publish_newest(self) -> None:
        """Brings `export/` up to the newest checkpoint, as a kill right after saving may have left it behind."""
        newest = checkpoint.newest(self._checkpoints)
        if newest is not None:
            checkpoint.publish(newest / "export", self.folder / "export")

    def _export(self, folder: Path) -> None:
        export(self._encoder, self._tokenizer, self._config, folder, probe_texts=self._probe_texts)

    def _logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []
