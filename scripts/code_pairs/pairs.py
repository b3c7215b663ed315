"""Queries and passages from documented functions: the split into training and held-out functions, and their
collections.

Whole modules or whole packages are held out, together with their twins. No text is on both sides, and every text
stands once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scipy.cluster.hierarchy import DisjointSet

from retriever.files import write_text
from scripts.code_pairs.near_duplicates import near_duplicates, words
from scripts.code_pairs.sources import STDLIB, Function

# Copies are told from coincidences ("Close the file.", `return self._name`) by their length.
TIE_SUMMARY_WORDS = 6
TIE_CODE_LINES = 3
# Near-duplicates that tie packages.
NEAR_SUMMARY_WORDS = 8
NEAR_CODE_WORDS = 20

_TWIN_PREFIX = re.compile(r"^_(py_?)?(?=[a-z])")
_TWIN_SUFFIX = re.compile(r"_(abc|pure|py)$")


@dataclass(frozen=True)
class Settings:
    """The settings that change the pairs."""

    packages: tuple[str, ...] = (STDLIB,)
    seed: int = 0
    names: Literal["hide", "keep"] = "hide"
    test_queries: int = 700
    dev_queries: int = 150
    max_test_per_module: int = 20
    max_held_out_module: int = 60
    hold_out: Literal["modules", "packages"] = "modules"
    searched: int | None = None  # passages of the folder to evaluate in; None: there is none

    def unit(self, function: Function) -> str:
        """What the split keeps together: the function's module or package."""
        return function.unit if self.hold_out == "modules" else function.package


@dataclass(frozen=True)
class Split:
    """The functions of each side. `family` maps a function's id to the first of the units that its own is tied to."""

    train: list[Function]
    dev: list[Function]
    test: list[Function]
    family: dict[str, str]


def split_by_family(functions: Sequence[Function], settings: Settings) -> Split:
    """Assigns whole families to test until it can hold `test_queries`, then to dev, and the rest to train. Of packages,
    each goes to the side that lacks more of its queries, as there may be too few for both. The seed draws their order.

    A family of more than `max_held_out_module` functions always trains: holding it out would cost many pairs and add at
    most `max_test_per_module` queries. A held-out function is left out if its summary or its code is also on another
    side.
    """
    of_unit = _families(functions, settings)
    family = {function.id: of_unit[settings.unit(function)] for function in functions}
    sizes = Counter(family[function.id] for function in functions)
    small = [name for name in sizes if sizes[name] <= settings.max_held_out_module]
    side_of = dict.fromkeys(sizes, "train")
    asked = {"test": settings.test_queries, "dev": settings.dev_queries}
    wanted = dict(asked)
    for name in sorted(small, key=lambda name: drawn(settings.seed, name)):
        lacking = [side for side, missing in wanted.items() if missing > 0]
        if settings.hold_out == "packages":
            lacking.sort(key=lambda side: -wanted[side] / asked[side])
        side = lacking[0] if lacking else "train"
        side_of[name] = side
        if side in wanted:
            wanted[side] -= min(sizes[name], settings.max_test_per_module)
    sides: dict[str, list[Function]] = {"train": [], "test": [], "dev": []}
    taken: set[str] = set()
    for side, chosen in sides.items():
        here = (function for function in functions if side_of[family[function.id]] == side)
        chosen += [function for function in here if side == "train" or not _texts(function) & taken]
        taken.update(*map(_texts, chosen))
    return Split(**sides, family=family)


def _texts(function: Function) -> set[str]:
    return {f"summary {normal(function.summary)}", f"code {normal(function.code)}"}


def drawn(seed: int, name: str) -> bytes:
    """A sort key for a random order that depends on the seed and the names alone."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def normal(text: str) -> str:
    """The text in lower case, with single blanks."""
    return " ".join(text.split()).lower()


def _families(functions: Sequence[Function], settings: Settings) -> dict[str, str]:
    """Maps each unit to the first, by name, of the units tied to it.

    Modules are tied by a twin's name, a copied function or a copied docstring; packages by a near-duplicate of either.
    """
    tied = DisjointSet()
    ties: Iterable[tuple[tuple[str, str], tuple[str, str]]] = _package_ties(functions)
    if settings.hold_out == "modules":
        ties = ((("unit", function.unit), tie) for function in functions for tie in _ties(function))
    for unit, tie in ties:
        tied.add(unit)
        tied.add(tie)
        tied.merge(unit, tie)
    family: dict[str, str] = {}
    for subset in tied.subsets():
        units = sorted(name for kind, name in subset if kind == "unit")
        family |= dict.fromkeys(units, units[0])
    return family


def _ties(function: Function) -> Iterator[tuple[str, str]]:
    """Keys (kind, text). Functions that share a key stay together."""
    yield "unit", function.unit
    *package, name = function.unit.split(".")
    # `decimal` for `_pydecimal` and `decimal`, `collections` for `_collections_abc`
    yield "twin", ".".join([*package, _TWIN_SUFFIX.sub("", _TWIN_PREFIX.sub("", name))])
    summary, code = normal(function.summary), function.code
    if len(summary.split()) >= TIE_SUMMARY_WORDS:
        yield "summary", summary
    if len(code.splitlines()) >= TIE_CODE_LINES:
        yield "code", normal(code)


def _package_ties(functions: Sequence[Function]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of packages with a near-duplicate summary or code of some length; every package also with itself."""
    units = [("unit", function.package) for function in functions]
    yield from ((unit, unit) for unit in dict.fromkeys(units))
    texts = {NEAR_SUMMARY_WORDS: [f.summary for f in functions], NEAR_CODE_WORDS: [f.code for f in functions]}
    for least, of in texts.items():
        long = [place for place, text in enumerate(of) if len(words(text)) >= least]
        for one, other in near_duplicates([of[place] for place in long]):
            yield units[long[one]], units[long[other]]


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
