"""The evaluation commands on run files and on what no run file can hold: results side by side, BEIR's rule, errors in
one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import beir
from tests.commands import assert_refused
from tests.eval.texts import Texts, help_texts, write_beir


@pytest.fixture(scope="module")
def texts() -> Texts:
    return help_texts()


def test_runs_of_one_name_keep_results_of_their_own(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model's run of a split is called test.trec."""
    data = write_beir(tmp_path / "data", texts)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        run = tmp_path / name / "test.trec"
        run.parent.mkdir()
        run.write_text("".join(f"{query_id} Q0 x 1 1.0 {name}\n" for query_id in texts.qrels))
        beir.main(["--run", str(run), "--data", str(data)])
    assert sorted(p.name for p in (tmp_path / "evaluations").iterdir()) == ["base-test.trec", "tuned-test.trec"]


@pytest.mark.parametrize(("option", "first"), [("--exclude-self", 1.0), ("--no-exclude-self", 0.5)])
def test_a_passage_with_the_querys_id_is_left_out_of_runs(
    texts: Texts, tmp_path: Path, capsys: Any, option: str, first: float
) -> None:
    data = write_beir(tmp_path / "own", texts)
    lines = (
        f"{q} Q0 {q} 1 2.0 x\n{q} Q0 {max(grades, key=lambda p: grades[p])} 2 1.0 x\n"
        for q, grades in texts.qrels.items()
    )
    (tmp_path / "run.trec").write_text("".join(lines))
    beir.main(["--run", str(tmp_path / "run.trec"), "--data", str(data), "--output-dir", str(tmp_path / "out"), option])
    result = json.loads((tmp_path / "out" / "test.json").read_text(encoding="utf-8"))
    assert (result["metrics"]["MRR@10"], result["search"]["exclude_self"]) == (first, first == 1.0)
    assert ("queries with the passage of the same id left out" in capsys.readouterr().out) == (first == 1.0)


def test_bm25_of_passages_without_words_is_told_in_one_line(texts: Texts, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "wordless", texts)
    (data / "corpus.jsonl").write_text('{"_id": "p", "text": "!"}\n', encoding="utf-8")
    assert_refused(
        beir.main,
        ["--bm25", "--data", str(data), "--output-dir", str(tmp_path / "out")],
        "1 passages without a single word",
    )
