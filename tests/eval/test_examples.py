"""Queries won and lost: those whose first relevant passage moved most, with the texts that are shown."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eval.collections.collection import Collection
from eval.evaluate import EvalResult
from eval.examples import Examples, first_relevant
from eval.measures import measure_run
from eval.trec import ranking

_QRELS = {f"q{i}": {f"p{i}": 1} for i in range(30)} | {"none": {"p1": 0}}


class _Corpus(Collection):
    def passages(self, title: Any, separator: str) -> Any:
        return ((f"p{i}", f"text{separator}{i}" * 90) for i in range(40))


def _result(rank: dict[str, int]) -> EvalResult:
    """Each query's passage at a rank of ten; 0: not found."""
    run = {}
    for i, query in enumerate(_QRELS):
        others = [f"p{(i + k) % 40}" for k in range(1, 10)]
        at = rank.get(query, 1)
        ids = [*others[: at - 1], f"p{i}", *others[at - 1 :]] if at else others
        run[query] = ranking(ids, range(len(ids), 0, -1))
    collection = _Corpus("fiqa", "dev", {query: f"text of {query}" for query in _QRELS}, _QRELS, ())
    return EvalResult(collection, measure_run(_QRELS, run, ["MRR@10"]), run, 40)


def test_those_that_moved_most_are_kept_with_their_passages(tmp_path: Path) -> None:
    file = tmp_path / "examples.json"
    examples = Examples(file, "join", " ")
    assert first_relevant(_result({"q3": 0, "q4": 7})) | {"none": None} == (
        dict.fromkeys(_QRELS, 1) | {"q3": None, "q4": 7, "none": None}
    )
    examples.add(0, _result({f"q{i}": i for i in range(2, 10)} | {"q11": 0}))
    assert "won" not in json.loads(file.read_text())
    examples.add(4, _result({"q5": 2, "q20": 3, "q21": 0}))
    found = json.loads(file.read_text())
    assert (found["collection"], found["before"], found["after"]) == ("fiqa", 0, 4)
    won = [(query["query"], query["before"], query["after"]) for query in found["won"]]
    assert won[0] == ("text of q11", None, 1) and won[1] == ("text of q9", 9, 1)
    assert won[-1] == ("text of q5", 5, 2) and len(won) == 9, "one stayed where it was, the others won"
    lost = [(query["query"], query["before"], query["after"], query["first"][:7]) for query in found["lost"]]
    assert lost == [("text of q21", 1, None, "text 22"), ("text of q20", 1, 3, "text 21")]
    assert found["won"][0]["relevant"] == found["won"][0]["first"] == ("text 11" * 90)[:400]
    assert found["lost"][1]["relevant"].startswith("text 20")


def test_an_evaluation_that_is_done_again_becomes_the_first(tmp_path: Path) -> None:
    """As where the run began anew, or of another collection; the corpus of a large one is not read."""
    examples = Examples(tmp_path / "examples.json", "join", " ")
    for step in (4, 2, 2):
        examples.add(step, _result({}))
        assert json.loads((tmp_path / "examples.json").read_text())["before"] == step
    large: Any = SimpleNamespace(**{**vars(_result({"q1": 2})), "n_passages": 2_000_000})
    examples.add(6, large)
    (lost,) = json.loads((tmp_path / "examples.json").read_text())["lost"]
    assert (lost["relevant"], lost["first"]) == ("p1", "p2")
