"""Every format, from files as their projects publish them, becomes the same kind of example; a wrong record is named by
its place.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retriever.config import SourceConfig
from retriever.data import json_records, lines, records, table_records
from retriever.data.formats import DataError, Example, Passage, Source, open_source

ODD = 'a "quoted" text, with\u2028a line separator, \x85 and 日本語'


def write(path: Path, content: str | list[dict[str, Any]]) -> Path:
    """Writes text, or records in the form that the file's ending asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
        return path
    text = (
        content
        if isinstance(content, str)
        else "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    )
    compress = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(compress.get(path.suffix, bytes)(text.encode()))
    return path


def opened(path: Path, **settings: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **settings))


def triple(query_id: str, query: str, positive: str, *negatives: str) -> Example:
    return Example(query_id, query, (Passage(None, positive),), tuple(Passage(None, text) for text in negatives))


TEVATRON_1 = [
    {
        "query_id": 7,
        "query": "who sings",
        "positive_passages": [{"docid": "3", "title": "Song", "text": ODD}, {"docid": "4", "text": "the band"}],
        "negative_passages": [{"docid": "9", "title": None, "text": "a river"}],
    },
    {
        "query_id": 8,
        "query": "where",
        "positive_passages": [{"docid": "3", "title": "Song", "text": ODD}],
        "negative_passages": [],
    },
]
FROM_TEVATRON_1 = [
    Example("7", "who sings", (Passage("3", ODD, "Song"), Passage("4", "the band")), (Passage("9", "a river"),)),
    Example("8", "where", (Passage("3", ODD, "Song"),)),
]


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.jsonl.gz", "train.jsonl.zst", "data/train-00000-of-00001.parquet"]
)
def test_tevatron_version_1(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, TEVATRON_1)
    for place in (path, tmp_path):
        source = opened(place)
        assert source.format == "tevatron"
        assert list(source.examples()) == FROM_TEVATRON_1
        assert list(source.corpus()) == []


@pytest.mark.parametrize("corpus", ["corpus.jsonl", "elsewhere/passages.jsonl.gz", "corpus/part-0.parquet"])
def test_tevatron_version_2_looks_passages_up_in_its_corpus(tmp_path: Path, corpus: str) -> None:
    record = {
        "query_id": "q",
        "query_text": "who",
        "positive_document_ids": ["a", 2],
        "negative_document_ids": ["c"],
        "answer": None,
    }
    write(tmp_path / "train.jsonl", [record])
    passages = [{"docid": name, "text": f"text {name}", "title": ""} for name in ("a", "2", "c", "d")]
    place = write(tmp_path / corpus, passages)
    configured = str(place) if "elsewhere" in corpus else None
    for path in (tmp_path, tmp_path / "train.jsonl"):
        source = opened(path, corpus=configured)
        assert list(source.examples()) == [Example("q", "who", (Passage("a"), Passage("2")), (Passage("c"),))]
        assert list(source.corpus()) == [Passage(p["docid"], p["text"]) for p in passages]


DPR = [
    {
        "dataset": "nq",
        "question": "big little lies how many episodes",
        "answers": ["seven"],
        "positive_ctxs": [
            {"title": "Big Little Lies", "text": "seven [episodes] {tv}", "score": 1000, "passage_id": "18768923"}
        ],
        "negative_ctxs": [{"title": "Cormac", "text": "no lies", "passage_id": 1}],
        "hard_negative_ctxs": [{"title": "Little", "text": "cast", "psg_id": "5"}],
    },
    {
        "question": "second",
        "positive_ctxs": [{"title": "", "text": ODD}],
        "negative_ctxs": [{"title": "t", "text": "easy"}],
    },
]
FROM_DPR = [
    Example(
        "0",
        "big little lies how many episodes",
        (Passage("18768923", "seven [episodes] {tv}", "Big Little Lies"),),
        (Passage("5", "cast", "Little"),),
    ),
    Example(
        "1", "second", (Passage(None, ODD),), (Passage(None, "easy", "t"),)
    ),  # no hard negatives: the plain ones serve
]


@pytest.mark.parametrize("window", [1, 37, 1 << 20])
@pytest.mark.parametrize("indent", [None, 4])
def test_dpr_json_list_through_a_window_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, indent: int | None
) -> None:
    monkeypatch.setattr(lines, "_PIECE_BYTES", window)
    text = json.dumps(DPR, indent=indent, ensure_ascii=False)
    for name in ("nq-train.json", "nq-train.json.gz"):
        assert list(opened(write(tmp_path / name, text)).examples()) == FROM_DPR
    assert list(opened(write(tmp_path / "lines.jsonl", DPR)).examples()) == FROM_DPR


def test_dpr_list_cut_off_is_an_error_and_not_a_shorter_list(tmp_path: Path) -> None:
    text = json.dumps(DPR, indent=1)
    path = write(tmp_path / "nq.json", text.rstrip("]\n "))
    with pytest.raises(
        DataError, match=rf"nq\.json, line {len(text.splitlines()) - 1}: expected a comma or the end of the list"
    ):
        list(opened(path).examples())
    packed = gzip.compress(text.encode())
    (tmp_path / "nq.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="complete gzip file"):
        list(opened(tmp_path / "nq.json.gz").examples())


def test_flagembedding_with_scores_and_prompt(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {
            "query": "q one",
            "pos": ["p1", "p2"],
            "neg": ["n1"],
            "pos_scores": [0.9, 1],
            "neg_scores": [0.25],
            "prompt": "find: ",
        },
        {"query": "q two", "pos": ["p1"], "neg": []},
    ]
    source = opened(write(tmp_path / "toy.jsonl.gz", records))
    assert source.format == "flagembedding"
    passages = (Passage(None, "p1"), Passage(None, "p2"))
    assert list(source.examples()) == [
        Example("0", "q one", passages, (Passage(None, "n1"),), (0.9, 1.0), (0.25,), "find: "),
        Example("1", "q two", passages[:1]),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "pairs.jsonl",
            [{"anchor": "a", "positive": ODD, "negative": "n"}, {"anchor": "b", "positive": "p", "negative": None}],
        ),
        (
            "pairs.parquet",
            [{"anchor": "a", "positive": ODD, "negative": "n"}, {"anchor": "b", "positive": "p", "negative": None}],
        ),
        ("pairs.tsv", f"anchor\tpositive\tnegative\r\na\t{ODD}\tn\r\nb\tp\t\r\n"),
        (
            "bom.jsonl",
            "\ufeff"
            + json.dumps({"anchor": "a", "positive": ODD, "negative": "n"})
            + '\n\n{"anchor": "b", "positive": "p"}\n',
        ),
        ("pairs.csv.gz", 'anchor,positive,negative\na,"{}",n\nb,p,\n'.format(ODD.replace('"', '""'))),
        (
            "pairs.csv",
            'label,negative,positive,anchor\n1,n,"{}",a\n0,,p,b\n'.format(ODD.replace('"', '""')),
        ),  # by name, in any order
        ("unnamed.csv", 'question,answer,wrong\na,"{}",n\nb,p,\n'.format(ODD.replace('"', '""'))),  # by order
    ],
)
def test_columns_from_every_kind_of_file(tmp_path: Path, name: str, content: Any) -> None:
    source = opened(write(tmp_path / name, content))
    assert source.format == "columns"
    empty = [""] if isinstance(content, str) and not name.endswith("jsonl") else []  # cells of a table of text
    assert list(source.examples()) == [triple("0", "a", ODD, "n"), triple("1", "b", "p", *empty)]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("t.txt", f'{ODD}\n\na "tab"\t""and\n', None),
        ("t.txt.gz", f'{ODD}\n\na "tab"\t""and\n', None),
        ("t.jsonl", [{"text": ODD}, {"text": 'a "tab"\t""and'}], None),
        ("t.parquet", [{"n": 1, "said": ODD}, {"n": 2, "said": 'a "tab"\t""and'}], ("said",)),
    ],
)
def test_texts_are_their_own_positives(tmp_path: Path, name: str, content: Any, columns: Any) -> None:
    source = opened(write(tmp_path / name, content), format="texts", columns=columns)
    texts = [ODD, 'a "tab"\t""and']
    assert list(source.examples()) == [triple(str(i), text, text) for i, text in enumerate(texts)]


def test_texts_are_named_and_their_column_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"line 1: expected a record of .*\(single texts: format: texts\)"):
        opened(path)
    with pytest.raises(DataError, match=r"line 1: no column 'said': the columns are text; name the text's"):
        list(opened(path, format="texts", columns=("said",)).examples())


def test_columns_ragged_lists_several_positives_and_a_query_id(tmp_path: Path) -> None:
    records = [
        {"query_id": 5, "anchor": "a", "positive": ["p", "q"], "negative_1": "n", "negative_2": ["m", "o"]},
        {"query_id": 5, "anchor": "a", "positive": ["r"], "negative_1": "", "negative_2": []},
        {"query_id": 6, "anchor": "b", "positive": "p"},
        {"query_id": 6, "anchor": "b", "positive": "p", "negative_1": "n", "negative_2": "m", "negative_3": "o"},
    ]
    examples = list(opened(write(tmp_path / "x.jsonl", records)).examples())
    assert [e.query_id for e in examples] == ["5", "5", "6", "6"]
    assert [[p.text for p in e.positives] for e in examples] == [["p", "q"], ["r"], ["p"], ["p"]]
    assert [[p.text for p in e.negatives] for e in examples] == [["n", "m", "o"], [""], [], ["n", "m", "o"]]


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.parquet", "pos.jsonl"])
def test_a_blank_text_is_a_passage_without_a_text_in_every_format(tmp_path: Path, name: str, blank: str) -> None:
    """The token store leaves it out and counts it; a null negative is none."""
    rows: Any = [{"anchor": "q", "positive": blank, "negative": blank}]
    if name == "pos.jsonl":
        rows = [{"query": "q", "pos": [blank], "neg": [blank]}]
    elif not name.endswith(("jsonl", "parquet")):
        separator = "," if name == "x.csv" else "\t"
        table = "".join(separator.join(row) + "\n" for row in (rows[0], rows[0].values()))
        rows = json.dumps(rows) if name == "x.json" else table
    assert list(opened(write(tmp_path / name, rows)).examples()) == [triple("0", "q", blank, blank)]


def test_a_prompt_column_beside_anchor_and_positive_is_the_querys(tmp_path: Path) -> None:
    """A row without one has the source's; where columns are asked for, or go by their order, it is a text like any."""
    rows: list[dict[str, Any]] = [
        {"anchor": "a", "positive": "p", "prompt": "ask: "},
        {"anchor": "b", "positive": "q", "prompt": None},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    assert [example.prompt for example in opened(path).examples()] == ["ask: ", None]
    asked = next(opened(path, columns=("prompt", "positive")).examples())
    assert (asked.query, asked.prompt) == ("ask: ", None)
    by_order = write(tmp_path / "order.jsonl", [{"prompt": "x", "response": "y"}])
    assert [(e.query, e.prompt) for e in opened(by_order).examples()] == [("x", None)]


def test_columns_chosen_by_config_and_ids_with_corpus_and_queries(tmp_path: Path) -> None:
    path = write(tmp_path / "ids.jsonl", [{"score": 3.5, "neg": [12, "13"], "query": 1, "pos": "11"}])
    settings = {"format": "columns", "columns": ("query", "pos", "neg")}
    corpus, queries = write(tmp_path / "c.tsv", "11\tx\n12\ty\n13\tz\n"), write(tmp_path / "q.tsv", "1\twho\n")
    source = opened(path, corpus=str(corpus), queries=str(queries), **settings)
    assert list(source.examples()) == [Example("1", "who", (Passage("11"),), (Passage("12"), Passage("13")))]
    assert list(source.corpus()) == [Passage("11", "x"), Passage("12", "y"), Passage("13", "z")]
    by_order = write(tmp_path / "order.jsonl", [{"qid": "1", "pid": "11"}])
    assert list(opened(by_order, corpus=str(corpus), queries=str(queries)).examples()) == [
        Example("1", "who", (Passage("11"),))
    ]
    assert next(opened(by_order, columns=("qid", "pid")).examples()).query == "1", "asked for by name"
    with pytest.raises(DataError, match="'score' is no passage"):
        list(opened(path, format="columns").examples())


def test_a_folder_gives_the_files_of_its_split_in_order_with_one_numbering(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "dev.jsonl"):
        write(tmp_path / name, [{"anchor": name, "positive": "p"}])
    assert [(e.query_id, e.query) for e in opened(tmp_path).examples()] == [
        ("0", "train-0.jsonl"),
        ("1", "train-1.jsonl"),
    ]
    assert [e.query for e in opened(tmp_path, split="dev").examples()] == ["dev.jsonl"]
    assert [e.query for e in opened(tmp_path, limit=1).examples()] == ["train-0.jsonl"]
    with pytest.raises(DataError, match="split 'test'"):
        opened(tmp_path, split="test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.jsonl",
            r'{"query_id": "\ud83d", "query": "q", "positive_passages": []}',
            "line 1: field 'query_id': expected Unicode text",
        ),
        ("c.csv", ",question,answer\n0,a,b\n", "line 2: column '' is no passage"),
        (
            "c.parquet",
            [{"anchor": "a", "positive": "b"}, {"anchor": " ", "positive": "d"}],
            "row 2: field 'anchor': expected text that is ",
        ),
        (
            "c.jsonl",
            [{"anchor": "a", "text": "b"}],
            "no column 'positive': the columns are anchor, text; name those to use in data.train.<n>.columns",
        ),
        (
            "c.jsonl",
            [{"anchor": "a", "positive": None, "x": "y"}],
            "line 1: field 'positive': expected text or a list of texts, received None",
        ),
    ],
)
def test_a_malformed_record_names_file_line_field_expected_and_received(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    """Records that tests/malformed, which runs the commands on many more, does not have."""
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        list(opened(path).examples())
    assert str(caught.value).startswith(str(path))


def test_the_fingerprint_follows_content_and_reading_and_nothing_else(tmp_path: Path) -> None:
    first = opened(write(tmp_path / "a/train.jsonl", TEVATRON_1)).fingerprint()
    assert opened(write(tmp_path / "b/other.jsonl", TEVATRON_1)).fingerprint() == first
    assert opened(tmp_path / "a", weight=0.5).fingerprint() == first
    assert opened(tmp_path / "a", limit=1).fingerprint() != first
    changed = json.loads(json.dumps(TEVATRON_1).replace("a river", "a rivet"))
    assert opened(write(tmp_path / "a/train.jsonl", changed)).fingerprint() != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"anchor":"a","positive":"b"}]\n[{"anchor":"c","positive":"d"}]\n',
            r"line 2: expected the end of the file .*, received '\[",
        ),
        ('[{"anchor":"a","positive":"b"}][]', r"line 1: expected the end of the file after the list, received '\[\]'"),
        ('[{"anchor":"a","positive":"b"}]\n\n{"anchor":"c","positive":"d"}', "line 3: expected the end of the file"),
        ('[{"anchor":"a","positive":"b"}] {broken', "line 1: expected the end of the file"),
        (
            '[{"anchor":"a","positive":"b"}\n{"anchor":"c","positive":"d"}]',
            "line 2: expected a comma or the end of the list",
        ),
        ('[{"anchor":"a","positive":"b"},\n]', "line 2: expected a JSON list of objects: Expecting value"),
        ('[,{"anchor":"a","positive":"b"}]', "line 1: expected a JSON list of objects: Expecting value"),
        (
            '[{"anchor":"a","positive":"b"},,{"anchor":"c","positive":"d"}]',
            "line 1: expected a JSON list of objects: Expecting value",
        ),
        (
            '[{"anchor":"a","positive":"b"},\n{"anchor":"c","anchor":"d"}]',
            "line 2: .* key 'anchor' stands twice in one object",
        ),
        ("[" * 100_000, "line 1: expected a JSON list of objects: values nested too deeply"),
        ('[{"anchor":' + "9" * 5000 + "}]", "line 1: expected a JSON list of objects: a number of too many digits"),
        ('[{"anchor":"a" "b"}' + "x" * 4_000_000, "line 1: expected a JSON list of objects: Expecting ',' delimiter"),
        ('[{"anchor":"a\x01"}]', "line 1: expected a JSON list of objects: Invalid control character"),
    ],
)
@pytest.mark.parametrize("window", [1 << 6, 1 << 20])
def test_a_json_list_is_read_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str, window: int
) -> None:
    monkeypatch.setattr(lines, "_PIECE_BYTES", window)
    path = write(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=message):
        list(opened(path, format="columns").examples())


def test_a_record_too_long_to_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line, and an object of a list; the rest of the line is not read."""
    for module in (lines, json_records, table_records):
        monkeypatch.setattr(module, "LONGEST_RECORD_BYTES", 1000)
    pair = json.dumps({"anchor": "a", "positive": "b"})
    write(tmp_path / "x.jsonl", f"{pair}\n{json.dumps({'anchor': 'a', 'positive': 'b' * 1000})}\n")
    with pytest.raises(DataError, match="line 2: expected a line of at most 1,000 bytes, received a longer one"):
        list(opened(tmp_path / "x.jsonl").examples())
    write(tmp_path / "w.jsonl", "x" * 999 + "日" * 9)  # the cut is inside a character
    with pytest.raises(DataError, match="line 1: expected a line of at most 1,000 bytes, received a longer one"):
        list(opened(tmp_path / "w.jsonl").examples())
    write(tmp_path / "x.csv", 'anchor,positive\na,"b\n' + "c,d\n" * 400)
    with pytest.raises(DataError, match=r"line \d+: expected comma-separated values: field larger than field limit"):
        list(opened(tmp_path / "x.csv").examples())
    monkeypatch.setattr(lines, "_PIECE_BYTES", 100)
    write(tmp_path / "x.json", f"[{pair},\n{json.dumps({'anchor': 'a', 'positive': 'b' * 5000})}]")
    with pytest.raises(DataError, match="line 2: expected an object of at most 1,000 characters, received"):
        list(opened(tmp_path / "x.json").examples())
    write(tmp_path / "y.json", "[" + ",".join([pair] * 200) + "]")
    assert len(list(opened(tmp_path / "y.json").examples())) == 200, "a list may be of any length, on one line too"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_an_overlong_text_keeps_both_ends_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(records, "LONGEST_TEXT", 10)
    monkeypatch.setattr(records, "_SHORTENED", set())
    rows = [{"query": "q", "pos": ["a" * 10], "neg": ["b" * 11]}, {"query": "0123456789ab", "pos": ["p"], "neg": []}]
    source = opened(write(tmp_path / name, json.dumps(rows) if name == "x.json" else rows))
    for _ in range(2):
        first, second = source.examples()
    assert (first.positives[0].text, first.negatives[0].text, second.query) == ("a" * 10, "b" * 10, "01234789ab")
    note = records.shortened_note()
    assert note is not None and note.startswith(
        "2 texts of more than 10 characters cut in the middle to that length; the first: "
    )
    assert note.endswith("1, field 'neg[0]'")


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
@pytest.mark.parametrize("settings", [{}, {"format": "columns"}])
def test_a_table_without_a_header_is_refused(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """Its first pair is no pair of names, in the second file of a folder neither."""
    separator = "," if name.endswith("csv") else "\t"
    path = write(tmp_path / name, f"how tall is it{separator}very tall\nand how wide{separator}wide\n")
    with pytest.raises(DataError, match="expected a header with anchor and positive"):
        list(opened(path, **settings).examples())
    named = opened(path, columns=("how tall is it", "very tall"), format="columns")
    assert next(named.examples()).query == "and how wide", "asked for by name"
    write(tmp_path / f"a-{name}", f"Question{separator}Answer\nq{separator}a\n")
    with pytest.raises(
        DataError, match=rf"{name}, line 2: expected a header with anchor and positive on the first line"
    ):
        list(opened(tmp_path, **settings).examples())


def test_semicolons_and_doubled_quotation_marks(tmp_path: Path) -> None:
    """As spreadsheets and pandas write them."""
    path = write(tmp_path / "x.csv", 'anchor;positive\na;"b; c ""d"""\n')
    assert list(opened(path).examples()) == [triple("0", "a", 'b; c "d"')]
    text = 'anchor\tpositive\nsay\t"He said ""hi"" to us"\n"quoted"\t"a" and "b"\nc\t"d ""e"" " f\n'
    assert list(opened(write(tmp_path / "x.tsv", text)).examples()) == [
        triple("0", "say", 'He said "hi" to us'),
        triple("1", '"quoted"', '"a" and "b"'),
        triple("2", "c", '"d ""e"" " f'),
    ]


def test_damaged_parquet_names_the_row_and_field(tmp_path: Path) -> None:
    rows = [{"anchor": f"anchor {i} {i * 7919 % 1009}", "positive": f"p {i}"} for i in range(20_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", use_dictionary=False)
    whole = (tmp_path / "x.parquet").read_bytes()
    for place in (40, len(whole) // 3, len(whole) // 2):
        (tmp_path / "x.parquet").write_bytes(whole[:place] + b"\xff" * 200 + whole[place + 200 :])
        with pytest.raises(
            DataError, match=r"x\.parquet, row \d+: (expected a Parquet file that is whole|field '\w+': expected UTF-8)"
        ):
            list(opened(tmp_path / "x.parquet", format="columns").examples())
    binary = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"anchor": ["a", "b"], "positive": binary}), tmp_path / "y.parquet")
    with pytest.raises(
        DataError, match=r"y\.parquet, row 2: field 'positive': expected UTF-8 text, received byte 0xe9 at 3"
    ):
        list(opened(tmp_path / "y.parquet", format="columns").examples())
    (tmp_path / "x.parquet").write_bytes(whole[:-1000])
    with pytest.raises(DataError, match=r"x\.parquet, row 1: expected a Parquet file that is whole"):
        list(opened(tmp_path / "x.parquet", format="columns").examples())


def test_a_name_that_no_file_can_have_is_told(tmp_path: Path) -> None:
    for name in ("x" * 300, "x\0y"):
        with pytest.raises(DataError, match="no such file"):
            opened(tmp_path / f"{name}.jsonl")


def test_a_parquet_column_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"anchor": ["q"], "positive": ["p"]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"positive", b"positiv\xe5"))
    with pytest.raises(DataError, match=r"x\.parquet, row 1: expected a Parquet file that is whole: 'utf-8' codec"):
        list(open_source(SourceConfig(path=str(file), format="columns")).read_examples())
