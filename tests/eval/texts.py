"""A small collection of real English: the paragraphs of Python's own help texts, each topic's first sentence as its
query.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from tests import beir


@dataclass(frozen=True)
class Texts:
    """Passages by id, queries by id, and grades 0..3: a topic's paragraphs, the first ones best."""

    passages: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def help_texts(n_topics: int = 24) -> Texts:
    """`n_topics` queries over the paragraphs of their topics and of as many others."""
    passages: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number, topic in enumerate(sorted(topics)[: 2 * n_topics]):
        paragraphs = [" ".join(part.split()) for part in topics[topic].split("\n\n") if len(part.split()) > 8][:6]
        ids = [f"{number}{place}" for place in range(len(paragraphs))]
        passages |= dict(zip(ids, paragraphs, strict=True))
        if number % 2 == 0 and len(paragraphs) >= 3:
            query_id = str(1000 - number)
            queries[query_id] = paragraphs[1].partition(". ")[0]
            qrels[query_id] = {passage_id: max(3 - place, 0) for place, passage_id in enumerate(ids)}
    return Texts(passages, queries, qrels)


def write_beir(folder: Path, texts: Texts) -> Path:
    """The collection as a BEIR folder with the splits test and half (every second query)."""
    corpus = ({"_id": i, "title": text[:20], "text": text} for i, text in texts.passages.items())
    half = dict(list(texts.qrels.items())[::2])
    return beir.write_beir(folder, corpus, texts.queries | {"unjudged": "how to"}, test=texts.qrels, half=half)


def write_msmarco(folder: Path, texts: Texts) -> Path:
    """The collection in MS MARCO's formats: dev small with one positive a query, and TREC DL 2019 with grades."""
    folder.mkdir(parents=True)
    (folder / "collection.tsv").write_text(
        "".join(f"{i}\t{text}\n" for i, text in texts.passages.items()), encoding="utf-8"
    )
    queries = "".join(f"{i}\t{text}\n" for i, text in [*texts.queries.items(), ("7", "an unjudged query")])
    for name in ("queries.dev.small.tsv", "msmarco-test2019-queries.tsv"):
        (folder / name).write_text(queries, encoding="utf-8")
    best = {query_id: max(grades, key=lambda p: grades[p]) for query_id, grades in texts.qrels.items()}
    (folder / "qrels.dev.small.tsv").write_text("".join(f"{q}\t0\t{p}\t1\n" for q, p in best.items()))
    lines = (f"{q} Q0 {p} {grade}\n" for q, grades in texts.qrels.items() for p, grade in grades.items())
    (folder / "2019qrels-pass.txt").write_text("".join(lines))
    return folder
