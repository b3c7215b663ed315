"""What a run publishes from its checkpoints: the newest export, the best one, their cards, and the report."""

from __future__ import annotations

import filecmp
import json
from functools import cached_property
from pathlib import Path

from retriever import checkpoint, files
from retriever.config import Config
from retriever.data.store import Store
from retriever.export import CARD
from retriever.history import History
from retriever.model_card import TrainingFacts, evaluation_section
from retriever.report import write_report
from retriever.run_folder import EXAMPLES
from retriever.screen import say


class Published:
    """The folders `export` and `best` of a run's folder, and its report. Only the first rank publishes."""

    def __init__(self, config: Config, store: Store) -> None:
        self._config, self._store = config, store
        self._folder = Path(config.run.output_dir)
        self._checkpoints = self._folder / checkpoint.FOLDER
        self.history = History(self._folder / "metrics.jsonl")

    @cached_property
    def facts(self) -> TrainingFacts:
        """What the run trains on."""
        return TrainingFacts.of(self._config, self._store)

    def catch_up(self, newest: Path) -> None:
        """Does what a kill may have left undone after the newest checkpoint was written.

        Publishes its export, also where the copies are damaged.
        """
        step = checkpoint.step_of(newest)
        if not self._shows("export", newest):
            self.export(step)
            self._write_card("export", step)
        if not self._shows("best", newest):
            self.best(step)

    def export(self, step: int) -> None:
        """Makes the export of a checkpoint the run's newest."""
        checkpoint.publish(self._export_of(step), self._folder / "export")
        files.write_text(self._folder / checkpoint.EXPORTED, json.dumps({"step": step}))

    def best(self, step: int) -> None:
        """Makes the export of a checkpoint the run's best, if its evaluation is."""
        best = self.history.logged.best
        if best is not None and best.step == step:
            checkpoint.publish(self._export_of(step), self._folder / "best")
            self._write_card("best", step)
            files.write_text(self._folder / "best.json", json.dumps({"step": step, f"eval/{best.measure}": best.value}))

    def evaluated(self, step: int) -> None:
        """Publishes what follows from the evaluation of `step`, 0 or the newest checkpoint, and says it."""
        logged = self.history.logged
        measures, best = logged.evaluations[step], logged.best
        if step:
            self._write_card("export", step)
            self.best(step)
        self.report()
        told = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
        text = f"eval    {f'step {step:,}' if step else 'before step 1'}: {told}"
        text += "" if best is None else f"; best {best}"
        say(text, "evaluation", step=step, measures=measures, best=None if best is None else best._asdict())

    def finish(self) -> None:
        """Writes the report and says which evaluation was the best."""
        self.report()
        if (best := self.history.logged.best) is not None:
            say(f"best    {best}: model in {self._folder / 'best'}", "end", best=best._asdict())

    def report(self) -> None:
        """Writes `report.html`."""
        file = self._folder / EXAMPLES
        examples = files.read_json(file) if file.exists() else {}
        write_report(self._folder / "report.html", self._config, self.facts, self.history.logged, examples)

    def _export_of(self, step: int) -> Path:
        return checkpoint.folder_of(self._checkpoints, step) / "export"

    def _write_card(self, name: str, step: int) -> None:
        files.write_text(self._folder / name / CARD, self._card(step))

    def _card(self, step: int) -> str:
        """The card of a checkpoint's export, with the evaluation that came after it, if there was one."""
        card = (self._export_of(step) / CARD).read_text(encoding="utf-8")
        measures = self.history.logged.trained.get(step)
        return card if measures is None else card + evaluation_section(self._config, step, measures)

    def _shows(self, name: str, newest: Path) -> bool:
        """Whether a published folder is recorded as the newest checkpoint's export, with every file as it should be."""
        source, step = newest / "export", checkpoint.step_of(newest)
        try:
            recorded = files.read_json(self._folder / f"{name}.json")["step"]
            return recorded == step and all(
                (self._folder / name / CARD).read_text(encoding="utf-8") == self._card(step)
                if file == source / CARD
                else filecmp.cmp(file, self._folder / name / file.relative_to(source), shallow=False)
                for file in source.rglob("*")
                if file.is_file()
            )
        except (OSError, ValueError, TypeError, KeyError):
            return False  # a file is missing, or damaged
