"""Queries and passages from documented functions: the collections of the training and the held-out ones.

No text is on both sides, and every text stands once.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retriever.files import write_text
from scripts.code_pairs.sources import Function
from scripts.code_pairs.split import Settings, Split, drawn, normal


@dataclass
class Collection:
    """A BEIR collection in the making."""

    corpus: dict[str, tuple[str, str]] = field(default_factory=dict)  # normalised text -> (id, text)
    queries: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # id -> (text, module or package it is held out or trained with)
    qrels: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # split -> (query id, passage id)

    def passage(self, passage_id: str, text: str) -> str:
        """Adds a text if it is new; returns the id of its passage."""
        return self.corpus.setdefault(normal(text), (passage_id, text))[0]

    def bounded(self, names: Sequence[str], passages: int, seed: int) -> Collection:
        """The splits `names` over a corpus of `passages` passages: all judged ones, and others drawn by the seed from
        every side.
        """
        qrels = {name: self.qrels[name] for name in names}
        judged = {passage for pairs in qrels.values() for _, passage in pairs}
        others = sorted(
            (passage for passage, _ in self.corpus.values() if passage not in judged),
            key=lambda passage: drawn(seed, passage),
        )
        kept = judged.union(others[: max(0, passages - len(judged))])
        corpus = {key: passage for key, passage in self.corpus.items() if passage[0] in kept}
        return Collection(corpus, self.queries, qrels)

    def files(self) -> dict[str, str]:
        """File name -> content, in BEIR's formats. The metadata of a query names its module."""
        corpus = ({"_id": passage_id, "title": "", "text": text} for passage_id, text in self.corpus.values())
        queries = (
            {"_id": query_id, "text": text, "metadata": {"module": module}}
            for query_id, (text, module) in self.queries.items()
        )
        texts = {"corpus.jsonl": _lines(map(json.dumps, corpus)), "queries.jsonl": _lines(map(json.dumps, queries))}
        for split, pairs in self.qrels.items():
            texts[f"qrels/{split}.tsv"] = _lines(
                ["query-id\tcorpus-id\tscore", *(f"{query}\t{passage}\t1" for query, passage in pairs)]
            )
        return texts

    def write(self, folder: Path) -> None:
        """Writes the BEIR folder."""
        for name, text in self.files().items():
            write_text(folder / name, text)

    def judge(
        self,
        name: str,
        asked: Sequence[Sequence[Function]],
        split: Split,
        passage: Callable[[Function], tuple[str, str]],
    ) -> None:
        """Adds the split `name`: one query, the shared summary, for each list of functions in `asked`. `passage` gives
        the id and the text of a function's positive.

        A function whose text is "" has no positive. A query without positives is left out.
        """
        judged = self.qrels[name] = []
        for sharing in asked:
            found = [passage(function) for function in sharing]
            positives = dict.fromkeys(self.passage(passage_id, text) for passage_id, text in found if text)
            if positives:
                first = sharing[0]
                query = f"{first.id}#summary"  # BEIR's evaluation drops a passage whose id is the query's
                self.queries[query] = (first.summary, split.family[first.id])
                judged += [(query, positive) for positive in positives]


def code_collection(split: Split, settings: Settings) -> Collection:
    """First paragraph -> code. The functions of every side are passages. Functions with the same first paragraph are
    positives of one query.
    """
    collection = Collection()
    for name, functions in (("train", split.train), ("dev", split.dev), ("test", split.test)):
        for function in functions:
            collection.passage(function.id, function.code)
        asked = _by_summary(functions)
        if name != "train":
            asked = _at_most(settings.max_test_per_module, asked, split, settings.seed)
        collection.judge(name, asked, split, lambda function: (function.id, function.code))
    return collection


def details_collection(split: Split) -> Collection:
    """First paragraph -> rest of the docstring, for the training side.

    This is a separate collection: with prose among the code, telling prose from code would answer the held-out queries.
    """
    collection = Collection()
    collection.judge(
        "train", _by_summary(split.train), split, lambda function: (f"{function.id}#details", function.details)
    )
    return collection


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _by_summary(functions: Sequence[Function]) -> list[list[Function]]:
    sharing: dict[str, list[Function]] = defaultdict(list)
    for function in functions:
        sharing[normal(function.summary)].append(function)
    return list(sharing.values())


def _at_most(limit: int, asked: list[list[Function]], split: Split, seed: int) -> list[list[Function]]:
    """The queries of at most `limit` functions a family, drawn by the seed, in the order of the source."""
    functions: Counter[str] = Counter()
    kept = []
    for position in sorted(range(len(asked)), key=lambda i: drawn(seed, asked[i][0].id)):
        family = split.family[asked[position][0].id]
        if functions[family] + len(asked[position]) <= limit:
            functions[family] += len(asked[position])
            kept.append(position)
    return [asked[position] for position in sorted(kept)]
