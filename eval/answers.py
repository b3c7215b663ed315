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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.arguments import evaluation_command, launched_search
from eval.collections.collection import Collection, fingerprint
from eval.measures import Scores, measure_run
from eval.trec import Run
from retriever.command import option
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
        wanted = defaultdict[str, list[str]](list)  # passage id -> questions
        for question in self.answers.keys() & run.keys():
            for passage_id in run[question].passage_ids:
                wanted[passage_id].append(question)
        patterns = {
            question: [answer_pattern(answer, self.regex) for answer in answers]
            for question, answers in self.answers.items()
        }
        qrels: dict[str, dict[str, int]] = {question: {} for question in self.answers}
        for passage in (passage for table in self.corpus for passage in passages_of(table)):
            if questions := wanted.pop(str(passage.id), None):
                text = searchable(passage.text or "", self.regex)
                for question in questions:
                    if any(pattern.search(text) for pattern in patterns[question]):
                        qrels[question][str(passage.id)] = 1
        if wanted:
            raise DataError(
                f"{len(wanted):,} passages of the run are not in the corpus, first {next(iter(wanted))!r}; "
                "expected the corpus of the run (--data)"
            )
        return qrels


def answer_pattern(answer: str, regex: bool) -> re.Pattern[str]:
    """The pattern to search in a `searchable` text: a regular expression, or the answer's words in a row."""
    if regex:
        return re.compile(searchable(answer, regex), re.IGNORECASE | re.MULTILINE)
    return re.compile(re.escape(searchable(answer, regex)))


def searchable(text: str, regex: bool) -> str:
    """The text, canonically decomposed; without `regex` its words in small letters, a blank before and behind each.

    A word is letters, digits and marks, or one other sign.
    """
    return unicodedata.normalize("NFD", text) if regex else f" {' '.join(_words(text))} "


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
    records = _rows(path) if kind_of(path) in (".csv", ".tsv") else FileTable(path).records()
    for record in records:
        name = "answers" if record.has("answers") else "answer"
        question, answers = record.text("question", empty=False), record.texts(name)
        if not answers:
            raise record.error(name, "a list of answers such as ['Paris']", record.values.get(name))
        for answer in answers:
            if problem := _problem(answer, regex):
                raise record.error(name, problem, answer)
        yield question, answers


def _rows(path: Path) -> Iterator[Record]:
    """The questions and lists of answers of DPR's csv."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in read_lines(path)), delimiter="\t")
    expected = "expected a question, a tab and a list of answers such as ['Paris']"
    try:
        for row in reader:
            if len(row) != 2 or (answers := _listed(row[1])) is None:
                raise DataError(expected, path, reader.line_num)
            yield Record({"question": row[0], "answers": answers}, str(path), reader.line_num)
    except csv.Error as error:
        raise DataError(f"{expected}: {error}", path, reader.line_num) from error


def _problem(answer: str, regex: bool) -> str | None:
    """The complaint about an answer that cannot be used; None if it can."""
    if not answer.strip():
        return "answers that are not blank"
    if regex:
        try:
            if answer_pattern(answer, regex).search("") is not None:
                return "a regular expression that is not found in every text"
        except (re.error, RecursionError, OverflowError) as error:
            return f"a regular expression (--regex): {error}"
    return None


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


@evaluation_command(
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
def main(args: argparse.Namespace) -> None:
    """The command `python -m eval.answers`."""
    if odd := [name for name in args.metrics or () if not name.lower().startswith(("success@", "mrr"))]:
        raise RefusedError(
            f"--metrics {' '.join(odd)}: passages that were not found are not judged; expected Success@k or MRR"
        )
    with launched_search(args) as world:
        from eval.commands import report_all

        report_all(args, [(read_answered(args.data, args.questions, regex=args.regex), args.metrics or METRICS)], world)


if __name__ == "__main__":
    sys.exit(main())
