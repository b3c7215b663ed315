"""The collections made of documented functions: queries, passages and judgments, each text once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retriever.files import write_text
from scripts.code_pairs.functions import Function
from scripts.code_pairs.split import Member, Split, drawn, normal


@dataclass
class Collection:
    """A BEIR collection in the making."""

    corpus: dict[str, tuple[str, str]] = field(default_factory=dict)  # normalised text -> (id, text)
    queries: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # id -> (text, module it is held out or trained with)
    qrels: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # split -> (query id, passage id)

    def passage(self, passage_id: str, text: str) -> str:
        """Adds a text unless it is there; returns the id it is known by."""
        return self.corpus.setdefault(normal(text), (passage_id, text))[0]

    def bounded(self, name: str, passages: int, seed: int) -> Collection:
        """The split `name` with all its passages, and others up to `passages` in all, drawn by the seed whatever side
        they are on.
        """
        judged = {passage for _, passage in self.qrels[name]}
        others = sorted(
            (passage for passage, _ in self.corpus.values() if passage not in judged),
            key=lambda passage: drawn(seed, passage),
        )
        kept = judged.union(others[: max(0, passages - len(judged))])
        corpus = {key: passage for key, passage in self.corpus.items() if passage[0] in kept}
        return Collection(corpus, self.queries, {name: self.qrels[name]})

    def files(self) -> dict[str, str]:
        """File name -> content, in BEIR's formats; a query's module goes into its metadata."""
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
        self, name: str, asked: Sequence[Sequence[Member]], split: Split, passage: Callable[[Function], tuple[str, str]]
    ) -> None:
        """Adds a split: a query for each list of members, their first paragraph. `passage` gives the id and text of a
        function's positive.

        A function whose text is "" has no positive, a query without positives is left out.
        """
        judged = self.qrels[name] = []
        for sharing in asked:
            found = [passage(member.function) for member in sharing]
            positives = dict.fromkeys(self.passage(passage_id, text) for passage_id, text in found if text)
            if positives:
                first = sharing[0]
                query = f"{first.function.id}#summary"  # BEIR's evaluation drops a passage whose id is the query's
                self.queries[query] = (first.function.summary, split.family[first.unit])
                judged += [(query, positive) for positive in positives]


def code_collection(split: Split, seed: int, max_test_per_module: int) -> Collection:
    """First paragraph -> code. Every function of every side is a passage; a shared docstring is one query with several
    positives.
    """
    collection = Collection()
    for name, members in (("train", split.train), ("dev", split.dev), ("test", split.test)):
        for member in members:
            collection.passage(member.function.id, member.function.code)
        asked = _by_summary(members)
        if name != "train":
            asked = _at_most(max_test_per_module, asked, split, seed)
        collection.judge(name, asked, split, lambda function: (function.id, function.code))
    return collection


def details_collection(split: Split) -> Collection:
    """First paragraph -> rest of the docstring, of the training side only.

    A collection of its own: prose among the code would turn the held-out search into telling prose from code.
    """
    collection = Collection()
    collection.judge(
        "train", _by_summary(split.train), split, lambda function: (f"{function.id}#details", function.details)
    )
    return collection


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _by_summary(members: Sequence[Member]) -> list[list[Member]]:
    sharing: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        sharing[normal(member.function.summary)].append(member)
    return list(sharing.values())


def _at_most(limit: int, asked: list[list[Member]], split: Split, seed: int) -> list[list[Member]]:
    """Queries in an order drawn by the seed while their functions stay within `limit` a family; in source order
    again.
    """
    functions: Counter[str] = Counter()
    kept = []
    for position in sorted(range(len(asked)), key=lambda i: drawn(seed, asked[i][0].function.id)):
        family = split.family[asked[position][0].unit]
        if functions[family] + len(asked[position]) <= limit:
            functions[family] += len(asked[position])
            kept.append(position)
    return [asked[position] for position in sorted(kept)]
