"""BEIR and MS MARCO folders as their projects lay them out, and the real collections' published counts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.collections.collection import read_beir
from retriever.config import SourceConfig
from retriever.data.formats import (
    DataError,
    Example,
    Passage,
    Source,
    find_qrels,
    open_source,
    read_corpus,
    read_qrels,
    read_queries,
)

REAL = Path(os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(
            f"the real collection {REAL / name} is not there; BIGBATCH_TEST_DATA names the folder that holds it"
        )
    return REAL / name


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def opened(path: Path, **settings: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **settings))


def by_id(query_id: str, query: str, positives: str, negatives: str = "") -> Example:
    return Example(query_id, query, tuple(map(Passage, positives.split())), tuple(map(Passage, negatives.split())))


DOCUMENTS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": "d2", "title": "", "text": "second\u2028still"}]
FROM_DOCUMENTS = [Passage("d1", "first", "One"), Passage("d2", "second\u2028still")]


def beir(folder: Path, ending: str = "") -> Path:
    write(folder / f"corpus.jsonl{ending}", lines(*DOCUMENTS))
    write(
        folder / f"queries.jsonl{ending}",
        lines({"_id": "q1", "text": "what", "metadata": {}}, {"_id": "q2", "text": "why"}),
    )
    judged = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\nq2\td1\t-1\n"
    write(folder / f"qrels/train.tsv{ending}", judged)
    return folder


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_beir_grades_above_zero_are_positives_zero_negatives_below_zero_neither(tmp_path: Path, ending: str) -> None:
    source = opened(beir(tmp_path / "set", ending))
    assert (source.format, source.name) == ("beir", "set")
    assert list(source.examples()) == [by_id("q1", "what", "d1", "d2"), by_id("q2", "why", "d2")]
    assert list(source.corpus()) == FROM_DOCUMENTS
    assert list(opened(tmp_path / "set", limit=1).examples()) == [by_id("q1", "what", "d1", "d2")]


def test_beir_corpus_of_parquet_shards_and_overrides(tmp_path: Path) -> None:
    beir(tmp_path / "set")
    (tmp_path / "set/corpus.jsonl").unlink()
    (tmp_path / "set/corpus").mkdir()
    for i, document in enumerate(DOCUMENTS):
        pq.write_table(pa.Table.from_pylist([document]), tmp_path / f"set/corpus/{i:05d}.parquet")
    assert list(opened(tmp_path / "set").corpus()) == FROM_DOCUMENTS
    other = write(tmp_path / "other.tsv", "pid\ttitle\ttext\nd1\tT\tnew\n")
    queries = write(tmp_path / "other.queries.tsv", "q1\thow\nq2\twhen\n")
    source = opened(tmp_path / "set", corpus=str(other), queries=str(queries))
    assert list(source.corpus()) == [Passage("d1", "new", "T")]
    assert [example.query for example in source.examples()] == ["how", "when"]


def test_two_corpora_are_named(tmp_path: Path) -> None:
    beir(tmp_path)
    write(tmp_path / "corpus.jsonl.gz", lines(*DOCUMENTS))
    with pytest.raises(DataError, match=r"expected one corpus file, found corpus\.jsonl, corpus\.jsonl\.gz"):
        opened(tmp_path)


def test_dprs_passages_lose_the_quotation_marks_around_them(tmp_path: Path) -> None:
    rows = [
        '1\t"Aaron ( or ; ""Ahärôn"") is"\tAaron',
        '2\t"He said ""no"""\t"""Weird Al"" Yankovic"',
        '3\t"A" and "B"\t"',
        '4\t""\tx',
    ]
    path = write(tmp_path / "psgs_w100.tsv.gz", "id\ttext\ttitle\n" + "\n".join(rows) + "\n")
    assert [(passage.text, passage.title) for passage in read_corpus(path)] == [
        ('Aaron ( or ; "Ahärôn") is', "Aaron"),
        ('He said "no"', '"Weird Al" Yankovic'),
        ('"A" and "B"', '"'),
        ("", "x"),
    ]
    headless = write(tmp_path / "collection.tsv", '10\t"quoted" as it stands "here"\n11\t"all of it"\n')
    assert [passage.text for passage in read_corpus(headless)] == ['"quoted" as it stands "here"', '"all of it"']


def msmarco(folder: Path) -> Path:
    write(folder / "collection.tsv", '10\tthe "first" one\n11\tsecond\r\n12\tthird\n')
    write(folder / "queries.train.tsv", "1\thow far\n2\t why so\n3\tnever judged\n")
    write(folder / "queries.dev.small.tsv", "9\tdev query\n")
    write(folder / "qrels.train.tsv", "1\t0\t10\t1\n2\t0\t12\t1\n")
    write(folder / "qrels.dev.small.tsv", "9\t0\t11\t1\n")
    return folder


def test_msmarco_judgments_with_collection_and_queries_beside(tmp_path: Path) -> None:
    source = opened(msmarco(tmp_path))
    assert source.format == "msmarco"
    assert list(source.examples()) == [by_id("1", "how far", "10"), by_id("2", " why so", "12")]
    assert list(source.corpus()) == [Passage("10", 'the "first" one'), Passage("11", "second"), Passage("12", "third")]
    assert list(opened(tmp_path, split="dev").examples()) == [by_id("9", "dev query", "11")]
    assert list(opened(tmp_path / "qrels.dev.small.tsv").examples()) == [by_id("9", "dev query", "11")]
    assert list(read_queries(tmp_path, "dev")) == [("9", "dev query")]
    with pytest.raises(
        DataError, match=r"expected one queries file, found queries\.dev\.small\.tsv, queries\.train\.tsv"
    ):
        list(read_queries(tmp_path))


@pytest.mark.parametrize(
    "name", ["2019qrels-pass.txt", "2020qrels-pass.txt", "qrels.dl19-passage.txt", "qrels.dl20-passage.txt"]
)
def test_judgments_to_evaluate_on_are_not_trained_on(tmp_path: Path, name: str) -> None:
    """eval.msmarco reads them from the folder that a training reads."""
    source = opened(msmarco(tmp_path))
    before, fingerprint = list(source.examples()), source.fingerprint()
    write(tmp_path / name, "19335 0 1 2\n")
    source = opened(tmp_path)
    assert list(source.examples()) == before and source.fingerprint() == fingerprint


def test_msmarco_folder_unites_judgments_hard_negatives_and_id_triples_but_not_text_triples(tmp_path: Path) -> None:
    msmarco(tmp_path)
    mined: list[dict[str, Any]]
    mined = [{"qid": 1, "pos": [10], "neg": {"bm25": [12, 11], "ance": [11]}}, {"qid": "2", "pos": [], "neg": ["10"]}]
    hard = write(tmp_path / "msmarco-hard-negatives.jsonl.gz", lines(*mined))
    triples = write(tmp_path / "qidpidtriples.train.full.2.tsv.gz", "2\t12\t10\n2 12 11\n")
    texts = write(tmp_path / "triples.train.small.tsv", 'what "is" it\tthis\tthat\n')
    judged = [by_id("1", "how far", "10"), by_id("2", " why so", "12")]
    from_mined = [by_id("1", "how far", "10", "12 11"), by_id("2", " why so", "", "10")]
    from_triples = [by_id("2", " why so", "12", "10"), by_id("2", " why so", "12", "11")]
    assert list(opened(tmp_path).examples()) == judged + from_mined + from_triples
    assert list(opened(hard).examples()) == from_mined
    assert list(opened(triples).examples()) == from_triples
    source = opened(texts)
    assert list(source.examples()) == [Example("1", 'what "is" it', (Passage(None, "this"),), (Passage(None, "that"),))]
    assert list(source.corpus()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("query-id\tcorpus-id\tscore\nq a\td\t1\n", {"q a": {"d": 1}}),
        ("q 0 d 1\nq\t0\te\t0\n", {"q": {"d": 1, "e": 0}}),
        ("q Q0 d -1\n\nr Q0 d 3\nr Q0 d 3\n", {"q": {"d": -1}, "r": {"d": 3}}),
        ("q d 2\n", {"q": {"d": 2}}),
    ],
)
def test_qrels_of_every_style(tmp_path: Path, text: str, expected: dict[str, dict[str, int]]) -> None:
    assert read_qrels(write(tmp_path / "qrels.txt", text)) == expected
    assert read_qrels(write(tmp_path / "qrels.tsv.gz", text)) == expected


@pytest.mark.parametrize("grade", ["NaN", "Infinity", "0.5", "true"])
def test_a_grade_in_json_is_a_whole_number(tmp_path: Path, grade: str) -> None:
    path = write(tmp_path / "test.jsonl", f'{{"query-id": "q", "corpus-id": "d", "score": {grade}}}\n')
    with pytest.raises(DataError, match="line 1: field 'score': expected a whole number"):
        read_qrels(path)


def test_hard_negatives_of_another_project_are_read_as_what_they_are(tmp_path: Path) -> None:
    mined = {"query": "q", "pos": ["p"], "neg": ["n"]}
    assert opened(write(tmp_path / "train-hard-negatives.jsonl", lines(mined))).format == "flagembedding"
    mined = {"qid": "9", "pos": ["11"], "neg": []}
    settings = {
        "queries": str(msmarco(tmp_path / "set") / "queries.dev.small.tsv"),
        "corpus": str(tmp_path / "set/collection.tsv"),
    }
    source = opened(write(tmp_path / "renamed.jsonl", lines(mined)), **settings)
    assert (source.format, list(source.examples())) == ("msmarco", [by_id("9", "dev query", "11")])


def test_malformed_tsv_and_triples_name_the_line(tmp_path: Path) -> None:
    msmarco(tmp_path)
    write(tmp_path / "collection.tsv", "10\tone\n11\ttwo\tthree\n")
    with pytest.raises(DataError, match=r"collection\.tsv, line 2: expected 2 columns \(id, text\), received 3"):
        list(read_corpus(tmp_path))
    with pytest.raises(DataError, match=r"triples\.tsv, line 1: query id '77' is not among the 3 queries"):
        list(opened(write(tmp_path / "triples.tsv", "77\t10\t11\n")).examples())


def test_real_msmarco_dev_queries_and_judgments() -> None:
    folder = real("msmarco")
    qrels = read_qrels(folder / "qrels.msmarco-passage.dev-subset.txt")
    queries = dict(read_queries(folder / "topics.msmarco-passage.dev-subset.txt"))
    assert (len(qrels), sum(map(len, qrels.values())), len(queries)) == (6980, 7437, 6980)
    assert qrels.keys() == queries.keys()
    assert qrels["300674"] == {"7067032": 1}
    assert queries["2"] == " Androgen receptor define"
    for year, count in (("19", 43), ("20", 54)):
        assert len(read_qrels(folder / f"qrels.dl{year}-passage.txt")) == count


def test_real_scifact_and_cranfield() -> None:
    folder = real("scifact")
    source = opened(folder)
    examples = list(source.examples())
    passages = {passage.id: passage for passage in source.corpus()}
    assert (source.format, len(examples), len(passages), len(dict(read_queries(folder)))) == ("beir", 809, 5183, 1109)
    assert all(example.positives and all(p.id in passages for p in example.positives) for example in examples)
    assert len(read_qrels(find_qrels(folder, "test"))) == 300
    assert (
        sum(
            grade == 0
            for judged in read_qrels(find_qrels(real("cranfield"), "test")).values()
            for grade in judged.values()
        )
        == 225
    )


@pytest.mark.parametrize(
    "order",
    ["query-id corpus-id score", "score corpus-id query-id", "corpus-id query-id score", "docid qid iteration rel"],
)
@pytest.mark.parametrize("separator", ["\t", " "])
def test_qrels_go_by_their_header(tmp_path: Path, order: str, separator: str) -> None:
    """Also where queries and passages have the same ids."""
    of = {"query-id": "7", "qid": "7", "corpus-id": "8", "docid": "8", "score": "2", "rel": "2", "iteration": "Q0"}
    names = order.split()
    text = f"{separator.join(names)}\n{separator.join(of[name] for name in names)}\n"
    assert read_qrels(write(tmp_path / "qrels.tsv", text)) == {"7": {"8": 2}}
    with pytest.raises(DataError, match=rf"line 3: expected {len(names)} columns as in the header"):
        read_qrels(write(tmp_path / "qrels.tsv", f"{text}7{separator}8\n"))


def test_qrels_as_csv_and_json_lines(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path / "q.csv", "corpus-id,query-id,score\n8,7,2\n")) == {"7": {"8": 2}}
    assert read_qrels(write(tmp_path / "q.jsonl", lines({"query_id": 7, "docid": "8", "label": 2.0}))) == {
        "7": {"8": 2}
    }


def test_an_evaluation_says_how_many_passages_are_blank(tmp_path: Path) -> None:
    """Without a text and a title; tests/malformed has what it refuses."""
    folder = beir(tmp_path)
    write(
        folder / "corpus.jsonl", lines(*DOCUMENTS, {"_id": "d3", "text": "", "title": "y"}, {"_id": "d4", "text": " "})
    )
    assert read_beir(folder, "train").check() == ("1 passage without a text and a title, encoded as blank texts",)
