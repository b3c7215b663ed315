"""The command that measures how often the passages found hold an answer: DPR's accuracy on Natural Questions, TriviaQA, WebQuestions.

python -m eval.answers --model runs/nq/export --data data/nq --questions data/nq/nq-test.qa.csv
accelerate launch -m eval.answers --model runs/nq/export --data data/nq --questions data/nq/nq-test.qa.csv --title join

`Success@20` is the share of questions with an answer among the 20 best passages. A passage holds an answer where the answer's words
stand in its text (not its title) in a row, capitals aside. (Karpukhin et al. 2020, arXiv:2004.04906, section 5)
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

from eval.arguments import evaluation_parser, launched_search
from eval.collections.collection import Collection, fingerprint
from eval.measures import Scores, measure_run
from eval.trec import Run
from retriever.command import option, run
from retriever.data.collection import corpus_tables, passages_of
from retriever.data.files import FileTable, kind_of, read_lines
from retriever.data.records import DataError
from retriever.errors import RefusedError

METRICS = ("Success@1", "Success@5", "Success@20", "Success@100")
_ASCII_WORD = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
_CORPORA = ("corpus.jsonl", "corpus.tsv", "psgs_w100.tsv", "collection.tsv")


@dataclass(frozen=True)
class AnsweredQuestions(Collection):
    """Questions with answers in words; a passage is relevant to a question where its text holds one of them."""

    answers: Mapping[str, Sequence[str]] = field(default_factory=dict)  # question id -> answers

    def measure(self, run: Run, metrics: Sequence[str]) -> Scores:
        """As `Collection.measure`; the texts of the passages that the run names are read once more. Raises DataError for a missing one."""
        return measure_run(self._judged(run), run, metrics)

    def fingerprints(self) -> dict[str, str]:
        """As `Collection.fingerprints`, with the answers."""
        return super().fingerprints() | {"answers": fingerprint({name: list(found) for name, found in self.answers.items()})}

    def _judged(self, run: Run) -> dict[str, dict[str, int]]:
        """Question id -> passage id -> 1 for the passages of the run that hold an answer."""
        wanted: dict[str, list[str]] = {}  # passage id -> questions
        for question in self.answers.keys() & run.keys():
            for passage_id in run[question].passage_ids:
                wanted.setdefault(passage_id, []).append(question)
        sought = {question: [_words(answer) for answer in answers] for question, answers in self.answers.items()}
        qrels: dict[str, dict[str, int]] = {question: {} for question in self.answers}
        for passage in (passage for table in self.corpus for passage in passages_of(table)):
            if questions := wanted.pop(str(passage.id), None):
                words = _words(passage.text or "")
                for question in questions:
                    if holds_answer(words, sought[question]):
                        qrels[question][str(passage.id)] = 1
        if wanted:
            raise DataError(
                f"{len(wanted):,} passages of the run are not in the corpus, first {next(iter(wanted))!r}; expected the corpus it is of"
            )
        return qrels


def holds_answer(words: Sequence[str], answers: Iterable[Sequence[str]]) -> bool:
    """Whether the words of one of the answers stand in those of a text in a row. A word is letters, digits and marks, or one other sign."""
    return any(_stands_in(answer, words) for answer in answers)


def read_answered(folder: Path, questions: Path) -> AnsweredQuestions:
    """The corpus of a folder (corpus.jsonl, or DPR's psgs_w100.tsv) and questions with their answers; a question's id is its number.

    Questions: DPR's csv (question, tab, a Python list of answers), or JSON and JSON lines with `question` and `answers` or `answer`.
    Raises DataError where a file is missing or malformed.
    """
    present = [path for name in _CORPORA for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not present:
        raise DataError(f"no passages: expected {' or '.join(_CORPORA)} (or .gz)", folder)
    found = {str(number): pair for number, pair in enumerate(_questions(questions))}
    if not found:
        raise DataError("no questions", questions)
    texts, answers = ({name: pair[part] for name, pair in found.items()} for part in (0, 1))
    return AnsweredQuestions(folder.resolve().name, questions.name.partition(".")[0], texts, {}, corpus_tables(present[0]), answers=answers)  # type: ignore[arg-type]


def _questions(path: Path) -> Iterator[tuple[str, list[str]]]:
    if not path.is_file():
        raise DataError("no such file; expected questions with answers (--questions)", path)
    if kind_of(path) in (".csv", ".tsv"):
        for number, row in enumerate(csv.reader((line for _, line in read_lines(path)), delimiter="\t"), 1):
            answers = _listed(row[1]) if len(row) == 2 else None
            if answers is None:
                raise DataError("expected a question, a tab and a list of answers such as ['Paris']", path, number)
            yield row[0], answers
        return
    for record in FileTable(path).records():
        name = "answers" if record.has("answers") else "answer"
        yield record.text("question", empty=False), list(record.texts(name))


def _listed(text: str) -> list[str] | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
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
    )
    return run(parser, arguments, _evaluate, lower="--batch")


def _evaluate(args: argparse.Namespace) -> None:
    if odd := [name for name in args.metrics or () if not name.lower().startswith(("success@", "mrr"))]:
        raise RefusedError(f"--metrics {' '.join(odd)}: passages that were not found are not judged; expected Success@k or MRR")
    with launched_search(args) as world:
        from eval.commands import report_all

        report_all(args, [(read_answered(args.data, args.questions), args.metrics or METRICS)], world)


if __name__ == "__main__":
    sys.exit(main())
