"""Which functions train and which are held out: whole modules, twins together, nothing identical on both sides."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.cluster.hierarchy import DisjointSet

from scripts.code_pairs.functions import Function

# Copies are told from coincidences ("Close the file.", `return self._name`) by their length.
TIE_SUMMARY_WORDS = 6
TIE_CODE_LINES = 3

_TWIN_PREFIX = re.compile(r"^_(py_?)?(?=[a-z])")
_TWIN_SUFFIX = re.compile(r"_(abc|pure|py)$")


@dataclass(frozen=True)
class Member:
    """A function and the unit of source (top-level module or subpackage) that holds it."""

    unit: str
    function: Function


@dataclass(frozen=True)
class Split:
    """Members of each side; `family` names the tied units a unit belongs to, by the first of them."""

    train: list[Member]
    dev: list[Member]
    test: list[Member]
    family: dict[str, str]


def split_by_family(
    members: Sequence[Member], seed: int, test_queries: int, dev_queries: int, max_per_family: int, max_family_size: int
) -> Split:
    """Whole families, in an order drawn by `seed`, to test until it can hold `test_queries`, then to dev, the rest to
    train.

    A family of more than `max_family_size` functions trains: held out, it would cost many pairs for the
    `max_per_family` queries it may give. A held-out function whose summary or code also stands on another side is left
    out.
    """
    family = _families(members)
    sizes = Counter(family[member.unit] for member in members)
    small = [name for name in sizes if sizes[name] <= max_family_size]
    side_of = dict.fromkeys(sizes, "train")
    wanted = {"test": test_queries, "dev": dev_queries}
    for name in sorted(small, key=lambda name: drawn(seed, name)):
        side = next((side for side, missing in wanted.items() if missing > 0), "train")
        side_of[name] = side
        if side in wanted:
            wanted[side] -= min(sizes[name], max_per_family)

    sides: dict[str, list[Member]] = {"train": [], "test": [], "dev": []}
    for member in members:
        sides[side_of[family[member.unit]]].append(member)
    taken: set[str] = set()
    for side in sides:
        sides[side] = [member for member in sides[side] if side == "train" or not _texts(member) & taken]
        taken.update(*map(_texts, sides[side]))
    return Split(sides["train"], sides["dev"], sides["test"], family)


def _texts(member: Member) -> set[str]:
    return {f"summary {normal(member.function.summary)}", f"code {normal(member.function.code)}"}


def drawn(seed: int, name: str) -> bytes:
    """A key to sort by: a random order that depends on the seed and the names alone."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def normal(text: str) -> str:
    """The text without differences of spacing and case."""
    return " ".join(text.split()).lower()


def _families(members: Sequence[Member]) -> dict[str, str]:
    """unit -> the first unit, by name, of those tied to it by twin names, by a copied function or by a copied
    docstring.
    """
    tied = DisjointSet()
    for member in members:
        for tie in _ties(member):
            tied.add(tie)
            tied.merge(("unit", member.unit), tie)
    family: dict[str, str] = {}
    for subset in tied.subsets():
        units = sorted(name for kind, name in subset if kind == "unit")
        family |= dict.fromkeys(units, units[0])
    return family


def _ties(member: Member) -> Iterator[tuple[str, str]]:
    """(kind, key): members that have one in common stay together."""
    yield "unit", member.unit
    *package, name = member.unit.split(".")
    # `decimal` for `_pydecimal` and `decimal`, `collections` for `_collections_abc`
    yield "twin", ".".join([*package, _TWIN_SUFFIX.sub("", _TWIN_PREFIX.sub("", name))])
    summary, code = normal(member.function.summary), member.function.code
    if len(summary.split()) >= TIE_SUMMARY_WORDS:
        yield "summary", summary
    if len(code.splitlines()) >= TIE_CODE_LINES:
        yield "code", normal(code)
