"""Pairs from texts that are no Python: WordNet, leads of Wikipedia, descriptions of Debian packages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from retriever.data.records import DataError
from retriever.files import read_object

Pair = tuple[str, str]  # anchor, positive

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_EXAMPLE = re.compile(r';\s*"')
_MARKER = re.compile(r"\((a|p|ip)\)$")  # where an adjective may stand


def wordnet(folder: Path) -> Iterator[Pair]:
    """Lemma -> gloss without its examples, of each lemma of each synset, from the folder with `data.noun` and so on."""
    for part in _PARTS_OF_SPEECH:
        for line in _lines(folder / f"data.{part}"):
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            words = fields.split()
            count = int(words[3], 16)
            for lemma in words[4 : 4 + 2 * count : 2]:
                yield _MARKER.sub("", lemma).replace("_", " "), _EXAMPLE.split(gloss)[0].strip(" ;\n")


def wikipedia(file: Path) -> Iterator[Pair]:
    """Title -> lead, in which the title is masked, from a JSON object of `{"title", "extract"}` objects."""
    for entry in (read_object(file) or {}).values():
        title = re.sub(r" \(.*\)$", "", entry["title"])  # "Mercury (planet)" is called Mercury
        yield title, re.sub(rf"(?<!\w){re.escape(title)}(?!\w)", "_", entry["extract"], flags=re.IGNORECASE).strip()


def debian(file: Path) -> Iterator[Pair]:
    """Short -> long description, from an index of packages with long ones, such as `Translation-en`."""
    short, rest = "", list[str]()
    for line in [*_lines(file), ""]:
        name, colon, value = line.partition(":")
        if short and line.startswith(" "):
            rest.append("" if line.strip() == "." else line.strip())
            continue
        if short:
            yield short, " ".join(rest).strip()
        short, rest = "", []
        if colon and name.split("-")[0] == "Description" and name != "Description-md5":
            short = value.strip()


READERS: Mapping[str, Callable[[Path], Iterable[Pair]]] = {"wordnet": wordnet, "wikipedia": wikipedia, "debian": debian}


def pairs_of(kind: str, path: Path) -> list[Pair]:
    """The different pairs of a source, in its order. Raises DataError where there is none."""
    found = list(dict.fromkeys(pair for pair in READERS[kind](path) if all(pair)))
    if not found:
        raise DataError(f"expected pairs of {kind}, found none", path)
    return found


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        yield from (line.rstrip("\n") for line in stream)
