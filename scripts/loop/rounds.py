"""The rounds of a loop: mine, train, evaluate, each a stage that is done once for the same inputs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from json import loads
from pathlib import Path
from typing import Any

from eval.collections.collection import file_fingerprint, fingerprint
from eval.report import format_table
from retriever.config import Config, to_dict, to_yaml
from retriever.data.folders import data_files
from retriever.data.formats import open_source
from retriever.files import write_json, write_text
from retriever.run_folder import RUN_FILES
from scripts.loop.config import LoopConfig, flags
from scripts.mining.mine import DATA
from scripts.stages import STAGE_FILES, Outputs, model_fingerprint, run_stage

RESULT = "result.json"
_MODEL = ("*.safetensors", "*.json", "*.model", "vocab.txt", "merges.txt", "*.jinja")  # of a cross-encoder
_WRITES = (  # what a stage leaves in its folder
    "train.yaml",
    *(f"model/{name}" for name in _MODEL),
    *(f"data/{name}" for name in (DATA, *STAGE_FILES)),
    *(f"run/{name}" for name in RUN_FILES),
    *(f"results/*{ending}" for ending in (".json", ".trec", ".msmarco.tsv")),
)
_TRAIN_TEACHER = "scripts.train_cross_encoder"  # runs alone in this process, whatever the others are launched with
Splits = dict[str, dict[str, float]]  # split -> measure -> value
Table = dict[str, dict[str, float]]  # model, and split where there are several -> measure -> value


class Loop:
    """One loop in its folder: <round>/{teacher, mine, train, evaluate}, `work` with what mining uses again,
    result.json.

    A round's variants have folders of their own for the last two: <round>/variant-1/{train, evaluate}, ...
    """

    def __init__(self, config: LoopConfig) -> None:
        self._config, self._root = config, Path(config.output_dir)

    def run(self) -> Table:
        """Runs what is not done yet; prints the measures of all models so far after each round and returns the last
        table.

        result.json holds that of the rounds done so far, and the folder of each one's evaluation.
        """
        config, model = self._config, self._config.first_model
        start = self._evaluate("start", Path("start"), model)
        table, folders, mined = _rows("start", start), {"start": "start/evaluate"}, None
        for number, described in enumerate(config.rounds):
            data = None
            if described.mine is not None:
                teacher = self._teach(number, mined) if mined is not None and described.teacher is not None else None
                data = mined = self._mine(number, model, teacher)
            model, found, folder = self._best(
                number, model if described.start == "previous" else config.first_model, data
            )
            folders[described.name] = folder.as_posix()
            table |= _rows(described.name, found)
            print(f"\n{format_table(table)}\n", flush=True)
            write_json(self._root / RESULT, {"metrics": table, "evaluations": folders})
        return table

    def _best(self, number: int, model: str, data: Path | None) -> tuple[str, Splits, Path]:
        """(export, measures, folder of its evaluation) of the variant that is best on the split to choose by; the first
        of equals.
        """
        described, evaluate = self._config.rounds[number], self._config.evaluate
        found = []
        for variant in range(max(1, len(described.variants))):
            label, folder = described.name, Path(described.name)
            if described.variants:
                label, folder = f"{label} {variant + 1}", folder / f"variant-{variant + 1}"
            export = self._train(number, variant, label, folder, model, data)
            found.append((export, self._evaluate(label, folder, export), folder / "evaluate"))
        if len(found) == 1:
            return found[0]
        measure = evaluate.options["metrics"][0]
        values = [splits[evaluate.choose][measure] for _, splits, _ in found]
        best = values.index(max(values))
        print(
            f"{described.name}: variant {best + 1} of {measure} {', '.join(f'{v:.4f}' for v in values)} on {evaluate.choose}",
            flush=True,
        )
        return found[best]

    def _teach(self, number: int, data: Path) -> Path:
        """The cross-encoder trained on mined `data`, from the first model."""
        described, model = self._config.rounds[number], self._config.first_model
        folder = Path(described.name, "teacher")
        inputs = {
            "model": model_fingerprint(model),
            "data": file_fingerprint(data / DATA),
            "options": described.teacher,
        }
        options = {
            "data": data,
            "model": model,
            "output_dir": self._root / folder / "model",
            **(described.teacher or {}),
        }
        self._stage(f"{described.name}: teacher", folder, inputs, _TRAIN_TEACHER, options, "model/**/*")
        return self._root / folder / "model"

    def _mine(self, number: int, model: str, teacher: Path | None) -> Path:
        """The folder of training data whose negatives `model` found in the source; `teacher` scores beside the teachers
        of the options.
        """
        described, source = self._config.rounds[number], self._config.source
        options = dict(described.mine or {})
        named = options.pop("teacher", None) or []
        teachers = [*([named] if isinstance(named, str) else named), *([] if teacher is None else [str(teacher)])]
        policy = self._config.training(number, model, None, self._root).data
        inputs = {
            "source": open_source(source).fingerprint(),
            "title": [policy.title, policy.title_separator],
            "model": model_fingerprint(model),
            "teachers": [model_fingerprint(name) for name in teachers],
            "options": options,
        }
        folder = Path(described.name, "mine")
        read = {
            "data": source.path,
            **{key: value for key, value in asdict(source).items() if key not in ("path", "weight")},
        }
        asked = {
            "title": policy.title,
            "title_separator": policy.title_separator,
            **options,
            "teacher": teachers or None,
        }
        places = {
            "model": model,
            "output_dir": self._root / folder / "data",
            "work_dir": self._root / "work" / described.name,
        }
        self._stage(
            f"{described.name}: mine",
            folder,
            inputs,
            "scripts.mine_negatives",
            {**read, **asked, **places},
            f"data/{DATA}",
        )
        return self._root / folder / "data"

    def _train(self, number: int, variant: int, label: str, folder: Path, model: str, data: Path | None) -> str:
        """The export of a training from `model` on `data`, or on the source."""
        folder = folder / "train"
        run, settings = self._root / folder / "run", self._root / folder / "train.yaml"
        config = self._config.training(number, model, data, run, variant)
        trained_on = open_source(config.data.train[0]).fingerprint()
        inputs = {"model": model_fingerprint(model), "data": trained_on, "config": _without_places(config)}
        begin = partial(write_text, settings, to_yaml(config))
        self._stage(
            f"{label}: train", folder, inputs, "retriever.train", {"config": settings}, "run/export/**/*", begin
        )
        return str(run / "export")

    def _evaluate(self, label: str, folder: Path, model: str) -> Splits:
        """The measures of `model` on every split that the evaluation names."""
        evaluate, folder = self._config.evaluate, folder / "evaluate"
        asked = {key: value for key, value in asdict(evaluate).items() if key != "choose"}
        inputs = {
            "model": model_fingerprint(model),
            "data": _collection_fingerprint(Path(evaluate.data)),
            "evaluate": asked,
        }
        options = {
            "model": model,
            "data": evaluate.data,
            "output_dir": self._root / folder / "results",
            **evaluate.options,
        }
        outputs = self._stage(f"{label}: evaluate", folder, inputs, evaluate.command, options, "results/*.json")
        read = {Path(file).stem: (self._root / folder / file).read_text(encoding="utf-8") for file in outputs}
        return {split: loads(text)["metrics"] for split, text in read.items()}

    def _stage(
        self,
        name: str,
        folder: Path,
        inputs: Mapping[str, Any],
        module: str,
        options: Mapping[str, Any],
        outputs: str,
        begin: Callable[[], None] = lambda: None,
    ) -> Outputs:
        """A stage that is a command: `begin`, then `module` with `options` to its end; `outputs` is the pattern of its
        output files.

        Raises SystemExit with the status of a command that failed and has said why, CalledProcessError where it was
        launched.
        """

        def work(folder: Path) -> list[str]:
            begin()
            if self._config.launch and module != _TRAIN_TEACHER:
                subprocess.run([*self._config.launch, "-m", module, *flags(options)], check=True)
            elif status := importlib.import_module(module).main(flags(options)):
                sys.exit(status)
            return sorted(f.relative_to(folder).as_posix() for f in folder.glob(outputs) if f.is_file())

        return run_stage(name, self._root / folder, inputs, work, writes=_WRITES)


def _rows(name: str, splits: Splits) -> Table:
    return {name if len(splits) == 1 else f"{name} {split}": metrics for split, metrics in splits.items()}


def _without_places(config: Config) -> dict[str, Any]:
    """All that a training's result depends on besides its model and its data."""
    tree = to_dict(config)
    del tree["run"]["output_dir"], tree["model"]["name_or_path"], tree["data"]["train"], tree["data"]["cache_dir"]
    return tree


def _collection_fingerprint(folder: Path) -> str:
    """A hash of the names and bytes of a collection's data files."""
    files = [*data_files(folder), *data_files(folder / "qrels")]
    return fingerprint([[file.relative_to(folder).as_posix(), file_fingerprint(file)] for file in files])
