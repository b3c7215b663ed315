"""Answer accuracy: what holds an answer, the files it reads, and the command's figures counted by hand."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.answers import _words, answer_pattern, main, read_answered, searchable
from retriever.data.records import DataError
from tests.commands import assert_refused


@pytest.mark.parametrize(
    ("text", "answer", "holds"),
    [
        ("The tower stands in Paris, France.", "paris", True),
        ("The tower stands in Paris, France.", "Paris , france", True),
        ("Comparison of towers", "paris", False),
        ("Beyoncé sang", "Beyonce\u0301", True),
        ("Beyoncé sang", "Beyonce", False),
        ("New  York\tCity", "york city", True),
        ("New City York", "York City", False),
        ("in 1995", "1995", True),
        ("a state-of-the-art thing", "state of", False),
        ("anything", "", False),
        ("", "word", False),
    ],
)
def test_an_answers_words_stand_in_a_row(text: str, answer: str, holds: bool) -> None:
    assert (answer_pattern(answer, False).search(searchable(text, False)) is not None) == holds


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=30))
def test_ascii_is_cut_into_the_same_words(text: str) -> None:
    """The fast way for ASCII and the slow one agree: a letter beyond ASCII takes the slow one."""
    assert [*_words(text), "é"[:0] + unicodedata.normalize("NFD", "é")] == _words(f"{text} é")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four passages, three questions in DPR's csv, and a run."""
    rows = [
        "id\ttext\ttitle",
        "1\tIt is Paris.\tTowers",
        "2\tNothing here\tParis",
        "3\tRome, or Roma\tCities",
        "4\tmore of nothing\tx",
    ]
    (tmp_path / "psgs_w100.tsv").write_text("\n".join(rows) + "\n")
    questions = [("where is it", ["Paris"]), ("and the other", ["Milan", "roma"]), ("what else", ["nobody knows"])]
    (tmp_path / "nq-test.qa.csv").write_text("".join(f'{q}\t"{answers!r}"\n' for q, answers in questions))
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"question": q, "answers": a}) + "\n" for q, a in questions)
    )
    run = [("0", "2", 3), ("0", "4", 2), ("0", "1", 1), ("1", "3", 2), ("1", "1", 1), ("2", "4", 1)]
    (tmp_path / "run.trec").write_text("".join(f"{q} Q0 {p} 1 {score} t\n" for q, p, score in run))
    return tmp_path


@pytest.mark.parametrize("questions", ["nq-test.qa.csv", "test.jsonl"])
def test_the_share_of_questions_with_an_answer_among_the_best(folder: Path, questions: str) -> None:
    """The title does not count: passage 2, first for question 0, names Paris in its title alone."""
    arguments = ["--run", str(folder / "run.trec"), "--data", str(folder), "--questions", str(folder / questions)]
    main([*arguments, "--metrics", "Success@1", "Success@3", "MRR@10", "--output-dir", str(folder / "out")])
    found = json.loads(next((folder / "out").glob("*.json")).read_text())
    assert found["metrics"] == pytest.approx({"Success@1": 1 / 3, "Success@3": 2 / 3, "MRR@10": (1 / 3 + 1) / 3})
    assert found["data"]["queries"] == 3 and found["fingerprints"].keys() >= {"answers", "corpus", "queries"}


def test_bm25_goes_all_the_way(folder: Path) -> None:
    (folder / "own.jsonl").write_text(json.dumps({"question": "rome", "answer": ["Roma"]}) + "\n")
    main(
        [
            "--bm25",
            "--data",
            str(folder),
            "--questions",
            str(folder / "own.jsonl"),
            "--output-dir",
            str(folder / "bm25"),
        ]
    )
    assert json.loads((folder / "bm25" / "own.json").read_text())["metrics"] == {
        f"Success@{k}": 1.0 for k in (1, 5, 20, 100)
    }


def test_answers_as_regular_expressions(folder: Path) -> None:
    """As CuratedTREC's: a pattern is searched for in the text, capitals aside, lines by themselves, accents composed or
    not.
    """
    (folder / "psgs_w100.tsv").write_text("id\ttext\ttitle\n1\ton FEB. 2nd\tx\n2\tFebruary\tx\n3\tCafe\u0301 Ole\tx\n")
    questions = [("when", [r"Feb(?:ruary)?\.? 2", r"\d{9}"]), ("where", ["^caf\u00e9 ol.$"]), ("why", [r"^ebr"])]
    (folder / "trec.csv").write_text("".join(f'{q}\t"{answers!r}"\n' for q, answers in questions))
    (folder / "r.trec").write_text(
        "".join(f"{q} Q0 {p} 1 {s} t\n" for q in range(3) for p, s in ((1, 3), (2, 2), (3, 1)))
    )
    for flags, expected in ((["--regex"], [1 / 3, 2 / 3]), ([], [0, 0])):
        out = folder / f"out{len(flags)}"
        arguments = [
            "--run",
            str(folder / "r.trec"),
            "--data",
            str(folder),
            "--questions",
            str(folder / "trec.csv"),
            *flags,
        ]
        main([*arguments, "--metrics", "Success@1", "Success@3", "--output-dir", str(out)])
        assert list(json.loads((out / "trec.json").read_text())["metrics"].values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "regex", "message"),
    [
        ("['a', ' ']", False, r"line 2: field 'answers': expected answers that are not blank, received ' '"),
        ("['a*']", True, "line 2: field 'answers': expected a regular expression that is not found in every text"),
        ("{[]: 1}", False, "line 2: expected a question, a tab and a list of answers"),
    ],
)
def test_answers_that_are_none_are_refused(folder: Path, answers: str, regex: bool, message: str) -> None:
    (folder / "bad.csv").write_text(f"a question\t['x']\nanother\t{answers}\n")
    with pytest.raises(DataError, match=rf"bad\.csv, {message}"):
        read_answered(folder, folder / "bad.csv", regex=regex)


def test_what_is_wrong_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_answered(folder, folder / "none.csv")
    (folder / "other.trec").write_text("0 Q0 99 1 1.0 t\n")
    arguments = ["--data", str(folder), "--questions", str(folder / "test.jsonl")]
    assert_refused(
        main,
        [*arguments, "--run", str(folder / "other.trec")],
        "1 passages of the run are not in the corpus, first '99'",
    )
    assert_refused(main, [*arguments, "--bm25", "--metrics", "Recall@20"], "expected Success@k or MRR")
