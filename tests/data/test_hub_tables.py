"""Hugging Face data sets by name and from save_to_disk folders read as their files would. A local folder stands for a
repository.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from retriever.config import SourceConfig
from retriever.data import hub_tables
from retriever.data.formats import DataError, Example, Passage, Source, open_source

RECORDS = [
    {
        "query_id": str(i),
        "query": f"query {i}",
        "positive_passages": [{"docid": f"{i}p", "title": "T", "text": f"positive {i}"}],
        "negative_passages": [{"docid": f"{i}n{j}", "title": "", "text": f"negative {i}.{j}"} for j in range(i % 3)],
    }
    for i in range(10)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.chdir(tmp_path)


def opened(**settings: Any) -> Source:
    return open_source(SourceConfig(**settings))


def repository(name: str, *subsets: tuple[str, str, list[dict[str, Any]]]) -> str:
    """A folder laid out as a data set repository, with (subset, split, records) each in a Parquet file."""
    folder = Path(name)
    folder.mkdir()
    configs: dict[str, list[str]] = {}
    for subset, split, records in subsets:
        datasets.Dataset.from_list(records).to_parquet(folder / f"{subset}-{split}.parquet")
        configs.setdefault(subset, []).append(f"  - split: {split}\n    path: {subset}-{split}.parquet\n")
    listed = "".join(f"- config_name: {subset}\n  data_files:\n{''.join(splits)}" for subset, splits in configs.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return name


def check_tevatron(source: Source, count: int = 10) -> None:
    assert source.format == "tevatron"
    examples = list(source.examples())
    assert len(examples) == count
    assert examples[2] == Example(
        "2",
        "query 2",
        (Passage("2p", "positive 2", "T"),),
        (Passage("2n0", "negative 2.0"), Passage("2n1", "negative 2.1")),
    )


def test_by_name_subset_split_and_from_disk_with_one_fingerprint() -> None:
    name = repository(
        "acme", ("default", "train", RECORDS), ("small", "train", RECORDS[:4]), ("small", "dev", RECORDS[:3])
    )
    named = opened(name=name)
    check_tevatron(named)
    check_tevatron(opened(name=f"{name}:small"), 4)
    check_tevatron(opened(name=f"{name}:small", split="dev"), 3)
    datasets.Dataset.from_list(RECORDS).save_to_disk("saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk("saved-splits")
    for folder in ("saved", "saved-splits"):
        source = opened(path=folder)
        check_tevatron(source)
        assert source.fingerprint() == named.fingerprint()
    assert opened(name=f"{name}:small").fingerprint() != named.fingerprint()


def test_a_streamed_data_set_is_read_without_a_copy() -> None:
    """Its rows are those of the whole one. At the hub, its commit stands for them in the fingerprint."""
    name = repository("acme", ("default", "train", RECORDS), ("small", "train", RECORDS[:4]))
    streamed = opened(name=name, streaming=True)
    check_tevatron(streamed)
    check_tevatron(opened(name=f"{name}:small", streaming=True), 4)
    assert not [*datasets.config.HF_DATASETS_CACHE.glob("**/*.arrow")], "a copy"
    assert streamed.fingerprint() == opened(name=name, streaming=True).fingerprint()
    assert streamed.fingerprint() != opened(name=f"{name}:small", streaming=True).fingerprint()
    table = hub_tables.named_table(name, None, "train", streaming=True)
    assert replace(table, commit="c1").digest() != replace(table, commit="c2").digest() != table.digest()


def test_a_view_of_a_dataset_has_its_own_fingerprint_and_rows() -> None:
    whole = datasets.Dataset.from_list(RECORDS)
    whole.select([3, 4, 5]).save_to_disk("view")
    datasets.Dataset.from_list(RECORDS[3:6]).save_to_disk("copy")
    assert [e.query_id for e in opened(path="view").examples()] == ["3", "4", "5"]
    assert opened(path="view").fingerprint() == opened(path="copy").fingerprint()


def test_columns_and_version_2_with_a_corpus_by_name() -> None:
    pairs = repository("pairs", ("default", "train", [{"anchor": "a", "positive": "p"}]))
    assert list(opened(name=pairs).examples()) == [Example("0", "a", (Passage(None, "p"),))]
    record = {"query_id": "q", "query_text": "who", "positive_document_ids": ["1"], "negative_document_ids": ["2", "3"]}
    name = repository("version2", ("default", "train", [record]))
    corpus = repository(
        "version2-corpus", ("default", "train", [{"docid": str(i), "text": f"text {i}"} for i in range(4)])
    )
    source = opened(name=name, corpus=corpus)
    assert list(source.examples()) == [Example("q", "who", (Passage("1"),), (Passage("2"), Passage("3")))]
    assert [passage.text for passage in source.corpus()] == ["text 0", "text 1", "text 2", "text 3"]


@pytest.mark.parametrize("own_judgments", [True, False])
def test_beir_repositories(own_judgments: bool) -> None:
    texts = (
        ("corpus", "corpus", [{"_id": "d", "title": "T", "text": "x"}]),
        ("queries", "queries", [{"_id": "q", "text": "why"}]),
    )
    judged = ("default", "train", [{"query-id": "q", "corpus-id": "d", "score": 1.0}])
    name = repository("set", *texts, *([judged] if own_judgments else []))
    if not own_judgments:
        repository("set-qrels", judged)
    source = opened(name=name)
    assert source.format == "beir"
    assert list(source.examples()) == [Example("q", "why", (Passage("d"),))]
    assert list(source.corpus()) == [Passage("d", "x", "T")]


def test_errors_name_the_data_set_and_row() -> None:
    with pytest.raises(DataError, match="Hugging Face data set 'acme/absent'"):
        opened(name="acme/absent")
    name = repository("acme", ("default", "train", RECORDS))
    with pytest.raises(DataError, match="'acme', split 'test'"):
        opened(name=name, split="test")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk("saved")
    with pytest.raises(DataError, match=r"saved: expected split 'dev' .*, found train"):
        opened(path="saved", split="dev")
    with pytest.raises(DataError, match="format 'msmarco' is read from its own files"):
        opened(name=name, format="msmarco")
    broken = repository("broken", ("default", "train", [RECORDS[0], {**RECORDS[1], "query": None}]))
    with pytest.raises(DataError, match=r"broken \[train\], row 2: field 'query': expected text, received None"):
        list(opened(name=broken).examples())


def webdataset(name: str, **members: bytes) -> str:
    """A folder with one tar of one example, a file for every member; `__` in a name is a dot."""
    folder = Path(name)
    folder.mkdir()
    with tarfile.open(folder / "train.tar", "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(f"0.{member.replace('__', '.')}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return name


class _Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def test_members_of_a_webdataset_are_never_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the installed `datasets` would, as versions before 4 do."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    monkeypatch.setitem(WebDataset.DECODERS, "pyd", pickle.loads)
    name = webdataset("pickles", anchor__txt=b"a", positive__pyd=pickle.dumps(_Touch()))
    source = opened(name=name, format="columns", columns=("anchor.txt", "positive.pyd"))
    with pytest.raises(DataError, match=r"pickles \[train\], row 1: field 'positive\.pyd': expected text, received b"):
        list(source.examples())
    assert not Path("unpickled").exists()


def test_a_data_set_that_needs_code_of_its_own_is_refused() -> None:
    Path("scripted").mkdir()
    (Path("scripted") / "scripted.py").write_text("print('run')")
    with pytest.raises(DataError, match=r"'scripted'.*: RuntimeError: Dataset scripts are no longer"):
        opened(name="scripted")


def test_damaged_files_are_told_in_one_line() -> None:
    """A WebDataset's member that is no JSON, a tar cut off, a saved data set without a file or with a damaged one."""
    with pytest.raises(DataError, match="'members', split 'train'.*: JSONDecodeError: Expecting"):
        opened(name=webdataset("members", json=b"{"))
    tar = Path(webdataset("cut", txt=b"a" * 2000)) / "train.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"'cut', split 'train'.*: \w+Error: "):
        opened(name="cut")
    datasets.Dataset.from_list(RECORDS).save_to_disk("saved")
    arrow = next(Path("saved").glob("*.arrow"))
    whole = arrow.read_bytes()
    for damaged in (whole[:100], whole[:-40], b"x" * len(whole)):
        arrow.write_bytes(damaged)
        with pytest.raises(DataError, match="saved.*expected a .* that is whole") as caught:
            list(opened(path="saved").examples())
        assert "\n" not in str(caught.value)
    arrow.unlink()
    with pytest.raises(DataError, match=r"saved: expected a folder of save_to_disk that is whole: \w+Error: "):
        opened(path="saved")
    (Path("saved") / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved: expected a folder of save_to_disk that is whole: JSONDecodeError"):
        opened(path="saved")
