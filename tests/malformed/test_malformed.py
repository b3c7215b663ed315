"""What cannot be read is refused in one line that names it, by every command: one process, many inputs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.beir import write_beir
from tests.malformed import cases, collection_cases
from tests.malformed.cases import Case
from tests.tiny import save_tiny_model

CASES = [*cases.rows(), *collection_cases.rows()]


def _mains() -> dict[str, Callable[[Sequence[str]], object]]:
    from eval import answers, beir, compare
    from retriever import encode, train
    from scripts import hold_out, mine_negatives

    modules = {
        "beir": beir,
        "answers": answers,
        "compare": compare,
        "encode": encode,
        "hold_out": hold_out,
        "mine": mine_negatives,
    }
    return {name: module.main for name, module in modules.items()} | dict.fromkeys(("train", "config"), train.main)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sound(tmp_path_factory.mktemp("sound"))


def make_sound(folder: Path) -> Path:
    """A model and data that every command accepts."""
    save_tiny_model(folder / "model")
    corpus, queries = [collection_cases.DOCUMENT, {"_id": "d2", "text": "storm"}], {"q1": "river", "q2": "storm"}
    write_beir(folder / "beir", corpus, queries, test={"q1": {"d1": 1}, "q2": {"d2": 1}})
    (folder / "good.run").write_text("q1 Q0 d1 1 1.0 t\nq2 Q0 d2 1 1.0 t\n")
    (folder / "x.jsonl").write_text(json.dumps(cases.GOOD) + "\n")
    return folder


def place(case: Case, folder: Path) -> None:
    """Writes the files of a case over those of the sound folder."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def arguments(case: Case, folder: Path) -> list[str]:
    """Those of the command, on the files of `folder`."""
    settings = [
        f"model.name_or_path={folder}/model",
        f"run.output_dir={folder}/run",
        f"data.cache_dir={folder}/cache",
        "train.max_steps=1",
    ]
    data = (
        []
        if any(option.startswith("data.train=") for option in case.options)
        else [f"data.train=[{{path: {folder}/x.jsonl}}]"]
    )
    given = [
        option.replace("{{", "{").replace("}}", "}") if "{{" in option else option
        for option in _placed(case.options, folder)
    ]
    if case.command == "train":
        return [*settings, *data, *given]
    return ["--config", f"{folder}/c.yaml", *settings] if case.command == "config" else given


def refusal(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the command ends with. Fails where it ends in another way."""
    status = _mains()[case.command](arguments(case, folder))
    said = capsys.readouterr().err
    assert status == 2, f"exit status {status}: {said}"
    (line,) = (line for line in re.split("[\r\n]", said) if line.startswith("error: "))
    return line


def _placed(options: Sequence[str], folder: Path) -> list[str]:
    return [re.sub(r"(?<!\{)\{\}(?!\})", str(folder), option) for option in options]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("ascii", "replace").decode()[:80])
def test_a_malformed_input_is_refused_in_one_line(
    case: Case, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Naming what is wrong and where."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    place(case, tmp_path)
    line = refusal(case, tmp_path, capsys)
    assert re.search(case.expected, line), line
    assert "\n" not in line and len(line) < 1000


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 300 and len(set(map(repr, CASES))) == len(CASES)
