"""The collections made of documented functions: queries, passages and judgments, each text once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.code_pairs.functions import Function
from scripts.code_pairs.split import Member, Split, drawn, normal


@dataclass
class Collection:
    """A BEIR collection in the making."""

    corpus: dict[str, tuple[str, str]] = field(default_factory=dict)  # normalised text -> (id, text)
    queries: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> (text, module it is held out or trained with)
    qrels: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # split -> (query id, passage id)

    def passage(self, passage_id: str, text: str) -> str:
        """Adds a text unless it is there; returns the id it is known by."""
        return self.corpus.setdefault(normal(text), (passage_id, text))[0]


def code_collection(split: Split, seed: int, max_test_per_module: int) -> Collection:
    """First paragraph -> code. Every function of every side is a passage; a shared docstring is one query with several positives."""
    collection = Collection()
    for name, members in (("train", split.train), ("dev", split.dev), ("test", split.test)):
        for member in members:
            collection.passage(member.function.id, member.function.code)
        asked = _by_summary(members)
        if name != "train":
            asked = _at_most(max_test_per_module, asked, split, seed)
        judged = collection.qrels[name] = []
        for sharing in asked:
            query = _add_query(collection, sharing, split)
            positives = [collection.passage(member.function.id, member.function.code) for member in sharing]
            judged += [(query, positive) for positive in dict.fromkeys(positives)]
    return collection


def details_collection(split: Split) -> Collection:
    """First paragraph -> rest of the docstring, of the training side only.

    A collection of its own: prose among the code would turn the held-out search into telling prose from code.
    """
    collection = Collection()
    judged = collection.qrels["train"] = []
    for sharing in _by_summary(split.train):
        detailed = [member.function for member in sharing if member.function.details]
        if not detailed:
            continue
        query = _add_query(collection, sharing, split)
        positives = [collection.passage(f"{function.id}#details", function.details) for function in detailed]
        judged += [(query, positive) for positive in dict.fromkeys(positives)]
    return collection


def _add_query(collection: Collection, sharing: Sequence[Member], split: Split) -> str:
    function: Function = sharing[0].function
    query_id = f"{function.id}#summary"  # BEIR's evaluation drops a passage whose id is the query's
    collection.queries[query_id] = (function.summary, split.family[sharing[0].unit])
    return query_id


def _by_summary(members: Sequence[Member]) -> list[list[Member]]:
    sharing: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        sharing[normal(member.function.summary)].append(member)
    return list(sharing.values())


def _at_most(limit: int, asked: list[list[Member]], split: Split, seed: int) -> list[list[Member]]:
    """Queries in an order drawn by the seed while their functions stay within `limit` a family; in source order again."""
    functions: Counter[str] = Counter()
    kept = []
    for position in sorted(range(len(asked)), key=lambda i: drawn(seed, asked[i][0].function.id)):
        family = split.family[asked[position][0].unit]
        if functions[family] + len(asked[position]) <= limit:
            functions[family] += len(asked[position])
            kept.append(position)
    return [asked[position] for position in sorted(kept)]
