"""What the pages show: every block of code runs or is understood, pictures are those of their script, and figures are
those of their files.

A figure is followed by where it comes from, in a comment that no reader sees: `7,989<!-- step_peers: b=16384, bigbatch,
pairs_per_s -->` is a value of docs/bench/step_peers.json, `1.8×<!-- … / … -->` a quotient of two.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from retriever import encode
from retriever.command import Command
from retriever.config_file import load
from tests.tiny import random_texts
from tests.workplace import ROOT, metrics

PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^    ((?:python|accelerate) .*)$", re.MULTILINE)
_FIGURE = re.compile(r"([\d,.]+(?:e-\d+)?)[^\d<>]{0,8}<!-- ([a-z_0-9]+: [^>]*) -->")
_OTHER_COMMANDS = {"python -m venv .venv", ". .venv/bin/activate", ".venv/bin/pre-commit install"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    code: str

    @property
    def name(self) -> str:
        """The page's name."""
        return self.page.stem


BLOCKS = [Block(page, *found) for page in PAGES for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def _commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a shell block, and of every indented command."""
    found = []
    for page in PAGES:
        indented = _INDENTED.findall(page.read_text(encoding="utf-8"))
        shells = [block.code for block in BLOCKS if block.page == page and block.language == "bash"]
        for line in "\n".join([*shells, *indented]).replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                if words and not re.match(r"\w+=\$\(", words[0]):  # head=$(…)
                    found.append((page.stem, shlex.join(words)))
    return found


COMMANDS = _commands()


def test_the_walk_sees_the_pages() -> None:
    """Guard: known blocks are found, and each has a language that a test here knows."""
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "text", ""}
    assert {"README", "run", "embeddings"} <= {block.name for block in BLOCKS if block.language == "python"}
    assert ("README", "make demo") in COMMANDS and len(COMMANDS) > 40
    assert all(not block.code.lstrip().startswith(("python", "import")) for block in BLOCKS if block.language == "")


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_a_shown_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own parser; a training command's settings are checked as before a run."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z][A-Z_0-9]*=.*", word)]
    module, rest = _module_of(words)
    if module is None:
        assert command in _OTHER_COMMANDS or _is_make(words) or _is_pip(words), command
    elif module.partition(".")[0] in ("tests", "pytest", "venv"):
        assert importlib.util.find_spec(module), command
    else:
        main = _main_of(module)
        args = main.parser.parse_args(rest)
        if module == "retriever.train":
            load(
                "configs/my_pairs.yaml" if args.config == "run.yaml" else args.config, args.overrides
            )  # the reader's own


def _module_of(words: list[str]) -> tuple[str | None, list[str]]:
    """The module that a command starts, and its arguments."""
    installed = _project()["scripts"]
    if words[0] in installed:
        return installed[words[0]].removesuffix(":main"), words[1:]
    for at, word in enumerate(words):
        if re.fullmatch(r"retriever/\w+\.py", word):
            return word.removesuffix(".py").replace("/", "."), words[at + 1 :]
        if word == "-m" and "pip" not in words[at + 1]:
            return words[at + 1], words[at + 2 :]
    return None, words


def _main_of(module: str) -> Command:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    found = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main
    assert isinstance(found, Command)
    return found


def _is_make(words: list[str]) -> bool:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return words[0] == "make" and all(re.search(f"^{word}:", makefile, re.MULTILINE) for word in words[1:])


def _is_pip(words: list[str]) -> bool:
    """Whether it installs the project with extras that there are."""
    asked = re.fullmatch(r"\.\[([\w,-]+)\]", words[-1])
    return (
        words[:2] == ["pip", "install"]
        and asked is not None
        and {*asked[1].split(",")} <= _project()["optional-dependencies"].keys()
    )


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.name)
def test_a_shown_configuration_is_one(block: Block, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(block.code)
    given = [
        "model.name_or_path=model",
        "train.epochs=1",
        *([] if "train:" in block.code else ["data.train=[{path: data}]"]),
    ]
    load(tmp_path / "shown.yaml", [*given, *(["train.eval_every=10"] if "eval:" in block.code else [])])


# What the pages' code is run with instead: a tiny model, and batches that suit it.
_INSTEAD = {"sentence-transformers/all-MiniLM-L6-v2": "{model}", "batch.queries=8192": "batch.queries=24"}
_INSTEAD |= {"batch.queries=1024": "batch.queries=24", "which river is the longest": "river"}


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.language == "python"}), ids=lambda p: p.stem
)
def test_the_python_of_a_page_runs(
    page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block by block in one namespace, in a folder that holds what the page speaks of."""
    model = str(workplace / "model")
    monkeypatch.chdir(_folder_of_the_pages(tmp_path, workplace))
    if page.stem == "embeddings":
        _encode(tmp_path, workplace)
    names: dict[str, Any] = {"__name__": "own", **_held_objects()}
    blocks = [block for block in BLOCKS if block.page == page and block.language == "python"]
    for block in blocks:
        code = block.code
        for shown, tried in _INSTEAD.items():
            code = code.replace(shown, tried.format(model=model))
        exec(compile(code, str(page), "exec"), names)
        shutil.rmtree("runs/default", ignore_errors=True)  # the next block starts a run of its own
    _CHECKS.get(page.stem, lambda *_: None)(names, capsys.readouterr().out, blocks)


def _folder_of_the_pages(folder: Path, workplace: Path) -> Path:
    """Files by the names that pages give them: a configuration and pairs."""
    whole = "run: {trackers: []}\n" + (workplace / "run.yaml").read_text().replace("learn_temperature: true", "")
    short = whole.replace("max_steps: 20", "max_steps: 4").replace("eval_every: 10", "eval_every: 2")
    (folder / "configs").mkdir()
    (folder / "configs" / "msmarco.yaml").write_text(whole)
    (folder / "run.yaml").write_text(short)
    (folder / "data").mkdir()
    with (folder / "data" / "my_pairs.csv").open("w", newline="") as stream:
        rows = csv.DictWriter(stream, ["anchor", "positive"])
        rows.writeheader()
        rows.writerows(_records())
    return folder


def _encode(folder: Path, workplace: Path) -> None:
    """A run's model, and the shards that it has encoded."""
    shutil.copytree(workplace / "model", folder / "runs" / "mine" / "best")
    texts = ["--input", str(workplace / "data"), "--side", "passage", "--shard-rows", "64"]
    assert encode.main(["--model", str(workplace / "model"), *texts, "--output", str(folder / "shards/passages")]) == 0


def _records() -> list[dict[str, str]]:
    texts = random_texts(96, shortest=6, longest=20, seed=5)
    return [{"anchor": " ".join(text.split()[:3]), "positive": text} for text in texts]


def _held_objects() -> dict[str, Any]:
    """What docs/run.md takes for granted in its first block."""
    records = _records()
    corpus = {f"p{i}": record["positive"] for i, record in enumerate(records)}
    queries = {f"q{i}": record["anchor"] for i, record in enumerate(records[:20])}
    judgments = {name: {name.replace("q", "p")} for name in queries}
    return {"dataset": Dataset.from_list(records), "queries": queries, "corpus": corpus, "judgments": judgments}


def _check_readme(names: dict[str, Any], _: str, blocks: list[Block]) -> None:
    assert sum(bool(line.strip()) for line in blocks[0].code.splitlines()) <= 20
    assert names["run"].done == names["run"].total == 6 and names["run"].config.loss.custom == "own:margin_loss"
    assert names["model"].encode(["a text"]).shape == (1, 32)


def _check_run(_: dict[str, Any], said: str, blocks: list[Block]) -> None:
    assert blocks[-1].code.count("\n") <= 20
    lines = metrics(Path("runs/own"))
    assert [line["step"] for line in lines if "own/mean_loss" in line] == [10, 20]
    assert [line["step"] for line in lines if "eval/MRR@10" in line] == [10, 20]
    assert Path("runs/own/best/model.safetensors").exists() and Path("runs/own/checkpoints/step-00000020").is_dir()


def _check_embeddings(names: dict[str, Any], said: str, _: list[Block]) -> None:
    """The three find the same passages."""
    numpy, faiss, database = (re.findall(r"d\d+", line) for line in said.splitlines()[-3:])
    assert len(numpy) == 10 and numpy == faiss == database


_CHECKS = {"README": _check_readme, "run": _check_run, "embeddings": _check_embeddings}


def test_pictures_are_those_of_their_script() -> None:
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "docs" / "site" / "drawings.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "drawings").iterdir()}
    assert found == script.drawings(), "write them anew: python docs/site/drawings.py"


def test_figures_are_those_of_their_files() -> None:
    found = [(page.name, *marked) for page in PAGES for marked in _FIGURE.findall(page.read_text(encoding="utf-8"))]
    assert len(found) >= 10
    wrong = [
        f"{page}: {shown}, {of} is {value:.6g}"
        for page, shown, of in found
        if not _rounds_to(value := _value(of), shown)
    ]
    assert not wrong, "\n".join(wrong)


def _value(of: str) -> float:
    """The value that a comment names, or the quotient of two."""
    parts = [_measured(part.strip()) for part in of.split(" / ")]
    return parts[0] if len(parts) == 1 else parts[0] / parts[1]


def _measured(of: str) -> float:
    file, _, key = of.partition(": ")
    case, method, metric = key.rsplit(", ", 2)
    rows = json.loads((ROOT / "docs" / "bench" / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    values = [row["value"] for row in rows if (row["case"], row["method"], row["metric"]) == (case, method, metric)]
    assert len(values) == 1, f"{of}: {len(values)} such rows"
    return float(values[0])


def _rounds_to(value: float, shown: str) -> bool:
    """Whether a value, rounded to the digits shown, is what is shown."""
    mantissa, _, exponent = shown.replace(",", "").partition("e")
    places = len(mantissa.partition(".")[2])
    return round(value / 10.0 ** int(exponent or 0), places) == float(mantissa)
