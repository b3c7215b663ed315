"""The command that measures how often the passages found hold an answer: DPR's accuracy on Natural Questions, TriviaQA,
WebQuestions.

python -m eval.answers --model runs/nq/export --data data/nq --questions data/nq/nq-test.qa.csv
accelerate launch -m eval.answers --model runs/nq/export --data data/nq --questions data/nq/nq-test.qa.csv --title join

`Success@20` is the share of questions with an answer among the 20 best passages. A passage holds an answer where the
answer's words stand in its text (not its title) in a row, capitals aside. (Karpukhin et al. 2020, arXiv:2004.04906,
section 5) With --regex answers are regular expressions, as CuratedTREC's are, and a passage holds one that is found
anywhere in its text.
"""

from __future__ import annotations

import argparse
import ast
import csv
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.arguments import evaluation_parser, launched_search
from eval.collections.collection import Collection, fingerprint
from eval.measures import Scores, measure_run
from eval.trec import Run
from retriever.command import option, run
from retriever.data.collection import corpus_tables, passages_of
from retriever.data.files import FileTable, is_file, kind_of
from retriever.data.lines import read_lines
from retriever.data.records import DataError, Record
from retriever.errors import RefusedError

METRICS = ("Success@1", "Success@5", "Success@20", "Success@100")
_ASCII_WORD = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
_CORPORA = ("corpus.jsonl", "corpus.tsv", "psgs_w100.tsv", "collection.tsv")


@dataclass(frozen=True)
class AnsweredQuestions(Collection):
    """Questions with answers in words; a passage is relevant to a question where its text holds one of them."""

    answers: Mapping[str, Sequence[str]] = field(default_factory=dict)  # question id -> answers
    regex: bool = False  # they are regular expressions

    def measure(self, run: Run, metrics: Sequence[str]) -> Scores:
        """As `Collection.measure`; the texts of the passages that the run names are read once more. Raises DataError
        for a missing one.
        """
        return measure_run(self._judged(run), run, metrics)

    def fingerprints(self) -> dict[str, str]:
        """As `Collection.fingerprints`, with the answers."""
        answers = {name: list(found) for name, found in self.answers.items()}
        return super().fingerprints() | {"answers": fingerprint({"regex": answers} if self.regex else answers)}

    def _judged(self, run: Run) -> dict[str, dict[str, int]]:
        """Question id -> passage id -> 1 for the passages of the run that hold an answer."""
        wanted: dict[str, list[str]] = {}  # passage id -> questions
        for question in self.answers.keys() & run.keys():
            for passage_id in run[question].passage_ids:
                wanted.setdefault(passage_id, []).append(question)
        prepare, holds = (_pattern, holds_match) if self.regex else (_words, holds_answer)
        sought: dict[str, list[Any]] = {
            question: [prepare(answer) for answer in answers] for question, answers in self.answers.items()
        }
        qrels: dict[str, dict[str, int]] = {question: {} for question in self.answers}
        for passage in (passage for table in self.corpus for passage in passages_of(table)):
            if questions := wanted.pop(str(passage.id), None):
                text: Any = _decomposed(passage.text or "") if self.regex else _words(passage.text or "")
                for question in questions:
                    if holds(text, sought[question]):
                        qrels[question][str(passage.id)] = 1
        if wanted:
            raise DataError(
                f"{len(wanted):,} passages of the run are not in the corpus, first {next(iter(wanted))!r}; expected the corpus it is of"
            )
        return qrels


def holds_answer(words: Sequence[str], answers: Iterable[Sequence[str]]) -> bool:
    """Whether the words of one of the answers stand in those of a text in a row. A word is letters, digits and marks,
    or one other sign.
    """
    return any(_stands_in(answer, words) for answer in answers)


def holds_match(text: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    """Whether one of the patterns is found in the text, canonically decomposed as the patterns are."""
    return any(pattern.search(text) for pattern in patterns)


def read_answered(folder: Path, questions: Path, *, regex: bool = False) -> AnsweredQuestions:
    """The corpus of a folder (corpus.jsonl, or DPR's psgs_w100.tsv) and questions with their answers; a question's id
    is its number.

    Questions: DPR's csv (question, tab, a Python list of answers), or JSON and JSON lines with `question` and `answers`
    or `answer`; `regex`: answers are regular expressions. Raises DataError where a file is missing or malformed.
    """
    present = [path for name in _CORPORA for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not present:
        raise DataError(f"no passages: expected {' or '.join(_CORPORA)} (or .gz)", folder)
    found = {str(number): pair for number, pair in enumerate(_questions(questions, regex))}
    if not found:
        raise DataError("no questions", questions)
    texts = {name: text for name, (text, _) in found.items()}
    answers = {name: listed for name, (_, listed) in found.items()}
    name, split = folder.resolve().name, questions.name.partition(".")[0]
    return AnsweredQuestions(name, split, texts, {}, corpus_tables(present[0]), answers=answers, regex=regex)


def _questions(path: Path, regex: bool) -> Iterator[tuple[str, list[str]]]:
    if not is_file(path):
        raise DataError("no such file; expected questions with answers (--questions)", path)
    if kind_of(path) in (".csv", ".tsv"):
        records: Iterator[Record] = (
            Record({"question": row[0], "answers": _listed(row[1])}, str(path), line) for line, row in _rows(path)
        )
    else:
        records = FileTable(path).records()
    for record in records:
        name = "answers" if record.has("answers") else "answer"
        question, answers = record.text("question", empty=False), record.texts(name)
        if not answers:
            raise record.error(name, "a list of answers such as ['Paris']", record.values.get(name))
        for answer in answers:
            if problem := _problem(answer, regex):
                raise record.error(name, problem, answer)
        yield question, answers


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, [question, list of answers]) of DPR's csv."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in read_lines(path)), delimiter="\t")
    try:
        for row in reader:
            if len(row) != 2 or _listed(row[1]) is None:
                raise DataError(
                    "expected a question, a tab and a list of answers such as ['Paris']", path, reader.line_num
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"expected a question, a tab and a list of answers: {error}", path, reader.line_num) from error


def _problem(answer: str, regex: bool) -> str | None:
    """What is expected instead of this answer, if it is none."""
    if not answer.strip():
        return "answers that are not blank"
    if regex:
        try:
            if _pattern(answer).search("") is not None:
                return "a regular expression that is not found in every text"
        except (re.error, RecursionError, OverflowError) as error:
            return f"a regular expression (--regex): {error}"
    return None


def _pattern(answer: str) -> re.Pattern[str]:
    return re.compile(_decomposed(answer), re.IGNORECASE | re.MULTILINE)


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _listed(text: str) -> list[str] | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(answer, str) for answer in value) else None


def _words(text: str) -> list[str]:
    if text.isascii():  # the same words, ten times as fast
        return _ASCII_WORD.findall(text.lower())
    words: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM" and inside:
            words[-1] += character
        elif kind not in "ZC":
            words.append(character)
        inside = kind in "LNM"
    return [word.lower() for word in words]


def _stands_in(answer: Sequence[str], words: Sequence[str]) -> bool:
    first, n = answer[:1], len(answer)
    return n > 0 and any(words[i : i + 1] == first and words[i : i + n] == answer for i in range(len(words) - n + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m eval.answers`."""
    parser = evaluation_parser(
        "python -m eval.answers",
        "how often the passages found for a question hold an answer to it",
        "folder of the passages",
        option("--questions", required=True, type=Path, help="questions with answers: DPR's csv, JSON or JSON lines"),
        option(
            "--regex",
            action="store_true",
            help="answers are Python's regular expressions, capitals aside (CuratedTREC)",
        ),
    )
    return run(parser, arguments, _evaluate, lower="--batch")


def _evaluate(args: argparse.Namespace) -> None:
    if odd := [name for name in args.metrics or () if not name.lower().startswith(("success@", "mrr"))]:
        raise RefusedError(
            f"--metrics {' '.join(odd)}: passages that were not found are not judged; expected Success@k or MRR"
        )
    with launched_search(args) as world:
        from eval.commands import report_all

        report_all(args, [(read_answered(args.data, args.questions, regex=args.regex), args.metrics or METRICS)], world)


if __name__ == "__main__":
    sys.exit(main())
