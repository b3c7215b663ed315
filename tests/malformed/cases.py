"""Malformed inputs: which command reads them, the files that replace those of a sound workplace, and the line expected
of it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

File = str | bytes


@dataclass(frozen=True)
class Case:
    """One input. In `options`, `{}` stands for the workplace; an empty file name in `files` makes a folder of the
    name.
    """

    name: str
    command: str
    expected: str  # a regular expression, found in the one line that the command prints
    files: Mapping[str, File] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def lines(*records: Any) -> str:
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def source(name: str, content: File, expected: str, *settings: str) -> Case:
    """Training on one file, a source of settings such as `format: columns`."""
    described = ", ".join((f"path: {{}}/{name}", *settings))
    return Case(
        f"train {' '.join((name, *settings))}: {expected}",
        "train",
        expected,
        {name: content},
        (f"data.train=[{{{{{described}}}}}]",),
    )


DEEP, DIGITS = "[" * 100_000, "9" * 5000
GOOD = {"query": "who", "pos": ["a river"], "neg": ["storm"]}


def json_syntax() -> Iterator[Case]:
    """What is no JSON, or no JSON object, in each of the files that hold it."""
    good = json.dumps(GOOD)
    broken = {
        "not closed": ('{"query": "who", "pos": ["a"', "Expecting"),
        "single quotes": ("{'query': 'who'}", "Expecting property name"),
        "trailing comma": ('{"query": "who",}', "property name|Illegal trailing comma"),
        "control character": ('{"query": "w\x01o"}', "Invalid control character"),
        "bad escape": (r'{"query": "\x"}', r"Invalid \\\\?escape"),
        "key twice": ('{"query": "who", "query": "what", "pos": ["a"]}', "key 'query' stands twice in one object"),
        "inner key twice": ('{"query": "who", "pos": [{"a": 1, "a": 2}]}', "key 'a' stands twice in one object"),
        "deep": ('{"query": ' + DEEP, "nested too deeply"),
        "digits": ('{"query": ' + DIGITS + "}", "a number of too many digits"),
        "a number": ("5", "expected a JSON object, received 5"),
        "null": ("null", "expected a JSON object, received None"),
        "text": ('"who"', "expected a JSON object, received 'who'"),
    }
    for name, (text, message) in broken.items():
        yield Case(
            f"json lines: {name}",
            "train",
            f"x\\.jsonl, line 2: .*{message}",
            {"x.jsonl": f"{good}\n{text}\n"},
            SOURCE_JSONL,
        )
        yield Case(
            f"json list: {name}",
            "train",
            f"x\\.json, line 2: .*{message}",
            {"x.json": f"[{good},\n{text}]"},
            SOURCE_JSON,
        )
    after = {
        "a second list": f"\n[{good}]",
        "json lines": f"\n{good}",
        "a list on the same line": f"[{good}]",
        "a bracket": "]",
        "words": " end",
    }
    for name, text in after.items():
        expected = r"x\.json, line [12]: expected the end of the file after the list"
        yield Case(f"json list, then {name}", "train", expected, {"x.json": f"[{good}]{text}"}, SOURCE_JSON)
    yield Case(
        "json lines: a list",
        "train",
        r"x\.jsonl, line 1: expected a JSON object",
        {"x.jsonl": f"[{good}]"},
        SOURCE_JSONL,
    )
    yield Case("json lines: two objects", "train", r"line 1: .*Extra data", {"x.jsonl": good + good}, SOURCE_JSONL)
    yield Case("json list: no comma", "train", r"line 1: expected a comma", {"x.json": f"[{good} {good}]"}, SOURCE_JSON)
    yield Case(
        "json list: comma at the end", "train", r"line 1: .*Expecting value", {"x.json": f"[{good},]"}, SOURCE_JSON
    )
    yield Case(
        "json list: not closed", "train", r"line 1: expected a comma or the end", {"x.json": f"[{good}"}, SOURCE_JSON
    )


SOURCE_JSONL, SOURCE_JSON = ("data.train=[{{path: {}/x.jsonl}}]",), ("data.train=[{{path: {}/x.json}}]",)


def encodings() -> Iterator[Case]:
    """Bytes that are no UTF-8 and files that are not what their name says."""
    text = lines(GOOD)
    kinds = {
        "x.jsonl": text,
        "x.json": f"[{json.dumps(GOOD)}]",
        "x.csv": "anchor,positive\nwho,b\n",
        "x.tsv": "anchor\tpositive\nwho\tb\n",
    }
    for name, content in kinds.items():
        yield source(
            name, content.encode().replace(b"who", b"\xff"), rf"{name}.*: expected UTF-8 text, received byte 0xff"
        )
        yield source(name, content.encode("utf-16"), rf"{name}.*: expected UTF-8 text, received byte 0xff")
        packed = gzip.compress(content.encode() * 1000)
        yield source(f"{name}.gz", packed[: len(packed) // 2], rf"{name}\.gz.*: expected a complete gzip file")
        yield source(f"{name}.gz", content.encode(), rf"{name}\.gz.*: expected a complete gzip file")
        packed = pa.compress(content.encode(), "zstd", asbytes=True)
        yield source(f"{name}.zst", packed[: len(packed) // 2], rf"{name}\.zst.*: expected a complete zstd file")
        yield source(f"{name}.zst", content.encode(), rf"{name}\.zst.*: expected a complete zstd file")
    yield source("x.parquet", b"", r"x\.parquet, row 1: expected a Parquet file that is whole")
    yield source(
        "x.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", r"x\.parquet, row 1: expected a Parquet file that is whole"
    )
    yield source("x.zip", b"PK", r"x\.zip: expected a file ending in \.jsonl")
    yield source("x.jsonl", "", r"x\.jsonl: expected at least one record, found none")
    yield source("x.json", "[]", r"x\.json: expected at least one record, found none")
    yield source("x.csv", "", r"x\.csv: expected at least one record, found none")


@dataclass(frozen=True)
class Format:
    """A format of training data: its file and how a record is made of a query, positives and negatives."""

    name: str
    file: str
    query: str  # fields
    positive: str
    negative: str
    settings: tuple[str, ...] = ()

    def record(self, query: Any, positives: Any, negatives: Any) -> dict[str, Any]:
        """One record."""
        if self.name == "columns":
            return {"anchor": query, "positive": positives, "negative": negatives}
        if self.name == "flagembedding":
            return {"query": query, "pos": positives, "neg": negatives}
        ids = {"query_id": "1"} if self.name == "tevatron" else {}
        named = [name.partition("[")[0] for name in (self.query, self.positive, self.negative)]
        return ids | dict(zip(named, (query, self._passages(positives), self._passages(negatives)), strict=True))

    @staticmethod
    def _passages(texts: Any) -> Any:
        return [{"title": "", "text": text} for text in texts] if isinstance(texts, list) else texts


FORMATS = (
    Format("columns", "x.jsonl", "anchor", "positive[0]", "negative[0]"),
    Format("flagembedding", "x.jsonl", "query", "pos[0]", "neg[0]"),
    Format("tevatron", "x.jsonl", "query", "positive_passages[0].text", "negative_passages[0].text"),
    Format("dpr", "x.json", "question", "positive_ctxs[0].text", "hard_negative_ctxs[0].text"),
)


def fields_of_formats() -> Iterator[Case]:
    """Every format with a wrong query, positive or negative in its second record."""
    texts: dict[str, tuple[Any, str]] = {
        "null": (None, "expected text, received None"),
        "a number": (5, "expected text, received 5"),
        "a list": (["a"], r"expected text, received \['a'\]"),
        "an object": ({"text": "a"}, "expected text, received {"),
        "half a character": ("\ud800", "expected Unicode text without the lone surrogate at 0"),
    }
    for kind in FORMATS:
        wrong = {
            f"query {name}": (kind.record(value, ["b"], ["c"]), kind.query, message)
            for name, (value, message) in texts.items()
        }
        blank = "expected text that is not blank, received"
        wrong |= {
            f"query {name}": (kind.record(text, ["b"], ["c"]), kind.query, blank)
            for name, text in (("empty", ""), ("blank", " \u3000"))
        }
        wrong |= {
            f"positive {name}": (kind.record("a", [value], ["c"]), kind.positive, message)
            for name, (value, message) in texts.items()
        }
        wrong |= {
            f"negative {name}": (kind.record("a", ["b"], [value]), kind.negative, message)
            for name, (value, message) in texts.items()
        }
        if kind.name != "columns":
            field_name = kind.positive.partition("[")[0]
            wrong["positives a text"] = (kind.record("a", "b", ["c"]), field_name, "expected a list, received 'b'")
            wrong["positives null"] = (
                kind.record("a", None, ["c"]),
                field_name,
                "expected a list of (texts|passages), received None",
            )
        for name, (record, field_name, message) in wrong.items():
            records = [kind.record("what", ["ocean"], ["storm"]), record]
            content = lines(*records) if kind.file == "x.jsonl" else json.dumps(records, indent=0)
            expected = rf"{kind.file}, line \d+: field '{_escaped(field_name)}(\[0\])?': {message}"
            yield Case(
                f"{kind.name}: {name}",
                "train",
                expected,
                {kind.file: content},
                (f"data.train=[{{{{path: {{}}/{kind.file}}}}}]",),
            )
        missing = kind.record("a", ["b"], ["c"])
        del missing[kind.query]
        records = [kind.record("what", ["ocean"], ["storm"]), missing]
        content = lines(*records) if kind.file == "x.jsonl" else json.dumps(records)
        if kind.name != "columns":
            expected = f"{kind.file}, line .*field '.*' is missing"
            yield Case(
                f"{kind.name}: no query",
                "train",
                expected,
                {kind.file: content},
                (f"data.train=[{{{{path: {{}}/{kind.file}}}}}]",),
            )


def _escaped(name: str) -> str:
    return name.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")


def other_fields() -> Iterator[Case]:
    """Ids, scores, titles and prompts."""
    passage = {"docid": "1", "text": "a"}
    tevatron = {"query_id": "1", "query": "who", "positive_passages": [passage], "negative_passages": []}
    yield source(
        "x.jsonl", lines(tevatron | {"query_id": None}), r"line 1: field 'query_id': expected an id .*, received None"
    )
    yield source("x.jsonl", lines(tevatron | {"query_id": ""}), r"field 'query_id': expected an id .*, received ''")
    yield source("x.jsonl", lines(tevatron | {"query_id": 1.5}), r"field 'query_id': expected an id .*, received 1\.5")
    yield source("x.jsonl", lines(tevatron | {"query_id": True}), r"field 'query_id': expected an id .*, received True")
    yield source(
        "x.jsonl", lines(tevatron, tevatron | {"query": "what"}), "query id '1' stands for two texts, the second 'what'"
    )
    yield source("x.jsonl", lines(tevatron | {"prompt": 5}), "field 'prompt': expected text, received 5")
    titled = tevatron | {"positive_passages": [passage | {"title": 5}]}
    yield source("x.jsonl", lines(titled), r"field 'positive_passages\[0\]\.title': expected text, received 5")
    named = tevatron | {"positive_passages": [{"docid": {}, "text": "a"}]}
    yield source("x.jsonl", lines(named), r"field 'positive_passages\[0\]\.docid': expected an id")
    yield source(
        "x.jsonl",
        lines(tevatron | {"positive_passages": ["a"]}),
        r"'positive_passages\[0\]': expected a mapping with the passage",
    )
    scores = {
        "[1, 2]": r"field 'pos_scores': expected 1 numbers, one for each passage, received \[1, 2\]",
        '["1"]': r"field 'pos_scores\[0\]': expected a finite number, received '1'",
        "[NaN]": r"field 'pos_scores\[0\]': expected a finite number, received nan",
        "[Infinity]": r"field 'pos_scores\[0\]': expected a finite number, received inf",
        "[1e39]": r"field 'pos_scores\[0\]': expected a finite number, received 1e\+39",
        "[true]": r"field 'pos_scores\[0\]': expected a finite number, received True",
        "[null]": r"field 'pos_scores\[0\]': expected a finite number, received None",
        "5": r"field 'pos_scores': expected a list, received 5",
    }
    for value, message in scores.items():
        yield source("x.jsonl", f'{{"query": "who", "pos": ["a"], "pos_scores": {value}}}\n', message)
    broken = lines({"query": "q", "pos": ["p"], "neg": []}, {"query": "r", "p\nos": ["p"], "neg": []})
    yield source("x.jsonl", broken, r"line 2: field 'pos' is missing: expected 'pos', received fields query, p os, neg")
    yield source("x.jsonl", lines({"query": "q", "pos": [""]}), r"none of its queries \(1\) has a positive passage")
    yield source(
        "x.jsonl",
        lines({"url": 1, "body": 2}),
        r"x\.jsonl, line 1: expected a record of tevatron, .* received fields body, url",
    )
    version2 = {"query_id": "1", "query_text": "who", "positive_document_ids": ["1"], "negative_document_ids": []}
    yield source("x.jsonl", lines(version2), r"expected a corpus file \(corpus\.\* or collection\.\*\)")
    yield source("x.jsonl", lines(version2), r"corpus\.jsonl: no such file", "corpus: {}/corpus.jsonl")


def tables_of_text() -> Iterator[Case]:
    """CSV and TSV."""
    yield source(
        "x.csv", "anchor,positive\na,b\nc,d,e\n", r"x\.csv, line 3: expected 2 columns \(anchor, positive\), received 3"
    )
    yield source("x.csv", "anchor,positive\na\n", r"x\.csv, line 2: expected 2 columns")
    yield source("x.csv", 'anchor,positive\na,"b\nc\n', r"x\.csv, line 3: expected comma-separated values")
    yield source("x.csv", 'anchor,positive\na,"b"c\n', r"x\.csv, line 2: expected comma-separated values")
    yield source(
        "x.csv",
        "anchor,positive,positive\na,b,c\n",
        r"x\.csv, line 1: expected columns of different names, received 'positive' twice",
    )
    yield source(
        "x.csv",
        "how tall is it,very tall\nhow wide,wide\n",
        r"x\.csv, line 2: expected a header with anchor and positive",
    )
    yield source(
        "x.csv",
        "how tall is it;very tall\nhow wide;wide\n",
        r"x\.csv, line 2: expected a header with anchor and positive",
    )
    yield source("x.csv", "anchor\na\n", r"x\.csv, line 2: expected a record of|anchor and a positive column")
    yield source(
        "x.csv",
        "anchor,positive\n,b\n",
        r"x\.csv, line 2: field 'anchor': expected text that is not blank, received ''",
    )
    yield source(
        "x.csv",
        "anchor,positive\na,\n",
        r"none of its queries \(1\) has a positive passage",
    )
    yield source(
        "x.csv",
        "id,question,answer\n1,a,b\n",
        r"x\.csv, line 2: column 'id' is no passage: the columns are id, question, answer",
    )
    yield source("x.csv", "question,answer,label\na,b,1\n", r"x\.csv, line 2: column 'label' is no passage")
    yield source(
        "x.csv",
        "anchor,positive\na,b\n",
        r"x\.csv, line 2: no column 'text': the columns are anchor, positive",
        "columns: [anchor, text]",
    )
    yield source(
        "x.tsv", "anchor\tpositive\na\tb\tc\n", r"x\.tsv, line 2: expected 2 columns \(anchor, positive\), received 3"
    )
    yield source(
        "x.tsv",
        "anchor\tanchor\na\tb\n",
        r"x\.tsv, line 1: expected columns of different names, received 'anchor' twice",
    )
    yield source("x.tsv", "how tall\tvery tall\n", r"x\.tsv, line 1: expected a header with anchor and positive")
    yield source(
        "x.tsv",
        "how tall\tvery tall\nb\tc\n",
        r"x\.tsv, line 2: expected a header with anchor and positive",
        "format: columns",
    )
    yield source(
        "x.tsv", "anchor\tpositive\n \tb\n", r"x\.tsv, line 2: field 'anchor': expected text that is not blank"
    )
    yield source("triples.tsv", "q\tp\n", r"triples\.tsv, line 1: expected 3 columns \(query, positive, negative\)")
    yield source("triples.tsv", " \tp\tn\n", r"triples\.tsv, line 1: field 'query': expected text that is not blank")
    yield source("triples.tsv", "q\t \tn\n", r"none of its queries \(1\) has a positive passage")


def configurations() -> Iterator[Case]:
    """Configuration files and overrides."""
    yield Case(
        "config not UTF-8", "config", r"--config .*c\.yaml: expected YAML in UTF-8", {"c.yaml": b"run: {seed: \xff}"}
    )
    yield Case(
        "config UTF-16", "config", r"--config .*c\.yaml: expected YAML in UTF-8", {"c.yaml": "run: {}".encode("utf-16")}
    )
    yield Case("config a list", "config", r"--config .*c\.yaml: expected a mapping of sections", {"c.yaml": "- 1\n"})
    yield Case("config a key twice", "config", r"--config .*c\.yaml: .*duplicate key", {"c.yaml": "run: {}\nrun: {}\n"})
    yield Case(
        "config digits", "config", r"--config .*c\.yaml: expected YAML in UTF-8", {"c.yaml": f"run: {{seed: {DIGITS}}}"}
    )
    yield Case("config deep", "config", r"--config .*c\.yaml: expected YAML in UTF-8", {"c.yaml": "a: " + "[" * 3000})
    yield Case("config absent", "config", r"--config .*c\.yaml: No such file", {})
    yield Case("config a folder", "config", r"--config .*c\.yaml: ", {"c.yaml/x": ""})
    overrides = {
        "a..b=1": r"override 'a\.\.b=1': expected key\.sub=value",
        ".run=1": r"override '\.run=1': expected key\.sub=value",
        "=1": "override '=1': expected key.sub=value",
        "run.seed": "override 'run.seed': expected key.sub=value",
        "run.seed=-1": "run.seed: expected a whole number of at least 0, received -1",
        "run.seed=1.5": "run.seed: expected a whole number, received 1.5",
        f"run.seed={2**63}": "run.seed: expected a whole number of at most 63 bits",
        f"run.seed={DIGITS}": "override 'run.seed=9+\\.\\.\\.': Exceeds the limit",
        "run.timeout_s=9999999999999999": "run.timeout_s: expected a whole number of at least 1 and at most 31,536,000",
        "data.train.-1.path=x": "expected a position from 0 to 0, received -1",
        "data.train.1.path=x": "expected a position from 0 to 0, received 1",
        "data.train.0.weight=1e300": "data.train.0.weight: expected a number above 0 and at most 10,000",
        "data.train.0.weight=-1": "data.train.0.weight: expected a number above 0",
        "data.train.0.weight=.inf": "data.train.0.weight: expected a number above 0 and at most 10,000",
        "data.train.0.limit=-2": "data.train.0.limit: expected a whole number of at least 1",
        "loss.temperature=1e-320": "loss.temperature: expected a number of at least",
        "loss.temperature=.nan": "loss.temperature: expected a number of at least 1e-12, received nan",
        "model.query_max_tokens=9999999": "model.query_max_tokens: expected a whole number of at least 4 and",
        "model={{}}": "override 'model={}': expected settings in the braces",
        "optim.lr.x=1": "override 'optim.lr.x=1'|optim.lr: expected a number",
        "run.trackers=[a": "override 'run.trackers=\\[a': ",
        "model.query_prompt=\ud800": "surrogates not allowed",
        "data.train.0.path={}/" + "x" * 300: "no such file: File name too long",
        "data.train.0.path={}/none": "data.train.0.path: there is no file or folder .*none",
    }
    for override, expected in overrides.items():
        yield Case(f"override {override[:60]!r}", "train", expected, {}, (override,))


def rows() -> list[Case]:
    """Every case of training data and configurations."""
    kinds = (json_syntax, encodings, fields_of_formats, other_fields, tables_of_text, configurations)
    return [case for kind in kinds for case in kind()]
