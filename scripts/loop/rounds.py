"""Runs the rounds of a loop: mine, train, evaluate. Each is a stage that is done once for the same inputs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import Any

from eval.collections.collection import file_fingerprint
from eval.report import format_table
from retriever.config import to_dict, to_yaml
from retriever.data.folders import data_files
from retriever.data.formats import open_source
from retriever.files import write_json, write_text
from retriever.run_folder import RUN_FILES
from scripts.loop.config import LoopConfig
from scripts.mining.mine import DATA
from scripts.stages import STAGE_FILES, files_fingerprint, model_fingerprint, run_stage

_MODEL = ("*.safetensors", "*.json", "*.model", "vocab.txt", "merges.txt", "*.jinja")  # of a cross-encoder
_WRITES = (  # what a stage leaves in its folder
    "train.yaml",
    *(f"model/{name}" for name in _MODEL),
    *(f"data/{name}" for name in (DATA, *STAGE_FILES)),
    *(f"run/{name}" for name in RUN_FILES),
    *(f"results/{name}" for name in ("*.json", "*.trec", "*.msmarco.tsv", "passages", "queries-*")),
)
_TRAIN_TEACHER = "scripts.train_cross_encoder"  # runs alone in this process, whatever the others are launched with
Measures = dict[str, dict[str, float]]  # split, or model and split -> measure -> value


class Loop:
    """A loop in its folder: <round>/{teacher, mine, train, evaluate}, `work` with what later minings can reuse, and
    result.json.

    The variants of a round are in <round>/variant-1/{train, evaluate} and so on. Folders are relative to the loop's.
    """

    def __init__(self, config: LoopConfig) -> None:
        self._config, self._root = config, Path(config.output_dir)
        self._table, self._evaluations = Measures(), dict[str, str]()

    def run(self) -> Measures:
        """Runs what is not done yet; returns the measures of the first model and of every round's.

        result.json holds them for the rounds done so far, with the folder of each evaluation.
        """
        first = model = self._config.first_model
        self._evaluate(Path("start"), model)
        self._record("start", Path("start"))
        mined = None
        for number, described in enumerate(self._config.rounds):
            data = None
            if described.mine is not None:
                data = mined = self._mine(number, model, mined)
            start = first if described.start == "first" else model
            variants = range(max(1, len(described.variants)))
            best = self._best([self._train(number, variant, start, data) for variant in variants])
            model = self._model(best)
            self._record(described.name, best)
        return self._table

    def _record(self, name: str, folder: Path) -> None:
        """Adds the measures in `folder` to result.json and prints the table of all models so far."""
        measures = self._measures(folder)
        self._table |= {f"{name} {split}" if len(measures) > 1 else name: found for split, found in measures.items()}
        self._evaluations[name] = (folder / "evaluate").as_posix()
        print(f"\n{format_table(self._table)}\n", flush=True)
        write_json(self._root / "result.json", {"metrics": self._table, "evaluations": self._evaluations})

    def _best(self, folders: Sequence[Path]) -> Path:
        """The variant with the highest measure on the split to choose by; the first one of equals."""
        if len(folders) == 1:
            return folders[0]
        split, measure = self._config.evaluate.choose, self._config.evaluate.options["metrics"][0]
        values = [self._measures(folder)[split][measure] for folder in folders]
        best = folders[values.index(max(values))]
        found = ", ".join(f"{value:.4f}" for value in values)
        print(f"{best}: the best of {measure} {found} on {split}", flush=True)
        return best

    def _mine(self, number: int, model: str, mined: Path | None) -> Path:
        """The folder of training data with negatives that `model` found in the source.

        If the round has a teacher of its own, that is trained on the data `mined` before, and scores beside the other
        teachers.
        """
        described, source = self._config.rounds[number], self._config.source
        folder, options = Path(described.name, "mine"), dict(described.mine or {})
        named = options.pop("teacher", None) or []
        teachers = [named] if isinstance(named, str) else list(named)
        if described.teacher is not None and mined is not None:
            teachers.append(self._teach(number, mined))
        policy = self._config.training(number, model, None, self._root).data
        title = {"title": policy.title, "title_separator": policy.title_separator}
        read = {"data" if key == "path" else key: value for key, value in asdict(source).items() if key != "weight"}
        places = {"output_dir": self._root / folder / "data", "work_dir": self._root / "work" / described.name}
        inputs = {
            "source": open_source(source).fingerprint(),
            "title": [*title.values()],
            "model": model_fingerprint(model),
            "teachers": [model_fingerprint(name) for name in teachers],
            "options": options,
        }
        asked = {**read, **title, **options, "teacher": teachers or None, "model": model, **places}
        self._stage(folder, inputs, "scripts.mine_negatives", asked, f"data/{DATA}")
        return self._root / folder / "data"

    def _teach(self, number: int, data: Path) -> str:
        """The folder of the cross-encoder trained on mined `data`, from the first model."""
        described, model = self._config.rounds[number], self._config.first_model
        folder, options = Path(described.name, "teacher"), described.teacher or {}
        output = str(self._root / folder / "model")
        inputs = {"model": model_fingerprint(model), "data": file_fingerprint(data / DATA), "options": options}
        asked = {"data": data, "model": model, "output_dir": output, **options}
        self._stage(folder, inputs, _TRAIN_TEACHER, asked, "model/**/*")
        return output

    def _train(self, number: int, variant: int, model: str, data: Path | None) -> Path:
        """Trains `model` on `data`, or on the source if None, and evaluates it. Returns the folder of both stages."""
        described = self._config.rounds[number]
        folder = Path(described.name, *([f"variant-{variant + 1}"] if described.variants else []))
        config = self._config.training(number, model, data, self._root / folder / "train" / "run", variant)
        settings = to_dict(config)  # all that the result depends on besides the model and the data
        del settings["run"]["output_dir"], settings["model"]["name_or_path"]
        del settings["data"]["train"], settings["data"]["cache_dir"]
        source = open_source(config.data.train[0]).fingerprint()
        inputs = {"model": model_fingerprint(model), "data": source, "config": settings}
        asked = {"config": self._root / folder / "train" / "train.yaml"}
        self._stage(folder / "train", inputs, "retriever.train", asked, "run/export/**/*", to_yaml(config))
        self._evaluate(folder, self._model(folder))
        return folder

    def _evaluate(self, folder: Path, model: str) -> None:
        """Measures `model` on every split of the evaluation."""
        evaluate, folder = self._config.evaluate, folder / "evaluate"
        data = Path(evaluate.data)
        inputs = {
            "model": model_fingerprint(model),
            "data": files_fingerprint(data, [*data_files(data), *data_files(data / "qrels")]),
            "evaluate": {"command": evaluate.command, "data": evaluate.data, "options": evaluate.options},
        }
        asked = {"model": model, "data": data, "output_dir": self._root / folder / "results", **evaluate.options}
        self._stage(folder, inputs, evaluate.command, asked, "results/*.json")

    def _stage(
        self,
        folder: Path,
        inputs: Mapping[str, Any],
        module: str,
        options: Mapping[str, Any],
        outputs: str,
        settings: str | None = None,
    ) -> None:
        """Runs `module` with `options` as a stage, unless its outputs are there already. `outputs` is the pattern of
        its output files.

        `settings` is written to train.yaml first. Raises SystemExit with the status of a command that failed in this
        process, and CalledProcessError for one that was launched.
        """

        def work(folder: Path) -> list[str]:
            if settings is not None:
                write_text(folder / "train.yaml", settings)
            if self._config.launch and module != _TRAIN_TEACHER:
                subprocess.run([*self._config.launch, "-m", module, *flags(options)], check=True)
            elif status := importlib.import_module(module).main(flags(options)):
                sys.exit(status)
            return sorted(f.relative_to(folder).as_posix() for f in folder.glob(outputs) if f.is_file())

        run_stage(f"{folder.parent}: {folder.name}", self._root / folder, inputs, work, writes=_WRITES)

    def _model(self, folder: Path) -> str:
        """The export of the training in `folder`."""
        return str(self._root / folder / "train" / "run" / "export")

    def _measures(self, folder: Path) -> Measures:
        """The measures of every split that the evaluation in `folder` wrote."""
        results = sorted((self._root / folder / "evaluate" / "results").glob("*.json"))
        return {path.stem: loads(path.read_text(encoding="utf-8"))["metrics"] for path in results}


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line: {first_rank: 3} -> --first-rank 3. A list gives several words, true the flag alone,
    null and false nothing.
    """
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words
