"""MS MARCO's passages, queries and judgments: dev small, TREC DL 2019 and 2020, from a folder of their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.collections.collection import Collection, collection_of, read_judgments
from retriever.data.collection import corpus_tables, query_tables
from retriever.data.records import DataError

N_PASSAGES = 8_841_823
DOWNLOADS = "https://microsoft.github.io/msmarco/Datasets"


@dataclass(frozen=True)
class Split:
    """One set of MS MARCO queries: the names its files go by (`.gz` may follow), its counts and its measures."""

    queries: tuple[str, ...]
    qrels: tuple[str, ...]
    n_queries: int  # judged
    n_judgments: int
    metrics: tuple[str, ...]
    relevance: int  # lowest grade that is relevant for binary measures
    qrels_from: str
    ir_datasets: str  # behind msmarco-passage/
    hub: tuple[str, ...]  # splits of the judgments in data sets of BEIR's form


SPLITS = {
    "dev": Split(
        ("queries.dev.small.tsv", "topics.msmarco-passage.dev-subset.txt", "topics.msmarco-passage.dev-subset.tsv"),
        ("qrels.dev.small.tsv", "qrels.msmarco-passage.dev-subset.txt"),
        6_980, 7_437, ("MRR@10", "Recall@50", "Recall@1000", "nDCG@10"), 1, DOWNLOADS,
        "dev/small", ("dev", "validation"),
    ),
    "dl19": Split(
        ("msmarco-test2019-queries.tsv", "topics.dl19-passage.txt", "topics.dl19-passage.tsv"),
        ("2019qrels-pass.txt", "qrels.dl19-passage.txt"),
        43, 9_260, ("nDCG@10", "MAP", "MRR@10", "Recall@1000"), 2, "https://trec.nist.gov/data/deep/2019qrels-pass.txt",
        "trec-dl-2019/judged", ("dl19", "test"),
    ),
    "dl20": Split(
        ("msmarco-test2020-queries.tsv", "topics.dl20.txt", "topics.dl20-passage.txt", "topics.dl20.tsv"),
        ("2020qrels-pass.txt", "qrels.dl20-passage.txt"),
        54, 11_386, ("nDCG@10", "MAP", "MRR@10", "Recall@1000"), 2,
        "https://trec.nist.gov/data/deep/2020qrels-pass.txt", "trec-dl-2020/judged", ("dl20",),
    ),
}  # fmt: skip


def read_msmarco(folder: str | Path, name: str, *, texts: bool = True) -> Collection:
    """The collection `name` (dev, dl19, dl20) of a folder with MS MARCO's files; without `texts`, its judgments only.

    Raises DataError where a file is missing (the message says where to get it) or malformed.
    """
    folder, split = Path(folder), SPLITS[name]
    qrels = read_judgments(_find(folder, split.qrels, f"judgments of {name}", split.qrels_from))
    tables = None
    if texts:
        queries = _find(folder, split.queries, f"queries of {name}", DOWNLOADS)
        corpus = _find(folder, ("collection.tsv", "corpus.jsonl", "corpus.tsv"), "passages", DOWNLOADS)
        tables = query_tables(queries), corpus_tables(corpus)
    return collection_of("msmarco", name, qrels, tables, relevance=split.relevance)


def available_splits(folder: Path) -> list[str]:
    """The splits whose judgments are in the folder. Raises DataError where there are none."""
    found = [name for name, split in SPLITS.items() if any(_present(folder, file) for file in split.qrels)]
    if not found:
        expected = "; ".join(
            f"{name}: {' or '.join(split.qrels)}, from {split.qrels_from}" for name, split in SPLITS.items()
        )
        raise DataError(f"no judgments of MS MARCO; expected one of these (--data): {expected}", folder)
    return found


def count_notes(collection: Collection, n_passages: int | None) -> list[str]:
    """Notes what differs from the official counts: a sample's figures are not MS MARCO's. `n_passages` is None if
    unknown.
    """
    name, split = collection.split, SPLITS[collection.split]
    judgments = sum(map(len, collection.qrels.values()))
    counts = (
        ("passages", n_passages, N_PASSAGES),
        ("judged queries", len(collection.qrels), split.n_queries),
        ("judgments", judgments, split.n_judgments),
    )
    other = [f"{found:,} {what}, not {official:,}" for what, found, official in counts if found not in (None, official)]
    told = f"a sample, not MS MARCO's {name}: {'; '.join(other)}; its figures compare with no published ones"
    return [f"{told} (all files: {DOWNLOADS})"] if other else []


def _present(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def _find(folder: Path, names: Sequence[str], what: str, source: str) -> Path:
    for name in names:
        if path := _present(folder, name):
            return path
    raise DataError(f"no {what}: expected {' or '.join(names)} (or .gz); to be had from {source}", folder)
