"""The split of documented functions into training and held-out ones.

Whole modules or whole packages are held out, together with their twins.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.cluster.hierarchy import DisjointSet

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
