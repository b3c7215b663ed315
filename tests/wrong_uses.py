"""Wrong uses of the commands, and the line that each prints: `python -m tests.wrong_uses` writes docs/wrong_uses.md."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from tests.workplace import ROOT, make_workplace

PAGE = ROOT / "docs" / "wrong_uses.md"


class Case(NamedTuple):
    """A wrong use: what is wrong, and the command."""

    what: str
    command: str


_TRAIN = "bigbatch-train --config run.yaml"
CASES = (
    Case("no configuration", "bigbatch-train"),
    Case("a configuration that is not there", "bigbatch-train --config missing.yaml"),
    Case("YAML that ends early", "bigbatch-train --config torn.yaml"),
    Case("an unknown setting", f"{_TRAIN} optim.learning_rate=1e-4"),
    Case("an unknown section", f"{_TRAIN} optimizer.lr=1e-4"),
    Case("a setting without its value", f"{_TRAIN} optim.lr"),
    Case("a text for a number", f"{_TRAIN} batch.queries=many"),
    Case("a number out of range", f"{_TRAIN} loss.temperature=0"),
    Case("a word that is no choice", f"{_TRAIN} optim.precision=bf32"),
    Case("two lengths of a run", f"{_TRAIN} train.epochs=2 train.max_steps=9"),
    Case("settings that do not fit", f"{_TRAIN} loss.guide_margin=0.1"),
    Case("an unknown option", f"{_TRAIN} --gpus 4"),
    Case("an unknown tracker", f"{_TRAIN} run.trackers=[tensorbord]"),
    Case("a misspelt model folder", f"{_TRAIN} model.name_or_path=./modle"),
    Case("a folder without a model", f"{_TRAIN} model.name_or_path=data"),
    Case("data that is not there", f"{_TRAIN} 'data.train=[{{path: pears.jsonl}}]'"),
    Case("a broken line of JSON", f"{_TRAIN} 'data.train=[{{path: broken.jsonl}}]'"),
    Case("a record without a passage", f"{_TRAIN} 'data.train=[{{path: lacking.jsonl}}]'"),
    Case("columns of other names", f"{_TRAIN} 'data.train=[{{path: columns.csv}}]'"),
    Case("an empty file", f"{_TRAIN} 'data.train=[{{path: empty.jsonl}}]'"),
    Case("a format that the file is not of", f"{_TRAIN} 'data.train=[{{path: pairs.csv, format: dpr}}]'"),
    Case("a query id with two texts", f"{_TRAIN} 'data.train=[{{path: twice.jsonl}}]'"),
    Case("one pair alone", f"{_TRAIN} 'data.train=[{{path: one.csv}}]'"),
    Case("scores that the data lack", f"{_TRAIN} loss.kl_weight=1"),
    Case("a prompt longer than the text", f"{_TRAIN} 'model.query_prompt={'search ' * 15}'"),
    Case("more dimensions than there are", f"{_TRAIN} 'loss.dims=[64, 32]'"),
    Case("a loss that cannot be imported", f"{_TRAIN} loss.learn_temperature=false loss.custom=losses:margin"),
    Case("an optimizer that is not there", f"{_TRAIN} optim.name=torch.optim.Adamm"),
    Case("an evaluation that is not there", f"{_TRAIN} eval.path=scifact"),
    Case("a split that is not there", f"{_TRAIN} eval.split=test"),
    Case("an unknown measure", f"{_TRAIN} 'eval.metrics=[NDCG10]'"),
    Case("a measure deeper than k", f"{_TRAIN} 'eval.metrics=[Recall@100]'"),
    Case("a file as the run's folder", f"{_TRAIN} run.output_dir=run.yaml"),
    Case("somebody else's folder", f"{_TRAIN} run.output_dir=mine"),
    Case("a checkpoint that is not there", f"{_TRAIN} run.resume=runs/a/checkpoints/step-00000004"),
    Case("an export as a checkpoint", f"{_TRAIN} run.resume=model"),
    Case("texts that are not there", "bigbatch-encode --model model --input corpus.tsv --side passage --output out"),
    Case("a side that is none", "bigbatch-encode --model model --input data --side document --output out"),
    Case("an evaluation without a model", "bigbatch-eval-beir --data data --output-dir out"),
    Case("a batch of no tokens", "bigbatch-eval-beir --model model --data data --split dev --batch 0 --output-dir out"),
    Case("a folder that is no collection", "bigbatch-eval-beir --model model --data mine --output-dir out"),
    Case("folders without embeddings", "bigbatch-eval-search --queries data --passages data --output run.trec"),
    Case("a run of other queries", "bigbatch-eval-compare a.trec other.trec --data data --split dev"),
    Case("a run file that is none", "bigbatch-eval-compare a.trec run.yaml --data data --split dev"),
    Case("MS MARCO without its files", "bigbatch-eval-msmarco --model model --data data --output-dir out"),
    Case("an unknown retriever", "bigbatch-mine --data data --retrievers bm52 --output-dir out"),
    Case("the mean of one model", "bigbatch-merge model --output merged"),
    Case("models that were not exported", "bigbatch-merge model model --output merged"),
    Case("a folder without a run", "bigbatch-report data"),
)


def make_place(folder: Path) -> None:
    """What the commands are given."""
    make_workplace(folder)
    made = (folder / "run.yaml").read_text(encoding="utf-8").replace(f"{folder}/", "")
    pair = {
        "query_id": "q",
        "query": "which river",
        "positive_passages": [{"docid": "d", "title": "", "text": "a river"}],
    }
    files = {
        "run.yaml": f"{made}run: {{output_dir: runs/a, trackers: []}}\n",
        "torn.yaml": "model: {name_or_path: model",
        "broken.jsonl": '{"anchor": "a", "positive": "b"}\n{"anchor": "a", "positive": \n',
        "lacking.jsonl": '{"anchor": "a", "positive": "b"}\n{"anchor": "a"}\n',
        "columns.csv": "frage,antwort\na,b\n",
        "pairs.csv": "anchor,positive\na river,the long river\na city,the old city\n",
        "one.csv": "anchor,positive\na river,the long river\n",
        "empty.jsonl": "",
        "twice.jsonl": "".join(json.dumps(pair | {"query": text}) + "\n" for text in ("which river", "which city")),
        "mine/config.yaml": "a file of mine\n",
        "a.trec": "q120 Q0 d120 1 2.0 a\n",
        "other.trec": "x1 Q0 d120 1 2.0 a\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def entry_points() -> dict[str, str]:
    """The module of each console command."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: entry.partition(":")[0] for name, entry in project["scripts"].items()}


def said(command: str, folder: Path) -> tuple[int, str]:
    """Exit status and standard error of a command in `folder`, in this process."""
    name, *words = shlex.split(command)
    before = sys.argv
    with chdir(folder), redirect_stderr(io.StringIO()) as told, redirect_stdout(io.StringIO()):
        sys.argv = [name]
        try:
            status = importlib.import_module(entry_points()[name]).main(words)
        finally:
            sys.argv = before
    return status, told.getvalue().strip()


def row(case: Case, folder: Path) -> str:
    """The page's row of a case, from what its command prints now."""
    status, line = said(case.command, folder)
    if not status:
        raise RuntimeError(f"expected a refusal of {case.command}")
    shown = re.sub(r"\s+", " ", line).replace("|", "\\|").replace(str(folder), "…")
    command = case.command.replace("search " * 5, "search ").replace("|", "\\|")
    return f"| {case.what} | `{command}` | {status} | `{shown}` |\n"


def page(folder: Path) -> str:
    """The page."""
    rows = [row(case, folder) for case in CASES]
    return f"""# Wrong uses

What a command prints where it cannot do what it was asked for, and its exit status: 2 for whatever it refuses. Each
line names what was received, what is expected, and where to change it. `--debug` adds the traceback.

| | command | status | line |
|---|---|---|---|
{"".join(rows)}"""


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="wrong-") as folder:
        make_place(Path(folder))
        PAGE.write_text(page(Path(folder)), encoding="utf-8")
