"""The rounds of a loop: mine, train, evaluate, each a stage that is done once for the same inputs."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import Any

from eval.collection import file_fingerprint, fingerprint
from eval.report import format_table
from retriever.config import Config, to_dict, to_yaml
from retriever.data.collection import data_files
from retriever.data.formats import open_source
from retriever.data.text_table import write_json
from scripts.loop.config import LoopConfig, flags, source_flags
from scripts.stages import model_fingerprint, run_stage

RESULT = "result.json"
Table = dict[str, dict[str, float]]  # model, and split where there are several -> measure -> value


class Loop:
    """One loop in its folder: <round>/mine, <round>/train and <round>/evaluate, `work` with what mining uses again, result.json."""

    def __init__(self, config: LoopConfig) -> None:
        self._config, self._root = config, Path(config.output_dir)

    def run(self) -> Table:
        """Runs what is not done yet; prints the measures of all models so far after each round and returns the last table."""
        config = self._config
        table: Table = {}
        table |= self._evaluate("start", config.first_model)
        model = config.first_model
        for number, described in enumerate(config.rounds):
            data = self._mine(number, model) if described.mine is not None else None
            model = self._train(number, model if described.start == "previous" else config.first_model, data)
            table |= self._evaluate(described.name, model)
            print(f"\n{format_table(table)}\n", flush=True)
        write_json(self._root / RESULT, {"metrics": table})
        return table

    def _mine(self, number: int, model: str) -> Path:
        """The folder of training data whose negatives `model` found in the source."""
        described = self._config.rounds[number]
        options = dict(described.mine or {})
        policy = self._config.training(number, model, None, self._root).data

        def work(folder: Path) -> list[str]:
            arguments = [*source_flags(self._config.source), *flags({"title": policy.title, "title_separator": policy.title_separator})]
            places = {"model": model, "output_dir": folder / "data", "work_dir": self._root / "work" / described.name}
            self._start("scripts.mine_negatives", [*arguments, *flags(options), *flags(places)])
            return ["data/train.jsonl"]

        teacher = options.get("teacher")
        inputs = {
            "source": open_source(self._config.source).fingerprint(),
            "title": [policy.title, policy.title_separator],
            "model": model_fingerprint(model),
            "teacher": model_fingerprint(teacher) if teacher else None,
            "options": {key: value for key, value in options.items() if key != "teacher"},
        }
        folder = self._root / described.name / "mine"
        run_stage(f"{described.name}: mine", folder, inputs, work)
        return folder / "data"

    def _train(self, number: int, model: str, data: Path | None) -> str:
        """The export of a training from `model` on `data`, or on the source."""
        name = self._config.rounds[number].name
        folder = self._root / name / "train"
        config = self._config.training(number, model, data, folder / "run")

        def work(folder: Path) -> list[str]:
            settings = folder / "train.yaml"
            settings.write_text(to_yaml(config), encoding="utf-8")
            self._start("retriever.train", ["--config", str(settings)])
            export = folder / "run" / "export"
            return sorted(f.relative_to(folder).as_posix() for f in export.rglob("*") if f.is_file())

        trained_on = open_source(config.data.train[0]).fingerprint()
        inputs = {"model": model_fingerprint(model), "data": trained_on, "config": _without_places(config)}
        run_stage(f"{name}: train", folder, inputs, work)
        return str(folder / "run" / "export")

    def _evaluate(self, name: str, model: str) -> Table:
        """The measures of `model` on every split that the evaluation names."""
        evaluate = self._config.evaluate
        folder = self._root / name / "evaluate"

        def work(folder: Path) -> list[str]:
            places = {"model": model, "data": evaluate.data, "output_dir": folder / "results"}
            self._start(evaluate.command, [*flags(places), *flags(evaluate.options)])
            return sorted(f.relative_to(folder).as_posix() for f in (folder / "results").glob("*.json"))

        inputs = {"model": model_fingerprint(model), "data": _collection_fingerprint(Path(evaluate.data)), "evaluate": asdict(evaluate)}
        outputs = run_stage(f"{name}: evaluate", folder, inputs, work)
        found = {Path(file).stem: loads((folder / file).read_text(encoding="utf-8"))["metrics"] for file in outputs}
        return {name if len(found) == 1 else f"{name} {split}": metrics for split, metrics in found.items()}

    def _start(self, module: str, arguments: Sequence[str]) -> None:
        """Runs one command to its end. Raises what the command raises, CalledProcessError where it was launched, SystemExit."""
        if self._config.launch:
            subprocess.run([*self._config.launch, "-m", module, *arguments], check=True)
            return
        status = importlib.import_module(module).main(list(arguments))
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise SystemExit(status)


def _without_places(config: Config) -> dict[str, Any]:
    """All that a training's result depends on besides its model and its data."""
    tree = to_dict(config)
    del tree["run"]["output_dir"], tree["model"]["name_or_path"], tree["data"]["train"], tree["data"]["cache_dir"]
    return tree


def _collection_fingerprint(folder: Path) -> str:
    """A hash of the names and bytes of a collection's data files."""
    files = [*data_files(folder), *data_files(folder / "qrels")]
    return fingerprint([[file.relative_to(folder).as_posix(), file_fingerprint(file)] for file in files])
