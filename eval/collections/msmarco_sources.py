"""MS MARCO's passages, queries and judgments from elsewhere than a folder of its files: ir_datasets' cache, or Hugging
Face data sets.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from eval.collections.collection import Collection, collection_of, relevant
from eval.collections.msmarco import Split
from retriever.config import ConfigError
from retriever.data.collection import qrels_of
from retriever.data.hub_tables import judgments_name, loading, named_table
from retriever.data.records import DataError, Record


class PairTable:
    """(id, text) pairs as records; `read` gives them anew each time."""

    def __init__(self, label: str, read: Callable[[], Iterable[tuple[str, str]]]) -> None:
        self.label = label  # what messages call it
        self._read = read

    def records(self) -> Iterator[Record]:
        """The pairs, numbered from 1. Raises DataError where they cannot be had."""
        with loading(f"ir_datasets {self.label!r}"):
            for row, (passage_id, text) in enumerate(self._read(), 1):
                yield Record({"id": passage_id, "text": text}, self.label, row, "row")

    def digest(self) -> str:
        """blake2b of all ids and texts."""
        hasher = hashlib.blake2b(digest_size=16)
        for record in self.records():
            for value in (record.identifier("id"), record.text("text")):
                encoded = value.encode("utf-8", "surrogatepass")
                hasher.update(len(encoded).to_bytes(8, "little") + encoded)
        return hasher.hexdigest()


def read_ir_datasets(root: str, name: str, split: Split, *, texts: bool = True) -> Collection:
    """The collection `name` as ir_datasets has it, `<root>/<split.ir_datasets>`; what its cache lacks, it downloads.

    Raises ConfigError where ir_datasets is not installed, DataError where it has no such collection or cannot download
    it.
    """
    identifier = f"{root}/{split.ir_datasets}"
    try:
        library = importlib.import_module("ir_datasets")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--source ir_datasets: expected the package ir_datasets, which is not installed (pip install ir_datasets); "
            "its cache is ~/.ir_datasets or $IR_DATASETS_HOME"
        ) from error
    with loading(f"ir_datasets {identifier!r}"):
        found = library.load(identifier)
        qrels: dict[str, dict[str, int]] = {}
        for judgment in found.qrels_iter():
            qrels.setdefault(judgment.query_id, {})[judgment.doc_id] = int(judgment.relevance)
    relevant(qrels, identifier)
    queries = PairTable(
        f"{identifier} queries", lambda: ((query.query_id, query.text) for query in found.queries_iter())
    )
    corpus = PairTable(f"{identifier} docs", lambda: ((passage.doc_id, passage.text) for passage in found.docs_iter()))
    tables = ([queries], [corpus]) if texts else None
    return collection_of("msmarco", name, qrels, tables, relevance=split.relevance)


def read_hub(data: str, name: str, split: Split, corpus: str | None = None, *, texts: bool = True) -> Collection:
    """The collection `name` from the Hugging Face data set `data` of BEIR's form: subsets corpus, queries and judgments
    by split.

    Judgments may stand in `<data>-qrels` instead. `corpus` names another data set, or `name:subset`, for the passages.
    Raises DataError where something cannot be loaded, or no split of the judgments is the one asked for.
    """
    judgments, splits = _judgments(data)
    known = next((word for word in split.hub if word in splits), None)
    if known is None:
        raise DataError(
            f"Hugging Face data set {judgments!r}: expected a split {' or '.join(split.hub)} for {name}, "
            f"found {', '.join(splits)}"
        )
    qrels = relevant(qrels_of(named_table(judgments, split=known)), judgments)
    tables = ([named_table(f"{data}:queries")], [named_table(corpus or f"{data}:corpus")]) if texts else None
    return collection_of("msmarco", name, qrels, tables, relevance=split.relevance)


def hub_splits(data: str, splits: dict[str, Split]) -> list[str]:
    """The members of `splits` with judgments in the data set. Raises DataError if there are none."""
    judgments, there = _judgments(data)
    found = [name for name, split in splits.items() if any(word in there for word in split.hub)]
    if not found:
        expected = "; ".join(f"{name}: {' or '.join(split.hub)}" for name, split in splits.items())
        raise DataError(
            f"Hugging Face data set {judgments!r}: expected one of the splits {expected}; found {', '.join(there)}"
        )
    return found


def _judgments(data: str) -> tuple[str, Sequence[str]]:
    """(name, splits) of the data set's judgments."""
    import datasets

    name = judgments_name(data)
    repository, _, subset = name.partition(":")
    with loading(f"Hugging Face data set {name!r}"):
        return name, datasets.get_dataset_split_names(repository, subset or None)
