"""MS MARCO from ir_datasets (a module of its shape) and from Hugging Face data sets (folders of theirs): the figures of
the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import datasets
import pytest

from eval import msmarco
from eval.collections.msmarco import SPLITS
from eval.collections.msmarco_sources import PairTable, read_hub, read_ir_datasets
from retriever.data.records import DataError
from tests.commands import assert_refused
from tests.eval.texts import Texts, help_texts, write_msmarco


class Doc(NamedTuple):
    doc_id: str
    text: str


class Query(NamedTuple):
    query_id: str
    text: str


class Judgment(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int
    iteration: str


@pytest.fixture(scope="module")
def texts() -> Texts:
    return help_texts(12)


def _best(texts: Texts) -> dict[str, dict[str, int]]:
    """What `write_msmarco` takes for dev: the best passage of each query."""
    return {query_id: {max(grades, key=lambda p: grades[p]): 1} for query_id, grades in texts.qrels.items()}


@pytest.fixture(scope="module")
def folder_results(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the plain files by split."""
    root = tmp_path_factory.mktemp("files")
    msmarco.main(["--bm25", "--data", str(write_msmarco(root / "marco", texts)), "--output-dir", str(root / "out")])
    return _results(root / "out", "dev", "dl19")


def _results(folder: Path, *splits: str) -> dict[str, Any]:
    return {split: json.loads((folder / f"{split}.json").read_text()) for split in splits}


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for split, result in found.items():
        assert result["metrics"] == expected[split]["metrics"] and 0 < result["metrics"]["nDCG@10"] < 1
        assert result["data"] == expected[split]["data"] and result["relevance"] == expected[split]["relevance"]
        assert all(
            result["fingerprints"][key] == expected[split]["fingerprints"][key] for key in ("run", "queries", "qrels")
        )


@pytest.fixture
def fake_ir_datasets(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """ir_datasets with dev and TREC DL 2019 in its cache; 2020 cannot be downloaded. Counts how often the passages are
    read.
    """
    reads = {"docs": 0}

    class Dataset:
        def __init__(self, qrels: dict[str, dict[str, int]] | None) -> None:
            self._qrels = qrels

        def docs_iter(self) -> Iterator[Doc]:
            reads["docs"] += 1
            return (Doc(i, text) for i, text in texts.passages.items())

        def queries_iter(self) -> Iterator[Query]:
            return (Query(i, text) for i, text in [*texts.queries.items(), ("7", "an unjudged query")])

        def qrels_iter(self) -> Iterator[Judgment]:
            if self._qrels is None:
                raise ConnectionError("no route to trec.nist.gov\nlong explanation")
            return (Judgment(q, p, grade, "0") for q, grades in self._qrels.items() for p, grade in grades.items())

    known = {
        "dev/small": Dataset(_best(texts)),
        "trec-dl-2019/judged": Dataset(texts.qrels),
        "trec-dl-2020/judged": Dataset(None),
    }
    module = ModuleType("ir_datasets")

    def load(name: str) -> Dataset:
        return known[name.removeprefix("msmarco-passage/")]

    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ir_datasets", module)
    return reads


def test_ir_datasets_gives_the_figures_of_the_files(
    fake_ir_datasets: dict[str, int], folder_results: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    msmarco.main(["--bm25", "--source", "ir_datasets", "--split", "dev", "dl19", "--output-dir", str(tmp_path)])
    _same(_results(tmp_path, "dev", "dl19"), folder_results)
    assert "a sample, not MS MARCO's dl19" in capsys.readouterr().out  # counts are checked as for files


def test_a_run_is_measured_without_reading_passages(
    fake_ir_datasets: dict[str, int], texts: Texts, tmp_path: Path
) -> None:
    lines = [f"{query_id} Q0 {next(iter(grades))} 1 1.0 x\n" for query_id, grades in _best(texts).items()]
    (tmp_path / "run.trec").write_text("".join(lines))
    run = ["--run", str(tmp_path / "run.trec"), "--output-dir", str(tmp_path / "out")]
    msmarco.main([*run, "--source", "ir_datasets", "--split", "dev"])
    assert _results(tmp_path / "out", "dev")["dev"]["metrics"]["MRR@10"] == 1 and fake_ir_datasets["docs"] == 0


def test_what_ir_datasets_lacks_is_said_in_one_line(
    fake_ir_datasets: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(
        msmarco.main,
        ["--bm25", "--source", "ir_datasets"],
        r"msmarco-passage/trec-dl-2020/judged': ConnectionError: no route to trec.nist.gov$",
    )
    with pytest.raises(DataError, match="ir_datasets 'other/dev/small': KeyError"):
        read_ir_datasets("other", "dev", SPLITS["dev"])
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    assert_refused(
        msmarco.main,
        ["--bm25", "--source", "ir_datasets", "--split", "dev"],
        "expected the package ir_datasets, which is not installed .pip install ir_datasets",
    )


def test_a_digest_is_of_ids_and_texts() -> None:
    pairs = [("a", "one"), ("b", "two")]
    others = [[("a", "one"), ("b", "twos")], [("a", "one")], [("ao", "ne"), ("b", "two")], [("b", "two"), ("a", "one")]]
    found = {PairTable("x", lambda rows=rows: rows).digest() for rows in (pairs, *others)}  # type: ignore[misc]
    assert len(found) == 5 and PairTable("y", lambda: iter(pairs)).digest() in found


def _hub_folder(folder: Path, parts: dict[tuple[str, str], list[dict[str, Any]]]) -> Path:
    """A data set with `parts` (subset, split) as JSON lines, described by a card as on the hub."""
    folder.mkdir()
    card = ""
    for (subset, split), rows in parts.items():
        (folder / f"{subset}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"  - split: {split}\n    path: {subset}-{split}.jsonl\n"
        card += files if f"config_name: {subset}\n" in card else f"- config_name: {subset}\n  data_files:\n{files}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    return folder


@pytest.fixture
def parts(texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The rows of a data set of BEIR's form."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"_id": i, "title": "", "text": text} for i, text in texts.passages.items()],
        "queries": [{"_id": i, "text": text} for i, text in [*texts.queries.items(), ("7", "an unjudged query")]],
    }
    for name, qrels in (("dev", _best(texts)), ("dl19", texts.qrels)):
        rows[name] = [
            {"query-id": q, "corpus-id": p, "score": float(g)} for q, grades in qrels.items() for p, g in grades.items()
        ]
    return rows


def test_hugging_face_gives_the_figures_of_the_files(
    parts: dict[str, list[dict[str, Any]]], folder_results: dict[str, Any], tmp_path: Path
) -> None:
    """Judgments inside (splits dev and test, as mteb/msmarco has them) and beside (validation and test, as
    BeIR/msmarco).
    """
    texts = {("corpus", "corpus"): parts["corpus"], ("queries", "queries"): parts["queries"]}
    inside = _hub_folder(
        tmp_path / "inside", texts | {("default", "dev"): parts["dev"], ("default", "test"): parts["dl19"]}
    )
    beside = _hub_folder(tmp_path / "beside", texts)
    _hub_folder(
        tmp_path / "beside-qrels", {("default", "validation"): parts["dev"], ("default", "test"): parts["dl19"]}
    )
    for data in (inside, beside):
        out = tmp_path / f"{data.name}-out"
        msmarco.main(["--bm25", "--source", "huggingface", "--data", str(data), "--output-dir", str(out)])
        _same(_results(out, "dev", "dl19"), folder_results)
        assert not (out / "dl20.json").exists()
    assert_refused(
        msmarco.main,
        ["--bm25", "--source", "huggingface", "--data", str(inside), "--split", "dl20"],
        "expected a split dl20 for dl20, found dev, test",
    )


def test_passages_may_come_from_another_data_set(
    parts: dict[str, list[dict[str, Any]]], texts: Texts, tmp_path: Path
) -> None:
    """With the columns docid, title and text, as a corpus with titles has them; without it, a data set lacks its
    passages.
    """
    data = _hub_folder(tmp_path / "data", {("queries", "queries"): parts["queries"], ("default", "dev"): parts["dev"]})
    titled = [{"docid": row["_id"], "title": "A title", "text": row["text"]} for row in parts["corpus"]]
    corpus = _hub_folder(tmp_path / "titled", {("default", "train"): titled})
    collection = read_hub(str(data), "dev", SPLITS["dev"], str(corpus))
    assert dict(collection.passages("join", " ")) == {i: f"A title {text}" for i, text in texts.passages.items()}
    assert collection.queries == texts.queries and collection.qrels == _best(texts)
    with pytest.raises(DataError, match="Hugging Face data set .*data:corpus"):
        read_hub(str(data), "dev", SPLITS["dev"])
    judgments = read_hub(str(data), "dev", SPLITS["dev"], texts=False)
    assert judgments.qrels == collection.qrels and not judgments.corpus


def test_a_data_set_without_judgments_is_refused(parts: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    data = _hub_folder(tmp_path / "data", {("corpus", "corpus"): parts["corpus"], ("default", "train"): parts["dev"]})
    assert_refused(
        msmarco.main,
        ["--bm25", "--source", "huggingface", "--data", str(data)],
        "expected one of the splits dev: dev or validation; dl19: .*; found train",
    )
    assert_refused(
        msmarco.main,
        ["--bm25", "--source", "huggingface", "--data", str(tmp_path / "nowhere")],
        "Hugging Face data set .*/nowhere",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: expected a folder with MS MARCO's files, or --source ir_datasets or huggingface"),
        (["--data", "x", "--corpus", "y"], "--corpus y: expected --source huggingface; received --source folder"),
        (["--source", "elsewhere"], "invalid choice: 'elsewhere'"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str) -> None:
    assert_refused(msmarco.main, ["--bm25", *arguments], message)
