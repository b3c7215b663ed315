"""A collection to evaluate on: passages, judged queries, judgments, and the fingerprints of the three."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.measures import Qrels, Scores, measure_run
from eval.trec import Run
from retriever.data.collection import (
    check_corpus,
    corpus_tables,
    passages_of,
    qrels_of,
    query_tables,
    query_texts,
)
from retriever.data.files import Table
from retriever.data.folders import find_qrels
from retriever.data.formats import read_qrels
from retriever.data.hub_tables import collection_tables
from retriever.data.records import DataError, final_text, shortened_note
from retriever.wording import counted

Tables = tuple[Sequence[Table], Sequence[Table]]  # of queries, and of the corpus
HUB = "hf:"  # in front of the name of a Hugging Face data set


@dataclass(frozen=True)
class Collection:
    """One test collection: a corpus with the queries and judgments of one split."""

    name: str
    split: str
    queries: Mapping[str, str]  # query id -> text, the judged queries only; empty where texts were not read
    qrels: Mapping[str, Mapping[str, int]]  # query id -> passage id -> grade
    corpus: Sequence[Table]  # empty where texts were not read
    relevance: int = 1  # lowest grade that is relevant for binary measures
    exclude_self: bool = False  # BEIR: a passage whose id is the query's is no answer

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the corpus's tables: splits of one corpus share them."""
        return tuple(table.label for table in self.corpus)

    def passages(self, title: Literal["join", "drop"], separator: str) -> Iterator[tuple[str, str]]:
        """(id, final text) of every passage. Raises DataError at a malformed record."""
        for table in self.corpus:
            for passage in passages_of(table):
                yield str(passage.id), final_text(passage, title, separator)

    def measure(self, run: Run, metrics: Sequence[str]) -> Scores:
        """The measures of a run over this collection, for each judged query. Raises RefusedError for an unknown
        measure.
        """
        return measure_run(self.qrels, run, metrics, self.relevance)

    def check(self) -> tuple[str, ...]:
        """Reads the corpus once, before anything is encoded or indexed; returns remarks to show beside the results.

        Raises DataError for a repeated id, an id that a run file cannot hold, and a malformed record.
        """
        return tuple(note for note in (check_corpus(self.corpus), shortened_note()) if note is not None)

    def notes(self, passage_ids: Iterable[str]) -> tuple[str, ...]:
        """Remarks about the judgments and the corpus ids, printed beside the scores."""
        judged = {passage_id for grades in self.qrels.values() for passage_id in grades}
        known = judged | self.queries.keys()
        found = {passage_id for passage_id in passage_ids if passage_id in known}
        notes = []
        if absent := len(judged - found):
            notes.append(f"{absent:,} of {counted(len(judged), 'judged passage')} not in the corpus")
        if self.exclude_self and (shared := len(found & self.queries.keys())):
            query = counted(shared, "query")
            notes.append(
                f"{query} with the id of a passage, which the results leave out "
                "(BEIR's rule; --no-exclude-self keeps it)"
            )
        return tuple(notes)

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the judgments and, where texts were read, of the corpus files' bytes and of the judged queries."""
        judgments = {"qrels": fingerprint({query_id: dict(grades) for query_id, grades in self.qrels.items()})}
        if not self.corpus:
            return judgments
        return {
            "corpus": fingerprint([table.digest() for table in self.corpus]),
            "queries": fingerprint(dict(self.queries)),
            **judgments,
        }


def read_beir(
    folder: str | Path, split: str = "test", qrels: str | Path | None = None, *, texts: bool = True
) -> Collection:
    """A BEIR folder: `corpus.jsonl`, `queries.jsonl`, and `qrels/<split>.tsv` unless `qrels` names another judgments
    file.

    `hf:<name>` is a Hugging Face data set of BEIR's form (subsets corpus, queries and judgments, or these in
    `<name>-qrels`). Without `texts` only the judgments are read, which is all that measuring a run needs. Raises
    DataError where a file is missing or malformed, or a judged query has no text.
    """
    name, given = str(folder).removeprefix(HUB), None if qrels is None else read_judgments(qrels)
    if name != str(folder):
        corpus, queries, table = collection_tables(name, None, split)
        judgments = given or relevant(qrels_of(table), table.label)
        tables: Tables = [queries], [corpus]
    elif not Path(name).is_dir():
        raise DataError("no such folder; expected one with corpus.jsonl, queries.jsonl and qrels/ (--data)", name)
    else:
        judgments = given or read_judgments(find_qrels(Path(name), split))
        tables = (query_tables(Path(name), split), corpus_tables(Path(name))) if texts else ([], [])
    label = Path(name).name if name != str(folder) else Path(name).resolve().name
    return collection_of(label, split, judgments, tables if texts else None, exclude_self=True)


def collection_of(name: str, split: str, qrels: Qrels, tables: Tables | None, **more: Any) -> Collection:
    """A collection from its judgments and the tables of its queries and corpus. Without `tables` no text is read."""
    queries, corpus = tables or ((), ())
    return Collection(name, split, judged_queries(queries, qrels) if tables else {}, qrels, corpus, **more)


def read_judgments(path: str | Path) -> dict[str, dict[str, int]]:
    """As `read_qrels`. Raises DataError also where no grade is above 0."""
    return relevant(read_qrels(path), path)


def relevant(qrels: dict[str, dict[str, int]], label: str | Path) -> dict[str, dict[str, int]]:
    """Returns the judgments. Raises DataError where no grade is above 0: every measure of every run would be 0."""
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise DataError(
            "field 'score': expected a grade above 0 on some line, received none: every measure would be 0", label
        )
    return qrels


def judged_queries(tables: Sequence[Table], qrels: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """The texts of the queries that have judgments, in the file's order. Raises DataError for one without text or with
    two.
    """
    found = query_texts(tables, qrels, for_run=True)
    missing = [query_id for query_id in qrels if query_id not in found]
    if missing:
        names = ", ".join(table.label for table in tables)
        raise DataError(
            f"{len(missing):,} of {counted(len(qrels), 'judged query')} without a text, first {missing[0]!r}; "
            "expected a text for each",
            names,
        )
    return found


def fingerprint(content: object) -> str:
    """A hash of plain values (what JSON can hold), 32 hexadecimal digits."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def file_fingerprint(path: Path) -> str:
    """A hash of a file's bytes, 32 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
