"""Malformed collections, runs, questions and embeddings, as `cases` has training data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.malformed.cases import DEEP, DIGITS, Case, File, lines

DOCUMENT: dict[str, Any] = {"_id": "d1", "title": "", "text": "a river"}
QUERY: dict[str, Any] = {"_id": "q1", "text": "river"}
EVAL = ("--bm25", "--data", "{}/beir", "--output-dir", "{}/out")
ENCODE = ("--model", "{}/model", "--input", "{}/c.jsonl", "--side", "passage", "--output", "{}/shards")
MINE = ("--data", "{}/x.jsonl", "--retrievers", "bm25", "--output-dir", "{}/mined")
DIVIDE = ("--data", "{}/beir", "--output", "{}/new", "--split", "test", "--queries", "1")
BOTH = {"beir": EVAL, "train": ("data.train=[{{path: {}/beir, split: test}}]",)}
HEADER = "query-id\tcorpus-id\tscore\n"


def of_both(name: str, expected: str, files: Mapping[str, File], *, evaluated: str = "") -> Iterator[Case]:
    """Training and evaluation on the folder; `evaluated`: what an evaluation says, where it differs."""
    placed = {f"beir/{file}": content for file, content in files.items()}
    for command, options in BOTH.items():
        yield Case(
            f"{command}: {name}", command, evaluated if evaluated and command == "beir" else expected, placed, options
        )


def evaluated(name: str, expected: str, files: Mapping[str, File], *options: str) -> Case:
    """Evaluation alone."""
    return Case(
        f"beir: {name}",
        "beir",
        expected,
        {f"beir/{file}": content for file, content in files.items()},
        (*EVAL, *options),
    )


def judgments() -> Iterator[Case]:
    """qrels/test.tsv."""
    number = r"test\.tsv, line 2: field 'score': expected a whole number of at most 9 digits, received"
    for grade in ("1_0", "1.5", "one", "", "9" * 10, DIGITS, "\u0661", "0x1", "1e1"):
        yield from of_both(f"grade {grade[:12]!r}", number, {"qrels/test.tsv": f"{HEADER}q1\td1\t{grade}\n"})
    for name, text in {"empty": "", "blank lines": "\n \n", "a header alone": HEADER}.items():
        yield from of_both(f"qrels {name}", r"test\.tsv: expected judgments .*found none", {"qrels/test.tsv": text})
    other = {
        "too few columns": ("q1\td1\n", r"test\.tsv, line 1: expected 'qid 0 pid grade' or 'qid pid grade'"),
        "too many columns": ("q1 0 d1 1 x\n", r"test\.tsv, line 1: expected 'qid 0 pid grade'"),
        "fewer columns than the header": (
            f"{HEADER}q1\td1\n",
            r"test\.tsv, line 2: expected 3 columns as in the header",
        ),
        "an empty query id": (f"{HEADER}\td1\t1\n", r"test\.tsv, line 2: field 'query-id': expected an id"),
        "an empty passage id": (f"{HEADER}q1\t\t1\n", r"test\.tsv, line 2: field 'corpus-id': expected an id"),
        "two grades": (
            f"{HEADER}q1\td1\t1\nq1\td1\t2\n",
            r"test\.tsv, line 3: query 'q1', passage 'd1': grade 2, but 1 before",
        ),
    }
    for name, (text, expected) in other.items():
        yield from of_both(name, expected, {"qrels/test.tsv": text})
    unknown = r"test\.tsv: query id 'q9' is not among the 2 queries that have a text"
    missing = r"queries\.jsonl: 1 of 2 judged queries without a text, first 'q9'"
    yield from of_both(
        "an unknown query", unknown, {"qrels/test.tsv": f"{HEADER}q1\td1\t1\nq9\td1\t1\n"}, evaluated=missing
    )
    swapped = "corpus-id\tquery-id\tscore\nq1\td1\t1\n"
    yield from of_both(
        "swapped columns",
        "query id 'd1' is not among",
        {"qrels/test.tsv": swapped},
        evaluated="without a text, first 'd1'",
    )
    zeros = r"test\.tsv: field 'score': expected a grade above 0 on some line"
    none = r"none of its queries \(1\) has a positive passage"
    for grade in ("0", "-1"):
        yield from of_both(
            f"grades of {grade}", none, {"qrels/test.tsv": f"{HEADER}q1\td1\t{grade}\n"}, evaluated=zeros
        )
    yield evaluated("no split", r"beir: expected one file qrels/dev\.tsv", {}, "--split", "dev")
    yield evaluated(
        "json",
        r"test\.jsonl, line 1: field 'score': expected a whole number",
        {"qrels/test.jsonl": lines({"query-id": 1, "corpus-id": 2, "score": 10**30})},
        "--qrels",
        "{}/beir/qrels/test.jsonl",
    )


def texts() -> Iterator[Case]:
    """corpus.jsonl and queries.jsonl."""
    wrong: dict[str, tuple[object, str]] = {
        "null": (None, "expected text, received None"),
        "a number": (5, "expected text, received 5"),
        "half a character": ("\ud800", "expected Unicode text without the lone surrogate"),
    }
    for name, (text, message) in wrong.items():
        corpus = {"corpus.jsonl": lines(DOCUMENT | {"text": text})}
        yield from of_both(f"passage {name}", rf"corpus\.jsonl, line 1: field 'text': {message}", corpus)
        yield from of_both(
            f"query {name}",
            rf"queries\.jsonl, line 1: field 'text': {message}",
            {"queries.jsonl": lines(QUERY | {"text": text})},
        )
    for name, text in (("empty", ""), ("blank", " \u3000")):
        blank = r"queries\.jsonl, line 1: field 'text': expected text that is not blank"
        untrained = "query id 'q1' is not among the 0 queries that have a text"
        yield from of_both(
            f"query {name}", untrained, {"queries.jsonl": lines(QUERY | {"text": text})}, evaluated=blank
        )
    ids: dict[str, Any] = {"null": None, "empty": "", "a list": [1], "a fraction": 1.5}
    for name, value in ids.items():
        expected = r"\.jsonl, line 1: field '_id': expected an id \(text or a whole number\)"
        yield from of_both(f"passage id {name}", expected, {"corpus.jsonl": lines(DOCUMENT | {"_id": value})})
        yield from of_both(f"query id {name}", expected, {"queries.jsonl": lines(QUERY | {"_id": value})})
    without = {"title": "x"}
    yield from of_both(
        "a passage without fields",
        r"corpus\.jsonl, line 1: field '_id' is missing: expected '_id' or",
        {"corpus.jsonl": lines(without)},
    )
    yield from of_both(
        "a title of a number",
        r"corpus\.jsonl, line 1: field 'title': expected text",
        {"corpus.jsonl": lines(DOCUMENT | {"title": 5})},
    )
    yield from of_both(
        "no corpus",
        "expected a corpus file|expected passages, found none|2 passage ids are not in",
        {"corpus.jsonl": ""},
    )
    yield from of_both(
        "broken corpus", r"corpus\.jsonl, line 2: expected one JSON object", {"corpus.jsonl": lines(DOCUMENT) + "{"}
    )
    yield from of_both("a deep corpus", r"corpus\.jsonl, line 1: .*nested too deeply", {"corpus.jsonl": DEEP})
    yield from of_both(
        "a corpus of digits", r"corpus\.jsonl, line 1: .*too many digits", {"corpus.jsonl": '{"_id": ' + DIGITS + "}"}
    )
    twice = lines(DOCUMENT, DOCUMENT | {"text": "another"})
    yield from of_both(
        "a passage of two texts", "passage id 'd1' stands for two texts in the corpus", {"corpus.jsonl": twice},
        evaluated=r"corpus\.jsonl, line 2: field '_id': expected an id once; line 1 has it, with another text",
    )  # fmt: skip
    queries = lines(QUERY, QUERY | {"text": "another"})
    yield from of_both(
        "a query of two texts",
        r"queries\.jsonl, line 2: query id 'q1' stands for two texts",
        {"queries.jsonl": queries},
    )
    repeated = r"corpus\.jsonl, line 2: field '_id': expected an id once; line 1 has it, received 'd1'"
    yield evaluated("a passage twice", repeated, {"corpus.jsonl": lines(DOCUMENT, DOCUMENT)})
    spaced = r"corpus\.jsonl, line 2: field '_id': expected an id without white space"
    yield evaluated("a passage id with a blank", spaced, {"corpus.jsonl": lines(DOCUMENT, DOCUMENT | {"_id": "d 2"})})
    asked = {"queries.jsonl": lines(QUERY | {"_id": "q 1"}), "qrels/test.tsv": f"{HEADER}q 1\td1\t1\n"}
    yield evaluated(
        "a query id with a blank", r"queries\.jsonl, line 1: field '_id': expected an id without white space", asked
    )
    yield evaluated("no passages", r"corpus\.jsonl: expected passages, found none", {"corpus.jsonl": "\n"})


def evaluated_while_training() -> Iterator[Case]:
    """An evaluation that would fail is refused before step 1."""
    wrong: dict[str, tuple[dict[str, File], str]] = {
        "a passage twice": (
            {"corpus.jsonl": lines(DOCUMENT, DOCUMENT)},
            r"corpus\.jsonl, line 2: field '_id': expected an id once",
        ),
        "a blank query": (
            {"queries.jsonl": lines(QUERY | {"text": " "})},
            r"queries\.jsonl, line 1: field 'text': expected text that is not",
        ),
        "grades of 0": (
            {"qrels/test.tsv": f"{HEADER}q1\td1\t0\n"},
            r"test\.tsv: field 'score': expected a grade above 0",
        ),
    }
    for name, (files, expected) in wrong.items():
        placed = {f"beir/{file}": content for file, content in files.items()}
        yield Case(f"train, eval: {name}", "train", expected, placed, ("eval={{path: {}/beir, split: test}}",))


def runs() -> Iterator[Case]:
    """Run files, measured and compared."""
    wrong = {
        "empty": ("", "no lines; expected a run"),
        "five fields": ("q1 Q0 d1 1 0.5\n", "line 1: 5 fields; expected 6"),
        "score text": ("q1 Q0 d1 1 high t\n", "line 1: score 'high'; expected a finite number"),
        "score nan": ("q1 Q0 d1 1 nan t\n", "line 1: score 'nan'; expected a finite number"),
        "score infinite": ("q1 Q0 d1 1 inf t\n", "line 1: score 'inf'; expected a finite number"),
        "score 1_0": ("q1 Q0 d1 1 1_0 t\n", "line 1: score '1_0'; expected a finite number"),
        "passage twice": ("q1 Q0 d1 1 2 t\nq1 Q0 d1 2 1 t\n", "line 2: passage 'd1' of query 'q1' stands twice"),
        "rank 0": ("q1\td1\t0\n", "line 1: rank '0'; expected a whole number from 1 on"),
        "rank digits": (
            f"q1\td1\t{DIGITS}\n",
            "line 1: rank '9+\\.\\.\\.; expected a whole number from 1 on, of at most 9 digits",
        ),
        "rank left out": ("q1\td1\t2\n", "query 'q1' has no rank 1 but a later one"),
        "rank twice": ("q1\td1\t1\nq1\td2\t1\n", "line 2: rank 1 of query 'q1' stands twice"),
    }
    for name, (text, expected) in wrong.items():
        options = ("--run", "{}/x.run", "--data", "{}/beir", "--output-dir", "{}/out")
        yield Case(f"beir --run: {name}", "beir", rf"x\.run[,:].*{expected}", {"x.run": text}, options)
        compared = ("{}/good.run", "{}/x.run", "--data", "{}/beir")
        yield Case(f"compare: {name}", "compare", rf"x\.run[,:].*{expected}", {"x.run": text}, compared)
    yield Case(
        "beir --run: no UTF-8",
        "beir",
        r"x\.run, line 1: expected UTF-8",
        {"x.run": b"\xff"},
        ("--run", "{}/x.run", "--data", "{}/beir"),
    )
    yield Case("beir --run: absent", "beir", r"x\.run: no such file", {}, ("--run", "{}/x.run", "--data", "{}/beir"))


def questions() -> Iterator[Case]:
    """Questions with answers."""
    listed = r"line 1: expected a question, a tab and a list of answers such as \['Paris'\]"
    rows = {
        "no list": ("who\tParis\n", listed),
        "an empty list": ("who\t[]\n", listed),
        "no tab": ("who\n", listed),
        "numbers": ("who\t[1]\n", listed),
        "deep": ("who\t" + DEEP + "\n", listed),
        "minus signs": ("who\t" + "-" * 200_000 + "1\n", listed),
        "a blank answer": ("who\t['']\n", "line 1: field 'answers': expected answers that are not blank"),
        "a blank question": (" \t['a']\n", "line 1: field 'question': expected text that is not blank"),
        "nothing": ("", "no questions"),
    }
    options = ("--bm25", "--data", "{}/beir", "--questions", "{}/q.csv", "--output-dir", "{}/out")
    for name, (text, expected) in rows.items():
        yield Case(f"answers: {name}", "answers", rf"q\.csv[,:].*{expected}", {"q.csv": text}, options)
    regex = r"q\.csv, line 1: field 'answers': expected a regular expression \(--regex\): missing \)"
    yield Case("answers: no expression", "answers", regex, {"q.csv": "who\t['(']\n"}, (*options, "--regex"))
    for name, record in {
        "no answers": {"question": "who"},
        "an empty list": {"question": "who", "answers": []},
    }.items():
        expected = r"q\.jsonl, line 1: field 'answer\w*': expected a list of answers"
        yield Case(
            f"answers, json: {name}", "answers", expected, {"q.jsonl": json.dumps(record)}, (*options[:4], "{}/q.jsonl")
        )


def other_commands() -> Iterator[Case]:
    """The same files as read by encoding, mining and dividing."""
    once = r"c\.jsonl: field 'id': expected an id once, received 'd1' again"
    yield Case("encode: an id twice", "encode", once, {"c.jsonl": lines(DOCUMENT, DOCUMENT)}, ENCODE)
    yield Case(
        "encode: null",
        "encode",
        r"c\.jsonl, line 1: field 'text'",
        {"c.jsonl": lines(DOCUMENT | {"text": None})},
        ENCODE,
    )
    yield Case("encode: nothing", "encode", r"c\.jsonl: no passage in it", {"c.jsonl": ""}, ENCODE)
    yield Case("encode: no file", "encode", r"c\.jsonl: no such file", {}, ENCODE)
    for name, text in {"key twice": '{"query": "a", "query": "b", "pos": ["c"]}', "deep": DEEP, "null": "null"}.items():
        yield Case(f"mine: {name}", "mine", r"x\.jsonl, line 1: ", {"x.jsonl": text}, MINE)
    yield Case(
        "mine: blank positives",
        "mine",
        r"none of its queries \(1\) has a positive",
        {"x.jsonl": lines({"query": "a", "pos": [" "]})},
        MINE,
    )
    for name, text in {"grade": f"{HEADER}q1\td1\t1_0\n", "nothing": HEADER}.items():
        yield Case(f"hold_out: {name}", "hold_out", r"test\.tsv", {"beir/qrels/test.tsv": text}, DIVIDE)


def numbers() -> Iterator[Case]:
    """Options that are no number that the command can use."""
    whole, above = "expected a whole number of at least 1; received", "expected a number above 0; received"
    wrong = {
        "beir": (
            EVAL,
            {
                "--k": whole,
                "--max-tokens": whole,
                "--batch": whole,
                "--threads": whole,
                "--memory-gib": above,
                "--relevance": whole,
            },
        ),
        "mine": (MINE, {"--limit": whole, "--negatives": whole, "--judged": whole, "--percentage": above}),
        "hold_out": (DIVIDE, {"--queries": whole}),
        "encode": (ENCODE, {"--max-tokens": whole, "--tokens-per-chunk": whole, "--shard-rows": whole}),
    }
    for command, (options, names) in wrong.items():
        for name, message in names.items():
            for value in ("-2", "0", "nan", "1_0") if message == whole else ("-2", "0", "nan", "inf"):
                yield Case(
                    f"{command} {name} {value}",
                    command,
                    f"argument {name}: {message} '{value}'",
                    {},
                    (*options, f"{name}={value}"),
                )
    runs = ("{}/good.run", "{}/x.run", "--data", "{}/beir")
    for option, message in {
        "--permutations=1e30": "expected a whole number of at least 1; received '1e30'",
        f"--permutations={10**30}": "expected a whole number of at most 10000000; received",
        "--permutations=0": "expected a whole number of at least 1; received '0'",
        "--seed=-1": "expected a whole number of at least 0; received '-1'",
        f"--seed={2**63}": f"expected a whole number of at most {2**63 - 1}",
        "--moved=-1": "expected a whole number of at least 0; received '-1'",
    }.items():
        yield Case(
            f"compare {option[:30]}", "compare", f"argument {option.partition('=')[0]}: {message}", {}, (*runs, option)
        )
    for value in ("-1", "inf", "nan"):
        expected = f"argument --margin: expected a number of at least 0; received '{value}'"
        yield Case(f"mine --margin {value}", "mine", expected, {}, (*MINE, f"--margin={value}"))


def rows() -> list[Case]:
    """Every case of these files."""
    return [
        case
        for kind in (judgments, texts, evaluated_while_training, runs, questions, other_commands, numbers)
        for case in kind()
    ]
